"""SAM in some steps, of some parameters, with a radius that changes: against loops by hand."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from cases import CASES
from sam_reference import gradient, m_sam_loop, perturbed_gradient, sgd_momentum
from torch import nn
from torch.nn.functional import cross_entropy

from sharpkit.contract.parameters import select_parameters
from sharpkit.errors import ArgumentError, DivergedError
from sharpkit.training import SAM, SamVariant, sam_groups
from sharpkit.training.sam_timing import sam_timing

SGD = torch.optim.SGD
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
STEPS = 12

# arguments, and the factors on rho of 12 steps
TIMINGS = {
    "every third": ({"interval": 3}, [1, 0, 0] * 4),
    "in between": ({"interval": 2, "start": 4, "stop": 9}, [0] * 4 + [1, 0, 1, 0, 1] + [0] * 3),
    "late": ({"start": 0.75, "total_steps": 12}, [0] * 9 + [1] * 3),
    "early": ({"stop": 0.25, "total_steps": 12}, [1] * 3 + [0] * 9),
    "linear": (
        {"rho_schedule": "linear", "total_steps": 12},
        [(12 - k) / 12 for k in range(12)],
    ),
    "cosine": (
        {"rho_schedule": "cosine", "start": 3, "stop": 9},
        [0] * 3 + [math.cos(math.pi * k / 12) ** 2 for k in range(6)] + [0] * 3,
    ),
    "step": (
        {"rho_schedule": "step", "stop": 8, "total_steps": 12},
        [1] * 4 + [0.1] * 2 + [0.01] * 2 + [0] * 4,
    ),
    "warm-up": ({"rho_warmup": 4}, [0, 0.25, 0.5, 0.75] + [1] * 8),
    "warm-up, then linear": (
        {"rho_warmup": 0.5, "rho_schedule": "linear", "start": 0.5, "total_steps": 12},
        [0] * 6 + [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3],
    ),
    "a function": (
        {"rho_schedule": lambda t: 1 + 2 * t, "interval": 4, "total_steps": 12},
        [1, 0, 0, 0, 1 + 2 * 4 / 12, 0, 0, 0, 1 + 2 * 8 / 12, 0, 0, 0],
    ),
}


def with_closure(opt, model, x, y, m):
    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)


def written_out(opt, model, x, y, m):
    opt.zero_grad()
    cross_entropy(model(x), y).backward()
    if opt.perturbs:
        with opt.perturbed():
            cross_entropy(model(x), y).backward()
    opt.step()


def always_twice(opt, model, x, y, m):
    """A loop that does not ask whether the step is perturbed."""
    opt.zero_grad()
    cross_entropy(model(x), y).backward()
    opt.first_step()
    cross_entropy(model(x), y).backward()
    opt.second_step()


def on_batch(opt, model, x, y, m):
    opt.step_batch(model, x, y, m=m)


LOOPS = [(with_closure, 24), (written_out, 24), (always_twice, 24), (on_batch, 24), (on_batch, 5)]


def problem():
    """A network in float64, and 12 batches of 24 examples."""
    model, _, _ = CASES[0].make()
    generator = torch.Generator().manual_seed(3)
    width = next(model.parameters()).shape[1]
    batches = []
    for _ in range(STEPS):
        x = torch.randn(24, width, generator=generator, dtype=torch.float64)
        batches.append((x, torch.randint(0, 3, (24,), generator=generator)))
    return model.eval(), batches


def by_hand(model, batches, rhos, m=24, adaptive=False):
    """SGD with momentum and decay in float64; each step at its radius, 0 for a plain gradient.

    A radius may be a list, one per parameter.
    """
    velocity = None
    for (x, y), rho in zip(batches, rhos, strict=True):
        if not (any(rho) if isinstance(rho, list) else rho):
            g = gradient(model, lambda net, x=x, y=y: cross_entropy(net(x), y))
        elif m < len(x):
            g = m_sam_loop(model, x, y, m, rho, adaptive)
        else:
            loss = lambda net, x=x, y=y: cross_entropy(net(x), y)  # noqa: E731
            g = perturbed_gradient(model, loss, rho, adaptive)
        own = [p.detach() for p in model.parameters()]
        new, velocity = sgd_momentum(own, g, velocity, lr=0.1, momentum=0.9, decay=0.01)
        with torch.no_grad():
            for p, w in zip(model.parameters(), new, strict=True):
                p.copy_(w)
    return model


def assert_close(model, expected, tolerance=1e-12):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        difference = (p - q).detach().abs().max()
        assert float(difference) <= tolerance * max(1.0, float(q.detach().abs().max()))


@pytest.mark.parametrize(
    ("timing", "step", "m"),
    [
        *[(timing, with_closure, 24) for timing in TIMINGS],
        *[("in between", *loop) for loop in LOOPS[1:]],
        *[("warm-up, then linear", *loop) for loop in LOOPS[1:]],
    ],
)
def test_steps_are_those_of_the_loop_by_hand(timing, step, m):
    arguments, factors = TIMINGS[timing]
    model, batches = problem()
    expected = by_hand(copy.deepcopy(model), batches, [0.1 * f for f in factors], m)
    opt = SAM(model.parameters(), SGD, rho=0.1, **arguments, **SETTINGS)
    for (x, y), factor in zip(batches, factors, strict=True):
        assert opt.perturbs == (factor > 0)
        step(opt, model, x, y, m)
    assert opt.steps == STEPS
    assert_close(model, expected)


@pytest.mark.parametrize(("step", "m"), [(with_closure, 24), (on_batch, 24), (on_batch, 5)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_only_the_selected_parameters_are_perturbed(step, m, adaptive):
    model, batches = problem()
    chosen = ["*.bias", "0.weight"]
    rhos = [
        0.1 if n.endswith("bias") or n == "0.weight" else 0.0
        for n in dict(model.named_parameters())
    ]
    expected = by_hand(copy.deepcopy(model), batches, [rhos, 0.0] * 6, m, adaptive)
    opt = SAM(sam_groups(model, chosen), SGD, rho=0.1, adaptive=adaptive, interval=2, **SETTINGS)
    for x, y in batches:
        step(opt, model, x, y, m)
    assert_close(model, expected)


def test_the_share_is_that_of_the_steps_counted_one_by_one():
    for interval, start, stop, warmup in itertools.product((1, 2, 5), (0, 3, 7), (8, 12), (0, 1)):
        timing = sam_timing(
            interval=interval, start=start, stop=stop, rho_warmup=warmup if stop - start > 5 else 0
        )
        for left, right in itertools.combinations((0, 1, 4, 9, 13, 20), 2):
            counted = sum(timing.factor(step) > 0 for step in range(left, right))
            assert timing.share(left, right) == counted / (right - left)


# --- one pass ----------------------------------------------------------------------------------


def counted(model):
    """Forward and backward passes of a model's first layer, as they happen."""
    counts = {"forward": 0, "backward": 0}

    def note(kind):
        def hook(*_):
            counts[kind] += 1

        return hook

    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(note("forward"))
    first.register_full_backward_hook(note("backward"))
    return counts


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(("step", "m"), [loop for loop in LOOPS if loop[0] is not always_twice])
def test_a_plain_step_is_one_pass(step, m):
    model, batches = problem()
    counts = counted(model)
    opt = SAM(model.parameters(), SGD, rho=0.1, interval=3, **SETTINGS)
    for number, (x, y) in enumerate(batches):
        before = dict(counts)
        step(opt, model, x, y, m)
        passes = {kind: counts[kind] - before[kind] for kind in counts}
        if number % 3:
            assert passes == {"forward": 1, "backward": 1}
        elif step is not on_batch:
            assert passes == {"forward": 2, "backward": 2}


