"""Weights of attention as pairs (G, H) of which only G Hᵀ matters, and their geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpkit.errors import ModelError

Tensors = dict[str, Tensor]
Place = tuple[str, int, int]  # parameter, and the range of its rows


@dataclass(frozen=True)
class PairLayout:
    """Where the pairs of all heads of one attention module stand."""

    heads: int  # their number
    # the weight whose rows are the columns of the heads' G, and its bias or None
    first: tuple[Place, Place | None]
    # the same for H, by rows; or by columns, without a bias, where `by_columns`
    second: tuple[Place, Place | None]
    # whether H is in the columns of its weight, as the output projection's is
    by_columns: bool = False


def has_attention(model: nn.Module) -> bool:
    """Whether a model has attention whose pairs are known: `nn.MultiheadAttention`.

    Example:
        >>> has_attention(nn.TransformerEncoderLayer(8, 2)), has_attention(nn.Linear(2, 2))
        (True, False)
    """
    return any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


def attention_pairs(model: nn.Module) -> Iterator[PairLayout]:
    """Two layouts per `nn.MultiheadAttention`: queries with keys, values with outputs.

    Raises:
        ModelError: For `add_bias_kv`, whose added key and value are no part of a pair.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention) or id(module) in seen:
            continue
        seen.add(id(module))
        if module.bias_k is not None:
            raise ModelError(f"{path}: geodesic sharpness does not know add_bias_kv")
        dot = f"{path}." if path else ""
        size, heads = module.embed_dim, module.num_heads
        together = module.in_proj_weight is not None
        parts = []
        for i, letter in enumerate("qkv"):
            name = "in_proj_weight" if together else f"{letter}_proj_weight"
            rows = (i * size, (i + 1) * size) if together else (0, size)
            bias = None
            if module.in_proj_bias is not None:
                bias = (f"{dot}in_proj_bias", i * size, (i + 1) * size)
            parts.append(((f"{dot}{name}", *rows), bias))
        yield PairLayout(heads, parts[0], parts[1])
        output = (f"{dot}out_proj.weight", 0, size)
        yield PairLayout(heads, parts[2], (output, None), by_columns=True)


class AttentionPairs:
    """The pairs G (heads, rows, d) and H (heads, rows, d) of a layout, and their metric.

    ⟨η, ζ⟩ = tr HᵀH η_Gᵀ ζ_G + tr GᵀG η_Hᵀ ζ_H; see `geodesic_sharpness` for the derivations.
    """

    def __init__(self, layout: PairLayout, weights: Tensors) -> None:
        self.layout = layout
        self.shapes = {name: weights[name] for name in self._names()}
        self.g, self.h = self.split(weights)
        self.gram_g, self.gram_h = self.g.mT @ self.g, self.h.mT @ self.h
        for gram, (name, _, _) in ((self.gram_g, layout.first[0]), (self.gram_h, layout.second[0])):
            values = torch.linalg.eigvalsh(gram)
            if not bool((values[:, 0] > 1e-12 * values[:, -1]).all()):
                raise ModelError(
                    f"{name}: a head's weights are not of full rank, so that its symmetries have "
                    "no quotient: use worst_case_sharpness with adaptive=True"
                )

    def split(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """G and H of tensors of the parameters' shapes."""
        second = self.layout.second
        return self._rows(tensors, *self.layout.first), self._rows(
            tensors, *second, columns=self.layout.by_columns
        )

    def merge(self, g: Tensor, h: Tensor) -> Tensors:
        """What `split` takes apart, 0 elsewhere."""
        out = {name: torch.zeros_like(like) for name, like in self.shapes.items()}
        sides = ((g, self.layout.first, False), (h, self.layout.second, self.layout.by_columns))
        for pair, ((name, start, stop), bias), columns in sides:
            body, last = (pair[:, :-1], pair[:, -1]) if bias is not None else (pair, None)
            matrix = body.mT.reshape(-1, body.shape[1])  # (heads · d, rows)
            block = torch.zeros_like(self.shapes[name])
            if columns:
                block = block + matrix.T
            else:
                block = torch.cat([block[:start], block[start:stop] + matrix, block[stop:]])
            out[name] = out[name] + block
            if bias is not None and last is not None:
                empty = torch.zeros_like(self.shapes[bias[0]])
                out[bias[0]] = out[bias[0]] + torch.cat(
                    [empty[: bias[1]], last.reshape(-1), empty[bias[2] :]]
                )
        return out

    def masks(self) -> dict[str, Tensor]:
        """Which entries of the parameters belong to the pairs."""
        ones = self.merge(torch.ones_like(self.g), torch.ones_like(self.h))
        return {name: tensor > 0 for name, tensor in ones.items()}

    def raised(self, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The Riemannian gradient of a Euclidean one."""
        return _over(g, self.gram_h), _over(h, self.gram_g)

    def squared_norm(self, g: Tensor, h: Tensor) -> float:
        """⟨ξ, ξ⟩."""
        return float((self.gram_h * (g.mT @ g)).sum() + (self.gram_g * (h.mT @ h)).sum())

    def horizontal(self, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Without its part along the orbit of the symmetry."""
        along = _over(h.mT @ self.h, self.gram_h) - torch.linalg.solve(self.gram_g, self.g.mT @ g)
        return g + 0.5 * self.g @ along, h - 0.5 * self.h @ along.mT

    def acceleration(self, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """γ̈(0) of the geodesic with γ̇(0) = ξ."""
        return (
            _over(self.g @ (h.mT @ h) - g @ _symmetric(h.mT @ self.h), self.gram_h),
            _over(self.h @ (g.mT @ g) - h @ _symmetric(g.mT @ self.g), self.gram_g),
        )

    def _rows(
        self, tensors: Tensors, weight: Place, bias: Place | None, *, columns: bool = False
    ) -> Tensor:
        name, start, stop = weight
        matrix = tensors[name].T if columns else tensors[name][start:stop]
        matrix = matrix.reshape(self.layout.heads, -1, matrix.shape[1]).mT  # (heads, rows, d)
        if bias is None:
            return matrix
        last = tensors[bias[0]][bias[1] : bias[2]].reshape(self.layout.heads, 1, -1)
        return torch.cat([matrix, last], 1)

    def _names(self) -> set[str]:
        places = [*self.layout.first, *self.layout.second]
        return {place[0] for place in places if place is not None}


def _over(a: Tensor, gram: Tensor) -> Tensor:
    """a · gram⁻¹ for symmetric matrices gram, (heads, rows, d) over (heads, d, d)."""
    solved: Tensor = torch.linalg.solve(gram, a.mT)
    return solved.mT


def _symmetric(a: Tensor) -> Tensor:
    return a + a.mT
