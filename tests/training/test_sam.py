"""The SAM optimizer against Algorithm 1, and in every kind of training loop."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import contextmanager

import pytest
import torch
from cases import CASES, Case
from sam_reference import perturbed_gradient, sgd_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.errors import ArgumentError, ModelError
from sharpkit.training import SAM, SamVariant

SGD = torch.optim.SGD
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def closure_step(opt: SAM, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)


def two_steps(opt: SAM, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.first_step()
    F.cross_entropy(model(x), y).backward()
    opt.second_step()


def context_step(opt: SAM, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with opt.perturbed():
        F.cross_entropy(model(x), y).backward()
    opt.step()


def batch_step(opt: SAM, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt.step_batch(model, x, y, m=len(x))


STEPS = [closure_step, two_steps, context_step, batch_step]


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    return CASES[0].make(dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_equals_algorithm_1_step_for_step(case: Case, adaptive, step):
    model, x, y = case.make()
    model.eval()
    expected, velocity = copy.deepcopy(model), None
    opt = SAM(model.parameters(), SGD, rho=0.1, adaptive=adaptive, **SETTINGS)
    for _ in range(3):
        g = perturbed_gradient(expected, lambda net: F.cross_entropy(net(x), y), 0.1, adaptive)
        w, velocity = sgd_momentum(weights(expected), g, velocity, lr=0.1, momentum=0.9, decay=0.01)
        with torch.no_grad():
            for p, t in zip(expected.parameters(), w, strict=True):
                p.copy_(t)
        step(opt, model, x, y)
    for p, t in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, t, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_have_radii_of_their_own_in_one_ball(step, adaptive):
    model, x, y = mlp()
    rhos = [0.2, 0.2, 0.0, 0.0, 0.05, 0.05]
    g = perturbed_gradient(model, lambda net: F.cross_entropy(net(x), y), rhos, adaptive)
    groups = [
        {"params": model[0].parameters(), "rho": 0.2},
        {"params": model[2].parameters(), "rho": 0.0},
        {"params": model[4].parameters()},
    ]
    expected = [w - 0.1 * a for w, a in zip(weights(model), g, strict=True)]
    opt = SAM(groups, SGD, rho=0.05, adaptive=adaptive, lr=0.1)
    step(opt, model, x, y)
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_radius_zero_is_the_base_optimizer_bit_for_bit(step, base):
    model, x, y = mlp(torch.float32)
    x = x.float()
    plain = copy.deepcopy(model)
    opt, reference = SAM(model.parameters(), base, rho=0, lr=0.1), base(plain.parameters(), lr=0.1)
    for _ in range(3):
        step(opt, model, x, y)
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
    assert same(weights(model), weights(plain))


def test_a_step_with_radius_zero_is_one_synchronised_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    x = torch.randn(6, 4)
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "rho": 0.0}]
    opt = SAM(groups, SGD, rho=0.1, lr=0.1)
    calls, contexts = 0, 0

    def closure():
        nonlocal calls
        calls += 1
        loss = model(x).square().mean()
        loss.backward()
        return loss

    @contextmanager
    def no_sync():
        nonlocal contexts
        contexts += 1
        yield

    for rho, expected in ((0.1, 2), (0.0, 3), (0.1, 5)):
        opt.param_groups[0]["rho"] = rho
        before = [p.detach().clone() for p in model.parameters()]
        loss = opt.step(closure, no_sync=no_sync)
        assert calls == expected and loss > 0
        assert not all(map(torch.equal, before, model.parameters()))
    assert contexts == 2  # a gradient that is stepped along has to be exchanged
    variant = SamVariant("both", combine=lambda plain, perturbed: plain)
    SAM(model.parameters(), SGD, rho=0.0, lr=0.1, variant=variant).step(closure)
    assert calls == 7  # what combines both gradients gets both


@pytest.mark.parametrize("step", STEPS)
def test_weights_come_back_bit_for_bit(step):
    model, x, y = mlp(torch.float32)
    before = weights(model)
    opt = SAM(model.parameters(), SGD, rho=3.0, lr=0.0)
    for _ in range(5):
        step(opt, model, x.float(), y)
    assert same(before, weights(model))


class SometimesUsed(nn.Module):
    """Each branch is used in one call out of two, as with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(40, 3), nn.Linear(40, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.even(x) if self.calls % 2 else self.odd(x)


@pytest.mark.parametrize("step", STEPS[:3])
def test_parameters_reached_by_one_pass_only_do_not_stay_displaced(step):
    _, x, y = mlp(torch.float32)
    model = SometimesUsed()
    before = weights(model)
    step(SAM(model.parameters(), SGD, rho=1.0, lr=0.0), model, x.float(), y)
    assert same(before, weights(model))


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_closure_that_fails_leaves_the_weights_and_statistics_as_they_were(failing_call):
    model, x, y = CASES[2].make()
    model.train()
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if calls == failing_call:
            raise KeyboardInterrupt
        return loss

    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert same(before, weights(model))
    assert int(model.norm1.num_batches_tracked) == 1  # the first pass alone counts
    assert not nn.modules.module._global_forward_pre_hooks
    closure_step(opt, model, x, y)  # and training can go on
    assert not same(before, weights(model))


def test_an_error_inside_perturbed_puts_everything_back():
    model, x, y = mlp()
    opt, before = SAM(model.parameters(), SGD, lr=0.1), weights(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ZeroDivisionError), opt.perturbed():
        assert not same(before, weights(model))
        _ = 1 / 0
    assert same(before, weights(model))
    with pytest.raises(ArgumentError, match="two passes"):
        opt.step()


def test_restore_drops_a_first_step():
    model, x, y = mlp()
    opt, before = SAM(model.parameters(), SGD, lr=0.1), weights(model)
    F.cross_entropy(model(x), y).backward()
    opt.first_step()
    opt.restore()
    opt.restore()
    assert same(before, weights(model))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_zero_gradient_does_not_move_the_weights(adaptive):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = SAM([w], SGD, rho=1.0, adaptive=adaptive, lr=0.1)
    w.grad = torch.zeros(2)
    opt.first_step()
    assert torch.equal(w.data, torch.tensor([1.0, 2.0]))
    opt.second_step()
    assert torch.isfinite(w).all()


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-42),
        (torch.float32, 1e37),
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
    ],
)
def test_the_norm_neither_under_nor_overflows(dtype, scale):
    w = nn.Parameter(torch.zeros(2, dtype=dtype))
    opt = SAM([w], SGD, rho=0.5, lr=0.1)
    w.grad = torch.tensor([3 * scale, 4 * scale], dtype=dtype)
    opt.first_step()
    torch.testing.assert_close(w.data, torch.tensor([0.3, 0.4], dtype=dtype), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_dtypes_move_by_rho(dtype):
    w = nn.Parameter(torch.zeros(2, dtype=dtype))
    opt = SAM([w], SGD, rho=0.5, lr=0.1)
    w.grad = torch.tensor([6e-5, 8e-5]).to(dtype)
    opt.first_step()
    torch.testing.assert_close(w.data.to(torch.complex64).real, torch.tensor([0.3, 0.4]),
                               rtol=2e-2, atol=0)  # fmt: skip


@pytest.mark.parametrize("base", [SGD, torch.optim.Adam])
def test_a_state_dict_resumes_bit_for_bit(base, tmp_path):
    settings = {"momentum": 0.9} if base is SGD else {}

    def optimizer(model: nn.Module) -> SAM:
        groups = [{"params": model[0].parameters(), "rho": 0.2},
                  {"params": model[2:].parameters(), "adaptive": True}]  # fmt: skip
        return SAM(groups, base, rho=0.1, lr=0.01, **settings)

    model, x, y = mlp()
    opt = optimizer(model)
    for _ in range(2):
        closure_step(opt, model, x, y)
    opt.param_groups[0]["rho"] = 0.3
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    other, _, _ = mlp()
    other.load_state_dict(saved["model"])
    resumed = optimizer(other)
    resumed.load_state_dict(saved["opt"])
    assert [g["rho"] for g in resumed.param_groups] == [0.3, 0.1]
    for _ in range(2):
        closure_step(opt, model, x, y)
        closure_step(resumed, other, x, y)
    assert same(weights(model), weights(other))


def test_a_checkpoint_of_the_plain_optimizer_can_be_continued():
    model, x, y = mlp()
    plain = SGD(model.parameters(), lr=0.3, momentum=0.9)
    F.cross_entropy(model(x), y).backward()
    plain.step()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.3 and opt.param_groups[0]["rho"] == 0.1
    assert opt.base_optimizer.param_groups is opt.param_groups
    assert opt.base_optimizer.state is opt.state
    closure_step(opt, model, x, y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_train_on_their_own(copied):
    model, x, y = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, **SETTINGS)
    closure_step(opt, model, x, y)
    other_model, other = copied((model, opt))
    closure_step(other, other_model, x, y)
    closure_step(opt, model, x, y)
    assert same(weights(model), weights(other_model))
    assert other.base_optimizer.param_groups is other.param_groups


@pytest.mark.parametrize("step", STEPS)
def test_schedulers_of_lr_and_rho_act_on_the_step(step, recwarn):
    model, x, y = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    step(opt, model, x, y)
    scheduler.step()
    opt.param_groups[0]["rho"] = 0.4
    g = perturbed_gradient(model, lambda net: F.cross_entropy(net(x), y), 0.4)
    expected = [w - 0.1 * a for w, a in zip(weights(model), g, strict=True)]
    step(opt, model, x, y)
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=1e-12, atol=1e-13)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_gradients_may_be_accumulated_and_clipped():
    model, x, y = mlp()
    g = perturbed_gradient(model, lambda net: F.cross_entropy(net(x), y), 0.1)
    norm = torch.cat([a.flatten() for a in g]).norm()
    expected = [w - 0.1 * a * (0.01 / norm) for w, a in zip(weights(model), g, strict=True)]
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    for phase in (opt.first_step, None):
        for part in (slice(0, 12), slice(12, 24)):
            (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        if phase:
            phase()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.second_step(zero_grad=True)
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=1e-6, atol=1e-9)
        assert p.grad is None


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_changes_nothing_but_the_scale(clip):
    model, x, y = mlp(torch.float32)
    x = x.float()
    plain = copy.deepcopy(model)
    opt, reference = (SAM(net.parameters(), SGD, rho=0.1, **SETTINGS) for net in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        opt.first_step()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.first_step()
        F.cross_entropy(plain(x), y).backward()
        if clip:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        reference.second_step()
    for p, t in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("overflow_in", ["first", "second", "both"])
def test_a_step_that_the_scaler_skips_puts_the_weights_back(overflow_in):
    model, x, y = mlp(torch.float32)
    x, before = x.float(), weights(model)
    opt = SAM(model.parameters(), SGD, rho=0.1, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def backward(overflow: bool) -> None:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if overflow:
            model[0].weight.grad[0, 0] = math.inf

    backward(overflow_in != "second")
    opt.first_step()
    backward(overflow_in != "first")
    scaler.step(opt)
    scaler.update()
    assert same(before, weights(model))
    assert scaler.get_scale() == (1024.0 if overflow_in == "first" else 512.0)
    assert not opt.state_dict()["state"]  # the base optimizer has not stepped


def test_m_sam_works_with_a_grad_scaler():
    model, x, y = mlp(torch.float32)
    x, plain = x.float(), copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt, reference = (SAM(net.parameters(), SGD, rho=0.1, lr=0.1) for net in (model, plain))
    opt.accumulate_groups(model, x, y, m=4, scaler=scaler)
    scaler.step(opt)
    scaler.update()
    reference.step_batch(plain, x, y, m=4)
    for p, t in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, t, rtol=1e-5, atol=1e-7)


def test_one_autocast_around_both_passes_sees_the_perturbed_weights():
    model, x, y = mlp(torch.float32)
    x, outputs = x.float(), []
    opt = SAM(model.parameters(), SGD, rho=5.0, lr=0.0)

    def closure() -> Tensor:
        outputs.append(model(x).detach())
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        opt.step(closure)
        outputs.append(model(x).detach())
    assert outputs[0].dtype == torch.bfloat16
    assert (outputs[1] - outputs[0]).abs().max() > 0.5
    assert torch.equal(outputs[2], outputs[0])


@pytest.mark.parametrize("step", STEPS)
def test_running_statistics_move_once_as_in_a_plain_step(step):
    model, x, y = CASES[2].make()
    plain = copy.deepcopy(model).train()
    model.train()
    plain(x)
    step(SAM(model.parameters(), SGD, rho=0.5, lr=0.1), model, x, y)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_running_statistics_of_a_compiled_model_move_once_too():
    model, x, y = CASES[2].make()
    plain = copy.deepcopy(model).train()
    compiled = torch.compile(model.train(), backend="eager")
    for _ in range(2):
        plain(x)
        closure_step(SAM(model.parameters(), SGD, rho=0.5, lr=0.0), compiled, x, y)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [closure_step, batch_step])
