"""Examples that are read again for every pass: what is accepted, compared, held and refused."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from sharpkit.contract.examples import Examples
from sharpkit.contract.loading import as_data, load_examples, load_in_order
from sharpkit.contract.streams import Stream
from sharpkit.errors import ArgumentError, DataError

X, Y = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 4
BATCHES = [(X[a:b], Y[a:b]) for a, b in ((0, 5), (5, 6), (6, 14), (14, 23))]


class Items(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Again:
    """A plain iterable, with no length and no items."""

    def __iter__(self):
        return (pair for pair in BATCHES)


class Sharded(IterableDataset):
    """Every worker reads examples of its own, as shards of a large set are read."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return ((X[i], Y[i]) for i in range(first, len(X), step))


def one_by_one():
    return list(zip(X, Y, strict=True))


FORMS = {
    "an IterableDataset": Items(one_by_one()),
    "one of batches": Items(BATCHES),
    "a loader of one": DataLoader(Items(one_by_one()), batch_size=4),
    "a loader of batches": DataLoader(Items(BATCHES), batch_size=None),
    "an iterable": Again(),
    "a function that generates": lambda: (pair for pair in BATCHES),
    "a function that makes an iterable": lambda: Again(),
    "a function that makes a loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "a function that returns a list": lambda: BATCHES,
    "dictionaries": lambda: ({"x": x, "labels": y} for x, y in BATCHES),
}


def read(examples: Examples, size: int) -> tuple[Tensor, Tensor]:
    parts = [(pytree.tree_leaves(c.inputs)[0], c.labels) for c in examples.chunks(size)]
    x, y = zip(*parts, strict=True)
    assert max(map(len, y)) <= size
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("n", [None, 6, 15])
@pytest.mark.parametrize("form", FORMS)
def test_a_stream_gives_the_same_examples_in_its_order_as_often_as_it_is_read(form, n):
    stream = load_examples(FORMS[form], n=n, seed=3)
    assert isinstance(stream, Stream)
    assert not stream.in_memory
    assert len(stream) == (n or 23)
    assert stream.uniform
    for size in (1, 4, 10, 100):
        x, y = read(stream, size)
        assert torch.equal(x, X[:n])
        assert torch.equal(y, Y[:n])


def test_slices_cross_batches_and_may_go_back():
    stream = load_in_order(lambda: BATCHES)
    for start, stop in ((0, 23), (4, 7), (13, 22), (2, 3), (22, 23), (5, 5)):
        part = stream.slice(start, stop)
        assert part.in_memory
        assert torch.equal(part.labels, Y[start:stop])
        assert torch.equal(part.inputs, X[start:stop])


def test_batches_of_different_shapes_are_cut_where_the_shape_changes():
    given = [(torch.full((k, width), float(k)), torch.arange(k)) for k, width in
             ((2, 3), (1, 3), (2, 5), (3, 3))]  # fmt: skip
    stream, whole = load_in_order(lambda: given), load_in_order(given)
    assert not stream.uniform
    for size in (1, 2, 100):
        assert stream.bounds(size) == whole.bounds(size)
        for a, b in stream.bounds(size):
            assert torch.equal(stream.slice(a, b).inputs, whole.slice(a, b).inputs)
    assert stream.widest(1).inputs.shape == whole.widest(1).inputs.shape == (1, 5)


def test_changes_are_made_as_it_is_read():
    stream = load_in_order(Again()).to(torch.device("cpu"), torch.float64).changed(lambda t: 2 * t)
    assert isinstance(stream, Stream)
    assert torch.equal(stream.slice(3, 9).inputs, 2 * X[3:9].double())
    assert stream.diverse(4).inputs.dtype == torch.float64


def test_the_few_that_are_kept_have_labels_as_different_as_there_are():
    many = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    stream = load_in_order(lambda: [(many[i : i + 50, None].float(), many[i : i + 50])
                                    for i in range(0, 400, 50)])  # fmt: skip
    kept = stream.diverse(8)
    assert len(kept) == 8
    assert {0, 399} <= set(kept.labels.tolist())


def test_a_stream_that_was_read_is_data_again():
    stream = load_in_order(Again())
    assert as_data(stream) is stream
    assert load_examples(stream) is stream
    assert torch.equal(read(load_examples(stream, n=7), 100)[0], X[:7])


class Counted(IterableDataset):
    """Examples that say how many of them are alive at once."""

    def __init__(self, batches: int):
        self.batches, self.alive, self.most = batches, 0, 0

    def __iter__(self):
        for i in range(self.batches):
            x = torch.full((8, 5), float(i))
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(x, self._gone)
            yield x, torch.arange(8)

    def _gone(self):
        self.alive -= 1


