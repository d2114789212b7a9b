"""Random models with data and a loss: the same for the same seed.

Kinds of blocks and losses are dealt from shuffled decks, so that every kind comes up about equally
often among consecutive seeds; everything else is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import custom_blocks  # noqa: F401 (registers its blocks)
import torch
from layer_blocks import BLOCKS, EMBEDDINGS, IMAGE, SEQUENCE, VECTOR, Shape
from random_losses import CLASSES, LOSSES, POSITIONS, VALUES, LossCase, random_loss
from stateful_blocks import Adapter
from torch import Tensor, nn

WORDS, WIDTH, LENGTH = 6, 4, 4
SHAPES: dict[int, Shape] = {VECTOR: (WIDTH,), SEQUENCE: (LENGTH, WIDTH), IMAGE: (WIDTH, 4, 4)}
DOMAINS = ("vector", "sequence", "image", "tokens")
BLOCKS_EACH = 6
INPUTS = ("tensor", "tensor", "tuple", "dict")


@dataclass(frozen=True)
class Architecture:
    """A model in eval mode, examples and a loss; `description` says what it is made of."""

    seed: int
    model: nn.Module
    inputs: Any
    labels: Tensor
    loss: LossCase
    blocks: tuple[str, ...]
    description: str


def make_architecture(seed: int) -> Architecture:
    """The architecture of a seed; torch's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return _make(seed, Random(seed))
        finally:
            torch.set_default_dtype(default)


def _make(seed: int, rng: Random) -> Architecture:
    domain = DOMAINS[seed % len(DOMAINS)]
    loss = random_loss(_dealt(list(LOSSES), seed, 1, "losses")[0], rng)
    turn = seed // len(DOMAINS)
    entry = _dealt(list(EMBEDDINGS), turn, 1, domain)[0] if domain == "tokens" else None
    kind = _kind_after(domain, entry)
    deck = [name for name, (kinds, _) in BLOCKS.items() if kind in kinds]
    names = _dealt(deck, turn, BLOCKS_EACH, f"{kind} {domain}")
    form, n = rng.choice(INPUTS), rng.randint(5, 8)
    blocks = [BLOCKS[name][1](SHAPES[kind], rng) for name in names]
    embed = None if entry is None else EMBEDDINGS[entry](WORDS, WIDTH, rng)
    tied = entry == "embedding" and kind == SEQUENCE and loss.outputs in ("tokens", "channels")
    model = Model(embed, blocks, Head(SHAPES[kind], loss.outputs, embed if tied else None))
    frozen = _freeze(model, rng)
    for module in model.modules():  # not eval(), which would merge the adapters
        module.training = isinstance(module, Adapter)
    parts = [*([entry] if entry else []), *names]
    return Architecture(
        seed, model, _inputs(domain, form, n), loss.labels(n), loss, tuple(parts),
        f"seed {seed}: {form} of {n} {domain} examples -> {' -> '.join(parts)} -> "
        f"{'tied ' if tied else ''}{loss.outputs}; loss {loss.name}; frozen: {frozen}",
    )  # fmt: skip


def _kind_after(domain: str, entry: str | None) -> int:
    if domain == "tokens":
        return VECTOR if entry == "embedding_bag" else SEQUENCE
    return {"vector": VECTOR, "sequence": SEQUENCE, "image": IMAGE}[domain]


def _dealt(kinds: Sequence[str], turn: int, count: int, deck: str) -> list[str]:
    """The cards that the turn-th player gets, of decks shuffled one after the other."""
    cards = []
    for position in range(turn * count, (turn + 1) * count):
        shuffled = list(kinds)
        Random(f"{deck} {position // len(kinds)}").shuffle(shuffled)
        cards.append(shuffled[position % len(kinds)])
    return cards


def _inputs(domain: str, form: str, n: int) -> Any:
    if domain == "tokens":
        x = torch.randint(0, WORDS, (n, LENGTH))
    else:
        shape = {"vector": VECTOR, "sequence": SEQUENCE, "image": IMAGE}[domain]
        x = torch.randn(n, *SHAPES[shape])
    scale = torch.rand(n) + 0.5
    return {"tensor": x, "tuple": (x, scale), "dict": {"x": x, "scale": scale}}[form]


def _freeze(model: nn.Module, rng: Random) -> str:
    """Freeze some, in rare cases all of the parameters."""
    chance = rng.random()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    chosen = names if chance < 0.04 else rng.sample(names, 1) if chance < 0.25 else []
    for name in chosen:
        model.get_parameter(name).requires_grad_(False)
    return "all" if chance < 0.04 else ", ".join(chosen) or "none"


class Model(nn.Module):
    """Perhaps an embedding, blocks, and a head; `scale` multiplies the features of each example."""

    def __init__(self, embed: nn.Module | None, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        if self.embed is not None:
            x = self.embed(x)
        if scale is not None:
            x = x * scale.view(-1, *[1] * (x.ndim - 1))
        for each in self.blocks:
            x = each(x)
        return self.head(x)


class Head(nn.Module):
    """The outputs that a loss takes; for tokens perhaps by the weights of the embedding."""

    def __init__(self, shape: Shape, outputs: str, embed: nn.Module | None) -> None:
        super().__init__()
        self.outputs, self.embed = outputs, embed
        size, width = torch.Size(shape).numel(), POSITIONS * CLASSES
        if outputs == "values":
            self.values = nn.Linear(size, VALUES)
        elif embed is None:
            self.classes = nn.Linear(size, width if outputs in ("tokens", "channels") else CLASSES)
        if outputs in ("tuple", "dict"):
            self.values = nn.Linear(size, VALUES)

    def forward(self, x: Tensor) -> Any:
        flat = x.flatten(1)
        if self.outputs == "values":
            return self.values(flat)
        if self.outputs in ("tokens", "channels"):
            if self.embed is None:
                logits = self.classes(flat).unflatten(1, (POSITIONS, CLASSES))
            else:
                logits = (x @ self.embed.weight.T)[..., :CLASSES]
            return logits if self.outputs == "tokens" else logits.mT
        logits = self.classes(flat)
        if self.outputs == "log_classes":
            return logits.log_softmax(1)
        if self.outputs == "tuple":
            return logits, self.values(flat)
        if self.outputs == "dict":
            return {"classes": logits, "values": self.values(flat)}
        return logits
