"""m-SAM whose passes over groups are compiled, against the same without."""

from __future__ import annotations

import copy
import gc
import json
import random
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from cases import CASES
from click.testing import CliRunner
from cores import slow_beyond
from sam_reference import close, m_sam_loop
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk
from sharpkit import compiling
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, RunError
from sharpkit.training import SAM, SamVariant, compiled_passes, m_sam_gradient, step_plan

MLP, CNN, RESIDUAL = CASES[0], CASES[1], CASES[2]
STEPS = 3
SLOPE = 2.0


@pytest.fixture
def compilations(monkeypatch):
    """How many graphs were compiled, by a backend that traces as inductor does and runs eagerly."""
    from torch._dynamo.backends.registry import lookup_backend

    made = []

    def counting(graph, inputs):
        made.append(graph)
        return lookup_backend("eager")(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", counting)
    return made


@pytest.fixture
def quiet():
    """Nothing falls back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "compile=True" in str(w.message)]


def optimizer_of(model: nn.Module, **options) -> SAM:
    return SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, **options)


def trained(model, x, y, make=optimizer_of, steps=STEPS, **options):
    """A copy of a model after some steps, and the losses before each."""
    model = copy.deepcopy(model)
    optimizer = make(model)
    losses = [optimizer.step_batch(model, x, y, **options) for _ in range(steps)]
    return model, torch.stack(losses)


def assert_alike(model, x, y, tolerance=1e-10, **options):
    (plain, losses), (compiled, found) = (
        trained(model, x, y, **options, compile=compile) for compile in (False, True)
    )
    torch.testing.assert_close(found, losses, rtol=tolerance, atol=0)
    pairs = zip(compiled.state_dict().values(), plain.state_dict().values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def of_groups(adaptive: bool):
    """Two parameter groups with radii of their own."""

    def make(model: nn.Module) -> SAM:
        first, *rest = model.parameters()
        groups = [{"params": [first], "rho": 0.3}, {"params": rest, "adaptive": adaptive}]
        return SAM(groups, torch.optim.SGD, rho=0.1, lr=0.05)

    return make


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "case", slow_beyond(2, [MLP, CNN, RESIDUAL, CASES[5]]), ids=lambda case: case.name
)
@pytest.mark.parametrize("m", slow_beyond(2, [1, 4, 5]))
def test_steps_are_the_same_as_without(case, m, compilations):
    model, x, y = case.make()
    assert_alike(model.eval(), x, y, m=m)
    assert len(compilations) == 1


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("case", slow_beyond(1, [CNN, MLP]), ids=lambda case: case.name)
@pytest.mark.parametrize(
    "make",
    [
        lambda model: optimizer_of(model, adaptive=True, rho=0.5),
        of_groups(False),
        of_groups(True),
        lambda model: optimizer_of(model, rho_schedule="linear", total_steps=STEPS),
        lambda model: optimizer_of(model, rho=0.0, variant=SamVariant("both", combine=halves)),
        lambda model: optimizer_of(model, variant=SamVariant("both", combine=halves)),
        lambda model: optimizer_of(model, variant=SamVariant("signs", direction=signs)),
    ],
    ids=["adaptive", "radii", "adaptive radii", "schedule", "no radius", "combined", "direction"],
)
def test_steps_of_every_kind_are_the_same(case, make, compilations):
    model, x, y = case.make()
    assert_alike(model.eval(), x, y, m=1, make=make)
    assert len(compilations) == 1


def halves(plain, perturbed):
    return {name: (plain[name] + g) / 2 for name, g in perturbed.items()}


def signs(gradient, weights):
    return {name: 0.01 * g.sign() for name, g in gradient.items()}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("case", [MLP, CNN, RESIDUAL], ids=lambda case: case.name)
def test_float32_is_the_same_to_rounding(case, compilations):
    model, x, y = case.make(torch.float32)
    assert_alike(model.eval(), x, y, m=1, tolerance=2e-4)
    assert len(compilations) == 1


@pytest.mark.usefixtures("quiet", "compilations")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_batchnorm_in_training_move_as_without(momentum):
    model, x, y = RESIDUAL.make()
    for layer in (model.norm1, model.norm2):
        layer.momentum = momentum
    before = copy.deepcopy(model.state_dict())
    assert_alike(model.train(), x, y, m=6)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_one_compilation_serves_all_steps_of_a_form(compilations, quiet):
    model, x, y = MLP.make()
    optimizer = optimizer_of(model)
    for _ in range(5):
        optimizer.step_batch(model, x, y, m=1, compile=True)
    assert len(compilations) == 1
    optimizer.step_batch(model, x[:20], y[:20], m=1, compile=True)  # the last batch of an epoch
    optimizer.step_batch(model, x, y, m=1, compile=True)
    optimizer.step_batch(model, x[:20], y[:20], m=1, compile=True)
    assert len(compilations) == 2


@pytest.mark.parametrize("groups", [24, 23, 5])
def test_chunks_are_of_one_form_where_they_can_be(groups, compilations, quiet, monkeypatch):
    monkeypatch.setattr(step_plan, "_groups_at_a_time", lambda *a: groups)
    model, x, y = MLP.make()
    expected = m_sam_loop(model, x, y, 1, 0.1)
    for _ in range(2):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1, compile=True)
        assert close([p.grad for p in model.parameters()], expected, 1e-10)
    assert len(compilations) == 1


def test_weights_and_buffers_that_changed_are_seen(compilations, quiet):
    model, x, y = CNN.make()
    model.eval()
    model[0].requires_grad_(False)
    found = []
    for _ in range(3):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1, compile=True)
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        other = copy.deepcopy(model)
        other.zero_grad()
        m_sam_gradient(other, x, y, m=1, rho=0.1)
        expected = [p.grad for p in other.parameters() if p.requires_grad]
        assert close(found[-1], expected, 1e-10)
        with torch.no_grad():
            model[-1].weight.mul_(1.5)
            model[0].weight.add_(0.1)  # which is not trained
            model[1].running_mean = model[1].running_mean + 0.2  # another tensor
    assert not close(found[1], found[0], 1e-3) and not close(found[2], found[1], 1e-3)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model, loss: setattr(model[1], "negative_slope", 0.3),
        lambda model, loss: setattr(loss, "label_smoothing", 0.2),
        lambda model, loss: setattr(loss, "weight", torch.tensor([1.0, 5.0, 1.0]).double()),
        lambda model, loss: loss.weight.mul_(torch.tensor([1.0, 5.0, 1.0])),
    ],
    ids=["slope", "smoothing", "class weights", "class weights in place"],
)
def test_settings_that_changed_are_seen(change, compilations, quiet):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)).double()
    loss = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64))
    _, x, y = MLP.make()
    found = []
    for _ in range(2):
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1, loss=loss, compile=True)
        compiled = [p.grad for p in model.parameters()]
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1, loss=loss)
        assert close(compiled, [p.grad for p in model.parameters()], 1e-10)
        found.append(compiled)
        change(model, loss)
    assert not close(found[1], found[0], 1e-3)


def test_what_a_loss_encloses_is_seen(compilations, quiet):
    model, x, y = MLP.make()
    settings, power = {"factor": 1.0}, partial(pow, exp=1)

    def loss(outputs, labels):
        return power(settings["factor"] * F.cross_entropy(SLOPE * outputs, labels))

    found = []
    for factor in (1.0, 1.0, 3.0):
        settings["factor"] = factor
        model.zero_grad()
        m_sam_gradient(model, x, y, m=1, rho=0.1, loss=loss, compile=True)
        found.append([p.grad for p in model.parameters()])
    assert len(compilations) == 2
    assert close(found[1], found[0], 1e-12) and not close(found[2], found[0], 1e-3)


def test_labels_that_are_ignored_are_so_in_later_batches_too(compilations, quiet):
    model, x, y = MLP.make()
    for labels in (y, y.masked_fill(torch.arange(24) % 3 == 0, -100)):
        model.zero_grad()
        m_sam_gradient(model, x, labels, m=2, rho=0.1, compile=True)
        compiled = [p.grad for p in model.parameters()]
        model.zero_grad()
        m_sam_gradient(model, x, labels, m=2, rho=0.1)
        assert close(compiled, [p.grad for p in model.parameters()], 1e-10)


@pytest.mark.usefixtures("quiet", "compilations")
def test_a_scaler_multiplies_the_gradient():
    model, x, y = MLP.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = []
    for scale in (None, 4.0, 16.0):
        model.zero_grad()
        if scale == 16.0:
            scaler.update(scale)
        m_sam_gradient(model, x, y, m=1, rho=0.1, scaler=scaler if scale else None, compile=True)
        found.append([p.grad for p in model.parameters()])
    for factor, other in zip((4.0, 16.0), found[1:], strict=True):
        assert close(other, [factor * g for g in found[0]], 1e-12)


@pytest.mark.usefixtures("quiet")
def test_bfloat16_autocast_is_compiled_as_it_is(compilations):
    model, x, y = MLP.make(torch.float32)
    found = []
    for compile in (True, True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            m_sam_gradient(model, x.float(), y, m=1, rho=0.05, compile=compile)
        found.append([p.grad for p in model.parameters()])
    assert len(compilations) == 1
    assert close(found[1], found[2], 2e-2)
    assert not close(found[1], [p.grad for p in exact(model, x, y)], 1e-5)  # in half precision


def exact(model, x, y):
    other = copy.deepcopy(model)
    other.zero_grad()
    m_sam_gradient(other, x.float(), y, m=1, rho=0.05)
    return list(other.parameters())


# --- what is not compiled -------------------------------------------------------------------------


class Selects(nn.Module):
    """Has a shape that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[x > 1e9].sum()


class Looks(nn.Module):
    """Brings values to Python."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.sum()) * 0.0


class Odd(nn.Module):
    """Has an operation that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
            raise RuntimeError("not to be traced")
        return x


class Counts(nn.Module):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


class Drops(nn.Module):
    """Is left out now and then, as Python's or NumPy's generator decides."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x if self.draw() < 0.999 else 0.5 * x


class Shares(nn.Module):
    """Uses a buffer by another tensor with its memory, which NumPy made."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.asarray(self.factor))


def hooked() -> nn.Module:
    layer = nn.Identity()
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.3), "it draws random numbers"),
        (Drops(random.random), "it draws random numbers"),
        (Drops(lambda: np.random.rand()), "it draws random numbers"),  # noqa: NPY002
        (Drops(np.random.default_rng(0).random), "a forward pass changes 'draw' of a Drops"),
        (hooked(), "of the hooks of '4.1'"),
        (Counts(), "a forward pass changes 'calls' of a Counts"),
        (Shares(), "it uses a parameter or buffer otherwise than as such"),
        (Selects(), "shapes depend on values"),
        (Looks(), "its groups cannot run as one batch"),
        (Odd(), "that failed: RuntimeError: not to be traced"),
    ],
    ids=[
        "dropout",
        "python",
        "numpy",
        "generator",
        "hook",
        "counter",
        "memory",
        "shape",
        "values",
        "odd",
    ],
)
def test_what_cannot_be_compiled_runs_as_without_and_says_so_once(layer, reason, compilations):
    model, x, y = MLP.make()
    model[3] = nn.Sequential(nn.Tanh(), layer.double())
    model[4], model = model[4], nn.Sequential(*model[:3], nn.Identity(), model[3], model[4])
    model.train()
    results = []
    for compile in (False, True):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append((*trained(model, x, y, m=1, compile=compile), torch.rand(3)))
        told = [w for w in caught if "compile=True" in str(w.message)]
        assert len(told) == compile
    (plain, losses, after), (other, found, also) = results
    assert told[0].category is UserWarning
    assert f"m-SAM of Sequential runs without being compiled, because {reason}" in str(
        told[0].message
    )
    assert torch.equal(losses, found) and torch.equal(after, also)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not compilations


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"m": 24}, "groups of 24 are evaluated one after the other"),
        ({"m": 2, "engine": "loop"}, "groups of 2 are evaluated one after the other"),
    ],
)
def test_where_no_groups_run_side_by_side_there_is_nothing_to_compile(
    options, reason, compilations
):
    model, x, y = MLP.make()
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m_sam_gradient(model, x, y, rho=0.1, compile=True, **options)
        assert [reason in str(w.message) for w in caught] == [True] * expected
    assert not compilations


