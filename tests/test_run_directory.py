"""One configuration per run directory: written once, repeated or refused."""

from __future__ import annotations

import pytest

from sharpkit.errors import RunError
from sharpkit.run_directory import changes, claim, read_claim


def test_a_claim_is_kept_and_another_one_refused(tmp_path):
    path, config = tmp_path / "new" / "config.json", {"lr": 0.1, "grid": {"width": (4, 8)}}
    claim(path, config)
    content = path.read_bytes()
    claim(path, config)  # a tuple is a list in JSON
    for other in ({**config, "lr": 0.2}, {"lr": 0.1}, {**config, "seed": 0}):
        with pytest.raises(RunError, match=r"config.json: was started with another configuration"):
            claim(path, other)
    assert path.read_bytes() == content
    assert read_claim(path)["grid"] == {"width": [4, 8]}


def test_a_claim_that_is_damaged_is_told_with_the_remedy(tmp_path):
    path = tmp_path / "config.json"
    for content in ("{", "[]", ""):
        path.write_text(content)
        with pytest.raises(RunError, match=r"config.json is damaged; delete it, or choose another"):
            claim(path, {"lr": 0.1})


@pytest.mark.parametrize(
    ("there", "now", "told"),
    [
        ({"a": 1}, {"a": 1, "b": None}, ""),
        ({"a": 1}, {"b": 2}, "a: 1 there, null now; b: null there, 2 now"),
        ({"p": {"q": {"r": 1}}}, {"p": {"q": {"r": 2}}}, "p: q: r: 1 there, 2 now"),
        ({"p": {"q": 1}}, {"p": None}, 'p: {"q": 1} there, null now'),
        ({"p": {}}, {"p": {"q": None}}, 'p: {} there, {"q": null} now'),
    ],
)
def test_changes_name_what_differs(there, now, told):
    assert changes(there, now) == told
