"""Landscapes against plain loops in float64, closed forms and dense linear algebra."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import CASES
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit.contract.parameters import floating_parameters
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.landscapes.filters import roles, unit_norms

QUIET = {"progress": False}


def mlp(width: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def examples(n: int = 20, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


@torch.no_grad()
def loop(model, data, directions, coordinates):
    """Loss, standard error and accuracy at every point, one example's loss at a time."""
    x, y = data
    found = []
    model = copy.deepcopy(model).eval()
    home = {name: p.clone() for name, p in model.named_parameters()}
    for point in coordinates:
        for name, p in model.named_parameters():
            moved = sum(c * d[name] for c, d in zip(point, directions, strict=True))
            p.copy_(home[name] + moved)
        outputs = model(x)
        losses = [F.cross_entropy(o[None], t[None]).item() for o, t in zip(outputs, y, strict=True)]
        right = (outputs.argmax(1) == y).double().mean().item()
        found.append((np.mean(losses), np.std(losses, ddof=1) / len(losses) ** 0.5, right))
    return np.array(found).T


def agree(result, model, data, directions):
    grid = np.stack(np.meshgrid(*result.coordinates, indexing="ij"), -1)
    points = grid.reshape(-1, len(result.coordinates))
    loss, error, right = loop(model, data, directions, points)
    # float64, summed in another order
    np.testing.assert_allclose(result.loss.ravel(), loss, rtol=1e-11)
    np.testing.assert_allclose(result.std_error.ravel(), error, rtol=1e-9)
    np.testing.assert_allclose(result.accuracy.ravel(), right, rtol=1e-12)


def filter_directions(model, seed, count, unit=lambda name, w: 0, moves=lambda name, w: w.ndim > 1):
    """Li et al.'s directions, one filter after the other, for weights with units on an axis."""
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for _ in range(count):
        direction = {}
        for name, w in model.named_parameters():
            drawn = torch.randn(w.shape, generator=generator, dtype=torch.float64)
            if not moves(name, w):
                drawn.zero_()
            elif w.ndim > 1:
                for k in range(w.shape[unit(name, w)]):
                    d, own = drawn.select(unit(name, w), k), w.detach().select(unit(name, w), k)
                    d *= own.norm() / d.norm()
            else:
                drawn *= w.detach().norm() / drawn.norm()
            direction[name] = drawn
        directions.append(direction)
    return directions


@pytest.mark.parametrize("dimensions", [1, 2])
def test_filter_normalised_directions_are_those_of_a_plain_loop(dimensions):
    model, data = mlp(), examples()
    result = sk.landscape(model, data, dimensions=dimensions, points=4, seed=3, **QUIET)
    agree(result, model, data, filter_directions(model, 3, dimensions))
    assert result.left_out == ("0.bias", "2.bias")
    assert result.parameters == 4 * 6 + 6 * 3


def test_biases_and_normalisation_layers_move_when_asked_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = examples()
    for options, moving in (
        ({"biases": True}, lambda name, w: not name.startswith("1.")),
        ({"norms": True}, lambda name, w: w.ndim > 1 or name.startswith("1.")),
        ({"biases": True, "norms": True}, lambda name, w: True),
    ):
        result = sk.landscape(model, data, points=3, **options, **QUIET)
        agree(result, model, data, filter_directions(model, 0, 2, moves=moving))


