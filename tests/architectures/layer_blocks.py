"""Building blocks made of torch's own layers: features in, features of the same kind out.

A block is made for a shape per example: (d,) a vector, (T, d) a sequence, (c, h, w) an image.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Shape = tuple[int, ...]
Block = Callable[[Shape, Random], nn.Module]
VECTOR, SEQUENCE, IMAGE = 1, 2, 3  # the number of dimensions of the shape

BLOCKS: dict[str, tuple[frozenset[int], Block]] = {}


def block(*kinds: int) -> Callable[[Block], Block]:
    """Register a block for vectors, sequences or images, under the name of its function."""

    def register(make: Block) -> Block:
        BLOCKS[make.__name__] = (frozenset(kinds or (VECTOR, SEQUENCE, IMAGE)), make)
        return make

    return register


def affine(shape: Shape) -> nn.Module:
    """A linear layer or convolution that keeps the shape."""
    if len(shape) == IMAGE:
        return nn.Conv2d(shape[0], shape[0], 3, padding=1)
    return nn.Linear(shape[-1], shape[-1])


def channels(shape: Shape) -> int:
    return shape[0] if len(shape) == IMAGE else shape[-1]


class Transposed(nn.Module):
    """A module over channels first, (n, d, T), applied to a sequence (n, T, d)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


@block()
def linear_tanh(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.Tanh())


@block(VECTOR, SEQUENCE)
def wide_linear(shape: Shape, rng: Random) -> nn.Module:
    d = shape[-1]
    return nn.Sequential(
        nn.Linear(d, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, d)
    )


@block()
def relu_inplace(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.ReLU(inplace=True), affine(shape))


@block()
def dropout_inplace(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.Dropout(0.5, inplace=True), nn.SiLU(inplace=True))


@block()
def prelu(shape: Shape, rng: Random) -> nn.Module:
    each = len(shape) != SEQUENCE and rng.random() < 0.5  # PReLU's channels are axis 1
    return nn.Sequential(affine(shape), nn.PReLU(channels(shape) if each else 1))


@block()
def layer_norm(shape: Shape, rng: Random) -> nn.Module:
    return nn.LayerNorm(shape if len(shape) == IMAGE else shape[-1])


@block(VECTOR, IMAGE)
def batch_norm(shape: Shape, rng: Random) -> nn.Module:
    norm = nn.BatchNorm2d if len(shape) == IMAGE else nn.BatchNorm1d
    layer = norm(channels(shape))
    layer.running_mean.normal_().mul_(0.3)
    layer.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(affine(shape), layer, nn.ReLU(inplace=rng.random() < 0.5))


@block(VECTOR, IMAGE)
def group_norm(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.GroupNorm(2, channels(shape)), nn.Tanh())


@block(IMAGE)
def conv2d(shape: Shape, rng: Random) -> nn.Module:
    c = shape[0]
    return nn.Sequential(
        nn.Conv2d(c, c, 3, padding=1, groups=rng.choice([1, 2]), bias=rng.random() < 0.5),
        nn.Tanh(),
        nn.Conv2d(c, c, (1, 3), padding="same", padding_mode=rng.choice(["zeros", "circular"])),
    )


@block(IMAGE)
def transposed_convolution(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(shape[0], shape[0], 3, padding=1), nn.Tanh())


@block(SEQUENCE)
def conv1d(shape: Shape, rng: Random) -> nn.Module:
    d = shape[-1]
    return Transposed(nn.Sequential(nn.Conv1d(d, d, 3, padding=1, dilation=1), nn.Tanh()))


@block(IMAGE)
def max_pool(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.MaxPool2d(3, stride=1, padding=1))


