"""JSON from others is bounded in size and depth before anything walks through it."""

from __future__ import annotations

import json

import pytest

from sharpkit.errors import ZooFormatError
from sharpkit.zoo.files import read_json


def test_json_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a file with a hole: to read it would take a terabyte
    with pytest.raises(ZooFormatError, match="has 1,099,511,627,776 bytes; at most"):
        read_json(path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [65, 500, 100_000])
def test_json_that_is_too_deep_is_refused(tmp_path, opening, depth):
    path = tmp_path / "a.json"
    closing = {"[": "]", '{"a":': "}"}[opening]
    path.write_text(opening * depth + "1" + closing * depth)
    with pytest.raises(ZooFormatError, match=r"a\.json: is nested more than 64 levels"):
        read_json(path)


def test_usual_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    content = {"a": [[[1.5, None], {"b": "c"}]], "d": {}}
    path.write_text(json.dumps(content))
    assert read_json(path) == content
