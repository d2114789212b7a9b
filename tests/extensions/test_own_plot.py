"""A plot from outside the package, of a run's scores, beside one of the package's own."""

import matplotlib.pyplot as plt
import pytest

import sharpkit as sk


def value_against_gap(scores, *, ax=None):
    """A panel of one measure: its value on every model against the generalization gap."""
    ax = plt.gca() if ax is None else ax
    table = scores.frame().merge(scores.metrics(), on=["task", "model"])
    ax.errorbar(table["value"], table["generalization_gap"], xerr=table["std_error"], fmt="o")
    ax.set(xlabel=table["measure"].iloc[0], ylabel="generalization gap")
    return ax.figure


@pytest.fixture
def scores():
    measure = sk.MSharpness(m=[1, 16], rho=0.1)
    return sk.score_zoo(sk.embedded_zoo(), measure, n=32, limit=12, progress=False)


@pytest.mark.filterwarnings("ignore:task:UserWarning", "ignore:conditioning sets:UserWarning")
def test_it_stands_beside_a_plot_of_the_package(scores, tmp_path):
    figure, (left, right) = plt.subplots(1, 2)
    table = sk.evaluate(scores, resamples=50)
    assert sk.plot.predictive_power(table, statistic="kendall_tau", ax=left) is figure
    assert value_against_gap(scores, ax=right) is figure
    assert len(right.containers[0].lines[0].get_xdata()) == 24
    assert left.get_xlabel() == "m" and right.get_xlabel() == "m_sharpness"
    figure.savefig(tmp_path / "both.png")
    assert plt.imread(tmp_path / "both.png").std() > 0.01
    plt.close(figure)
