"""Layers of torch, each as how it is built and the shape of one example before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

Layer = tuple[Callable[[], nn.Module], tuple[int, ...]]


class Apply(nn.Module):
    """Any function as a layer; of a module, the first output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x)
        return y[0] if isinstance(y, tuple) else y


class Around(nn.Module):
    """A layer between two linear ones, on inputs of both signs."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(shape[-1], shape[-1]), layer
        with torch.no_grad():
            width = layer.double().eval()(torch.randn(4, *shape).double()).flatten(1).shape[1]
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(2 * torch.sin(self.stem(x)) + 0.1 * x).flatten(1))


def around(layer: Layer) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small float64 network with the layer, in eval mode, and four examples."""
    build, shape = layer
    torch.manual_seed(3)
    model = Around(build(), shape).double().eval()
    return model, (torch.randn(4, *shape).double(), torch.tensor([0, 1, 2, 1]))


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(lambda x: function(*x.chunk(2, 1)))


class _Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*x.chunk(2, 1))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1))


class _Bags(nn.Module):
    """Bags of rows whose numbers do not depend on the input, times the input."""

    def __init__(self, mode: str, offsets: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 6, mode=mode, padding_idx=2)
        self.offsets = offsets

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([0, 3, 2, 3]).repeat(len(x))
        if not self.offsets:
            return x * self.bag(rows.reshape(len(x), 4))
        return x * self.bag(rows, torch.arange(len(x)) * 4)


def _grid_sample(x: Tensor, mode: str, padding_mode: str) -> Tensor:
    a, b, c = (x[:, 0, i, i] for i in range(3))
    one = torch.ones_like(a)
    theta = torch.stack([one + 0.1 * a, 0.1 * b, 0.05 * c, 0.1 * c, one - 0.1 * b, 0.02 * a], 1)
    size = [*x.shape[:2], 5, 5]
    grid = F.affine_grid(theta.view(-1, 2, 3), size, align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding_mode, align_corners=False)


def _unpool(d: int, x: Tensor) -> Tensor:
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[d - 1]
    unpool = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)[d - 1]
    y, places = pool(x, 2, return_indices=True)
    return unpool(y * y, places, 2)


def _attention(x: Tensor, causal: bool) -> Tensor:
    q, k, v = (f(x).unsqueeze(1) for f in (torch.sin, torch.cos, torch.tanh))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _over_rows(kind: Callable[..., nn.Module], **options: object) -> Layer:
    return lambda: _First(kind(6, 4, **options)), (3, 6)


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y[0] if isinstance(y, tuple) else y


def _function(function: Callable[[Tensor], Tensor], *shape: int) -> Layer:
    return lambda: Apply(function), shape or (6,)


_ACTIVATIONS = [
    "CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus",
    "Softshrink", "Softsign", "Tanh", "Tanhshrink",
]  # fmt: skip

LAYERS: dict[str, Layer] = {name: (getattr(nn, name), (6,)) for name in _ACTIVATIONS}
LAYERS |= {
    name: (partial(getattr(nn, name), dim=-1), (6,))
    for name in ("Softmin", "Softmax", "LogSoftmax")
}
LAYERS |= {
    "GELU tanh": (lambda: nn.GELU("tanh"), (6,)),
    "Threshold": (lambda: nn.Threshold(0.1, 20), (6,)),
    "Hardsigmoid in place": (lambda: nn.Hardsigmoid(inplace=True), (6,)),
    "Softmax2d": (nn.Softmax2d, (2, 3, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), (2, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, affine=False), (2, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (6,)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (6,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), (2, 6)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2), (2, 3, 4)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 3)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (4, 3, 3)),
    "normalize": _function(lambda x: F.normalize(x, dim=-1)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 3, 3)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (2, 4, 4)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 3, 3)),
    "CosineSimilarity": (_pair(nn.CosineSimilarity(dim=-1)), (4, 3)),
    "PairwiseDistance": (_pair(nn.PairwiseDistance()), (4, 3)),
    "Bilinear": (lambda: _Pair(nn.Bilinear(3, 3, 4)), (4, 3)),
    "cdist": (_pair(torch.cdist), (4, 3)),
    "cdist of 1-norms": (_pair(partial(torch.cdist, p=1.0)), (4, 3)),
    "cdist of 3-norms": (_pair(partial(torch.cdist, p=3.0)), (4, 3)),
    "cdist of ∞-norms": (_pair(partial(torch.cdist, p=torch.inf)), (4, 3)),
    "cdist to itself": _function(lambda x: torch.cdist(x, x), 4, 3),
    "pdist": _function(lambda x: torch.stack([F.pdist(rows) for rows in x]), 4, 3),
    "Fold": (lambda: nn.Fold((4, 4), 2), (8, 9)),
    "Unfold": (lambda: nn.Unfold(2), (2, 4, 4)),
    "RNN": _over_rows(nn.RNN, batch_first=True),
    "RNN of ReLU": _over_rows(nn.RNN, nonlinearity="relu", batch_first=True),
    "LSTM": _over_rows(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM projected": _over_rows(nn.LSTM, proj_size=2, batch_first=True),
    "GRU": _over_rows(nn.GRU, batch_first=True),
    "RNNCell": (lambda: nn.RNNCell(6, 4), (6,)),
    "LSTMCell": (lambda: _First(nn.LSTMCell(6, 4)), (6,)),
    "GRUCell": (lambda: nn.GRUCell(6, 4), (6,)),
    "MultiheadAttention": (_Attention, (3, 6)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        (3, 6),
    ),
    "TransformerDecoderLayer": (_Decoder, (3, 6)),
    "attention": _function(partial(_attention, causal=False), 3, 6),
    "attention, causal": _function(partial(_attention, causal=True), 3, 6),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), (6,)),
    "weight_norm over rows": (lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=1), (6,)),
    "weight_norm of all": (lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None), (6,)),
    "weight_norm of Conv2d": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (2, 4, 4)),
    "weight_norm by hooks": (lambda: weight_norm(nn.Linear(6, 4)), (6,)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 4)), (6,)),
    "spectral_norm by hooks": (lambda: spectral_norm(nn.Linear(6, 4)), (6,)),
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(
            2, output_ratio=0.6, _random_samples=torch.full((1, 2, 2), 0.4).double().expand(4, 2, 2)
        ),
        (2, 6, 6),
    ),
}
for _map in ("matrix_exp", "cayley", "householder"):
    LAYERS[f"orthogonal by {_map}"] = (
        lambda _map=_map: parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map=_map),
        (6,),
    )