def test_a_wrong_compiler_is_not_believed(monkeypatch):
    def halved(graph, inputs):
        return lambda *args: [0.5 * t for t in graph(*args)]

    monkeypatch.setattr(compiling, "BACKEND", halved)
    model, x, y = MLP.make()
    with pytest.warns(UserWarning, match="it gave other numbers then"):
        m_sam_gradient(model, x, y, m=1, rho=0.1, compile=True)
    assert close([p.grad for p in model.parameters()], m_sam_loop(model, x, y, 1, 0.1), 1e-10)


def test_code_that_fails_later_is_not_believed_either(monkeypatch):
    calls = []

    def spoilt(graph, inputs):
        def run(*args):
            calls.append(1)
            found = graph(*args)
            spoils = len(calls) > 3
            return [t * torch.nan if spoils and t.is_floating_point() else t for t in found]

        return run

    monkeypatch.setattr(compiling, "BACKEND", spoilt)
    model, x, y = MLP.make()
    expected = m_sam_loop(model, x, y, 1, 0.1)
    for warns in (False, False, True, False):
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m_sam_gradient(model, x, y, m=1, rho=0.1, compile=True)
        assert ["not finite" in str(w.message) for w in caught] == [True] * warns
        assert close([p.grad for p in model.parameters()], expected, 1e-10)
    (plan,) = step_plan._PLANS[model].values()
    assert plan.one_batch


