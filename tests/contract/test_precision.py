"""Full precision while measuring: torch's flags by both interfaces, and the caller's autocast."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import sharpkit as sk
from sharpkit.contract.precision import current_precision, measuring_precision, precision
from sharpkit.curvature import frobenius_norm, lanczos, trace
from sharpkit.errors import ArgumentError

NEW = hasattr(torch.backends, "fp32_precision")
BACKENDS = torch.backends

# what a user can set, by the interface up to torch 2.8 and by the one from 2.9 on
OLD_FLAGS = {
    (BACKENDS.cudnn, "allow_tf32"): (True, False),
    (BACKENDS.cuda.matmul, "allow_tf32"): (True, False),
    (BACKENDS.cuda.matmul, "allow_fp16_reduced_precision_reduction"): (True, False),
    (BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction"): (True, False),
    (BACKENDS.cuda.matmul, "allow_fp16_accumulation"): (True, False),
}
OF_CUDA, OF_CPU = ("none", "ieee", "tf32"), ("none", "ieee", "tf32", "bf16")
NEW_FLAGS = {}
if NEW:
    NEW_FLAGS = {
        (BACKENDS, "fp32_precision"): OF_CPU,
        (BACKENDS.cuda.matmul, "fp32_precision"): OF_CUDA,
        (BACKENDS.cudnn, "fp32_precision"): OF_CUDA,
        (BACKENDS.cudnn.conv, "fp32_precision"): OF_CUDA,
        (BACKENDS.cudnn.rnn, "fp32_precision"): OF_CUDA,
        (BACKENDS.mkldnn, "fp32_precision"): OF_CPU,
        (BACKENDS.mkldnn.matmul, "fp32_precision"): OF_CPU,
        (BACKENDS.mkldnn.conv, "fp32_precision"): OF_CPU,
        (BACKENDS.mkldnn.rnn, "fp32_precision"): OF_CPU,
    }
FLAGS = {key: values for key, values in {**OLD_FLAGS, **NEW_FLAGS}.items() if hasattr(*key)}

Action = tuple[object, str, object]
ACTIONS: list[Action] = [(*key, value) for key, values in FLAGS.items() for value in values]
ACTIONS += [(torch, "matmul", value) for value in ("highest", "high", "medium")]
SEQUENCES = st.lists(st.sampled_from(ACTIONS), max_size=6)


def act(actions):
    for place, name, value in actions:
        if place is torch:
            torch.set_float32_matmul_precision(value)
        else:
            setattr(place, name, value)


def reading(read):
    try:
        return read()
    except RuntimeError:  # set by both interfaces, and the two disagree
        return "unreadable"


def everything_readable():
    """All flags as a user reads them."""
    found = [reading(lambda key=key: getattr(*key)) for key in FLAGS]
    return [*found, reading(torch.get_float32_matmul_precision)]


def as_at_the_start():
    torch.set_float32_matmul_precision("highest")
    for key in FLAGS:
        if key in OLD_FLAGS:
            setattr(*key, key[1] not in ("allow_tf32", "allow_fp16_accumulation"))
        else:
            setattr(*key, "none")
    if NEW:
        # the flag of this name sets the general one
        torch._C._set_fp32_precision_setter("mkldnn", "all", "none")
    BACKENDS.cudnn.allow_tf32 = True


@pytest.fixture(autouse=True)
def flags_of_the_other_tests():
    as_at_the_start()
    yield
    as_at_the_start()


def assert_all_full():
    assert BACKENDS.cudnn.allow_tf32 is False
    assert BACKENDS.cuda.matmul.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
    for place, name in FLAGS:
        if name == "fp32_precision":
            assert getattr(place, name) == "ieee"
        else:
            assert getattr(place, name) is False


@given(before=SEQUENCES, after=SEQUENCES, kind=st.sampled_from(["full", "tf32"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flags_set_by_any_interface_are_as_if_nothing_was_measured(before, after, kind):
    as_at_the_start()
    act(before)
    expected = [everything_readable()]
    for action in after:  # what torch keeps unseen shows in what later settings do
        act([action])
        expected.append(everything_readable())
    as_at_the_start()
    act(before)
    with precision(kind), measuring_precision():
        if kind == "full":
            assert_all_full()
        assert "unreadable" not in everything_readable()
    found = [everything_readable()]
    for action in after:
        act([action])
        found.append(everything_readable())
    assert found == expected


@given(outside=SEQUENCES, inside=SEQUENCES)
@settings(max_examples=100, deadline=None)
def test_flags_that_a_model_sets_are_gone_afterwards_also_after_an_error(outside, inside):
    as_at_the_start()
    act(outside)
    expected = everything_readable()
    with pytest.raises(ZeroDivisionError), measuring_precision():
        act(inside)
        raise ZeroDivisionError
    assert everything_readable() == expected


def test_tf32_is_allowed_where_it_is_asked_for_and_only_there():
    with precision("tf32"):
        assert current_precision() == "tf32"
        BACKENDS.cudnn.allow_tf32 = False
        with measuring_precision():
            assert BACKENDS.cudnn.allow_tf32 and BACKENDS.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "high"
            if NEW:
                assert BACKENDS.cudnn.conv.fp32_precision == "tf32"
                assert BACKENDS.cudnn.rnn.fp32_precision == "tf32"
                assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"
        assert BACKENDS.cudnn.allow_tf32 is False
        with precision("full"), measuring_precision():
            assert_all_full()
    assert current_precision() == "full"
    with measuring_precision():
        assert_all_full()


def test_another_precision_is_refused():
    with pytest.raises(ArgumentError, match='"full" or "tf32", got \'bf16\''), precision("bf16"):
        pass


def test_measurements_inside_measurements_keep_their_own_precision():
    with measuring_precision():
        with measuring_precision():
            assert_all_full()
        with precision("tf32"):
            assert_all_full()
            with measuring_precision():
                assert BACKENDS.cudnn.allow_tf32
            assert_all_full()
        assert_all_full()
    assert BACKENDS.cudnn.allow_tf32


def test_a_models_own_cudnn_flags_work_inside():
    with measuring_precision():
        with torch.backends.cudnn.flags(enabled=False):
            pass
        assert BACKENDS.cudnn.allow_tf32 is False
        if NEW:
            assert BACKENDS.cudnn.conv.fp32_precision == "ieee"
            assert BACKENDS.cudnn.rnn.fp32_precision == "ieee"


def in_a_thread(function):
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_measure_at_once_leave_the_flags_as_the_first_found_them():
    first = ExitStack()
    first.enter_context(measuring_precision())
    entered, leave = threading.Event(), threading.Event()

    def measure():
        with measuring_precision():
            entered.set()
            leave.wait(600)
            return BACKENDS.cudnn.allow_tf32

    found = []
    thread = threading.Thread(target=lambda: found.append(measure()))
    thread.start()
    assert entered.wait(600)
    first.close()  # before the second
    assert BACKENDS.cudnn.allow_tf32 is False
    leave.set()
    thread.join()
    assert found == [False]
    assert BACKENDS.cudnn.allow_tf32 is True


def test_a_thread_does_not_see_the_setting_of_another_and_cannot_change_its_flags():
    def quick():
        with precision("tf32"), measuring_precision():
            return "measured"

    with precision("tf32"):
        assert in_a_thread(current_precision) == "full"
    with measuring_precision():
        refusal = in_a_thread(quick)
        assert isinstance(refusal, ArgumentError)
        assert "another thread is measuring" in str(refusal)
        assert_all_full()
    assert in_a_thread(quick) == "measured"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_callers_autocast_is_off_inside_and_on_again_afterwards(device):
    with torch.autocast(device, dtype=torch.bfloat16, enabled=True):
        was = torch.is_autocast_enabled(device)  # torch turns it off where there is no GPU
        with measuring_precision():
            assert not torch.is_autocast_enabled(device)
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled(device) == was
        with pytest.raises(ZeroDivisionError), measuring_precision():
            raise ZeroDivisionError
        assert torch.is_autocast_enabled(device) == was
    assert not torch.is_autocast_enabled(device)
    assert torch.autocast_increment_nesting() == 1
    assert torch.autocast_decrement_nesting() == 0


def test_a_models_own_autocast_sees_changed_weights_also_inside_the_callers():
    # nested in another, torch's autocast keeps the weights it has cast until that one ends
    layer = nn.Linear(3, 3)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward():
        return layer(torch.ones(1, 3))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [forward()]
        with torch.no_grad():
            layer.weight.add_(1)
        with measuring_precision():
            outputs.append(forward())
            with torch.no_grad():
                layer.weight.add_(1)
            outputs.append(forward())
    assert outputs[0].dtype == torch.bfloat16
    changes = torch.cat(outputs).float().diff(dim=0)
    torch.testing.assert_close(changes, torch.full((2, 3), 3.0), atol=0.05, rtol=0)


class Noted(torch.autograd.Function):
    """The identity, which notes what torch may do to float32, forwards and backwards."""

    generate_vmap_rule = True
    seen: ClassVar[set[object]] = set()

    @classmethod
    def note(cls):
        autocast = torch.is_autocast_enabled("cpu")
        cls.seen.add((BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision(), autocast))

    @staticmethod
    def forward(x):
        Noted.note()
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        Noted.note()
        return Noted.apply(gradient)

    @staticmethod
    def jvp(ctx, tangent):
        Noted.note()
        return Noted.apply(tangent)


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs):
        return self.second(Noted.apply(self.first(inputs).tanh()))


DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
VECTOR = torch.ones(5 * 5 + 6 * 3)


def product(operator, **arguments):
    return lambda model: operator(model, DATA, **arguments).matvec(VECTOR)


MEASUREMENTS = {
    "m-sharpness": lambda model: sk.m_sharpness(model, DATA, m=[1, 4], rho=0.1),
    "m-sharpness, loop": lambda model: sk.m_sharpness(model, DATA, m=4, rho=0.1, engine="loop"),
    "Hessian": product(sk.HessianOperator),
    "Hessian, graphs not kept": product(sk.HessianOperator, memory_budget=0),
    "Gauss-Newton": product(sk.GaussNewtonOperator),
    "Gauss-Newton, graphs not kept": product(sk.GaussNewtonOperator, memory_budget=0),
    "Fisher": product(sk.FisherOperator),
    "Fisher, empirical": product(sk.FisherOperator, kind="empirical"),
    "eigenvalues": lambda model: sk.top_eigenvalues(sk.HessianOperator(model, DATA), 2),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("kind", ["full", "tf32"])
def test_a_model_runs_in_the_precision_of_the_measurement(name, kind):
    torch.set_float32_matmul_precision("medium")
    Noted.seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), precision(kind):
        MEASUREMENTS[name](Recorder())
    allowed = kind == "tf32"
    assert Noted.seen == {(allowed, "high" if allowed else "highest", False)}
    assert torch.get_float32_matmul_precision() == "medium"


def of_a_hessian(function, **arguments):
    # its products are in full: what is left is the arithmetic on the vectors
    return lambda model: function(sk.HessianOperator(model, DATA), **arguments)


ON_VECTORS = {
    "Lanczos": of_a_hessian(lambda hessian: lanczos(hessian, steps=9).diagonal),
    "density": of_a_hessian(lambda hessian: sk.spectral_density(hessian, steps=9).nodes),
    "eigenvalues": of_a_hessian(lambda hessian: sk.top_eigenvalues(hessian, 2).values),
    "trace": of_a_hessian(lambda hessian: trace(hessian, products=12).value),
    "norm": of_a_hessian(lambda hessian: frobenius_norm(hessian, products=12).value),
    "products": of_a_hessian(lambda hessian: hessian.to_dense().numpy()),
}


@pytest.mark.parametrize("name", ON_VECTORS)
def test_the_callers_autocast_changes_no_digit(name):
    torch.manual_seed(0)
    model = Recorder()
    expected = ON_VECTORS[name](model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ON_VECTORS[name](model)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not NEW, reason="this torch rounds no convolution on the CPU")
def test_a_convolution_on_the_cpu_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    layer, images = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 16, 16)
    expected = layer(images)
    BACKENDS.fp32_precision = "bf16"
    with measuring_precision():
        assert torch.equal(layer(images), expected)
