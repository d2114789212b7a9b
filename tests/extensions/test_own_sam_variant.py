"""Variants of SAM from outside the package, beside plain loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sharpkit import SAM, fit, m_sam_gradient
from sharpkit.errors import ArgumentError, RunError
from sharpkit.groupwise.geometry import Tensors, expand, inner
from sharpkit.training import SamVariant

# ---- the variants of one's own --------------------------------------------------------------

ALPHA, ETA = 0.4, 0.01


def gsam(plain: Tensors, perturbed: Tensors) -> Tensors:
    """g(w + ε) − α g(w)⊥, the part of g(w) orthogonal to g(w + ε) (Zhuang et al. 2022)."""
    along = inner(plain, perturbed) / inner(perturbed, perturbed)
    return {k: g - ALPHA * (plain[k] - expand(along, g) * g) for k, g in perturbed.items()}


def shifted_scale(gradient: Tensors, weights: Tensors) -> Tensors:
    """T² g / ‖T g‖ with T = |w| + η, as ASAM's authors compute it."""
    t = {name: w.abs() + ETA for name, w in weights.items()}
    ascent = {name: g * t[name] for name, g in gradient.items()}
    length = inner(ascent, ascent).sqrt()
    return {name: a * t[name] * expand(1 / length, a) for name, a in ascent.items()}


def random_direction(gradient: Tensors, weights: Tensors) -> Tensors:
    """Gaussian, of unit length: no gradient at all."""
    z = {name: torch.randn_like(g) for name, g in gradient.items()}
    length = inner(z, z).sqrt()
    return {name: t * expand(1 / length, t) for name, t in z.items()}


GSAM = SamVariant("gsam", combine=gsam)
SHIFTED = SamVariant("shifted", direction=shifted_scale)
BOTH = SamVariant("both", direction=shifted_scale, combine=gsam)

# ---- and what they are compared with --------------------------------------------------------

RHO = 0.3


class Network(nn.Module):
    """A convolution, BatchNorm in training, a layer used twice, and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.mix, self.out = nn.Linear(64, 64), nn.Linear(64, 5)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.out(torch.tanh(self.mix(torch.tanh(self.mix(x)))))


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(14, 1, 6, 6).double(), torch.randint(5, (14,))
    return Network().double(), x, y


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )


def plain_group(model: nn.Module, x: Tensor, y: Tensor, variant: SamVariant) -> Tensor:
    """One group: whole vectors, every formula written out."""
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    g = gradient(copy.deepcopy(model), x, y)
    t = torch.ones_like(w) if variant.direction is None else w.abs() + ETA
    moved = copy.deepcopy(model)
    nn.utils.vector_to_parameters(w + RHO * t**2 * g / (t * g).norm(), moved.parameters())
    p = gradient(moved, x, y)
    if variant.combine is None:
        return p
    unit = p / p.norm()
    return p - ALPHA * (g - (g @ unit) * unit)


def plain_batch(model: nn.Module, x: Tensor, y: Tensor, m: int, variant: SamVariant) -> Tensor:
    groups = zip(x.split(m), y.split(m), strict=True)
    return sum(len(a) / len(x) * plain_group(model, a, b, variant) for a, b in groups)


def flat(model: nn.Module, gradients: Sequence[Tensor | None]) -> Tensor:
    pairs = zip(gradients, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def flat_gradients(model: nn.Module) -> Tensor:
    return flat(model, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("variant", [GSAM, SHIFTED, BOTH], ids=lambda v: v.name)
@pytest.mark.parametrize("engine", ["auto", "loop", "vectorized"])
@pytest.mark.parametrize("m", [2, 4, 14])
def test_m_sam_with_a_variant_is_the_plain_loop(variant, engine, m):
    model, x, y = case()
    expected = plain_batch(model, x, y, m, variant)
    m_sam_gradient(model, x, y, m=m, rho=RHO, engine=engine, variant=variant)
    torch.testing.assert_close(flat_gradients(model), expected, rtol=1e-9, atol=1e-11)
    assert model.spare.grad is None  # weight decay leaves it alone, as without a variant


class Scaled(nn.Module):
    """Runs under vmap alone: `torch.func` inside is nothing that one batch can take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 36))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x.flatten(1), self.w / self.w.norm())