@block(IMAGE)
def average_pool(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(affine(shape), nn.AvgPool2d(3, 1, padding=1), nn.Tanh())


@block(SEQUENCE)
def sequence_pool(shape: Shape, rng: Random) -> nn.Module:
    pool = nn.AdaptiveAvgPool1d(shape[0]) if rng.random() < 0.5 else nn.MaxPool1d(3, 1, padding=1)
    return nn.Sequential(affine(shape), Transposed(pool))


@block(SEQUENCE)
def attention(shape: Shape, rng: Random) -> nn.Module:
    return Attention(shape[-1], rng.random() < 0.5)


class Attention(nn.Module):
    """Self-attention; without weights it takes the fused kernel."""

    def __init__(self, width: int, weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, x, x, need_weights=self.weights)[0]


@block(SEQUENCE)
def transformer_layer(shape: Shape, rng: Random) -> nn.Module:
    d = shape[-1]
    return nn.TransformerEncoderLayer(
        d, 2, 2 * d, batch_first=True, norm_first=rng.random() < 0.5, activation="gelu"
    )


@block(SEQUENCE)
def lstm(shape: Shape, rng: Random) -> nn.Module:
    both = rng.random() < 0.5
    width = shape[-1] // 2 if both else shape[-1]
    return First(nn.LSTM(shape[-1], width, batch_first=True, bidirectional=both))


@block(SEQUENCE)
def gru(shape: Shape, rng: Random) -> nn.Module:
    return First(nn.GRU(shape[-1], shape[-1], rng.choice([1, 2]), batch_first=True))


@block(SEQUENCE)
def rnn(shape: Shape, rng: Random) -> nn.Module:
    return First(nn.RNN(shape[-1], shape[-1], batch_first=True))


@block(SEQUENCE)
def recurrent_cell(shape: Shape, rng: Random) -> nn.Module:
    return Unrolled(rng.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell])(shape[-1], shape[-1]))


class Unrolled(nn.Module):
    """A recurrent cell applied step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


@block(SEQUENCE)
def packed_recurrence(shape: Shape, rng: Random) -> nn.Module:
    return Packed(rng.choice([nn.LSTM, nn.GRU])(shape[-1], shape[-1], batch_first=True))


class Packed(nn.Module):
    """A recurrent layer over packed sequences whose lengths follow from the features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, :-1, 0] > 0).sum(1)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden = pad_packed_sequence(self.inner(packed)[0], True, total_length=x.shape[1])[0]
        return x + hidden


@block()
def weight_norm(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(affine(shape)), nn.Tanh())


@block()
def spectral_norm(shape: Shape, rng: Random) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(affine(shape)), nn.Tanh())


@block(VECTOR, SEQUENCE)
def orthogonal(shape: Shape, rng: Random) -> nn.Module:
    how = rng.choice(["matrix_exp", "cayley"])  # "householder" truncates signs: it jumps at w
    return nn.utils.parametrizations.orthogonal(affine(shape), orthogonal_map=how)


# what turns tokens (n, T) into features comes first in a model
def embedding(words: int, width: int, rng: Random) -> nn.Module:
    return nn.Embedding(words, width)


def embedding_padding(words: int, width: int, rng: Random) -> nn.Module:
    layer = nn.Embedding(words, width, padding_idx=rng.randrange(words))
    nn.init.normal_(layer.weight)  # a padding row that is not 0, so that it matters
    return layer


def embedding_max_norm(words: int, width: int, rng: Random) -> nn.Module:
    return nn.Embedding(words, width, max_norm=1.0, padding_idx=rng.choice([None, 0]))


def embedding_sparse(words: int, width: int, rng: Random) -> nn.Module:
    return nn.Embedding(words, width, sparse=True, padding_idx=rng.choice([None, 0]))


def embedding_bag(words: int, width: int, rng: Random) -> nn.Module:
    mode = rng.choice(["sum", "mean", "max"])
    sparse = mode != "max" and rng.random() < 0.3
    return nn.EmbeddingBag(
        words, width, mode=mode, sparse=sparse, padding_idx=rng.choice([None, 0])
    )


EMBEDDINGS = {
    f.__name__: f
    for f in (embedding, embedding_padding, embedding_max_norm, embedding_sparse, embedding_bag)
}
