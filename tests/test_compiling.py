"""Functions that are traced and compiled give what they give without."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import CASES

from sharpkit.compiling import Compiled
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
