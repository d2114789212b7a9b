"""How products are computed: several at once, compiled, and without waiting for the device."""

import gc
import subprocess
import sys
import warnings
import weakref
from collections import Counter

import pytest
import torch
from cores import slow_beyond
from curvature_cases import BUILDERS, dense_hessian, make, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkit.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, lanczos
from sharpkit.curvature.together import can_go_together, vectors_together

KINDS = [HessianOperator, GaussNewtonOperator, FisherOperator]
VIEWS = {
    "_unsafe_view", "alias", "detach", "expand", "new_empty", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
WAITS = ("_local_scalar_dense", "equal", "allclose", "masked_select", "nonzero", "_unique2")


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self):
        """What a device is given to do."""
        return sum(calls for name, calls in self.count.items() if name not in VIEWS)

    @property
    def waits(self):
        return sum(self.count[name] for name in WAITS)


def counted(run):
    with Calls() as calls:
        run()
    return calls


# --- several vectors at once ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
def test_vectors_together_are_multiplied_as_alone(name, kind):
    model, data = make(name)
    operator = kind(model, data, chunk=6)
    assert operator._recording.way.together == 1  # on a CPU
    v = torch.randn(operator.shape[0], 5, dtype=torch.float64)
    alone = operator.matmat(v)
    product = operator._recording.chunks[0].product
    assert operator._problem.run(lambda: can_go_together(operator._problem, product))
    operator._recording.way = operator._recording.way._replace(together=2)  # 2, 2 and 1
    assert relative(operator.matmat(v), alone) < 1e-12
    operator.close()
    assert relative(operator.matmat(v), alone) < 1e-12


def test_four_vectors_together_launch_what_one_does():
    model, data = make("residual")
    operator = HessianOperator(model, data)
    v = torch.randn(operator.shape[0], 4, dtype=torch.float64)
    alone = counted(lambda: operator.matmat(v[:, :1])).kernels
    four = counted(lambda: operator.matmat(v)).kernels
    operator._recording.way = operator._recording.way._replace(together=4)
    together = counted(lambda: operator.matmat(v)).kernels
    assert four > 3.5 * alone
    assert together < 1.5 * alone


def test_lanczos_with_vectors_together_has_the_same_nodes():
    model, data = make("cnn")
    operator = HessianOperator(model, data)
    nodes = lanczos(operator, steps=8, probes=3, seed=0).quadrature()[0]
    operator._recording.way = operator._recording.way._replace(together=3)
    again = lanczos(operator, steps=8, probes=3, seed=0).quadrature()[0]
    assert abs(again - nodes).max() < 1e-8 * abs(nodes).max()


