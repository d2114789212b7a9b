"""Examples in memory: uniform and ragged ones, chosen, moved, sorted by label and fingerprinted."""

from __future__ import annotations

import pickle
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from sharpkit.contract.checksum import checksum
from sharpkit.contract.examples import Examples, label_diverse
from sharpkit.errors import ArgumentError, DataError

CPU = torch.device("cpu")

# (examples, padded length) of each batch; few lengths, so that neighbours often agree
batches = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=8).filter(
    lambda sizes: any(n for n, _ in sizes)
)


def ragged(sizes: list[tuple[int, int]]) -> Examples:
    """Sequences (n_b, T_b, 2) with lengths and token labels, numbered so that each is unique."""
    parts, first = [], 0
    for n, length in sizes:
        numbers = torch.arange(first, first + n)
        x = numbers.view(n, 1, 1).expand(n, length, 2).double()
        parts.append(
            Examples({"x": x, "lengths": numbers % 3}, numbers.view(n, 1).expand(n, length))
        )
        first += n
    return Examples.joined(parts)


def listed(examples: Examples) -> list[list[Tensor]]:
    """Every example alone, as the list of its tensors."""
    ones = [examples.slice(i, i + 1) for i in range(len(examples))]
    return [pytree.tree_leaves((one.inputs, one.labels)) for one in ones]


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(
        s.shape == t.shape and s.dtype == t.dtype and torch.equal(s, t)
        for x, y in zip(a, b, strict=True)
        for s, t in zip(x, y, strict=True)
    )


@given(batches)
@settings(deadline=None)
def test_joined_examples_are_those_of_the_parts_one_after_the_other(sizes):
    expected = [length for n, length in sizes for _ in range(n)]
    examples = ragged(sizes)
    assert len(examples) == len(expected)
    for i, one in enumerate(listed(examples)):
        x, lengths, labels = one
        assert x.shape == (1, expected[i], 2) and labels.shape == (1, expected[i])
        assert bool((x == i).all()) and bool((labels == i).all()) and int(lengths) == i % 3


@given(batches, st.integers(1, 6))
@settings(deadline=None)
def test_chunks_reassemble_the_same_examples_in_order(sizes, size):
    examples = ragged(sizes)
    chunks = list(examples.chunks(size))
    assert all(chunk.uniform and 1 <= len(chunk) <= size for chunk in chunks)
    assert same([one for chunk in chunks for one in listed(chunk)], listed(examples))
    assert examples.bounds(size) == [
        (sum(map(len, chunks[:i])), sum(map(len, chunks[: i + 1]))) for i in range(len(chunks))
    ]
    assert same(listed(Examples.joined(chunks)), listed(examples))


@given(batches)
@settings(deadline=None)
def test_chunks_are_as_large_as_shapes_allow(sizes):
    chunks = list(ragged(sizes).chunks(10**6))
    shapes = [chunk.labels.shape[1] for chunk in chunks]
    assert all(a != b for a, b in pairwise(shapes))


@given(batches, st.integers(-3, 30), st.integers(-3, 30))
@settings(deadline=None)
def test_slices_are_those_of_a_list(sizes, start, stop):
    examples = ragged(sizes)
    assert same(listed(examples.slice(start, stop)), listed(examples)[start:stop])
    assert len(examples.slice(start, stop)) == len(range(len(examples))[start:stop])


@given(batches, st.data())
@settings(deadline=None)
def test_examples_may_be_selected_in_any_order_and_more_than_once(sizes, data):
    examples = ragged(sizes)
    indices = data.draw(st.lists(st.integers(0, len(examples) - 1), max_size=12))
    chosen = examples.select(torch.tensor(indices, dtype=torch.int64))
    assert same(listed(chosen), [listed(examples)[i] for i in indices])