def test_plain_steps_are_those_of_the_base_optimizer_bit_for_bit():
    """BatchNorm sees the whole batch, dropout draws once, a variant has nothing to combine."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    plain = copy.deepcopy(model)
    _, batches = problem()
    double = SamVariant("double", combine=lambda g, h: {k: g[k] + h[k] for k in h})
    opt = SAM(model.parameters(), SGD, rho=0.1, start=12, variant=double, **SETTINGS)
    other = SGD(plain.parameters(), **SETTINGS)
    for number, (x, y) in enumerate(batches):
        x = x[:, :6].float()
        torch.manual_seed(number)
        if number % 3 == 0:
            opt.step_batch(model, x, y, m=5, loss=lambda f, y: cross_entropy(f, y))
        else:
            (with_closure, written_out)[number % 2](opt, model, x, y, 24)
        torch.manual_seed(number)
        other.zero_grad()
        cross_entropy(plain(x), y).backward()
        other.step()
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_accumulated_plain_gradients_and_a_scaler():
    model, batches = problem()
    expected = copy.deepcopy(model)
    opt = SAM(model.parameters(), SGD, rho=0.1, start=5, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other = SGD(expected.parameters(), lr=0.1)
    for x, y in batches[:2]:
        opt.accumulate_groups(model, x, y, m=4, scaler=scaler)
        cross_entropy(expected(x), y).backward()
    scaler.step(opt)
    other.step()
    assert_close(model, expected)
    assert opt.steps == 1


def test_parameters_of_others_get_no_gradient():
    model, ((x, y), *_) = problem()
    opt = SAM(model[0].parameters(), SGD, rho=0.1, start=5, lr=0.1)
    opt.step_batch(model, x, y, m=4)
    assert model[0].weight.grad is not None and model[2].weight.grad is None


def test_a_plain_step_of_a_loss_that_is_not_finite_is_refused():
    model, ((x, y), *_) = problem()
    opt = SAM(model.parameters(), SGD, rho=0.1, start=5, lr=0.1)
    with pytest.raises(DivergedError, match="not finite"):
        opt.step_batch(model, x * math.nan, y, m=4)
    assert all(p.grad is None for p in model.parameters()) and opt.steps == 0
    with pytest.raises(ArgumentError, match="m must be a whole number"):
        opt.step_batch(model, x, y, m=0)


# --- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 6])
@pytest.mark.parametrize(("step", "m"), [(with_closure, 24), (on_batch, 5)])
def test_a_state_goes_on_at_its_step_with_the_same_bits(stop_at, step, m, tmp_path):
    arguments = {
        "interval": 2,
        "start": 3,
        "stop": 0.9,
        "total_steps": 12,
        "rho_schedule": "cosine",
    }

    def optimizer(model):
        return SAM(sam_groups(model, "*.weight"), SGD, rho=0.1, **arguments, **SETTINGS)

    model, batches = problem()
    opt = optimizer(model)
    for number, (x, y) in enumerate(batches):
        if number == stop_at:
            torch.save((model.state_dict(), opt.state_dict()), tmp_path / "c.pt")
        step(opt, model, x, y, m)
    other, _ = problem()
    weights, state = torch.load(tmp_path / "c.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed = optimizer(other)
    resumed.load_state_dict(state)
    assert resumed.steps == stop_at
    for x, y in batches[stop_at:]:
        step(resumed, other, x, y, m)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_and_later_groups_count_on():
    model, batches = problem()
    opt = SAM(model[0].parameters(), SGD, rho=0.1, interval=2, lr=0.1)
    with_closure(opt, model, *batches[0], 24)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert copied.steps == 1 and not copied.perturbs and copied.timing == opt.timing
    opt.add_param_group({"params": model[2].parameters()})
    assert [group["sam_step"] for group in opt.param_groups] == [1, 1]
    with_closure(opt, model, *batches[1], 24)
    assert opt.steps == 2 and opt.perturbs


def test_a_state_without_a_count_needs_one():
    model, _ = problem()
    state = SGD(model.parameters(), lr=0.3).state_dict()
    SAM(model.parameters(), SGD, lr=0.1).load_state_dict(state)
    opt = SAM(model.parameters(), SGD, start=3, lr=0.1)
    with pytest.raises(ArgumentError, match=r"how many steps.*\['sam_step'\] = n"):
        opt.load_state_dict(state)
    for group in state["param_groups"]:
        group["sam_step"] = 3
    opt.load_state_dict(state)
    assert opt.perturbs and opt.param_groups[0]["lr"] == 0.3


def test_a_dropped_step_and_a_failed_one_do_not_count():
    model, ((x, y), *_) = problem()
    opt = SAM(model.parameters(), SGD, interval=2, lr=0.1)
    cross_entropy(model(x), y).backward()
    opt.first_step()
    opt.restore()

    def failing():
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(failing)
    assert opt.steps == 0 and opt.perturbs


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval is 0: expected a whole number of steps >= 1"),
        ({"interval": 2.0}, "interval is 2.0"),
        ({"interval": True}, "interval is True"),
        ({"start": 0.8}, "start is 0.8, a fraction of .*give total_steps= as well"),
        ({"stop": 0.8}, "stop is 0.8, a fraction"),
        ({"rho_warmup": 0.1}, "rho_warmup is 0.1, a fraction .*total_steps= as well, or stop="),
        ({"start": -1}, "start is -1: expected a step, from 0"),
        ({"start": 11, "total_steps": 10}, "start is 11: expected a step, from 0 to 10"),
        ({"start": 1.5, "total_steps": 10}, "start is 1.5: expected a whole number of steps, or"),
        ({"start": "late"}, "start is 'late'"),
        ({"start": math.nan, "total_steps": 10}, "start is nan"),
        ({"start": 5, "stop": 5}, r"no step: start is 5, step 5, and stop is 5, step 5"),
        ({"start": 0.96, "total_steps": 10}, "no step: start is 0.96, step 10 of 10"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"rho_schedule": "cosine"}, "how long it takes is not known: give total_steps="),
        ({"rho_schedule": "exp", "stop": 5}, "rho_schedule is 'exp': expected one of 'co"),
        ({"rho_schedule": 0.5, "stop": 5}, "rho_schedule is 0.5"),
        ({"rho_warmup": 1, "interval": 5, "stop": 5}, "of the 5 from start to stop every 5th is"),
        ({"rho_warmup": 6, "stop": 5}, "rho_warmup is 6: expected a step, from 0 to 5"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        SAM([nn.Parameter(torch.ones(1))], SGD, lr=0.1, **arguments)


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan, "1", None])
def test_a_schedule_must_give_a_factor(factor):
    model, ((x, y), *_) = problem()
    opt = SAM(model.parameters(), SGD, lr=0.1, total_steps=5, rho_schedule=lambda _: factor)
    with pytest.raises(ArgumentError, match=r"rho_schedule gave .* at the progress 0"):
        opt.step_batch(model, x, y, m=4)


def test_a_step_beyond_the_last_is_refused():
    for step, m in LOOPS:
        model, ((x, y), *_) = problem()
        opt = SAM(model.parameters(), SGD, lr=0.1, total_steps=2, rho_schedule="linear")
        for _ in range(2):
            step(opt, model, x, y, m)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ArgumentError, match="this is step 3, but total_steps is 2"):
            step(opt, model, x, y, m)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_perturbed_step_still_needs_its_second_pass():
    model, _ = problem()
    opt = SAM(model.parameters(), SGD, lr=0.1, start=1)
    opt.step()
    with pytest.raises(ArgumentError, match="SAM needs two passes"):
        opt.step()


# --- which parameters ----------------------------------------------------------------------------


class RootMeanSquareNorm(nn.Module):
    """A layer of somebody else's."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


