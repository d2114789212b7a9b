"""Damaged files of every format are read, or refused with the project's own error."""

from __future__ import annotations

import random

import pytest
from reader_files import FORMATS, outcomes

# reading trains, measures, or opens a zoo
SLOW = {"checkpoint", "fit_config", "spectrum", "spectrum_config", "layout", "metrics", "weights"}
SLOW |= {"trial_params", "trial_result", "trial_checkpoint"}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused(tmp_path, name):
    found = outcomes(random.Random(name), FORMATS[name], tmp_path, 20 if name in SLOW else 120)
    assert sum(map(bool, found)) > len(found) / 5, "the damages do no harm"
