"""m-sharpness of a zoo that TensorFlow wrote, against what TensorFlow computed for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paths import FIXTURE_REFERENCE, FIXTURE_ZOOS, RECORDED
from torch.nn import functional as F

from sharpkit import load_zoo, m_sharpness

pytestmark = pytest.mark.filterwarnings("ignore:.*settings have no model")


@pytest.fixture(scope="module", params=FIXTURE_ZOOS)
def fixture_zoo(request):
    """The models, the first 64 training examples, and TensorFlow's values."""
    task = load_zoo(request.param)["task1_v4"]
    inputs, labels = task.dataset("train").tensors
    return task, (inputs[:64], labels[:64]), np.load(request.param / FIXTURE_REFERENCE)


@pytest.mark.parametrize("engine", ["vectorized", "loop"])
def test_m_sharpness_equals_tensorflow(fixture_zoo, engine):
    task, data, recorded = fixture_zoo
    ms = [1, 4, 16, 64]
    for id_, entry in task.items():
        result = m_sharpness(entry.load(), data, m=ms, rho=0.05, seed=None, engine=engine)
        for m, value in zip(ms, result.value, strict=True):
            before, after, _ = recorded[f"model_{id_}/msharp_m{m}_rho0.05"].T
            assert value == pytest.approx((after - before).mean(), rel=1e-3)
            # a group's value is the difference of two float32 losses of up to 10, on either side
            np.testing.assert_allclose(
                result.group_values[m, 0.05], after - before, rtol=1e-2, atol=2e-5
            )


def test_losses_and_distances_from_the_start_equal_tensorflow(fixture_zoo):
    task, (inputs, labels), recorded = fixture_zoo
    for id_, entry in task.items():
        model, initial = entry.load(), entry.load("initial")
        with torch.no_grad():
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            pairs = zip(model.parameters(), initial.parameters(), strict=True)
            distance = sum(float((w - w0).double().square().sum()) for w, w0 in pairs)
        np.testing.assert_allclose(
            losses, recorded[f"model_{id_}/loss_per_example"], rtol=1e-4, atol=1e-5
        )
        assert losses.mean() == pytest.approx(recorded[f"model_{id_}/loss"].item(), rel=1e-5)
        stored = recorded[f"model_{id_}/dist_from_init_sq"].item()
        assert distance == pytest.approx(stored, rel=1e-5)


def test_the_recorded_zoo_is_what_a_clone_has():
    sizes = [path.stat().st_size for path in RECORDED.rglob("*") if path.is_file()]
    assert sum(sizes) < 1_500_000
