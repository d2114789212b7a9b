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

    def configure_optimizers(self):
        return sk.SAM(self.parameters(), torch.optim.SGD, rho=self.rho, lr=self.lr, **self.where)
