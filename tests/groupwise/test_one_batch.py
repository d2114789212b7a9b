"""Groups that run as one ordinary batch, beside plain loops in float64."""

from __future__ import annotations

import copy
import math
from random import Random

import numpy as np
import pytest
import torch
from cases import CASES
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.contract.examples import Examples
from sharpkit.contract.functional import FunctionalModel
from sharpkit.contract.losses import resolve_loss
from sharpkit.groupwise.batch_passes import BatchPasses, batch_passes
from sharpkit.groupwise.fallback import Disagreement
from sharpkit.groupwise.low_rank import Rows, multiplied_out, squared_norm
from sharpkit.groupwise.pooling import MaxPool2x2, pooled
from sharpkit.groupwise.survey import survey
from sharpkit.sharpness import measurement


class TiedHead(nn.Module):
    """A language model whose embedding is its last layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 40)
        self.mix = nn.Linear(40, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.table(tokens).mean(1)))
        return F.linear(x, self.table.weight)


class Broadcast(nn.Module):
    """A class token, positions, a scale per channel, a number, norms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.scale, self.number = nn.Parameter(torch.rand(8)), nn.Parameter(torch.tensor(0.7))
        self.norm, self.groups = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.groups(self.patches(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(tokens * self.scale * self.number).mean(1))


class Windows(nn.Module):
    """Convolutions in one to three dimensions, in groups, with strides, dilation and windows."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv2d(2, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4, bias=False)
        self.point = nn.Conv2d(16, 24, 1, stride=2)
        self.line = nn.Conv1d(24, 6, 3, padding=1)
        self.block = nn.Conv3d(1, 2, (2, 1, 2))
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep(F.relu(self.flat(x))), inplace=True)
        x = torch.tanh(self.line(self.point(x).flatten(2)))
        return self.head(self.block(x.view(len(x), 1, 6, 2, 2)).flatten(1).relu_())


class Attending(nn.Module):
    """Attention with masks of both kinds, with its weights, and with steps on the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.averaged = nn.MultiheadAttention(8, 4, bias=False, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, padding = self.words(tokens), tokens == 0
        padding[:, 0] = False
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.encoder(x, later.double().masked_fill(later, -torch.inf), padding.to(x.dtype))
        x = self.encoder(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1]).double())
        seen, weights = self.averaged(x, x, x, key_padding_mask=padding)
        x = x + seen * weights.diagonal(dim1=1, dim2=2).unsqueeze(2)
        per_head = later.expand(2 * len(x), -1, -1)
        x, weights = self.apart(
            *[x.transpose(0, 1)] * 3, attn_mask=per_head, average_attn_weights=False
        )
        return self.head(x.mean(0)) * weights.amax((1, 2, 3)).unsqueeze(1)


class Placed(nn.Module):
    """Rows and parts of weights that all examples have, as many as there may be examples."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(20, 8)
        self.later, self.scales = nn.Embedding(20, 8), nn.Parameter(torch.rand(1, 30, 8))
        self.kinds, self.head, self.steps = nn.Parameter(torch.rand(3, 8)), nn.Linear(8, 3), steps

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(self.steps)
        x = self.words(tokens) + self.places(places)
        x = x + self.later(places.unsqueeze(0)) + self.places(places.flip(0)).unsqueeze(0)
        x = torch.cat([self.kinds[:1, None].expand(len(x), -1, -1), x], 1)
        x = torch.tanh(x * self.scales[:, : self.steps + 1] - self.kinds[..., 2, :])
        return self.head(x.mean(1) + torch.unsqueeze(self.kinds[1], 0))


class Slopes(nn.Module):
    """PReLU of one slope and of one per channel, RMSNorm, and convolutions that keep the size."""

    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding="same", dilation=2), nn.PReLU(8),
            nn.Conv2d(8, 4, (3, 5), padding="same", groups=2), nn.PReLU(),
            nn.Flatten(2), nn.Conv1d(4, 4, 1, padding="valid"), nn.RMSNorm(64), nn.PReLU(4),
            nn.Flatten(), nn.Linear(256, 5), nn.PReLU(5), nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x)


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 8, 8, dtype=torch.float64)


MODELS = {
    **{case.name: (case.build, lambda n, case=case: case.make()[1][:n]) for case in CASES},
    "tied_head": (TiedHead, lambda n: torch.randint(0, 60, (n, 5))),
    "broadcast": (Broadcast, images),
    "windows": (Windows, images),
    "attending": (Attending, lambda n: torch.randint(0, 20, (n, 5))),
    "placed": (Placed, lambda n: torch.randint(0, 30, (n, 12))),
    "slopes": (Slopes, images),
}
# what is used in ways that only function transforms can follow
REFUSED = {"shared_weights"}


def passes_of(name: str, n: int) -> tuple[nn.Module, BatchPasses, Tensor, Tensor]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build().double().eval()
    x = inputs(n)
    y = torch.randint(0, 3, (n,))
    f = FunctionalModel(model)
    weights = {key: f.value(key) for key in f.names}
    found = survey(f, weights, Examples(x, y))
    return model, batch_passes(f, resolve_loss("cross_entropy"), weights, found), x, y


def moved(passes: BatchPasses, groups: int) -> dict[str, Tensor]:
    """Weights of each group's own."""
    return {
        name: w + 0.1 * torch.randn(groups, *w.shape, dtype=w.dtype)
        for name, w in passes.weights.items()
    }


