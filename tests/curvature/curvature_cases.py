"""Small networks with dense curvature matrices that are computed without sharpkit."""

from __future__ import annotations

from functools import cache

import torch
from cases import Residual, Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class SmallTied(nn.Module):
    """One weight in two layers, and an embedding used for input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(self.table(tokens)))))
        return self.head((x + x @ self.table.weight.T @ self.table.weight).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.BatchNorm1d(12),
        nn.Softplus(),
        nn.Linear(12, 3),
    )


BUILDERS = {
    "mlp": (_mlp, (10,)),
    "cnn": (_cnn, (2, 6, 6)),
    "batchnorm": (_batchnorm, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "transformer": (Transformer, (5, 4)),
    "shared_weights": (SmallTied, None),
}
PROBLEMS = [(name, loss) for name in BUILDERS for loss in ("cross_entropy", "mse")]
N = 17  # prime, so that chunks are never equal


def make(name: str, loss: str = "cross_entropy", dtype: torch.dtype = torch.float64):
    """The model in eval mode, and its data."""
    build, shape = BUILDERS[name]
    torch.manual_seed(0)
    model = build().to(torch.float64)
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=g).mul_(0.3)
            module.running_var.uniform_(0.5, 2.0, generator=g)
            module.weight.data.uniform_(0.5, 1.5, generator=g)
    x = (
        torch.randint(0, 6, (N, 7), generator=g)
        if shape is None
        else torch.randn(N, *shape, generator=g, dtype=torch.float64).to(dtype)
    )
    y = (
        torch.randint(0, 3, (N,), generator=g)
        if loss == "cross_entropy"
        else torch.randn(N, 3, generator=g, dtype=torch.float64).to(dtype)
    )
    return model.to(dtype).eval(), (x, y)


def plain_loss(loss: str):
    """The losses, written without sharpkit."""
    if loss == "cross_entropy":
        return F.cross_entropy
    return lambda f, y: ((f - y) ** 2).sum() / (2 * len(f))


@cache
def dense_hessian(name: str, loss: str) -> Tensor:
    """Columns by double backward over the whole batch with F.cross_entropy, in float64."""
    model, (x, y) = make(name, loss)
    weights = list(model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(
                plain_loss(loss)(model(x), y), weights, create_graph=True
            )
            flat = torch.cat([g.reshape(-1) for g in gradient])
            rows = [
                torch.cat(
                    [
                        g.flatten(1)
                        for g in torch.autograd.grad(
                            flat,
                            weights,
                            block,
                            retain_graph=True,
                            is_grads_batched=True,
                            materialize_grads=True,
                        )
                    ],
                    1,
                )
                for block in torch.eye(len(flat), dtype=torch.float64).split(64)
            ]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return torch.cat(rows)


def jacobian(name: str, loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobian (N, 3, P), outputs (N, 3) and labels, by one backward pass per output."""
    model, (x, y) = make(name, loss)
    weights = list(model.parameters())
    torch.backends.mha.set_fastpath_enabled(False)
    outputs = model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(o, weights, retain_graph=True)])
        for o in outputs.reshape(-1)
    ]
    return torch.stack(rows).view(N, 3, -1), outputs.detach(), y


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
