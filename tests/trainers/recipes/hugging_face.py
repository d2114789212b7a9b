"""SAM in the Trainer of Hugging Face, with accumulated gradients, clipping and mixed precision."""

from contextlib import nullcontext

import torch
from transformers import Trainer

import sharpkit as sk


class SamTrainer(Trainer):
    base, rho, interval = torch.optim.AdamW, 0.05, 1

    def create_optimizer(self, *_):
        if self.optimizer is None:
            weights = (p for p in self.model.parameters() if p.requires_grad)
            self.optimizer = sk.SAM(
                weights, self.base, rho=self.rho, interval=self.interval, lr=self.args.learning_rate
            )
            self.held = []
        return self.optimizer

    def training_step(self, model, inputs, *further):
        self.held.append(inputs)
        sam = self.optimizer.optimizer  # inside Accelerate's wrapper
        # each process has its own ε, as in the paper
        with self.accelerator.no_sync(model) if sam.perturbs else nullcontext():
            loss = super().training_step(model, inputs, *further)  # the gradient at w
        if self.accelerator.sync_gradients:  # the last batch of a step
            if sam.perturbs:
                with sam.perturbed():
                    with self.accelerator.no_sync(model):
                        for again in self.held[:-1]:
                            super().training_step(model, again, *further)
                    super().training_step(model, inputs, *further)
            self.held.clear()
        return loss  # the Trainer clips, and steps