def test_slices_and_chunks_of_uniform_examples_are_views():
    x = torch.zeros(10, 3)
    examples = Examples(x, torch.arange(10))
    assert examples.uniform and examples.inputs is x
    assert examples.slice(2, 9).inputs.data_ptr() == x[2:].data_ptr()
    assert [len(chunk) for chunk in examples.chunks(4)] == [4, 4, 2]
    assert Examples.joined([examples]).inputs is x


def test_ragged_examples_have_no_inputs_or_labels_as_a_whole():
    examples = ragged([(2, 3), (1, 5)])
    assert not examples.uniform
    for name in ("inputs", "labels"):
        with pytest.raises(DataError, match=r"\(n, 3, 2\).*\(n, 5, 2\).*pad all.*m_sharpness"):
            getattr(examples, name)
    assert examples.slice(0, 2).inputs["x"].shape == (2, 3, 2)
    assert ragged([(2, 3), (1, 3)]).inputs["x"].shape == (3, 3, 2)


def test_parts_that_differ_in_more_than_size_are_not_joined():
    base = Examples(torch.zeros(2, 3), torch.arange(2))
    for other, found in [
        (Examples(torch.zeros(2, 3, 1), torch.arange(2)), r"\(n, 3\).*\(n, 3, 1\)"),
        (Examples(torch.zeros(2, 3).double(), torch.arange(2)), "float32.*float64"),
        (Examples(torch.zeros(2, 3), torch.zeros(2)), "int64.*float32"),
        (Examples((torch.zeros(2, 3),), torch.arange(2)), "parts of the data differ"),
        (Examples({"x": torch.zeros(2, 3)}, torch.arange(2)), "'x'"),
    ]:
        with pytest.raises(DataError, match=found):
            Examples.joined([base, other])
    for nothing in ([], [base.slice(1, 1)]):
        with pytest.raises(DataError, match="no examples"):
            Examples.joined(nothing)


def test_indices_beyond_the_examples_are_refused():
    for examples in (ragged([(2, 3), (1, 5)]), ragged([(3, 2)])):
        for index in (-1, 3):
            with pytest.raises(ArgumentError, match="from 0 to 2"):
                examples.select(torch.tensor([0, index]))


def test_moving_changes_the_precision_of_real_and_complex_numbers_only():
    kinds = [torch.float32, torch.complex64, torch.int32, torch.bool]
    x = tuple(torch.ones(2, 3).to(kind) for kind in kinds)
    moved = Examples(x, torch.ones(2)).to(CPU, torch.float64)
    expected = [torch.float64, torch.complex128, torch.int32, torch.bool]
    assert [t.dtype for t in moved.inputs] == expected
    assert moved.labels.dtype == torch.float64
    long = ragged([(2, 3), (1, 5)]).to(CPU, torch.float32).slice(2, 3)
    assert long.inputs["x"].dtype == torch.float32 and long.inputs["lengths"].dtype == torch.int64


def test_examples_survive_pickling():
    examples = ragged([(2, 3), (1, 5)])
    assert same(listed(pickle.loads(pickle.dumps(examples))), listed(examples))


@given(st.lists(st.integers(-100, 9), min_size=1, max_size=60), st.integers(2, 20))
@settings(deadline=None)
def test_label_diverse_examples_span_the_labels_in_order(labels, k):
    y = torch.tensor(labels)
    chosen = label_diverse(Examples(torch.zeros(len(y), 1), y), k)
    assert len(chosen) == len(set(chosen.tolist())) == min(k, len(y))
    assert y[chosen].tolist() == sorted(y[chosen].tolist())
    assert y[chosen[0]] == min(labels) and y[chosen[-1]] == max(labels)


def test_label_diverse_examples_are_spread_evenly_over_a_stable_order():
    y = torch.arange(5).repeat(20)
    chosen = label_diverse(Examples(torch.zeros(100, 1), y), 5)
    assert y[chosen].tolist() == [0, 1, 2, 3, 4]
    same_label = label_diverse(Examples(torch.zeros(9, 1), torch.zeros(9)), 3)
    assert same_label.tolist() == [0, 4, 8]


