"""The closed form of a cross-entropy's curvature by its logits, and what it takes."""

from __future__ import annotations

import pytest
import torch
from memory_peak import peak
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.contract import checks
from sharpkit.contract.losses import resolve_loss
from sharpkit.curvature.softmax import SoftmaxCurvature, softmax_loss

N, T, V = 4, 5, 7
WEIGHT = torch.tensor([0.0, 3.0, 1.0, 0.5, 2.0, 1.5, 0.25], dtype=torch.float64)
LOSSES = {
    "by name": "cross_entropy",
    "plain": nn.CrossEntropyLoss(),
    "ignoring another": nn.CrossEntropyLoss(ignore_index=2),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "both": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels() -> Tensor:
    found = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))
    found[0, 1:], found[2] = -100, -100
    return found


def as_module(loss) -> nn.Module:
    return nn.CrossEntropyLoss() if isinstance(loss, str) else loss


# the loss by name has its classes last
PLACES = [("by name", 2), *((name, axis) for name in list(LOSSES)[1:-1] for axis in (1, 2))]


@pytest.mark.parametrize(("name", "axis"), PLACES)
def test_it_is_the_hessian_of_the_loss(name, axis):
    loss, y = LOSSES[name], labels()
    if name == "ignoring another":
        y = y.clamp(min=2)
    logits = 3 * draw(N, T, V).movedim(2, axis)
    hessian = torch.autograd.functional.hessian(
        lambda z: as_module(loss)(z.movedim(axis, 1), y), logits
    )
    u = draw(*logits.shape, seed=2)
    expected = hessian.reshape(u.numel(), -1) @ u.flatten()
    kind = softmax_loss(resolve_loss(loss))
    found = SoftmaxCurvature(kind, logits, y)(u)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-12, atol=1e-14)


def test_it_is_exact_where_the_network_is_certain():
    """p rounds to 1 in float32; each entry is compared, and the largest is 1e-7."""
    logits = torch.tensor([[0.0, 17.0, -3.0], [25.0, 1.0, 2.0]], dtype=torch.float64)
    y, u = torch.tensor([1, 0]), torch.tensor([[1.0, 1.5, -2.0], [0.3, 0.2, 7.0]])
    kind = softmax_loss(resolve_loss("cross_entropy"))
    exact, found = (
        SoftmaxCurvature(kind, logits.to(t), y)(u.to(t)) for t in (torch.float64, torch.float32)
    )
    assert exact.abs().max() < 1e-7
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [*LOSSES, "probabilities"])
def test_gauss_newton_products(name):
    """Jᵀ (∇²ℓ) J with dense matrices; "both" and "probabilities" have no closed form here."""
    loss, y = LOSSES.get(name, nn.CrossEntropyLoss()), labels()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, V)).double()
    x = draw(N, T, 3)
    if name == "ignoring another":
        y = y.clamp(min=2)
    if name == "probabilities":
        x, y = x[:, 0], draw(N, V, seed=3).softmax(1)
    names = [n for n, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def outputs(w: Tensor) -> Tensor:
        parts = [t.view_as(p) for t, p in zip(w.split(sizes), model.parameters(), strict=True)]
        return torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))

    def mean(z: Tensor) -> Tensor:
        return as_module(loss)(z if z.ndim == 2 else z.movedim(2, 1), y)

    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, w).reshape(-1, len(w))
    z = outputs(w).detach()
    hessian = torch.autograd.functional.hessian(mean, z).reshape(z.numel(), -1)
    for chunk in ("auto", 3):
        matrix = sk.GaussNewtonOperator(model, (x, y), loss=loss, chunk=chunk)
        found = matrix.to_dense()
        torch.testing.assert_close(found, jacobian.T @ hessian @ jacobian, rtol=1e-9, atol=1e-12)


class Words(nn.Module):
    """A language model that is hardly more than its output layer."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.table(tokens).tanh(), self.table.weight)


@pytest.mark.parametrize("operator", [sk.GaussNewtonOperator, sk.FisherOperator])
def test_products_hold_few_tensors_of_the_size_of_the_logits(operator):
    """Beside p: J v, whose two terms are added, then a moved copy of it and the sum's own."""
    vocabulary, tokens = 20_000, 16
    torch.manual_seed(0)
    words = torch.randint(vocabulary, (3, tokens + 1))
    matrix = operator(Words(vocabulary), (words[:, :-1], words[:, 1:]), chunk=1)
    logits = 4 * tokens * vocabulary
    assert matrix.kept_bytes >= 3 * logits  # p of every chunk, though no graph holds it
    vector = torch.ones(matrix.shape[0])
    assert matrix.kept_chunks == 3
    matrix.matvec(vector)
    assert peak(lambda: matrix.matvec(vector)) < 2.5 * logits + 8 * 4 * len(vector)


def test_large_outputs_are_looked_at_for_three_examples(monkeypatch):
    """Dependence on the batch is found all the same."""
    monkeypatch.setattr(checks, "_LARGE", 2**18)  # of 76 kB for each
    lengths = []

    class Watched(Words):
        def forward(self, tokens: Tensor) -> Tensor:
            lengths.append(len(tokens))
            return super().forward(tokens)

    class Mixing(Words):
        def forward(self, tokens: Tensor) -> Tensor:
            found = super().forward(tokens)
            return found - found.mean(0)

    torch.manual_seed(0)
    words = torch.randint(1000, (12, 20))
    data = words[:, :-1], words[:, 1:]
    sk.m_sharpness(Watched(1000), data, m=12, rho=0.1, engine="loop")
    assert lengths[0] == 4
    assert max(lengths[1:4]) <= 3
    with pytest.raises(sk.errors.ModelError, match="depend on the others in its batch"):
        sk.m_sharpness(Mixing(1000), data, m=12, rho=0.1)