def at(model: nn.Module, weights: dict[str, Tensor], group: int) -> nn.Module:
    """A copy of a model at the weights of one group."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name][group])
    return other


def plain(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), grads, strict=True))


USABLE = sorted(set(MODELS) - REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_recognised_is_refused(name):
    with pytest.raises(Disagreement, match="used by more than"):
        passes_of(name, 12)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("name", USABLE)
def test_gradients_of_groups_are_those_of_a_loop(name, thin, size):
    model, passes, x, y = passes_of(name, 12)
    groups, factored = 12 // size, frozenset(passes.rows if thin else ())
    found = passes.gradients(Examples(x, y), groups, factored)
    dense = passes.packing.parts(found.packs)
    for i in range(groups):
        part = slice(i * size, (i + 1) * size)
        loss, grads = plain(model, x[part], y[part])
        torch.testing.assert_close(found.terms.mean[i], loss, rtol=1e-12, atol=0.0)
        for key, g in grads.items():
            if key in factored:
                mine = multiplied_out(*found.factors[key], g.shape)[i]
            else:
                mine = dense[key][i]
            torch.testing.assert_close(
                mine / 2.0 ** found.terms.exponent[i], g, rtol=1e-10, atol=1e-13
            )


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", USABLE)
def test_losses_and_gradients_at_weights_of_their_own_are_those_of_a_loop(name, size):
    model, passes, x, y = passes_of(name, 12)
    groups = 12 // size
    own = moved(passes, groups)
    packs = passes.packing.joined(own)
    losses, _ = passes.losses(Examples(x, y), groups, packs)
    found = passes.gradients(Examples(x, y), groups, at=packs)
    dense = passes.packing.parts(found.packs)
    for i in range(groups):
        part = slice(i * size, (i + 1) * size)
        loss, grads = plain(at(model, own, i), x[part], y[part])
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=0.0)
        for key, g in grads.items():
            torch.testing.assert_close(
                dense[key][i] / 2.0 ** found.terms.exponent[i], g, rtol=1e-10, atol=1e-13
            )


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", USABLE)
def test_perturbations_in_factors_are_those_that_are_multiplied_out(name, size):
    model, passes, x, y = passes_of(name, 12)
    groups = 12 // size
    thin = {}
    for key, rows in passes.rows.items():
        w = passes.weights[key]
        a = torch.randn(groups, 2, w[0].numel(), dtype=w.dtype)
        if rows.looked_up:
            a = torch.randint(0, 4, (groups, 2))
        size_of_rows = w[0].numel() if rows.looked_up else len(w)
        thin[key] = a, 0.1 * torch.randn(groups, 2, size_of_rows, dtype=w.dtype)
    own = {key: w.expand(groups, *w.shape) for key, w in passes.weights.items()}
    packs = passes.packing.joined({key: w for key, w in own.items() if key not in thin})
    losses, _ = passes.losses(Examples(x, y), groups, packs, thin)
    own |= {
        key: passes.weights[key] + multiplied_out(a, d, passes.weights[key].shape)
        for key, (a, d) in thin.items()
    }
    for i in range(groups):
        part = slice(i * size, (i + 1) * size)
        loss, _ = plain(at(model, own, i), x[part], y[part])
        torch.testing.assert_close(losses[i], loss, rtol=1e-11, atol=0.0)


def test_a_weight_that_is_looked_up_as_well_is_not_kept_in_factors():
    _, passes, _, _ = passes_of("tied_head", 12)
    assert "mix.weight" in passes.rows
    assert "table.weight" not in passes.rows


def test_a_table_stays_in_factors_while_few_rows_are_looked_up():
    torch.manual_seed(0)
    _, passes, _, _ = passes_of("looked_up", 12)
    assert passes.rows["table.weight"] == Rows(6, looked_up=True)
    found = survey(
        passes.model, passes.weights, Examples(torch.randint(0, 4, (6, 5)), torch.zeros(6))
    )
    assert "table.weight" in found.factored(passes.weights, 5)  # 60 · (24 + 3 · 30) of 7200
    assert "table.weight" not in found.factored(passes.weights, 6)


class Gathered(nn.Module):
    """Rows of a weight by an index that is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(300, 8), nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head((self.words(tokens) + self.places.weight[torch.arange(5)]).mean(1))


