"""SAM in Lightning, which calls `step` with a closure that SAM runs twice."""

import lightning as L
import torch
from torch import nn

import sharpkit as sk


class Classifier(L.LightningModule):
    def __init__(self, network, rho=0.1, lr=0.1, **where):
        super().__init__()
        self.network, self.rho, self.lr = network, rho, lr
        self.where = where  # which steps are perturbed, such as start=800

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, number):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def on_train_start(self):
        if self.automatic_optimization and self.trainer.accumulate_grad_batches > 1:
            raise ValueError("SAM would see the last of the accumulated batches only")

    def optimizer_step(self, epoch, number, optimizer, closure):
        # of several processes, each has its own ε, as in the paper
        optimizer.step(closure, no_sync=getattr(self.trainer.model, "no_sync", None))

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        # of the norm; Lightning's own way refuses SAM under mixed precision
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self):
        return sk.SAM(self.parameters(), torch.optim.SGD, rho=self.rho, lr=self.lr, **self.where)
