"""Projected ascent against closed forms, a dense grid, and a plain loop over groups."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sharpkit.groupwise import geometry
from sharpkit.sharpness.ascent_rules import Ascent
from sharpkit.sharpness.ball import Ball, random_point, scaled

KINDS = ["pgd", "apgd"]
NORMS = [2.0, math.inf]
RHO = 0.7


class Problem:
    """A loss of two parameters, `a` (3,) and `b` (2, 2), that differs between groups."""

    def __init__(self, loss, groups, adaptive=False):
        g = torch.Generator().manual_seed(5)
        self.weights = {
            "a": torch.randn(3, generator=g, dtype=torch.float64),
            "b": torch.randn(2, 2, generator=g, dtype=torch.float64),
        }
        self.loss, self.groups = loss, groups
        self.scale = {k: w.abs() for k, w in self.weights.items()} if adaptive else None

    def losses(self, at):
        return torch.stack(
            [self.loss(i, flat({k: t[i] for k, t in at.items()})) for i in range(self.groups)]
        )

    def gradients(self, at):
        at = {k: t.detach().requires_grad_() for k, t in at.items()}
        losses = self.losses(at)
        found = torch.autograd.grad(losses.sum(), list(at.values()))
        return dict(zip(at, found, strict=True)), losses.detach()

    def increase(self, ascent, rho=RHO, first_group=0):
        """The largest increase found for every group."""
        origin = {k: w.expand(self.groups, *w.shape) for k, w in self.weights.items()}
        gradient, base = self.gradients(origin)
        first = geometry.steepest(scaled(gradient, self.scale), ascent.p)

        def start(rho, restart):
            keys = ascent.seed, ascent.p, self.weights, 4, first_group, self.groups
            return random_point(*keys, rho, restart)

        ball = Ball(
            ascent.p, ascent.steps, ascent.restarts, self.weights, self.scale, base,
            with_grad(self.gradients), self.losses, None, start, gradient, first,
        )  # fmt: skip
        with torch.no_grad():
            return ascent.rule.increases(ball, [rho])[0]


def with_grad(f):
    def inner(at):
        with torch.enable_grad():
            return f(at)

    return inner


def flat(at):
    return torch.cat([t.flatten() for t in at.values()])


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def linear(groups=3):
    x = normal(groups, 7, seed=1)
    return Problem(lambda i, w: x[i] @ w, groups), x


def quadratic(groups=4, adaptive=False):
    """Gradients and indefinite Hessians at the weights, in the coordinates of w."""
    h = normal(groups, 7, 7, seed=2)
    h, g = (h + h.mT) / 2, 0.3 * normal(groups, 7, seed=3)
    problem = Problem(None, groups, adaptive)
    w0 = flat(problem.weights)
    problem.loss = lambda i, w: g[i] @ (w - w0) + (w - w0) @ h[i] @ (w - w0) / 2
    return problem, g, h


def bumpy(groups=3):
    """Many local maxima: a small network with sines."""
    first, second = normal(groups, 12, 7, seed=6), normal(groups, 12, seed=7)
    return Problem(lambda i, w: second[i] @ torch.sin(3 * first[i] @ w), groups)


def exact_maxima(g, h, rho):
    pairs = zip(g, h, strict=True)
    return torch.tensor([trust_region_maximum(a, b, rho) for a, b in pairs], dtype=torch.float64)


def trust_region_maximum(g, h, rho):
    """max over ‖u‖ ≤ ρ of gᵀu + uᵀHu/2: u = (λI − H)⁻¹g with ‖u‖ = ρ, by bisection in λ ≥ λmax."""
    values, vectors = np.linalg.eigh(h.numpy())
    c = vectors.T @ g.numpy()

    def length(shift):
        return np.linalg.norm(c / (shift - values))

    low, high = max(values[-1], 0.0) + 1e-14, max(values[-1], 0.0) + np.linalg.norm(c) / rho + 1
    if values[-1] < 0 and length(low) <= rho:  # the maximum is inside
        return float((c**2 / (-values)).sum() / 2)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > rho else (low, middle)
    u = c / (high - values)
    return float(c @ u + (values * u**2).sum() / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("p", "dual"), [(2.0, 2.0), (math.inf, 1.0)])
def test_the_maximum_of_a_linear_loss_is_rho_times_the_dual_norm(kind, p, dual):
    problem, x = linear()
    found = problem.increase(Ascent(kind, p=p, steps=3, restarts=2))
    assert torch.allclose(found, RHO * x.norm(p=dual, dim=1), rtol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.05, 0.7, 5.0])
def test_the_maximum_of_a_quadratic_loss_is_that_of_the_trust_region(rho, adaptive):
    # in the adaptive geometry the same with T g and T H T
    problem, g, h = quadratic(adaptive=adaptive)
    t = flat(problem.weights).abs() if adaptive else torch.ones(7, dtype=torch.float64)
    exact = exact_maxima(t * g, t[:, None] * h * t, rho)
    for kind, steps, tolerance in (("pgd", 200, 1e-2), ("apgd", 100, 1e-3)):
        ascent = Ascent(kind, adaptive=adaptive, steps=steps, restarts=3)
        found = problem.increase(ascent, rho)
        assert (found <= exact * (1 + 1e-12)).all()
        assert torch.allclose(found, exact, rtol=tolerance), kind
    ten = problem.increase(Ascent("pgd", adaptive=adaptive, steps=10), rho)
    assert (ten <= exact * (1 + 1e-12)).all()


def test_the_maximum_inside_the_ball_is_found():
    # a concave quadratic: the ascent must not stay on the sphere
    problem, g, h = quadratic()
    h -= 4 * torch.eye(7, dtype=torch.float64)
    exact = exact_maxima(g, h, 3.0)
    found = problem.increase(Ascent("apgd", steps=100), 3.0)
    assert (found <= exact * (1 + 1e-12)).all()
    assert torch.allclose(found, exact, rtol=2e-2)  # steps have a length of their own, and halve


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", NORMS)
def test_two_parameters_against_a_dense_grid(kind, p):
    direction, w0 = normal(9, 2, seed=8), torch.tensor([0.3, -0.2], dtype=torch.float64)

    def values(w):  # (..., 2) -> (...)
        return torch.sin(w @ (4 * direction.T)).sum(-1)

    problem = Problem(lambda i, w: values(w), 1)
    problem.weights = {"w": w0}
    axis = torch.linspace(-1, 1, 1501, dtype=torch.float64)
    u = torch.cartesian_prod(axis, axis)
    inside = u[u.norm(p=p, dim=1) <= 1]
    best = (values(w0 + inside) - values(w0)).max()
    found = problem.increase(Ascent(kind, p=p, steps=40, restarts=10), 1.0)
    # between grid points the loss rises by at most curvature · spacing², here 1e-3
    assert found.item() <= best.item() + 1e-3
    if kind == "apgd":  # shrinking steps stop short of it
        assert found.item() == pytest.approx(best.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_all_groups_together_are_the_plain_loop_over_them(kind, p, adaptive):
    ascent = Ascent(kind, p=p, adaptive=adaptive, steps=25, seed=2, restarts=3)
    for problem in (bumpy(), quadratic(3)[0]):
        problem.scale = {k: w.abs() for k, w in problem.weights.items()} if adaptive else None
        expected = [plain_increase(problem, i, ascent, RHO) for i in range(3)]
        found = problem.increase(ascent)
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", NORMS)
def test_more_restarts_never_find_less(kind, p):
    problem = bumpy()
    found = [problem.increase(Ascent(kind, p=p, restarts=r)) for r in (1, 2, 3, 6, 12)]
    for fewer, more in pairwise(found):
        assert (more >= fewer).all()
    assert (found[-1] > found[0]).any()  # this loss has many local maxima


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_iterate_is_the_one_step_perturbation(kind):
    problem = bumpy()
    one = problem.increase(Ascent(kind, steps=1))
    gradient, base = problem.gradients(
        {k: w.expand(3, *w.shape) for k, w in problem.weights.items()}
    )
    first = geometry.steepest(gradient, 2.0)
    at = geometry.moved(problem.weights, first.tensors, RHO * first.coefficient)
    assert torch.allclose(one, (problem.losses(at) - base).clamp(min=0), rtol=1e-12)
    for restarts in (1, 4):
        more = problem.increase(Ascent(kind, steps=7, restarts=restarts))
        assert (more >= one - 1e-12).all()


def test_momentum_comes_nearer_than_ten_shrinking_steps():
    # ten steps from 0 can be a third below the maximum; APGD of the same cost is nearer on average
    problem, g, h = quadratic(groups=40)
    exact = exact_maxima(g, h, 3.0)
    plain, momentum = (problem.increase(Ascent(kind, steps=10), 3.0) / exact for kind in KINDS)
    assert plain.min() < 0.9
    assert momentum.mean() > plain.mean()
    assert (problem.increase(Ascent("apgd", steps=50, restarts=4), 3.0) / exact).min() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_random_starts_do_not_depend_on_the_chunk(kind):
    problem, ascent = bumpy(), Ascent(kind, seed=3, restarts=4)
    together = problem.increase(ascent)
    for i in range(3):
        alone = Problem(lambda _, w, i=i: problem.loss(i, w), 1)
        assert torch.allclose(alone.increase(ascent, first_group=i), together[i : i + 1], rtol=1e-9)
    assert not torch.equal(together, problem.increase(replace(ascent, seed=4)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_a_gradient_moves_only_from_random_starts(kind):
    problem = Problem(lambda i, w: i * (w - flat(problem.weights)).square().sum(), 2)
    assert problem.increase(Ascent(kind)).tolist() == [0.0, 0.0]
    found = problem.increase(Ascent(kind, restarts=2))
    assert found[0] == 0
    assert found[1].item() == pytest.approx(RHO**2, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_diverged_loss_is_not_skipped(kind, steps):
    problem = Problem(
        lambda i, w: w.sum() if torch.equal(w, flat(problem.weights)) else w.sum() * math.nan, 1
    )
    problem.gradients = lambda at: (
        {k: torch.ones_like(t) for k, t in at.items()},
        problem.losses(at),
    )
    assert problem.increase(Ascent(kind, steps=steps)).isnan().all()


@pytest.mark.parametrize("p", NORMS)
def test_random_points_are_uniform_in_the_ball(p):
    weights = {"a": torch.zeros(2), "b": torch.zeros(())}
    u = random_point(0, p, weights, 1, 0, 2000, 2.0, 1)
    rows = torch.cat([u["a"], u["b"].unsqueeze(1)], 1).double()
    radii = rows.norm(p=p, dim=1) / 2
    assert radii.max() <= 1 + 1e-6
    # (‖u‖ / ρ)^P is uniform on [0, 1]: mean 1/2, variance 1/12; four standard errors
    assert abs(float((radii**3).mean()) - 0.5) < 4 / math.sqrt(12 * 2000)
    assert rows.mean(0).abs().max() < 4 * 2 / math.sqrt(3 * 2000)


def plain_increase(problem, group, ascent, rho):
    """The same by whole vectors, one group: what the loop engine is to do."""
    w0 = flat(problem.weights)
    scale = w0.abs() if ascent.adaptive else torch.ones_like(w0)

    def loss(u):
        return float(problem.loss(group, w0 + scale * u))

    def direction(u):
        v = u.clone().requires_grad_()
        gradient = torch.autograd.grad(problem.loss(group, w0 + scale * v), v)[0]
        return gradient.sign() if ascent.p == math.inf else gradient / gradient.norm()

    def project(u):
        return u.clamp(-rho, rho) if ascent.p == math.inf else u * min(1.0, rho / float(u.norm()))

    climb = plain_momentum if ascent.kind == "apgd" else plain_shrinking_steps
    base = loss(torch.zeros_like(w0))
    best = 0.0
    for restart in range(ascent.restarts):
        u = torch.zeros_like(w0)
        if restart:
            keys = ascent.seed, ascent.p, problem.weights, 4, group, 1
            point = random_point(*keys, rho, restart)
            u = flat({k: t[0] for k, t in point.items()})
        best = max(best, climb(u, loss, direction, project, rho, ascent.steps) - base)
    return best


def plain_shrinking_steps(u, loss, direction, project, rho, steps):
    best = loss(u)
    for step in range(steps):
        u = project(u + rho / math.sqrt(step + 1) * direction(u))
        best = max(best, loss(u))
    return best


def plain_momentum(u, loss, direction, project, rho, steps):
    """Algorithm 1 of Croce and Hein (2020), for a maximum."""
    shares, marks = [0.0, 0.22], []
    while math.ceil(shares[-1] * steps - 1e-9) < steps:
        marks.append(math.ceil(shares[-1] * steps - 1e-9))
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    points, values = [u], [loss(u)]
    best, best_u, eta = values[0], u, 2 * rho
    last, best_then, eta_then = 0, best, eta
    for k in range(steps):
        x = points[k]
        z = project(x + eta * direction(x))
        if k:
            z = project(x + 0.75 * (z - x) + 0.25 * (x - points[k - 1]))
        points.append(z)
        values.append(loss(z))
        if values[-1] > best:
            best, best_u = values[-1], z
        if k + 1 in marks:
            rises = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            stuck = rises < 0.75 * (k + 1 - last) or (eta == eta_then and best == best_then)
            last, best_then, eta_then = k + 1, best, eta
            if stuck:
                eta, points[-1], values[-1] = eta / 2, best_u, best
    return best
