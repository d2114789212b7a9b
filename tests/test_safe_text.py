"""Text from files does nothing to a terminal or a spreadsheet."""

import sys

import pytest

from sharpkit.safe_text import cell, printable


def test_no_character_that_steers_a_terminal_is_left():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    safe = printable(everything)
    assert safe.isprintable()
    safe.encode()  # bytes that were no UTF-8 can be written too
    for steering in ("\x1b", "\x07", "\x9b", "\u202e", "\u2028", "\udcff", "\r", "\x7f"):
        assert steering in everything
        assert steering not in safe


@pytest.mark.parametrize("text", ["größer", "m-sharpness, ρ = 0.1", "模型", ""])
def test_ordinary_text_stays(text):
    assert printable(text) == text
    assert cell(text) == text


def test_what_is_kept_stays():
    assert printable("one\ntwo\x1b[0m", keep="\n") == "one\ntwo\\x1b[0m"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "  =1", "\t=1", "\r=1", "-", "+x", "-infinity"]
)
def test_a_formula_becomes_text(text):
    assert cell(text)[0] == "'" or not cell(text).startswith(("=", "+", "-", "@", " "))
    assert cell(text).lstrip("'") == printable(text)


@pytest.mark.parametrize("text", ["-1", "+0.5", "-1e-05", "-.5", "-inf", "3."])
def test_a_number_stays_one(text):
    assert cell(text) == text
    float(cell(text))
