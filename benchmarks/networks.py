"""The networks that the benchmarks measure, with random data, from torch and sharpkit alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit


def small_cnn(width: int = 32, dense: int = 128) -> nn.Module:
    """Four convolutions, for grey images of 28 pixels; 0.47 M parameters, 0.22 M at width 16."""
    w = width
    return nn.Sequential(
        nn.Conv2d(1, w, 3, padding=1), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(w, 2 * w, 3, padding=1), nn.ReLU(),
        nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(98 * w, dense), nn.ReLU(), nn.Linear(dense, 10),
    )  # fmt: skip


def task1_vgg(width: int = 512) -> nn.Module:
    """A VGG of PGDL task 1: one block at 32x32, a 16 M-parameter dense layer; 19.2 M in all."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(width * 256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """One hidden layer, for grey images of 28 pixels; 0.20 M parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max pooling, for grey images of 28 pixels; 0.04 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Block(nn.Module):
    """One layer of a vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        mixed = self.queries_keys_values(self.before_attention(x))
        q, k, v = mixed.view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.dense(self.before_dense(x))


class VisionTransformer(nn.Module):
    """ViT as of Dosovitskiy et al., with a class token."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class TextLSTM(nn.Module):
    """A classifier of sequences of 32 words: embedding, LSTM, mean over time."""

    def __init__(self, words: int = 1000, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(x))[0].mean(1))
        return logits


class TextEncoder(nn.Module):
    """A classifier of sequences by torch's transformer layers: words, positions, mean over time."""

    def __init__(self, words: int = 1000, steps: int = 32, width: int = 64) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(steps, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = self.positions(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.encoder(self.words(x) + places).mean(1))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.path = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if inside != out or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 for images of 224 pixels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inside = 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for i in range(depth):
            layers.append(Bottleneck(inside, width, 2 if stage and not i else 1))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


@dataclass(frozen=True)
class Network:
    """A network and the kind of data that it takes.

    Args:
        make: The network, with random weights.
        shape: Of one input.
        classes: Number of labels.
        words: Inputs are whole numbers below this; 0 for images.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    words: int = 0

    def case(self, n: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        """A model in eval mode, inputs and labels; BatchNorm has their statistics."""
        torch.manual_seed(0)
        model = self.make().to(device)
        size = (n, *self.shape)
        x = torch.randint(0, self.words, size) if self.words else torch.randn(size)
        x, y = x.to(device), torch.randint(0, self.classes, (n,)).to(device)
        norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(x[:64])
        for norm in norms:
            norm.momentum = 0.1
        return model.eval(), x, y


def _named(name: str) -> Callable[[], nn.Module]:
    return lambda: sharpkit.build_architecture(name, (3, 32, 32), 10, seed=0)


NETWORKS = {
    "CNN 0.47 M": Network(small_cnn, (1, 28, 28)),
    "CNN 0.22 M": Network(lambda: small_cnn(16), (1, 28, 28)),
    "ResNet-20": Network(_named("resnet20"), (3, 32, 32)),
    "WRN-16-4": Network(_named("wrn-16-4"), (3, 32, 32)),
    "small ViT": Network(lambda: VisionTransformer(32, 4, 128, 4, 4, 10), (3, 32, 32)),
    "LSTM": Network(TextLSTM, (32,), words=1000),
    "encoder": Network(TextEncoder, (32,), words=1000),
    "perceptron": Network(perceptron, (1, 28, 28)),
    "LeNet-5": Network(lenet, (1, 28, 28)),
    "VGG 19.2 M": Network(task1_vgg, (3, 32, 32)),
    "WRN-28-10": Network(_named("wrn-28-10"), (3, 32, 32)),
    "ResNet-50": Network(resnet50, (3, 224, 224), 1000),
    "ViT-B/16": Network(lambda: VisionTransformer(224, 16, 768, 12, 12, 1000), (3, 224, 224), 1000),
}
