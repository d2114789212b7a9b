"""What is handed to the wrong place is refused with what belongs there."""

import pytest

import sharpkit as sk
from sharpkit.errors import ArgumentError

MEASURE = sk.MSharpness(m=1, rho=0.1)


@pytest.mark.parametrize("zoo", ["public_data", MEASURE])
def test_a_zoo_is_opened_first(zoo):
    with pytest.raises(ArgumentError, match=r"such as load_zoo\(path\)"):
        sk.score_zoo(zoo, MEASURE)


@pytest.mark.parametrize("measures", ["m_sharpness", ["output_margin"], sk.MSharpness])
def test_a_measure_is_made_of_its_name(measures):
    with pytest.raises(ArgumentError, match=r'or make_measure\("output_margin"\)'):
        sk.score_zoo(sk.embedded_zoo(), measures)


@pytest.mark.parametrize("function", [sk.evaluate, sk.combine, sk.selection_regret])
def test_a_run_is_opened_first(function):
    with pytest.raises(ArgumentError, match=r"Scores.open\(run\) reads them, got 'runs/first'"):
        function("runs/first")


def test_scores_are_evaluated_before_they_are_plotted():
    scores = sk.score_zoo(sk.embedded_zoo(), MEASURE, n=8, limit=1, progress=False)
    with pytest.raises(ArgumentError, match=r"table of sharpkit\.evaluate, got Scores"):
        sk.plot.predictive_power(scores)
