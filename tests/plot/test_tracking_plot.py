"""The picture of a training shows its curvature, wherever the threshold is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sharpkit.plot import tracking


@pytest.mark.parametrize(
    ("threshold", "label"),
    [
        ([np.nan, 12.0, 12.0], "threshold"),
        ([np.nan, 1e4, 2e4], "threshold, above: 1e+04 or more"),
        ([np.nan, np.inf, np.inf], "threshold"),
    ],
)
def test_a_threshold_far_above_does_not_press_the_curve_flat(threshold, label):
    rows = pd.DataFrame({"step": [0, 1, 2], "lambda_max": [np.nan, 4.0, 8.0]})
    axis = tracking(rows.assign(threshold=threshold)).axes[0]
    assert [line.get_label() for line in axis.lines] == ["λmax", label]
    assert 8.0 < axis.get_ylim()[1] < 20.0