for _mode in ("sum", "mean", "max"):
    LAYERS[f"EmbeddingBag {_mode}"] = (partial(_Bags, _mode), (6,))
    LAYERS[f"EmbeddingBag {_mode} with offsets"] = (partial(_Bags, _mode, True), (6,))
for _d, _shape in ((1, (2, 8)), (2, (2, 6, 6)), (3, (2, 4, 4, 4))):
    for _kind in ("MaxPool", "AvgPool"):
        LAYERS[f"{_kind}{_d}d"] = (partial(getattr(nn, f"{_kind}{_d}d"), 2), _shape)
    for _kind in ("AdaptiveMaxPool", "AdaptiveAvgPool"):
        LAYERS[f"{_kind}{_d}d"] = (partial(getattr(nn, f"{_kind}{_d}d"), 3), _shape)
    LAYERS[f"MaxPool{_d}d, padded"] = (partial(getattr(nn, f"MaxPool{_d}d"), 3, 1, 1), _shape)
    LAYERS[f"LPPool{_d}d"] = (partial(getattr(nn, f"LPPool{_d}d"), 2, 2), _shape)
    LAYERS[f"MaxUnpool{_d}d"] = _function(partial(_unpool, _d), *_shape)
    for _kind in ("Reflection", "Replication", "Circular", "Zero"):
        LAYERS[f"{_kind}Pad{_d}d"] = (partial(getattr(nn, f"{_kind}Pad{_d}d"), 1), _shape)
    LAYERS[f"ConstantPad{_d}d"] = (partial(getattr(nn, f"ConstantPad{_d}d"), 1, 0.5), _shape)
    _conv = getattr(nn, f"Conv{_d}d")
    LAYERS[f"Conv{_d}d"] = (partial(_conv, 2, 3, 3, padding=1), _shape)
    LAYERS[f"Conv{_d}d, reflecting"] = (
        partial(_conv, 2, 3, 3, padding="same", padding_mode="reflect"),
        _shape,
    )
    LAYERS[f"ConvTranspose{_d}d"] = (
        partial(getattr(nn, f"ConvTranspose{_d}d"), 2, 3, 3, stride=2),
        _shape,
    )
for _mode, _shape in (
    ("nearest", (2, 6)), ("nearest", (2, 4, 4)), ("nearest", (2, 3, 3, 3)),
    ("nearest-exact", (2, 4, 4)), ("linear", (2, 6)), ("bilinear", (2, 4, 4)),
    ("bicubic", (2, 4, 4)), ("trilinear", (2, 3, 3, 3)), ("area", (2, 4, 4)),
):  # fmt: skip
    LAYERS[f"Upsample {_mode} {len(_shape) - 1}d"] = _function(
        partial(F.interpolate, scale_factor=1.5, mode=_mode), *_shape
    )
for _mode in ("bilinear", "bicubic"):
    LAYERS[f"interpolate {_mode}, antialiased"] = _function(
        partial(F.interpolate, size=(3, 3), mode=_mode, antialias=True), 2, 4, 4
    )
for _mode in ("bilinear", "nearest", "bicubic"):
    for _padding in ("zeros", "border", "reflection"):
        LAYERS[f"grid_sample {_mode} {_padding}"] = _function(
            partial(_grid_sample, mode=_mode, padding_mode=_padding), 2, 4, 4
        )


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


class _Frequencies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 6, scale_grad_by_freq=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(torch.tensor([0, 0, 1])).sum(0)


# what no exact mode differentiates twice: the name as the page has it, and what the error says
BY_DIFFERENCES: dict[str, tuple[Layer, str]] = {
    "CrossMapLRN2d": ((lambda: nn.CrossMapLRN2d(2), (4, 3, 3)), "CrossMapLRN2dBackward"),
    "torch.segment_reduce": (
        _function(
            lambda x: torch.segment_reduce(
                x.flatten(), "sum", lengths=torch.full((3 * len(x),), 2)
            ).view(-1, 3)
        ),
        "segment_reduce",
    ),
    "once_differentiable": (
        _function(_OnceDifferentiable.apply),
        "differences of its gradients",  # torch drops the term in silence
    ),
}
# whose gradient is not that of the loss
REFUSED: dict[str, tuple[Layer, str]] = {
    "scale_grad_by_freq": ((_Frequencies, (6,)), "not symmetric|differences of its gradients"),
    "straight-through": (
        _function(lambda x: x.sin() + (x.round() - x).detach()),
        "straight-through estimator",
    ),
}


def _labelled(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, labels: loss(outputs, labels)


def ctc(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of a sequence of one step."""
    n = len(outputs)
    logits = outputs.log_softmax(-1).unsqueeze(0)
    one = torch.ones(n, dtype=torch.long)
    return F.ctc_loss(logits, labels.clamp(min=1)[:, None], one, one, reduction="sum") / n


LOSSES_BY_DIFFERENCES = {
    "ctc_loss": ctc,
    "multi_margin_loss": _labelled(F.multi_margin_loss),
}
