"""The output layer and its loss in slices: products, refusals, memory."""

from __future__ import annotations

import pytest
import torch
from memory_peak import peak
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.contract import surprise
from sharpkit.curvature import hessian, vocabulary

N, T, V, D = 4, 6, 24, 3


class Head(nn.Module):
    """Hidden states by a small network; the output layer tied, with a bias, or frozen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(V, D)
        self.body = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D), nn.Tanh())
        if kind != "tied":
            self.out = nn.Linear(D, V, bias=kind != "frozen")
        if kind == "frozen":
            self.out.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.body(self.words(tokens))
        if self.kind == "tied":
            return F.linear(h, self.words.weight)
        if self.kind == "scaled after":
            return 2.0 * self.out(h)
        return self.out(h)


def problem(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    words, labels = torch.randint(V, (2, N, T))
    labels[0, 2:], labels[2] = -100, -100  # unequal numbers, and none at all
    return Head(kind).double().eval(), (words, labels)


def dense(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian by torch's own functions."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def loss(w: Tensor) -> Tensor:
        parts = [t.view_as(p) for t, p in zip(w.split(sizes), named.values(), strict=True)]
        logits = torch.func.functional_call(model, dict(zip(named, parts, strict=True)), data[0])
        return F.cross_entropy(logits.flatten(0, 1), data[1].flatten())

    w = nn.utils.parameters_to_vector(named.values()).detach()
    return torch.func.grad(loss)(w), torch.func.hessian(loss)(w)


@pytest.fixture
def in_slices(monkeypatch) -> list[bool]:
    """Slices of a few positions; whether the output layer was taken, chunk by chunk."""
    monkeypatch.setitem(surprise._LARGE, "cpu", 8 * 3 * V * vocabulary._SLICES)
    taken = []

    def asked(*args) -> bool:
        taken.append(vocabulary.in_slices(*args))
        return taken[-1]

    monkeypatch.setattr(hessian, "in_slices", asked)
    return taken


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", ["tied", "bias", "frozen", "scaled after"])
def test_products_are_those_of_the_dense_hessian(kind, kept, in_slices):
    model, data = problem(kind)
    gradient, matrix = dense(model, data)
    found = sk.HessianOperator(model, data, chunk=3, memory_budget=None if kept else 0)
    assert found.mode == "reverse"
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.to_dense(), matrix, rtol=1e-9, atol=1e-13)
    # a layer that is not the last one is seen, and not taken
    assert all(in_slices) if kind != "scaled after" else not in_slices


@pytest.mark.parametrize("selection", ["out.weight", "body.*", "out.bias"])
def test_some_parameters_alone(selection, in_slices):
    model, data = problem("bias")
    for name, p in model.named_parameters():
        p.requires_grad_(name == selection or (selection == "body.*" and name.startswith("body")))
    _, matrix = dense(model, data)
    model.requires_grad_(True)
    found = sk.HessianOperator(model, data, parameters=selection).to_dense()
    assert all(in_slices)
    torch.testing.assert_close(found, matrix, rtol=1e-9, atol=1e-13)


def test_several_vectors_at_once(in_slices):
    """As on a GPU, where they share a backward pass."""
    model, data = problem("tied")
    matrix = sk.HessianOperator(model, data, chunk=4)
    vectors = torch.randn(3, matrix.shape[0], dtype=torch.float64)
    rows = [list(matrix.split(v).values()) for v in vectors]
    product = matrix._recording.chunks[0].product
    assert product is not None
    filled = matrix._problem.filled
    together = torch.func.vmap(lambda *parts: filled(product(parts)))(
        *map(torch.stack, zip(*rows, strict=True))
    )
    for i, row in enumerate(rows):
        for a, b in zip(together, filled(product(row)), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, V, dtype=torch.float64)),
        lambda z, y: (z.square().sum((1, 2)), torch.ones(len(z), dtype=torch.float64)),
    ],
    ids=["smoothing", "class weights", "own"],
)
def test_other_losses_do_not_take_the_layer(loss, in_slices):
    model, data = problem("tied")
    sk.HessianOperator(model, data, loss=loss)
    assert in_slices
    assert not any(in_slices)


def test_what_follows_a_layer_is_not_overlooked():
    h, w = torch.ones(2, 3), torch.ones(5, 3)
    with vocabulary.OutputLayer() as layer:
        z = F.linear(h, w)
        assert layer.of(z) == (h, w)
        z.mul_(2.0)
    assert layer.of(z) is None


def test_a_kept_graph_has_nothing_of_the_size_of_the_logits():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(80_000, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.table(tokens).tanh(), self.table.weight)

    torch.manual_seed(0)
    words = torch.randint(80_000, (3, 193))
    matrix = sk.HessianOperator(Words(), (words[:, :-1], words[:, 1:]), chunk=1)
    logits = 4 * 192 * 80_000
    vector = torch.ones(matrix.shape[0])
    assert matrix.kept_chunks == 3
    assert matrix.kept_bytes < 0.1 * logits
    assert peak(lambda: matrix.matvec(vector)) < 1.5 * logits + 8 * 4 * len(vector)