def test_both_passes_have_the_same_dropout_masks(step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double().train()
    _, x, y = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.0, lr=1.0)
    step(opt, model, x, y)  # plans
    before = weights(model)
    torch.manual_seed(1)
    g = perturbed_gradient(model, lambda net: F.cross_entropy(_seeded(net, x), y), 0.3)
    opt.param_groups[0]["rho"] = 0.3
    torch.manual_seed(1)
    step(opt, model, x, y)
    for p, w, a in zip(model.parameters(), before, g, strict=True):
        torch.testing.assert_close(p.detach(), w - a, rtol=1e-12, atol=1e-13)


def _seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


def test_groups_can_be_added_later():
    model, x, y = mlp()
    opt = SAM(model[0].parameters(), SGD, rho=0.1, lr=0.1)
    opt.add_param_group({"params": model[2:].parameters(), "rho": 0.1, "lr": 0.1})
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["momentum"] == 0
    g = perturbed_gradient(model, lambda net: F.cross_entropy(net(x), y), 0.1)
    expected = [w - 0.1 * a for w, a in zip(weights(model), g, strict=True)]
    closure_step(opt, model, x, y)
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), t, rtol=1e-12, atol=1e-13)
    with pytest.raises(ArgumentError, match="at least 0"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": -1})


def test_a_sparse_gradient_is_refused_before_anything_moves():
    table = nn.Embedding(5, 3, sparse=True)
    opt, before = SAM(table.parameters(), SGD, lr=0.1), table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ModelError, match="sparse"):
        opt.first_step()
    assert torch.equal(before, table.weight)