class Flattened(Gathered):
    """Words are looked up in one row of all examples."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens.flatten()).view(*tokens.shape, 8).mean(1))


class Mixed(Gathered):
    """A table is looked up by words and by places."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head((self.words(tokens) + self.words(torch.arange(5))).mean(1))


class Crossed(Gathered):
    """Attention to others than itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        return self.head(self.cross(x, x.flip(1), x.flip(1))[0].mean(1))


class Sliced(Gathered):
    """A layer at a part of a weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.words(tokens).mean(1), self.head.weight[:2], self.head.bias[:2])


@pytest.mark.parametrize("kind", [Gathered, Flattened, Mixed, Crossed, Sliced])
def test_other_uses_of_tables_and_parts_are_refused(kind):
    torch.manual_seed(0)
    f, examples = FunctionalModel(kind()), Examples(torch.randint(0, 5, (4, 5)), torch.zeros(4))
    assert survey(f, {key: f.value(key) for key in f.names}, examples).refused


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("name", ["attending", "placed", "slopes"])
def test_sharpness_of_what_is_recognised_is_that_of_one_group_after_the_other(name, m, monkeypatch):
    """The plan has chunks of as many examples as there are places."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, x, y = build().double().eval(), inputs(24), torch.randint(0, 3, (24,))

    def values(**options: object) -> np.ndarray:
        found = sk.m_sharpness(model, (x, y), m=m, rho=0.5, progress=False, **options)
        return found.group_values[m, 0.5]

    expected = values(engine="loop")
    monkeypatch.setattr(measurement, "transformed", None)  # as one batch, or not at all
    for chunk in ("auto", 12):
        np.testing.assert_allclose(values(chunk=chunk, engine="vectorized"), expected, rtol=1e-9)


def test_tables_of_a_model_that_cannot_run_as_one_batch_are_counted_whole():
    f, examples = FunctionalModel(Gathered()), Examples(torch.randint(0, 9, (4, 5)), torch.zeros(4))
    weights = {key: f.value(key) for key in f.names}
    found = survey(f, weights, examples)
    assert "places.weight" in found.refused and found.looked_up == {"words.weight": 5}
    assert "words.weight" not in found.factored(weights)


@pytest.mark.parametrize("seed", range(8))
def test_squared_norms_of_factors_are_those_of_the_gradients(seed):
    draw = Random(seed)
    torch.manual_seed(seed)
    groups, rows, size = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 5)
    delta, other = torch.randn(2, groups, rows, size)
    shared = [
        (torch.randn(groups, rows, draw.randint(1, 4)), delta) for _ in range(draw.randint(1, 3))
    ]
    numbers = torch.randint(0, draw.randint(1, 4), (groups, rows))
    factors = [*shared, (numbers, other), (numbers, delta)]
    expected = sum(
        multiplied_out(a, d, (4, size) if a.ndim == 2 else (size, a.shape[2]))
        .double().flatten(1).square().sum(1)
        for a, d in factors
    )  # fmt: skip
    torch.testing.assert_close(squared_norm(factors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (2, 3, 7, 5), (1, 1, 2, 2)])
def test_max_pooling_is_torchs_with_ties_and_odd_sizes(shape):
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randint(0, 3, shape).double().requires_grad_()
        expected, found = F.max_pool2d(x, 2), MaxPool2x2.apply(x)
        grad = torch.randn_like(expected)
        assert torch.equal(found, expected)
        assert torch.equal(pooled(x), expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
        )


def test_max_pooling_passes_nan_on():
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 0] = math.nan
    assert pooled(x).isnan().all()