def test_layers_are_normalised_as_a_whole():
    model, data = mlp(), examples()
    generator = torch.Generator().manual_seed(0)
    direction = {}
    for name, w in model.named_parameters():
        drawn = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        moved = w.detach().norm() / drawn.norm() if w.ndim > 1 else 0.0
        direction[name] = drawn * moved
    result = sk.landscape(model, data, dimensions=1, points=4, normalise="layer", **QUIET)
    agree(result, model, data, [direction])
    assert "each layer as long" in result.description


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(3, 5, 2), nn.Linear(3, 2), nn.Embedding(5, 2), nn.Bilinear(2, 3, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_filter_is_what_changes_one_output_unit(layer):
    """Scaled up, the weights of a unit change that unit alone; of an embedding, that token."""
    layer = layer.double()
    norms = unit_norms(layer.weight.detach(), roles(layer)["weight"]).expand(layer.weight.shape)
    inputs = {
        nn.Embedding: lambda: (torch.arange(5),),
        nn.Linear: lambda: (torch.eye(3).double(),),
        nn.Bilinear: lambda: (torch.rand(3, 2).double(), torch.rand(3, 3).double()),
    }.get(
        type(layer),
        lambda: (torch.rand(1, layer.in_channels, *[6] * (layer.weight.ndim - 2)).double(),),
    )()
    before = layer(*inputs).detach()
    axis = 0 if isinstance(layer, nn.Embedding) else 1
    for value in norms.unique():
        unit = norms == value
        assert float(layer.weight.detach()[unit].norm()) == pytest.approx(float(value), rel=1e-12)
        with torch.no_grad():
            layer.weight[unit] *= 2
            after = layer(*inputs)
            layer.weight[unit] /= 2
        moved = (
            (after != before).any(tuple(k for k in range(after.ndim) if k != axis))
            if after.ndim > 1
            else after != before
        )
        assert int(moved.sum()) == 1
    units = {nn.Embedding: lambda: 5, nn.Linear: lambda: 2, nn.Bilinear: lambda: 4}
    assert len(norms.unique()) == units.get(type(layer), lambda: layer.out_channels)()


@pytest.mark.parametrize("normalise", ["filter", "layer"])
def test_a_network_with_rescaled_layers_has_the_same_picture(normalise):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, factor in ((0, 30.0), (2, 1 / 30), (5, 0.01), (7, 100.0)):
            other[layer].weight *= factor
        other[0].bias *= 30.0
        other[5].bias *= 0.01
    data = torch.randn(12, 1, 6, 6).double(), torch.arange(12) % 3
    a, b = (sk.landscape(m, data, points=3, normalise=normalise, **QUIET) for m in (model, other))
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-10)
    assert np.ptp(a.loss) > 0.1