def test_norm_layers_are_found_by_their_kind():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 3, 3),
            "batch": nn.BatchNorm1d(3),
            "layer": nn.LayerNorm((2, 3)),
            "group": nn.GroupNorm(1, 3),
            "instance": nn.InstanceNorm1d(3, affine=True),
            "rms": nn.RMSNorm(3),
            "own": RootMeanSquareNorm(3),
            "last": nn.Linear(3, 2),
        }
    )
    both = ["batch", "layer", "group", "instance"]
    expected = {f"{n}.{kind}" for n in both for kind in ("weight", "bias")}
    assert set(select_parameters(model, "norm")) == {*expected, "rms.weight", "own.weight"}
    first, others = sam_groups(model, "norm")
    assert len(first["params"]) == 10 and others["rho"] == 0.0 and len(others["params"]) == 4
    assert set(select_parameters(model, ["norm", "last.*"])) > {"rms.weight", "last.bias"}


def test_a_parameter_of_that_name_comes_first():
    model = nn.Module()
    model.norm, model.layer = nn.Parameter(torch.ones(2)), nn.LayerNorm(2)
    assert list(select_parameters(model, "norm")) == ["norm"]


def test_selections_that_leave_nothing_are_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="no parameter is of a normalisation layer; the model"):
        sam_groups(model, "norm")
    with pytest.raises(ArgumentError, match="no parameter matches 'head"):
        sam_groups(model, ["0.*", "head.*"])
    model[0].requires_grad_(False)
    with pytest.raises(ArgumentError, match=r"0.weight, 0.bias would be perturbed, but none of"):
        sam_groups(model, "0.*")
    assert [len(group["params"]) for group in sam_groups(model, None)] == [2]
    with pytest.raises(ArgumentError, match="no parameter of the model requires gradients"):
        sam_groups(model.requires_grad_(False), None)