@pytest.mark.parametrize("variant", [GSAM, SHIFTED, BOTH], ids=lambda v: v.name)
def test_m_sam_under_vmap_is_the_plain_loop(variant):
    _, x, y = case()
    model = Scaled().double()
    expected = plain_batch(model, x, y, 2, variant)
    m_sam_gradient(model, x, y, m=2, rho=RHO, engine="vectorized", variant=variant)
    torch.testing.assert_close(flat_gradients(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", [GSAM, SHIFTED, BOTH], ids=lambda v: v.name)
@pytest.mark.parametrize("way", ["closure", "by hand", "batch"])
def test_an_optimizer_with_a_variant_is_the_plain_loop(variant, way):
    model, x, y = case()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, variant=variant)
    other = copy.deepcopy(model)

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        step = -0.1 * plain_group(other, x, y, variant)
        w = nn.utils.parameters_to_vector(other.parameters())
        nn.utils.vector_to_parameters(w + step, other.parameters())
        if way == "closure":
            opt.step(closure)
        elif way == "batch":
            opt.step_batch(model, x, y, m=len(x))
        else:
            opt.zero_grad()
            closure()
            opt.first_step()
            closure()
            opt.second_step()
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(model.parameters()),
        nn.utils.parameters_to_vector(other.parameters()), rtol=1e-9, atol=1e-11,
    )  # fmt: skip
    assert copy.deepcopy(opt).variant.name == variant.name


def test_gradients_may_be_clipped_after_they_are_combined():
    model, x, y = case()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, variant=GSAM)
    expected = plain_group(model, x, y, GSAM)
    cross_entropy(model(x), y).backward()
    with opt.perturbed():
        cross_entropy(model(x), y).backward()
    torch.testing.assert_close(flat_gradients(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_random_directions_differ_between_groups_and_steps(engine):
    """The loss is quadratic: the gradient at w + ε is the plain one plus H ε."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    half = torch.randn(7, 6).double()
    x, hessian = torch.cat([half, half]), half.T @ half / 7
    drawn = SamVariant("random", direction=random_direction)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs + outputs**2 / 2).mean()

    def mean_perturbation(m: int, seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        model.zero_grad()
        options = {"rho": RHO, "loss": loss, "variant": drawn, "engine": engine}
        m_sam_gradient(model, x, torch.zeros(14), m=m, **options)
        before = torch.autograd.grad(loss(model(x), x), model.weight)[0]
        return torch.linalg.solve(hessian, (model.weight.grad - before)[0])

    whole = mean_perturbation(14, seed=1)
    assert whole.norm().item() == pytest.approx(RHO, rel=1e-9)
    assert (mean_perturbation(14) - whole).norm() > 0.01  # another step
    assert mean_perturbation(7).norm() < 0.99 * RHO  # two groups of the same examples
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=RHO, variant=drawn)

    def closure() -> Tensor:
        value = loss(model(x), x)
        value.backward()
        return value

    steps = []
    for _ in range(2):
        opt.step(closure)
        steps.append(model.weight.grad.clone())
    assert not torch.allclose(*steps)


def test_fit_takes_a_variant_and_notes_it(tmp_path):
    options = {"optimizer": "sam", "epochs": 1, "batch_size": 14, "lr": 0.05, "rho": RHO}
    options |= {"weight_decay": 0.0, "momentum": 0.0, "progress": False}
    (model, x, y), noted = case(), []
    for variant in (SamVariant(), GSAM):  # one step, of all examples
        trained = copy.deepcopy(model)
        out = tmp_path / variant.name
        fit(trained, (x, y), variant=variant, out=out, **options)
        w, step = (nn.utils.parameters_to_vector(net.parameters()) for net in (model, trained))
        expected = w - 0.05 * plain_group(model, x, y, variant)
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-11)
        noted.append((out / "config.json").read_text())
    assert "variant" not in noted[0] and "SamVariant" in noted[1]
    with pytest.raises(RunError, match="variant"):
        fit(model, (x, y), variant=BOTH, out=tmp_path / "gsam", **options)
    fit(copy.deepcopy(model), (x, y), variant=GSAM, m=2, **options)


def test_what_a_variant_cannot_do_is_refused():
    model, x, y = case()
    with pytest.raises(ArgumentError, match="belongs to SAM"):
        fit(model, (x, y), epochs=1, batch_size=14, variant=GSAM)
    for call in (
        lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1, variant=gsam),
        lambda: m_sam_gradient(model, x, y, m=2, variant=gsam),
    ):
        with pytest.raises(ArgumentError, match=r"such as SamVariant\(combine=function\)"):
            call()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, variant=GSAM)
    with pytest.raises(ArgumentError, match="leave out no_sync"):
        opt.step(lambda: None, no_sync=torch.enable_grad)
    ragged = SamVariant(direction=lambda g, w: {name: t.sum() for name, t in g.items()})
    short = SamVariant(combine=lambda plain, perturbed: {"conv.weight": plain["conv.weight"]})
    none = SamVariant(combine=lambda plain, perturbed: None)
    wrong = (ragged, r"shape \(\) for"), (short, "nothing for 'spare'"), (none, "is None: expected")
    for variant, message in wrong:
        for engine in ("auto", "loop"):
            with pytest.raises(ArgumentError, match=message):
                m_sam_gradient(model, x, y, m=2, engine=engine, variant=variant)