@pytest.mark.parametrize("rho", [-0.05, math.nan, math.inf, "x"])
def test_a_bad_radius_is_refused(rho):
    model, x, y = mlp()
    with pytest.raises(ArgumentError, match="at least 0"):
        SAM(model.parameters(), SGD, rho=rho, lr=0.1)
    with pytest.raises(ArgumentError, match="at least 0"):
        SAM([{"params": model.parameters(), "rho": rho}], SGD, lr=0.1)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    opt.param_groups[0]["rho"] = rho
    before = weights(model)
    with pytest.raises(ArgumentError, match="at least 0"):
        closure_step(opt, model, x, y)
    assert same(before, weights(model))


def test_misuse_is_explained():
    model, x, y = mlp()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ArgumentError, match="closure"):
        opt.step()
    with pytest.raises(ArgumentError, match="closure"):
        opt.second_step()
    opt.first_step()
    with pytest.raises(ArgumentError, match="already"):
        opt.first_step()
    with pytest.raises(ArgumentError, match="begun"):
        closure_step(opt, model, x, y)
    with pytest.raises(ArgumentError, match="perturbed"):
        opt.accumulate_groups(model, x, y, m=1)
    opt.restore()
    with pytest.raises(ArgumentError, match="no parameter that this optimizer trains"):
        opt.step_batch(nn.Linear(40, 3).double(), x, y, m=1)
    with pytest.raises(ArgumentError, match="must be a class"):
        SAM(model.parameters(), SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match="closure of its own"):
        SAM(model.parameters(), torch.optim.LBFGS)
