"""The perturbations of groups against ρ T² g / ‖T g‖, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharpkit.training.group_perturbation import step_of_one, steps_of_groups
from sharpkit.training.radius import Radii

SHAPES = {"a": (3, 2), "b": (70, 1000), "c": ()}  # b is one whose squares are added up in blocks
KINDS = [
    Radii(dict.fromkeys(SHAPES, 0.3)),
    Radii({"a": 0.3, "b": 0.1, "c": 0.0}),
    Radii(dict.fromkeys(SHAPES, 0.3), frozenset({"b", "c"})),
]


def case(dtype: torch.dtype, groups: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    return weights, {n: torch.randn(groups, *w.shape, dtype=dtype) for n, w in weights.items()}


def written_out(
    weights: dict[str, Tensor], gradients: dict[str, Tensor], radii: Radii
) -> dict[str, Tensor]:
    t = {
        name: radii.rho[name] * (w.double().abs() if name in radii.adaptive else 1.0)
        for name, w in weights.items()
    }
    g = {name: d.double() for name, d in gradients.items()}
    norm = torch.cat([(t[name] * g[name]).flatten() for name in g]).norm()
    return {name: w.double() + t[name] ** 2 * g[name] / norm for name, w in weights.items()}


@pytest.mark.parametrize("radii", KINDS)
@pytest.mark.parametrize("careful", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_the_formula(radii, careful, dtype, tolerance):
    weights, gradients = case(dtype, 2)
    scale, never = radii.scale(weights), torch.zeros(2, dtype=torch.float64)
    found = steps_of_groups(weights, gradients, {}, never, radii, scale, careful=careful)
    assert not found.doubtful
    for i in range(2):
        mine = {name: g[i] for name, g in gradients.items()}
        expected = written_out(weights, mine, radii)
        one, doubtful = step_of_one(
            weights, list(mine.values()), never[0], radii, scale, careful=careful
        )
        assert not doubtful
        for name, t in expected.items():
            for at in (found.at[name][i], one[name]):
                torch.testing.assert_close(at.double(), t, rtol=tolerance, atol=tolerance)


def test_factors_are_perturbed_as_the_matrix_that_they_stand_for():
    torch.manual_seed(0)
    a, d = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 4).double()
    weights, g = {"b": torch.randn(4).double()}, torch.randn(2, 4).double()
    for radii in (Radii({"w": 0.2, "b": 0.2}), Radii({"w": 0.2, "b": 0.4}, frozenset("b"))):
        found = steps_of_groups(
            weights, {"b": g}, {"w": (a, d)}, torch.zeros(2), radii, radii.scale(weights),
            careful=False,
        )  # fmt: skip
        thin_a, thin_d = found.thin["w"]
        for i in range(2):
            zero = torch.zeros(4, 5).double()
            expected = written_out(
                {"w": zero, **weights}, {"w": d[i].T @ a[i], "b": g[i]}, radii
            )  # fmt: skip
            torch.testing.assert_close(thin_d[i].T @ thin_a[i], expected["w"], rtol=1e-12, atol=0)
            torch.testing.assert_close(found.at["b"][i], expected["b"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_norm_that_leaves_float32_is_noticed_and_right_with_care(scale):
    weights, gradients = case(torch.float32, 1)
    expected = written_out(weights, {n: g[0] for n, g in gradients.items()}, KINDS[0])
    far = {name: g * scale for name, g in gradients.items()}
    zero = torch.zeros(1, dtype=torch.float64)
    assert steps_of_groups(weights, far, {}, zero, KINDS[0], None, careful=False).doubtful
    assert step_of_one(
        weights, [g[0] for g in far.values()], zero[0], KINDS[0], None, careful=False
    )[1]
    found = steps_of_groups(weights, far, {}, zero, KINDS[0], None, careful=True)
    assert not found.doubtful
    for name, t in expected.items():
        torch.testing.assert_close(found.at[name][0].double(), t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("careful", [True, False])
def test_a_gradient_of_zero_moves_nothing_and_one_that_is_not_finite_shows(careful):
    weights, gradients = case(torch.float32, 2)
    gradients = {name: g * 0 for name, g in gradients.items()}
    gradients["a"][1, 0, 0] = torch.nan
    exponent = torch.tensor([torch.inf, 0.0], dtype=torch.float64)
    found = steps_of_groups(weights, gradients, {}, exponent, KINDS[0], None, careful=careful)
    assert not found.doubtful
    for i in range(2):
        one, _ = step_of_one(
            weights, [g[i] for g in gradients.values()], exponent[i], KINDS[0], None,
            careful=careful,
        )  # fmt: skip
        for name, w in weights.items():
            for at in (found.at[name][i], one[name]):
                assert torch.equal(at, w) if i == 0 else bool(torch.isnan(at).any())


def test_a_parameter_that_is_not_used_stays():
    weights, gradients = case(torch.float32, 1)
    given = [None if name == "b" else g[0] for name, g in gradients.items()]
    for careful in (True, False):
        at, _ = step_of_one(weights, given, torch.zeros(()), KINDS[0], None, careful=careful)
        assert torch.equal(at["b"], weights["b"]) and not torch.equal(at["a"], weights["a"])
    at, _ = step_of_one(weights, [None] * 3, torch.zeros(()), KINDS[0], None, careful=False)
    assert all(torch.equal(at[name], w) for name, w in weights.items())