def test_a_quadratic_loss_is_its_paraboloid():
    """With ½ (w·x − y)² the loss is exactly quadratic in w, along any direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    result = sk.landscape(
        model, (x, y), loss="mse", directions="eigenvectors", points=5, extent=2.0, **QUIET
    )
    hessian = (x.T @ x / 30).numpy()
    values, vectors = np.linalg.eigh(hessian)
    w = model.weight.detach().numpy()[0]
    gradient = hessian @ w - (x.T @ y).numpy()[:, 0] / 30
    assert result.eigenvalues == pytest.approx(values[::-1][:2], rel=1e-10)
    a, b = (v * np.sign(v[np.abs(v).argmax()]) for v in vectors[:, ::-1].T[:2])
    base = 0.5 * float(np.square(x.numpy() @ w - y.numpy()[:, 0]).mean())
    s, t = np.meshgrid(*result.coordinates, indexing="ij")
    expected = base + s * (gradient @ a) + t * (gradient @ b)
    expected += 0.5 * (values[-1] * s**2 + values[-2] * t**2)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-9)
    assert result.accuracy is None
    assert result.norms == pytest.approx((1.0, 1.0))


def test_eigenvectors_are_those_of_the_dense_hessian():
    model, data = mlp(3), examples(12)
    names = [name for name, _ in model.named_parameters()]

    def loss(flat):
        parts = torch.split(flat, [p.numel() for p in model.parameters()])
        at = {n: f.view_as(p) for n, f, p in zip(names, parts, model.parameters(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, at, data[0]), data[1])

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    values, vectors = torch.linalg.eigh(torch.func.hessian(loss)(flat))
    found = sk.landscape(model, data, directions="eigenvectors", points=3, **QUIET)
    assert found.eigenvalues == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-8)
    for k, v in enumerate(vectors.flip(1).T[:2]):
        v = v * v[v.abs().argmax()].sign()
        ends = found.loss[::2, 1] if k == 0 else found.loss[1, ::2]
        expected = [float(loss(flat + c * v)) for c in (-0.5, 0.5)]
        np.testing.assert_allclose(ends, expected, rtol=1e-7)


def checkpoints(count: int = 6):
    """A model and the states it went through."""
    model, data = mlp(), examples()
    optimizer, states = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(count):
        states.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model, data, states


def flat(state):
    return np.concatenate([t.numpy().ravel() for t in state.values()])


def test_components_of_a_trajectory_are_those_of_the_singular_value_decomposition():
    model, data, states = checkpoints()
    result = sk.landscape(model, data, trajectory=states, points=4, **QUIET)
    rows = np.stack([flat(s) for s in states])
    _, singular, components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    assert result.variance_shares == pytest.approx(shares[:2], rel=1e-8)
    v = components[:2] * np.sign(components[[0, 1], np.abs(components[:2]).argmax(1)])[:, None]
    offsets = rows - flat(model.state_dict())
    places = result.trajectory[["x", "y"]].to_numpy()
    np.testing.assert_allclose(places, offsets @ v.T, rtol=1e-7, atol=1e-9)
    left = offsets - (offsets @ v.T) @ v
    distances = np.linalg.norm(left, axis=1)
    np.testing.assert_allclose(result.trajectory["distance"], distances, rtol=1e-5, atol=1e-7)
    for column, axis in zip(places.T, result.coordinates, strict=True):  # all of it is in the box
        assert axis[0] < column.min() and column.max() < axis[-1]
    directions = [{}, {}]
    for direction, row in zip(directions, v, strict=True):
        parts = np.split(row, np.cumsum([p.numel() for p in model.parameters()])[:-1])
        for (name, p), part in zip(model.named_parameters(), parts, strict=True):
            direction[name] = torch.from_numpy(part).view_as(p)
    agree(result, model, data, directions)


def test_a_trajectory_is_projected_on_any_plane_at_the_nearest_point():
    model, data, states = checkpoints(3)
    result = sk.landscape(model, data, directions="random", trajectory=states, points=2, **QUIET)
    basis = np.stack([flat(d) for d in filter_directions(model, 0, 2)], 1)
    offsets = np.stack([flat(s) for s in states], 1) - flat(model.state_dict())[:, None]
    expected, *_ = np.linalg.lstsq(basis, offsets, rcond=None)
    np.testing.assert_allclose(result.trajectory[["x", "y"]], expected.T, rtol=1e-8)
    distances = np.linalg.norm(offsets - basis @ expected, axis=0)
    np.testing.assert_allclose(result.trajectory["distance"], distances, rtol=1e-8)


def test_directions_of_ones_own():
    model, data = mlp(), examples()
    gradient = torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), model.parameters())
    named = {n: g for (n, _), g in zip(model.named_parameters(), gradient, strict=True)}
    result = sk.landscape(model, data, directions=named, points=3, **QUIET)
    agree(result, model, data, [named])
    bias = {"2.bias": torch.ones(3, dtype=torch.float64)}
    result = sk.landscape(model, data, directions=[named, bias], points=3, **QUIET)
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    agree(result, model, data, [named, {**zero, **bias}])


# --- lines, planes and paths ------------------------------------------------------------------


def test_on_a_line_the_ends_are_the_models_also_with_batch_norm():
    case = next(c for c in CASES if c.name == "cnn_batchnorm")
    a, x, y = case.make()
    b = copy.deepcopy(a)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for t in [*b.parameters(), *(t for t in b.buffers() if t.is_floating_point())]:
            t.mul_(1 + 0.3 * torch.rand(t.shape, generator=generator, dtype=t.dtype))
    result = sk.landscape(a, (x, y), to=b, points=7, **QUIET)
    assert {0.0, 1.0} <= set(result.coordinates[0].tolist())
    assert "between models their means" in result.description
    for t, loss in zip(result.coordinates[0], result.loss, strict=True):
        at = copy.deepcopy(a).eval()
        share = min(max(t, 0.0), 1.0)  # of the buffers, which stay between the models
        with torch.no_grad():
            for p, q in zip(at.parameters(), b.parameters(), strict=True):
                p.lerp_(q, t)
            for p, q in zip(at.buffers(), b.buffers(), strict=True):
                if p.is_floating_point():
                    p.lerp_(q, share)
            assert loss == pytest.approx(F.cross_entropy(at(x), y).item(), rel=1e-11)
    same = sk.landscape(a, (x, y), to=b.state_dict(), points=7, **QUIET)
    np.testing.assert_array_equal(same.loss, result.loss)


def test_recomputed_statistics_are_those_of_the_data():
    case = next(c for c in CASES if c.name == "cnn_batchnorm")
    a, x, y = case.make()
    b, *_ = case.make()
    for p in b.parameters():
        p.data.mul_(1.5)
    result = sk.landscape(a, (x, y), to=b, points=3, batch_norm="recomputed", **QUIET)
    for t, loss in zip(result.coordinates[0], result.loss, strict=True):
        at = copy.deepcopy(a).eval()
        at[1].train()  # 24 examples are one batch
        at[1].momentum = 1.0
        with torch.no_grad():
            for p, q in zip(at.parameters(), b.parameters(), strict=True):
                p.lerp_(q, t)
            at(x)
            at.eval()
            assert loss == pytest.approx(F.cross_entropy(at(x), y).item(), rel=1e-10)
    assert "recomputed at each point" in result.description


def test_a_plane_goes_through_three_models_and_a_path_through_all():
    models, data = [mlp(seed=k) for k in range(4)], examples()
    losses = [F.cross_entropy(m(data[0]), data[1]).item() for m in models]
    plane = sk.landscape(models[0], data, to=models[1:3], points=3, **QUIET)
    places = list(plane.marks.values())
    offsets = [flat(m.state_dict()) - flat(models[0].state_dict()) for m in models[:3]]
    for i in range(3):  # distances are those in weight space
        for j in range(i):
            expected = np.linalg.norm(offsets[i] - offsets[j])
            assert np.linalg.norm(np.subtract(places[i], places[j])) == pytest.approx(expected)
    for k in range(3):
        x, y = places[k]
        at = sk.landscape(
            models[0], data, to=models[1:3], points=3, extent=((x - 1, x + 1), (y - 1, y + 1)),
            **QUIET,
        )  # fmt: skip
        assert at.loss[1, 1] == pytest.approx(losses[k], rel=1e-10)
    path = sk.landscape(models[0], data, to=models[1:], dimensions=1, points=7, **QUIET)
    np.testing.assert_allclose(path.loss[::2], losses, rtol=1e-12)
    half = sk.landscape(models[1], data, to=models[2], points=3, extent=(0, 1), **QUIET)
    assert path.loss[3] == pytest.approx(half.loss[1], rel=1e-12)


# --- both engines, and what does not matter ---------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_points_side_by_side_have_the_losses_of_points_alone(case):
    model, x, y = case.make()
    alone, together = (
        sk.landscape(model, (x, y), points=3, extent=0.3, biases=True, engine=engine, **QUIET)
        for engine in ("loop", "vectorized")
    )
    assert (alone.engine, together.engine) == ("loop", "vectorized")
    for name in ("loss", "std_error", "accuracy"):
        # float64, products in another order
        np.testing.assert_allclose(getattr(alone, name), getattr(together, name), rtol=1e-10)


def test_side_by_side_between_models_statistics_have_their_means_too():
    case = next(c for c in CASES if c.name == "cnn_batchnorm")
    a, x, y = case.make()
    b, *_ = case.make()
    b[1].running_var.mul_(3.0)
    b[0].weight.data.mul_(1.2)
    found = [
        sk.landscape(a, (x, y), to=b, points=5, engine=engine, **QUIET).loss
        for engine in ("loop", "vectorized")
    ]
    np.testing.assert_allclose(*found, rtol=1e-11)


def test_draws_depend_on_the_seed_alone():
    model, data = mlp(), examples()

    def norms(**options):
        return sk.landscape(model, data, points=3, **options, **QUIET)

    first, again, small = norms(), norms(), norms(chunk=3)
    np.testing.assert_array_equal(first.loss, again.loss)
    assert first.norms == small.norms
    np.testing.assert_allclose(first.loss, small.loss, rtol=1e-14)
    assert not np.allclose(first.loss, norms(seed=1).loss)
    # an option that holds biases still does not change what the weights get
    single = copy.deepcopy(model).float()
    x, y = data
    np.testing.assert_allclose(
        sk.landscape(single, (x.float(), y), points=3, **QUIET).loss, first.loss, rtol=1e-5
    )


@pytest.mark.parametrize("options", [{}, {"engine": "vectorized"}, {"batch_norm": "recomputed"}])
def test_the_model_is_left_as_it_was(options):
    case = next(c for c in CASES if c.name == "cnn_batchnorm")
    model, x, y = case.make()
    model.train()
    model[1].momentum = 0.3
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    state = torch.get_rng_state()
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(1.1)
    sk.landscape(model, (x, y), to=other, points=3, **options, **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert (model[1].momentum, model[0].weight.requires_grad) == (0.3, False)
    assert all(p.grad is None for p in model.parameters())


def test_weighted_and_ignored_labels_and_losses_of_ones_own():
    model, (x, y) = mlp(), examples(30)
    weights = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
    point = {"points": 2, "extent": (0.0, 1e-9), "dimensions": 1, **QUIET}
    loss = nn.CrossEntropyLoss(weight=weights)
    found = sk.landscape(model, (x, y), loss=loss, **point)
    assert found.loss[0] == pytest.approx(loss(model(x), y).item(), rel=1e-12)
    ignored = y.clone()
    ignored[::3] = -100
    found = sk.landscape(model, (x, ignored), **point)
    assert found.loss[0] == pytest.approx(F.cross_entropy(model(x), ignored).item(), rel=1e-12)
    right = (model(x).argmax(1) == y)[ignored >= 0].double().mean().item()
    assert found.accuracy[0] == pytest.approx(right)

    def own(outputs, labels):  # whose form vmap does not take
        total = 0.0
        for o, t in zip(outputs, labels, strict=True):
            total = total + F.cross_entropy(o[None], t[None]) * (2.0 if float(t) > 1 else 1.0)
        return total / len(labels)

    found = sk.landscape(model, (x, y), loss=own, **point)
    assert found.loss[0] == pytest.approx(own(model(x), y).item(), rel=1e-12)


def test_points_that_are_not_finite_stay_and_are_told():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()

    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) * torch.exp(1e3 * (self.inner[0].weight.sum() - start))

    start = float(model[0].weight.detach().sum())
    direction = {"inner.0.weight": torch.ones(5, 4, dtype=torch.float64)}
    network = Exploding()
    result = sk.landscape(network, examples(), directions=direction, points=3, **QUIET)
    assert not np.isfinite(result.loss[2]) and np.isfinite(result.loss[:2]).all()
    assert result.not_finite == 1 and "1 points NOT finite" in repr(result)
    assert not np.isfinite(result.frame()["loss"].to_numpy()[2])
    with pytest.raises(ModelError, match="finite at no point"):
        sk.landscape(network, examples(), directions=direction, points=2, extent=(1, 2), **QUIET)


def test_what_cannot_be_drawn_is_refused_with_the_way_out():
    model, data = mlp(), examples()

    def refused(match, error=ArgumentError, **options):
        with pytest.raises(error, match=match):
            sk.landscape(model, data, **{"points": 2, **QUIET, **options})

    refused("expected one of random", directions="gradient")
    refused("needs the checkpoints", directions="trajectory")
    refused("give either", directions="random", to=mlp(seed=1))
    refused("same weights", to=copy.deepcopy(model))
    refused("has shape", ModelError, to=mlp(7))
    refused("has no '2.weight'", ModelError, to=model[:1])
    refused("plane goes through the model and two", to=mlp(seed=1), dimensions=2)
    refused("fewer than 2 dimensions", trajectory=[model, mlp(seed=1)])
    refused("runs from 0 to 2", to=[mlp(seed=1), mlp(seed=2)], dimensions=1, extent=(-1, 1))
    refused("no place on a path", to=[mlp(seed=1)] * 2, dimensions=1, trajectory=[mlp(seed=2)])
    refused("one line", directions=[dict(model.named_parameters())] * 2)
    refused("is no parameter", directions={"weight": torch.ones(2)})
    refused("expected a tensor of shape", directions={"2.bias": torch.ones(2)})
    refused("no parameter moves", parameters="*.bias")
    refused("whole number of at least 2", points=1)
    refused("low < high", extent=-1.0)
    refused("has no BatchNorm", batch_norm="recomputed")
    refused("dimensions must be 1 or 2", dimensions=3)
    refused('must be "filter" or "layer"', normalise="unit")
    refused("positive integer", chunk=0)
    refused("whole number, got None", seed=None)
    refused("expected models or state dicts", to=3)
    with pytest.raises(DataError):
        sk.landscape(model, (data[0], data[1] + 7), points=2, **QUIET)
    bad = mlp(seed=1)
    bad[0].bias.data[0] = torch.nan
    refused("NaN", ModelError, to=bad.state_dict())


def test_a_function_of_the_package_is_not_hidden_by_a_room():
    import sharpkit.landscapes.barrier  # noqa: F401

    assert callable(sk.landscape) and callable(sk.barrier)


def test_names_of_wrappers_are_taken_off_states():
    model, data, other = mlp(), examples(), mlp(seed=1)
    plain = sk.landscape(model, data, to=other, points=3, **QUIET)
    wrapped = {f"module._orig_mod.{k}": v for k, v in other.state_dict().items()}
    found = sk.landscape(nn.DataParallel(model), data, to=wrapped, points=3, **QUIET)
    np.testing.assert_array_equal(found.loss, plain.loss)


def test_frozen_parameters_stay_but_between_models_all_move():
    model, data = mlp(), examples()
    model[0].requires_grad_(False)
    around = sk.landscape(model, data, points=2, **QUIET)
    assert around.left_out == ("0.weight", "0.bias", "2.bias")
    other = mlp(seed=1)
    line = sk.landscape(model, data, to=other, points=3, extent=(0, 1), **QUIET)
    assert line.left_out == ()
    assert line.loss[-1] == pytest.approx(F.cross_entropy(other(data[0]), data[1]).item())
    some = sk.landscape(model, data, to=other, points=3, extent=(0, 1), parameters="2.*", **QUIET)
    mixed = nn.Sequential(model[0], nn.ReLU(), other[2])
    assert some.loss[-1] == pytest.approx(F.cross_entropy(mixed(data[0]), data[1]).item())
    assert set(floating_parameters(model)) == {"2.weight", "2.bias"}
