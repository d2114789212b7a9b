"""Hyperparameter grids: complete ones pass in silence, everything else is named."""

from itertools import product

from hypothesis import given, settings, strategies as st

from sharpkit.zoo import check_grid
from sharpkit.zoo.grid import possible_values


def entry(possible, **current):
    return {
        "hparams": {
            name: {"possible_values": possible[name], "current_value": value}
            for name, value in current.items()
        }
    }


POSSIBLE = {"depth": [1, 2], "dropout": [0.0, 0.5], "bn": [True, False]}
GRID = {
    str(i): entry(POSSIBLE, **dict(zip(POSSIBLE, values, strict=True)))
    for i, values in enumerate(product(*POSSIBLE.values()))
}


def test_a_complete_grid_is_fine():
    assert check_grid(GRID) == []
    assert possible_values(GRID) == POSSIBLE


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(GRID)), min_size=1))
def test_the_count_of_missing_settings_is_right(kept):
    messages = check_grid({id_: GRID[id_] for id_ in kept})
    expected = len(GRID) - len(kept)
    assert [m.split()[0] for m in messages] == ([str(expected)] if expected else [])


def test_many_missing_settings_are_cut_short():
    [message] = check_grid({"0": GRID["0"]})
    assert message.startswith("7 of 8 settings have no model: depth=1 dropout=0.0 bn=False; ")
    assert message.endswith(", ...")


def test_doubled_settings_are_named():
    assert check_grid({**GRID, "8": GRID["3"], "9": GRID["3"]}) == [
        "3 models share the setting depth=1 dropout=0.5 bn=False: 3, 8, 9"
    ]


def test_replicates_of_every_setting_are_no_fault_but_a_lost_one_is():
    replicates = {f"{id_}{r}": entry for id_, entry in GRID.items() for r in (0, 1)}
    assert check_grid(replicates) == []
    del replicates["30"]
    assert check_grid(replicates) == [
        "1 of 8 settings has fewer than 2 models: depth=1 dropout=0.5 bn=False"
    ]


def test_values_outside_the_grid_are_named():
    grid = {**GRID, "9": entry(POSSIBLE, depth=3, dropout=0.0, bn=True)}
    assert check_grid(grid) == [
        "depth=3 of model 9 is not among the possible values [1, 2] (1 such models)"
    ]


def test_values_are_compared_as_text():
    grid = {"0": entry({"lr": ["0.1"]}, lr=0.1)}
    assert check_grid(grid) == []


def test_different_hyperparameters_are_named():
    [message] = check_grid({**GRID, "9": entry({"lr": [1]}, lr=1)})
    assert "different hyperparameters; compare 9" in message


def test_different_possible_values_are_named():
    other = entry({**POSSIBLE, "depth": [1, 2, 3]}, depth=3, dropout=0.0, bn=True)
    assert "models list different possible values of 'depth'" in check_grid({**GRID, "9": other})


def test_a_huge_grid_is_counted_without_being_enumerated():
    axes = {f"h{i}": list(range(100)) for i in range(10)}
    [message] = check_grid({"0": entry(axes, **dict.fromkeys(axes, 0))})
    assert message == f"{100**10 - 1} of {100**10} settings have no model"


def test_unusable_entries_are_left_out():
    assert check_grid({**GRID, "x": 3, "y": {}, "z": {"hparams": []}}) == []
    assert check_grid({}) == []
