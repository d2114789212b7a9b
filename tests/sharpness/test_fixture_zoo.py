"""m-sharpness of a zoo that TensorFlow wrote, against what TensorFlow computed for it."""

from __future__ import annotations

import numpy as np
import pytest
from paths import SHARED, needs_shared

from sharpkit import load_zoo, m_sharpness

pytestmark = needs_shared


@pytest.fixture(scope="module")
def task():
    return load_zoo(SHARED / "pgdl_fixture")["task1_v4"]


@pytest.fixture(scope="module")
def recorded():
    return np.load(SHARED / "pgdl_fixture/expected/task1_v4_reference.npz")


@pytest.mark.parametrize("id_", ["20", "21", "22", "23", "32", "35", "38", "41"])
@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_m_sharpness_equals_tensorflow(task, recorded, id_, engine):
    inputs, labels = task.dataset("train").tensors
    ms = [1, 4, 16, 64]
    result = m_sharpness(
        task[id_].load(), (inputs[:64], labels[:64]), m=ms, rho=0.05, seed=None, engine=engine
    )
    for m, value in zip(ms, result.value, strict=True):
        before, after, _ = recorded[f"model_{id_}/msharp_m{m}_rho0.05"].T
        assert value == pytest.approx((after - before).mean(), rel=1e-3)
        # a group's value is the difference of two float32 losses of up to 10, on either side
        np.testing.assert_allclose(
            result.group_values[m, 0.05], after - before, rtol=1e-2, atol=2e-5
        )
