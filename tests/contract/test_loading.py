"""Reading examples from tensors, data sets, lists, batches and loaders."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from sharpkit.contract.examples import Examples
from sharpkit.contract.loading import load_examples, load_in_order
from sharpkit.errors import ArgumentError, DataError


class Items(Dataset):
    """A data set of given items that counts how many were read."""

    def __init__(self, items):
        self.items, self.reads = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def padded(items):
    """The usual collate_fn for sequences: padded to the longest of the batch."""
    x, y = zip(*items, strict=True)
    return (
        nn.utils.rnn.pad_sequence(x, batch_first=True),
        nn.utils.rnn.pad_sequence(y, batch_first=True, padding_value=-100),
    )


def sequences(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((k, 2), float(i)), torch.full((k,), i)) for i, k in enumerate(lengths)]


def each(examples: Examples) -> list[list[Tensor]]:
    ones = [examples.slice(i, i + 1) for i in range(len(examples))]
    return [pytree.tree_leaves((one.inputs, one.labels)) for one in ones]


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return len(a) == len(b) and all(
        s.shape == t.shape and s.dtype == t.dtype and torch.equal(s, t)
        for x, y in zip(a, b, strict=True)
        for s, t in zip(x, y, strict=True)
    )


# tensors, data sets, lists and loaders of the same uniform examples


X = torch.arange(22.0).reshape(11, 2)
Y = torch.arange(11)
FORMS = {
    "pair": (X, Y),
    "list of two": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "list of arrays": [X.numpy(), Y.numpy()],
    "labels in a list": (X, Y.tolist()),
    "tensor data set": TensorDataset(X, Y),
    "data set": Items([(x, int(y)) for x, y in zip(X, Y, strict=True)]),
    "items": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "items of 0-d tensors": list(zip(X, Y, strict=True)),
    "tuple of items": tuple((x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)),
    "batches": [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 11, 4)],
    "two batches": [(X[:5], Y[:5]), (X[5:], Y[5:])],
    "batches of arrays": [[X[i : i + 4].numpy(), Y[i : i + 4].numpy()] for i in range(0, 11, 4)],
    "one batch": [(X, Y)],
    "one batch in a tuple": ((X, Y),),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader with collate_fn": DataLoader(
        TensorDataset(X, Y),
        batch_size=3,
        collate_fn=lambda items: tuple(map(torch.stack, zip(*items, strict=True))),
    ),
    "loader of batches": DataLoader(Items([(X[:5], Y[:5]), (X[5:], Y[5:])]), batch_size=None),
    "loader of items": DataLoader(TensorDataset(X, Y), batch_size=None),
    "loader with its own batches": DataLoader(
        TensorDataset(X, Y), batch_sampler=[[0, 1, 2], [3], [*range(4, 11)]]
    ),
}


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("n", [None, 1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_data_gives_the_same_examples(form, n, seed):
    expected = load_examples((X, Y), n=n, seed=seed)
    found = load_examples(FORMS[form], n=n, seed=seed)
    assert found.uniform
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.labels, expected.labels)
    assert found.labels.dtype == torch.int64


def test_reads_the_first_n_of_a_seeded_order():
    whole = load_examples((X, Y), seed=3)
    assert torch.equal(whole.labels[:4], load_examples((X, Y), n=4, seed=3).labels)
    assert sorted(whole.labels.tolist()) == list(range(11))
    assert load_examples((X, Y), n=3, seed=None).labels.tolist() == [0, 1, 2]


def test_tensors_in_their_own_order_are_not_copied():
    assert load_examples((X, Y), seed=None).inputs.data_ptr() == X.data_ptr()
    assert load_in_order(TensorDataset(X, Y), 4).inputs.data_ptr() == X.data_ptr()


FORMS_OF_INPUTS = {
    "dict": lambda x: {"a": x, "b": x[..., 0]},
    "tuple": lambda x: (x, x[..., 0]),
    "list": lambda x: [x, x[..., 0]],
    "ordered dict": lambda x: OrderedDict(a=x, b=x[..., 0]),
    "other mapping": lambda x: UserDict(a=x, b=x[..., 0]),
    "nested": lambda x: {"a": [x, {"b": x[..., 0]}]},
}


@pytest.mark.parametrize("inputs", FORMS_OF_INPUTS)
def test_inputs_of_several_tensors_are_the_same_in_every_form(inputs):
    make = FORMS_OF_INPUTS[inputs]
    whole = load_examples((make(X), Y), seed=1)
    items = [(make(x), y) for x, y in zip(X, Y, strict=True)]
    batches = [(make(X[i : i + 4]), Y[i : i + 4]) for i in range(0, 11, 4)]
    for data in (items, Items(items), batches, DataLoader(Items(items), batch_size=4)):
        found = load_examples(data, seed=1)
        assert pytree.tree_flatten(found.inputs)[1] == pytree.tree_flatten(whole.inputs)[1]
        assert same(each(found), each(whole))
    assert type(whole.inputs) in (dict, tuple)


# lists: batches or single examples


def test_a_batch_may_hold_one_row_per_example_of_anything():
    batches = [((torch.zeros(n, n + 1, 2), torch.full((n,), n)), torch.ones(n)) for n in (3, 2, 4)]
    examples = load_examples(batches, seed=None)
    assert len(examples) == 9 and not examples.uniform
    assert [x.inputs[0].shape[1] for x in examples.chunks(9)] == [4, 3, 5]
    assert [x.inputs[1].tolist() for x in examples.chunks(9)] == [[3] * 3, [2] * 2, [4] * 4]


def test_vectors_with_vector_labels_are_single_examples():
    assert load_examples([(torch.zeros(5), torch.zeros(5))] * 3).inputs.shape == (3, 5)
    assert load_examples([(torch.zeros(5, 2), torch.zeros(3))] * 4).labels.shape == (4, 3)


def test_single_examples_that_look_like_batches_are_read_as_a_data_set():
    items = [(torch.zeros(5, 2), torch.zeros(5))] * 3
    assert load_examples(items).inputs.shape == (15, 2)
    assert load_examples(Items(items)).inputs.shape == (3, 5, 2)


def test_a_list_with_a_batch_and_a_single_example_is_refused():
    mixed = [(torch.zeros(4, 3), torch.zeros(4)), (torch.zeros(5, 3), torch.zeros(6))]
    with pytest.raises(DataError, match=r"item 0 of the list is a batch.*item 1 is not.*Dataset"):
        load_examples(mixed)


# examples of different shapes


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 5), st.data())
@settings(deadline=None)
def test_padding_is_that_of_a_loop_over_the_loader(lengths, size, data):
    items = sequences(lengths)
    loader = DataLoader(Items(items), batch_size=size, collate_fn=padded)
    loop = [[x[i : i + 1], y[i : i + 1]] for x, y in loader for i in range(len(x))]
    shuffled = DataLoader(Items(items), batch_size=size, collate_fn=padded, shuffle=True)
    n = data.draw(st.integers(1, len(lengths)))
    assert same(each(load_examples(loader, n=n, seed=None)), loop[:n])
    assert same(each(load_in_order(shuffled, n)), loop[:n])
    batches = list(loader)
    assert same(each(load_in_order(batches)), loop)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(5)).tolist()
    for form in (loader, shuffled, batches):
        assert same(each(load_examples(form, seed=5)), [loop[i] for i in order])


def test_a_seeded_choice_is_padded_like_the_batches_that_hold_it():
    items = sequences([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    loader = DataLoader(Items(items), batch_size=4, collate_fn=padded)
    whole = each(load_examples(loader, seed=2))
    for n in range(1, 10):
        assert same(each(load_examples(loader, n=n, seed=2)), whole[:n])


def test_a_seeded_choice_reads_few_items_if_shapes_do_not_depend_on_the_batch():
    items = Items(sequences([3] * 1000))
    loader = DataLoader(items, batch_size=50, collate_fn=padded)
    assert load_examples(loader, n=20).uniform
    assert items.reads == 70


def test_a_loader_with_its_own_sampler_is_read_as_it_comes():
    items = sequences([1, 2, 3, 4, 5, 6])
    loader = DataLoader(items, collate_fn=padded, batch_sampler=[[5, 0], [3], [1, 2]])
    examples = load_in_order(loader)
    assert [x.inputs.shape for x in examples.chunks(9)] == [(2, 6, 2), (1, 4, 2), (2, 3, 2)]
    assert [int(x.labels[0, 0]) for x in examples.chunks(1)] == [5, 0, 3, 1, 2]


def test_items_of_different_shapes_need_no_loader():
    items = sequences([3, 3, 1, 2, 2])
    for data in (Items(items), DataLoader(items, batch_size=1)):
        examples = load_in_order(data)
        assert [len(x) for x in examples.chunks(9)] == [2, 1, 2]
        assert same(each(examples), [[x[None], y[None]] for x, y in items])


def test_a_loader_that_groups_equal_shapes_is_read_though_others_do_not_fit_together():
    items = sequences([3, 3, 1, 1])
    examples = load_in_order(DataLoader(items, batch_size=2))
    assert [x.inputs.shape for x in examples.chunks(9)] == [(2, 3, 2), (2, 1, 2)]


# loaders and samplers


def test_other_samplers_are_followed():
    data = TensorDataset(torch.arange(20.0).unsqueeze(1), torch.arange(20))
    batches = DataLoader(data, batch_sampler=BatchSampler([1, 2, 3, 4], 2, False))
    assert load_examples(batches, seed=None).labels.tolist() == [1, 2, 3, 4]
    few = DataLoader(data, sampler=RandomSampler(data, num_samples=5))
    assert len(load_examples(few)) == 5
    first = DataLoader(data, sampler=SequentialSampler(range(6)), batch_size=4)
    assert load_examples(first, seed=None).labels.tolist() == [*range(6)]
    chosen = DataLoader(data, sampler=[4, 0, 2], batch_size=2)
    assert load_examples(chosen, seed=None).labels.tolist() == [4, 0, 2]
    assert load_in_order(DataLoader(data, sampler=[4, 0])).labels.tolist() == [4, 0]


def test_a_loader_that_shuffles_stands_for_its_data_set_in_order():
    data = TensorDataset(torch.arange(20.0).unsqueeze(1), torch.arange(20))

    def doubled(items):
        return torch.stack([2 * x for x, _ in items]), torch.stack([y for _, y in items])

    loader = DataLoader(data, batch_size=3, shuffle=True, collate_fn=doubled)
    assert load_in_order(loader).labels.tolist() == list(range(20))
    assert load_in_order(loader, 2).inputs.tolist() == [[0.0], [2.0]]
    with pytest.raises(DataError, match="shuffles"):
        load_examples(loader, seed=None)
    alone = DataLoader(data, batch_size=None, shuffle=True)
    assert load_in_order(alone, 3).labels.tolist() == [0, 1, 2]


def test_items_of_a_subclass_are_its_own():
    class Negated(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return -x, y

    data = Negated(torch.arange(3.0).unsqueeze(1), torch.arange(3))
    assert load_examples(data, seed=None).inputs.flatten().tolist() == [0.0, -1.0, -2.0]


# refusals

PACKED = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
WITHOUT_ROWS = (X, torch.tensor(1))
REFUSED = {
    "a tensor": (X, "the data are a Tensor: expected a pair .inputs, labels. of tensors"),
    "a dict": ({"x": X, "y": Y}, "the data are a dict: expected a pair"),
    "an array": (X.numpy(), "the data are a ndarray"),
    "a string": ("train", "the data are a str"),
    "nothing": (None, "the data are a NoneType"),
    "a generator": (
        (pair for pair in [(X, Y)]),
        "a generator, which can be read only once.*a function",
    ),
    "a pair of lists": (([*X], [*Y]), "a pair of lists: stack each into a tensor"),
    "a pair of tuples": ((tuple(X), tuple(Y)), "differ in length"),
    "two batches in a tuple": (((X, Y), (X, Y)), "labels are a tuple.*two batches.*as a list"),
    "numbers in lists": (([[1.0, 2.0]], Y[:1]), "inputs hold a float: expected a tensor"),
    "nothing as a mask": (({"x": X, "mask": None}, Y), "inputs hold a NoneType"),
    "no input": (({}, Y), "hold no tensor"),
    "labels in a dict": ((X, {"y": Y}), "labels are a dict: expected a tensor"),
    "labels in words": ((X, ["a"] * 11), "labels are not numbers"),
    "objects": ((np.array([None] * 11), Y), "inputs are not numbers"),
    "three lengths": (((X, X[:5]), Y[:4]), r"differ in length: \[4, 5, 11\]"),
    "a single label": (WITHOUT_ROWS, "without dimensions: expected one row per example"),
    "a packed sequence": ((PACKED, Y[:2]), r"PackedSequence.*\(x, lengths\).*inside forward"),
    "a packed one of two": (({"x": PACKED}, Y[:2]), "PackedSequence"),
    "packed batches": ([(PACKED, Y[:2])] * 3, "PackedSequence"),
    "a sparse tensor": ((X.to_sparse(), Y), "inputs are a nested or sparse tensor.*to_dense"),
    "three tensors": (TensorDataset(X, X, X), "3 tensors"),
    "three parts": ((X, X, X), "expected items that are pairs .input, label., got a Tensor"),
    "a list of inputs": (
        [*X],
        "got a Tensor; a DataLoader with a collate_fn",
    ),
    "items of three": (Items([(1.0, 2.0, 3.0)]), "pairs .input, label., got 3 items"),
    "items in dicts": (Items([{"x": X[0], "y": 1}]), "got a dict; a DataLoader with a collate_fn"),
    "batches in dicts": (
        DataLoader(Items([{"x": x, "y": 1} for x in X])),
        "got a dict; a DataLoader with a collate_fn",
    ),
    "collated to a dict": (
        DataLoader(Items([*X]), collate_fn=lambda items: {"x": torch.stack(items)}),
        "got a dict; a DataLoader with a collate_fn that returns .inputs, labels.",
    ),
    "items out of place": (Items([(object(), 1)]), "cannot be put together.*collate_fn"),
    "an empty list": ([], "no examples"),
    "an empty pair": ((X[:0], Y[:0]), "no examples"),
    "an empty data set": (Items([]), "no examples"),
    "an empty loader": (DataLoader(Stream([])), "no examples"),
    "NaN": ((X / 0, Y), "inputs have NaN or infinite"),
    "NaN among complex": ((torch.complex(X, X * math.inf), Y), "inputs have NaN or infinite"),
    "infinite labels": ((X, Y.double() / 0), "labels have NaN or infinite"),
    "NaN in a later batch": (
        [(X, Y), (torch.full((2, 3), math.nan), Y[:2])],
        "inputs have NaN or infinite",
    ),
    "batches of two kinds": (
        [(X, Y), (X.double(), Y)],
        "parts of the data.*float32.*float64",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_data_is_refused_with_what_was_found(form):
    data, message = REFUSED[form]
    with pytest.raises(DataError, match=message):
        load_examples(data)


def test_a_collate_fn_that_leaves_items_out_is_refused():
    loader = DataLoader(
        Items(sequences([2] * 6)), batch_size=3, collate_fn=lambda items: padded(items[:2])
    )
    with pytest.raises(DataError, match=r"made 2 examples of 3 items.*leave items out of the data"):
        load_examples(loader, seed=None)


@pytest.mark.parametrize("n", [0, 12])
@pytest.mark.parametrize("form", ["pair", "items", "batches", "loader with collate_fn"])
def test_more_examples_than_there_are_cannot_be_asked_for(form, n):
    with pytest.raises(ArgumentError, match=f"n = {n} examples asked for: expected 1 to 11"):
        load_examples(FORMS[form], n=n)


def test_only_the_examples_in_use_are_checked():
    x = X.clone()
    x[9] = math.nan
    assert len(load_examples((x, Y), n=9, seed=None)) == 9