@pytest.mark.parametrize("kind", ["one-hot floats", "one-hot integers", "values", "complex"])
def test_labels_of_other_forms_are_told_apart(kind):
    classes = torch.arange(3).repeat_interleave(30)
    y = torch.eye(3)[classes]
    y = {
        "one-hot floats": y,
        "one-hot integers": y.long(),
        "values": classes.float().unsqueeze(1),
        "complex": torch.complex(torch.zeros(90), classes.float()),
    }[kind]
    chosen = label_diverse(Examples(torch.zeros(90, 1), y), 3)
    assert classes[chosen].tolist() == [0, 1, 2]


def test_sequences_with_many_and_few_ignored_positions_are_among_the_label_diverse():
    torch.manual_seed(0)
    kept = torch.randperm(40) % 8
    parts = []
    for rows, length in ((kept[:17], 9), (kept[17:], 12)):
        labels = (
            (10 ** (9 - rows)).unsqueeze(1).repeat(1, length)
        )  # short ones have the larger sums
        labels[torch.arange(length) >= rows.unsqueeze(1)] = -100
        parts.append(Examples(torch.zeros(len(rows), length), labels))
    chosen = label_diverse(Examples.joined(parts), 6)
    counts = kept[chosen].tolist()
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 7
    assert len(set(counts)) == 6


DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_sees_every_single_change(dtype):
    torch.manual_seed(0)
    x = torch.randint(0, 2, (7, 5)).to(dtype)
    y = torch.arange(7)
    seen = {checksum(Examples(x, y))}
    for i in range(7):
        for j in range(5):
            changed = x.clone()
            changed[i, j] = 1 - changed[i, j] if dtype != torch.bool else ~changed[i, j]
            seen.add(checksum(Examples(changed, y)))
    y[3] = 0
    seen.add(checksum(Examples(x, y)))
    assert len(seen) == 37


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checksum_does_not_depend_on_the_layout_in_memory(dtype):
    x, y = torch.arange(88).reshape(8, 11).to(dtype), torch.arange(8)
    expected = checksum(Examples(x, y))
    room = torch.zeros(100, dtype=dtype)
    room[3:91] = x.flatten()  # not aligned to words
    wide = torch.zeros(8, 22, dtype=dtype)
    wide[:, ::2] = x
    for view in (x.T.contiguous().T, room[3:91].view(8, 11), wide[:, ::2], x.clone()):
        assert checksum(Examples(view, y)) == expected
    if dtype.is_complex:
        assert checksum(Examples(x.conj().resolve_conj().conj(), y)) == expected


def test_the_checksum_sees_the_order_the_dtype_and_the_shape():
    x = torch.tensor([1.0, 2.0, 0.0, -0.0]).repeat_interleave(5000).reshape(5, 4000)
    y = torch.zeros(5)
    swapped = x.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    values = [x, swapped, x.flip(1), x.view(torch.int32), x.unsqueeze(1), x.double(), x.abs()]
    assert len({checksum(Examples(v, y)) for v in values}) == len(values)
    assert len({checksum(ragged(s)) for s in ([(3, 2)], [(2, 2), (1, 3)], [(3, 3)])}) == 3


def test_exchanged_powers_of_two_far_apart_change_the_checksum():
    x = torch.zeros(1 << 15, dtype=torch.float64)
    x[0] = 1.0
    sums = set()
    for power in range(1, 15):
        other = x.clone()
        other[1 << power] = 2.0
        exchanged = x.clone()
        exchanged[0], exchanged[1 << power] = 2.0, 1.0
        sums |= {checksum(Examples(v.view(-1, 1), v)) for v in (other, exchanged)}
    assert len(sums) == 28


@pytest.mark.slow
def test_checksum_and_label_diverse_are_cheap():
    examples = Examples(torch.zeros(50_000, 784), torch.arange(50_000) % 10)  # 157 MB
    started = time.process_time()  # so that other processes do not count
    checksum(examples)
    label_diverse(examples, 32)
    assert time.process_time() - started < 5  # 0.1 s when the machine is idle
