"""SAM in the Trainer of Hugging Face, with accumulated gradients, clipping and mixed precision."""

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
        loss = super().training_step(model, inputs, *further)  # the gradient at w
        self.held.append(inputs)
        if self.accelerator.sync_gradients:  # the last batch of a step
            sam = self.optimizer.optimizer  # inside Accelerate's wrapper
            if sam.perturbs:
                with sam.perturbed():
                    for again in self.held:
                        super().training_step(model, again, *further)
            self.held.clear()
        return loss  # the Trainer clips, and steps