class _Elementwise(torch.autograd.Function):
    """x² whose backward pass looks at numbers, which no batch of vectors allows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad if bool(torch.isfinite(grad).all()) else grad


class _Looking(nn.Module):
    def forward(self, x):
        return _Elementwise.apply(x)


def test_a_backward_pass_that_cannot_be_batched_is_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), _Looking()).double()
    data = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    operator = HessianOperator(model, data)
    product = operator._recording.chunks[0].product
    assert not operator._problem.run(lambda: can_go_together(operator._problem, product))


def test_how_many_vectors_go_together_follows_from_sizes_and_device():
    def weights(count, device):
        return [torch.empty(count, device=device)]

    class OnGPU:
        device = torch.device("cuda")

        def __init__(self, nbytes):
            self.nbytes = nbytes

    mega = 2**20
    assert vectors_together(mega, weights(10, "cpu"), None) == 1
    assert vectors_together(512 * mega, [OnGPU(mega)], None) == 8
    assert vectors_together(512 * mega, [OnGPU(mega)], 4096 * mega) == 2
    assert vectors_together(8192 * mega, [OnGPU(mega)], None) == 1
    assert vectors_together(512 * mega, [OnGPU(200 * mega)], None) == 1  # large


# --- compiled ---------------------------------------------------------------------------------


@pytest.fixture
def quick_compiler(monkeypatch):
    """Traces and partitions as the real one, and runs what comes out without generating code."""
    monkeypatch.setattr("sharpkit.curvature.compiled.BACKEND", "aot_eager")


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", slow_beyond(1, BUILDERS))
def test_compiled_products_are_the_eager_ones(name, kind):
    model, data = make(name)
    eager = kind(model, data, chunk=6)
    v = torch.randn(eager.shape[0], 2, dtype=torch.float64)
    expected = eager.matmat(v)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compile")
        compiled = kind(model, data, chunk=6, compile=True)
    assert (eager.compiled, compiled.compiled) == (False, True)
    assert compiled.kept_chunks == 3
    assert 0 < compiled.kept_bytes < 2 * eager.kept_bytes + 1000
    assert compiled.loss == eager.loss
    assert relative(compiled.matmat(v), expected) < 1e-12
    compiled.close()
    assert relative(compiled.matmat(v), expected) < 1e-12


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_products_of_which_nothing_is_kept_are_the_same(kind):
    model, data = make("batchnorm")
    eager = kind(model, data, chunk=6)
    v = torch.randn(eager.shape[0], 2, dtype=torch.float64)
    compiled = kind(model, data, chunk=6, compile=True, memory_budget=0)
    assert (compiled.compiled, compiled.kept_chunks) == (True, 0)
    assert relative(compiled.matmat(v), eager.matmat(v)) < 1e-12


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_product_computes_no_forward_pass_and_keeps_the_weights_it_had():
    model, data = make("residual")
    operator = HessianOperator(model, data, compile=True)
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    expected = operator @ v
    eager = counted(lambda: HessianOperator(model, data) @ v).count
    product = counted(lambda: operator @ v).count
    # four convolutions: two for a tangent and two gradients each, fewer at the first
    assert product["convolution"] <= 8 < eager["convolution"]
    assert product["_log_softmax"] == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(operator @ v, expected)


@pytest.mark.usefixtures("quick_compiler")
def test_compiled_products_notice_what_eager_ones_do():
    from sharpkit.errors import DataError

    model, (x, y) = make("mlp")
    operator = HessianOperator(model, (x, y), compile=True, chunk=6, memory_budget=0)
    x[7] += 1
    with pytest.raises(DataError, match="have changed"):
        operator @ torch.ones(operator.shape[0])


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_operator_is_freed_without_the_garbage_collector():
    operator = HessianOperator(*make("mlp"), compile=True)
    operator @ torch.ones(operator.shape[0])
    reference = weakref.ref(operator)
    gc.collect()
    gc.disable()
    try:
        del operator
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_traced_runs_eagerly_with_one_warning(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), _Looking()).double()
    data = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    expected = kind(model, data)
    with pytest.warns(UserWarning, match=r"compile=True has no effect: .*data") as caught:
        operator = kind(model, data, compile=True)
    assert sum("compile" in str(w.message) for w in caught) == 1
    assert not operator.compiled
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    assert torch.equal(operator @ v, expected @ v)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("sharpkit.curvature.compiled.BACKEND", "no such compiler")
    model, data = make("mlp")
    with pytest.warns(UserWarning, match=r"compile=True has no effect: .*no such compiler"):
        operator = HessianOperator(model, data, compile=True)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    assert relative(operator @ v, dense_hessian("mlp", "cross_entropy") @ v) < 1e-10


def test_a_wrong_compiler_is_not_believed(monkeypatch):
    from torch._dynamo import register_backend

    def halved(graph, examples):
        return lambda *args: [0.5 * t for t in graph(*args)]

    register_backend(halved, name="sharpkit_test_halved")
    monkeypatch.setattr("sharpkit.curvature.compiled.BACKEND", "sharpkit_test_halved")
    model, data = make("mlp")
    with pytest.warns(UserWarning, match="products differ from those of the eager graph by 0.5"):
        operator = HessianOperator(model, data, compile=True)
    assert not operator.compiled


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inductor_gives_the_same_products(dtype):
    from torch._inductor.exc import InductorError

    model, data = make("residual", dtype=dtype)
    eager = HessianOperator(model, data)
    v = torch.randn(eager.shape[0], dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        operator = HessianOperator(model, data, compile=True)
    if not operator.compiled:  # no C++ compiler on this machine; the reason is in the warning
        assert any("compile=True has no effect" in str(w.message) for w in caught)
        pytest.skip(f"{InductorError.__name__}: {caught[0].message}")
    assert relative(operator @ v, eager @ v) < 100 * torch.finfo(dtype).eps


def test_the_compiler_is_imported_only_when_asked_for():
    code = (
        "import sys, torch, sharpkit\n"
        "data = torch.ones(4, 3), torch.arange(4) % 2\n"
        "H = sharpkit.HessianOperator(torch.nn.Linear(3, 2), data)\n"
        "H @ torch.ones(8)\n"
        "assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- no waiting for the device ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("name", ["cnn", "residual"])
def test_the_host_waits_a_constant_number_of_times(name, budget, kind, monkeypatch):
    # fingerprints are of the examples, in the memory of the host: no device is waited for
    monkeypatch.setattr("sharpkit.curvature.chunks.checksum", lambda examples: 0)
    model, (x, y) = make(name)

    def waits(copies):
        data = x.repeat(copies, 1, 1, 1), y.repeat(copies)
        how = {"chunk": 4, "memory_budget": budget, "progress": False}
        construction = counted(lambda: kind(model, data, **how)).waits
        operator = kind(model, data, **how)
        v = torch.randn(operator.shape[0], 2, dtype=torch.float64)
        return operator.chunks, construction, counted(lambda: operator.matmat(v)).waits

    few, many = waits(1), waits(4)
    assert many[0] > 3 * few[0]
    assert many[1:] == few[1:]
    if budget is None:
        assert many[2] == 0


def test_the_same_seed_gives_the_same_bits():
    model, data = make("residual", dtype=torch.float32)
    runs = [lanczos(HessianOperator(model, data), steps=5, probes=2, seed=0) for _ in range(2)]
    assert (runs[0].diagonal == runs[1].diagonal).all()
    assert (runs[0].off_diagonal == runs[1].off_diagonal).all()
