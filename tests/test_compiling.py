"""Functions that are traced and compiled give what they give without."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES

from sharpkit import compiling
from sharpkit.compiling import Compiled, compiled, trace
from sharpkit.contract.holding import run_eagerly
from sharpkit.sharpness import passes
from sharpkit.sharpness.m_sharpness import m_sharpness


def test_a_compiled_function_takes_arguments_of_other_forms_as_well():
    called = []

    def double(x):
        called.append(len(x))
        return 2 * x

    run = Compiled(double, "doubling", "eager")
    assert run(torch.ones(3)).tolist() == [2.0] * 3
    assert run(torch.full((3,), 5.0)).tolist() == [10.0] * 3
    assert called == [3]  # traced once, with its first arguments
    assert run(torch.ones(2)).tolist() == [2.0] * 2
    assert called == [3, 2]


def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning():
    def decides(x):
        return x if x.sum().item() > 0 else -x

    run = Compiled(decides, "deciding", "eager")
    with pytest.warns(UserWarning, match="deciding runs without being compiled"):
        assert run(torch.ones(2)).tolist() == [1.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(-torch.ones(2)).tolist() == [1.0, 1.0]


def test_what_a_function_takes_from_elsewhere_is_an_input():
    scale = torch.full((2,), 3.0)

    def scaled(x, names):
        return {"scaled": scale * x["x"] + scale, "kept": [None, x["x"] - 1.0], "name": names}

    args = {"x": torch.ones(2)}, "some"
    code = compiled(trace(scaled, args), args, "aot_eager")
    assert [tensor is scale for tensor in code.taken] == [True]
    scale += 1.0  # in place: it is the same tensor
    found = code(args)
    assert found["scaled"].tolist() == [8.0, 8.0]
    assert found["kept"][0] is None and found["kept"][1].tolist() == [0.0, 0.0]
    assert found["name"] == "some"
    assert code(args, [torch.zeros(2)])["scaled"].tolist() == [0.0, 0.0]


def test_code_keeps_the_types_that_it_was_traced_with_under_autocast():
    def product(x):
        return x @ x

    args = (torch.randn(4, 4),)
    with torch.autocast("cpu", torch.bfloat16):
        code = compiled(trace(product, args), args, "aot_eager")
        assert code(args).dtype == torch.bfloat16
    assert code(args).dtype == torch.bfloat16
    code = compiled(trace(product, args), args, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert code(args).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_compiled_modules_run_eagerly_but_what_is_compiled_here_does_not(monkeypatch):
    import torch._dynamo

    calls = []

    def counting(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", counting)
    run = Compiled(lambda x: 2 * x, "doubling")
    with run_eagerly():
        run(torch.ones(2))
        assert run(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(calls) == 3  # one of them when it was compiled


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda c: c.name)
def test_compiled_m_sharpness_is_the_same(case, monkeypatch):
    made = []

    class Graph(Compiled):
        """Traced, and run without generating code, which takes long."""

        def __init__(self, function, name):
            super().__init__(function, name, "aot_eager")
            made.append(name)

    monkeypatch.setattr(passes, "Compiled", Graph)
    model, x, y = case.make()
    options = {"m": [1, 2], "rho": [0.1, 0.3], "chunk": 10}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        compiled = m_sharpness(model, (x, y), **options, compile=True)
    torch.testing.assert_close(
        compiled.value, m_sharpness(model, (x, y), **options).value, rtol=1e-9, atol=1e-12
    )
    assert set(made) == {"gradients", "perturbed losses"}