@pytest.mark.parametrize("batches", [20, 80])
def test_few_batches_are_alive_however_long_the_stream_is(batches):
    data = Counted(batches)
    stream = load_in_order(data)
    for chunk in stream.chunks(16):
        assert len(chunk) == 16
        del chunk
    assert data.most <= 6  # a chunk's two, the last one's two, and what is read ahead


def test_the_last_examples_are_held_where_they_are_asked_for():
    reads = []

    def batches():
        reads.append(1)
        return iter(BATCHES)

    stream = load_in_order(batches)
    stream.keep(10)
    stream.slice(14, 20)
    assert len(reads) == 2
    stream.slice(7, 12)
    assert len(reads) == 2
    stream.slice(0, 3)
    assert len(reads) == 3


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_the_same_order_in_every_pass(persistent):
    loader = DataLoader(Sharded(), batch_size=3, num_workers=2, persistent_workers=persistent)
    stream = load_in_order(loader)
    expected = torch.cat([y for _, y in loader])
    assert torch.equal(read(stream, 5)[1], expected)
    stream.slice(0, 4)  # a pass that is left half-way
    assert torch.equal(read(stream, 100)[1], expected)
    assert sorted(expected.tolist()) == sorted(Y.tolist())


def shuffled():
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)


def augmented():
    return ((x + torch.rand(()), y) for x, y in BATCHES)


def growing():
    calls = []

    def batches():
        calls.append(1)
        return BATCHES[: 2 + len(calls)]

    return batches


def test_passes_that_differ_are_refused():
    torch.manual_seed(0)
    for source in (shuffled, augmented):
        stream = load_in_order(source)
        with pytest.raises(DataError, match=r"batch 0 of the data \(from example 0\) is another"):
            read(stream, 8)
    used = iter(BATCHES)
    stream = load_in_order(lambda: used)
    with pytest.raises(DataError, match="ended after 0 examples, in the first pass after 23"):
        read(stream, 8)
    with pytest.raises(DataError, match="go on after 14 examples, where the first pass ended"):
        read(load_in_order(growing()), 8)


def test_a_source_that_writes_over_its_last_batch_is_refused():
    buffer = torch.empty(8, 3)

    def batches():
        for i in range(4):
            yield buffer.fill_(i), torch.arange(8)

    stream = load_in_order(batches)
    with pytest.raises(DataError, match=r"batch 1 of the data is written over the one before"):
        stream.slice(4, 12)
    same = load_in_order(lambda: [BATCHES[0]] * 3)  # the same tensors, with the same in them
    assert torch.equal(same.slice(4, 11).labels, Y[torch.tensor([4, 0, 1, 2, 3, 4, 0])])


REFUSED = {
    "a generator": ((pair for pair in BATCHES), "generator, which can be read only once"),
    "an iterator": (iter(BATCHES), "list_iterator, which can be read only once.*a function"),
    "a function of something": (lambda x: BATCHES, "cannot be called without arguments"),
    "a function that returns a pair": (lambda: (X, Y), "returned a tuple"),
    "a function that returns a number": (lambda: 3, "returned a int"),
    "a class": (Again, "the data are a type"),
    "a module": (torch.nn.Linear(1, 1), "the data are a Linear"),
    "nothing": (lambda: iter([]), "no examples"),
    "items of two kinds": (Items([BATCHES[0], (X[0], Y[0])]), "mix batches"),
    "not a number": (lambda: [(X * torch.nan, Y)], "inputs have NaN"),
    "batches that differ": (lambda: [BATCHES[0], (X.double(), Y)], "parts of the data differ"),
    "no labels": (lambda: [X, X], "pairs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_again_or_is_no_stream_of_pairs_is_refused(case):
    data, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        load_examples(data)


def test_more_examples_than_there_are_and_none_are_refused():
    for n in (0, 24):
        with pytest.raises(ArgumentError, match=f"n = {n} examples"):
            load_examples(Again(), n=n)
    with pytest.raises(ArgumentError, match="expected 1 to 23"):
        load_examples(load_examples(Again()), n=24)


def test_what_needs_all_examples_at_once_says_how_to_hold_them():
    stream = load_in_order(Again())
    for use in (
        lambda: stream.inputs,
        lambda: stream.labels,
        lambda: stream.select(torch.tensor([3, 1])),
    ):
        with pytest.raises(DataError, match=r"stream of 23 examples.*pass a list of their batches"):
            use()