def test_ever_new_forms_are_not_compiled_for_ever(compilations, monkeypatch):
    monkeypatch.setattr(compiled_passes, "_MOST_FORMS", 2)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    y = torch.arange(8) % 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (5, 6, 7, 8, 5):
            m_sam_gradient(model, torch.randn(8, 2, length), y, m=1, compile=True)
    assert len(compilations) == 2
    assert ["2 forms of chunks already" in str(w.message) for w in caught] == [True]


def test_a_compiled_model_is_freed(compilations, quiet):
    model, x, y = CNN.make()
    m_sam_gradient(model.eval(), x, y, m=1, compile=True)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# --- the compiler itself --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("case", "dtype", "m", "tolerance"),
    [(RESIDUAL, torch.float64, 4, 1e-10), (CNN, torch.float32, 1, 2e-4)],
    ids=["residual", "cnn"],
)
def test_inductor_gives_the_same_steps(case, dtype, m, tolerance):
    model, x, y = case.make(dtype)
    model.eval()
    assert_alike(model, x, y, m=m, tolerance=tolerance)


# --- fit and the command --------------------------------------------------------------------------


def fitted(out=None, **options):
    model, x, y = MLP.make(torch.float32)
    options = {"optimizer": "sam", "m": 2, "batch_size": 8, "lr": 0.05, "epochs": 2, **options}
    return sk.fit(model, (x.float(), y), out=out, progress=False, **options)


