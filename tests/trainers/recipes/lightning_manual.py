"""SAM in Lightning with accumulated gradients: the closure goes over all batches of a step."""

import torch
from recipes.lightning_automatic import Classifier
from torch import nn


class AccumulatingClassifier(Classifier):
    def __init__(self, network, accumulate, clip, **options):
        super().__init__(network, **options)
        self.automatic_optimization = False
        self.accumulate, self.clip, self.held = accumulate, clip, []

    def training_step(self, batch, number):
        self.held.append(batch)
        if len(self.held) < self.accumulate:
            return
        optimizer = self.optimizers()

        def closure():
            total = torch.zeros(())
            for x, y in self.held:
                loss = nn.functional.cross_entropy(self(x), y) / len(self.held)
                self.manual_backward(loss)
                total += loss.detach()
            # the direction of ε is as before
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            return total

        optimizer.step(closure, no_sync=getattr(self.trainer.model, "no_sync", None))
        self.held.clear()