def test_fit_compiles_and_notes_it(tmp_path, compilations, quiet):
    plain, compiled = fitted(), fitted(tmp_path, compile=True)
    assert len(compilations) == 1
    for a, b in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["compile"] is True
    with pytest.raises(RunError, match="compile: true there, null now"):
        fitted(tmp_path, epochs=2)


def test_what_was_begun_without_has_no_setting_of_it(tmp_path):
    fitted(tmp_path)
    assert "compile" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(RunError, match="compile: null there, true now"):
        fitted(tmp_path, compile=True)


def test_only_sam_has_passes_to_compile():
    with pytest.raises(ArgumentError, match='compile belongs to SAM: choose the optimizer "sam"'):
        fitted(optimizer="sgd", m=None, compile=True)


def test_the_command_has_it(tmp_path, compilations, quiet):
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8)).astype(np.uint8)
    y = np.arange(64) % 3
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    arguments = [
        "train", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run"), "--arch", "vgg-4x1",
        "--epochs", "1", "--batch-size", "16", "--optimizer", "sam", "--m", "1", "--compile",
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert not result.exit_code, result.output
    assert len(compilations) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] is True


def test_cross_entropy_of_torch_is_compiled_too(compilations, quiet):
    model, x, y = MLP.make()
    assert_alike(model, x, y, m=1, loss=F.cross_entropy)
    assert_alike(model, x, y, m=1, loss=lambda f, t: F.cross_entropy(f, t))
    assert len(compilations) == 2
