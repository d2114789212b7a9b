"""Dictionaries with labels among their entries, and labels that were not shifted."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sharpkit as sk
from sharpkit.contract.loading import load_examples
from sharpkit.errors import DataError

WORDS = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))
SHIFTED = torch.cat([WORDS[:, 1:], torch.full((6, 1), -100)], 1)
KEEP = torch.ones(6, 5)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, keep: Tensor) -> Tensor:
        return self.head((self.table(input_ids) * keep.unsqueeze(-1)).cumsum(1).tanh())


class Encoding(UserDict):
    """As tokenizers return: a mapping that is no dict."""


WHOLE = {"input_ids": WORDS, "keep": KEEP, "labels": SHIFTED}
ITEMS = [{key: value[i] for key, value in WHOLE.items()} for i in range(6)]
FORMS = {
    "whole": WHOLE,
    "a mapping that is no dict": Encoding(WHOLE),
    "batches": [{k: v[i : i + 2] for k, v in WHOLE.items()} for i in (0, 2, 4)],
    "items": ITEMS,
    "a loader of items": DataLoader(ITEMS, batch_size=4),
    "a loader of mappings": DataLoader(
        ITEMS, batch_size=4,
        collate_fn=lambda rows: Encoding({k: torch.stack([r[k] for r in rows]) for k in rows[0]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_dictionaries_with_labels_are_pairs(form):
    for seed, n in ((None, None), (0, 3)):
        expected = load_examples(({"input_ids": WORDS, "keep": KEEP}, SHIFTED), n=n, seed=seed)
        found = load_examples(FORMS[form], n=n, seed=seed)
        assert torch.equal(found.labels, expected.labels)
        assert set(found.inputs) == {"input_ids", "keep"}
        assert all(torch.equal(found.inputs[key], expected.inputs[key]) for key in found.inputs)


def test_other_dictionaries_are_refused_with_what_may_stand_for_a_pair():
    for wrong in ({"x": WORDS}, {"labels": SHIFTED}):
        with pytest.raises(DataError, match="a dict with the key 'labels' may stand"):
            load_examples(wrong)


def test_labels_that_are_the_tokens_themselves_are_refused():
    padded = WORDS.clone()
    padded[2, 3:] = -100
    for labels in (WORDS, padded):
        data = {"input_ids": WORDS, "keep": KEEP, "labels": labels}
        for run in (
            lambda data=data: sk.m_sharpness(Tokens(), data, m=2, rho=0.1),
            lambda data=data: sk.HessianOperator(Tokens(), data),
        ):
            with pytest.raises(DataError, match="shift them, so that label t is token t"):
                run()


def test_a_network_that_is_to_repeat_its_input_has_a_way():
    def repeat(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    data = {"input_ids": WORDS, "keep": KEEP, "labels": WORDS}
    assert sk.m_sharpness(Tokens(), data, m=2, rho=0.1, loss=repeat).value > 0


def test_a_decoder_may_repeat_what_its_encoder_reads():
    """Its own inputs are shifted; if they are not, that is refused."""

    class Repeating(Tokens):
        def forward(self, input_ids: Tensor, keep: Tensor, decoder_input_ids: Tensor) -> Tensor:
            return super().forward(input_ids, keep) + super().forward(decoder_input_ids, keep)

    shifted = torch.cat([torch.zeros_like(WORDS[:, :1]), WORDS[:, :-1]], 1)
    data = {"input_ids": WORDS, "keep": KEEP, "decoder_input_ids": shifted, "labels": WORDS}
    assert sk.m_sharpness(Repeating(), data, m=2, rho=0.1).value > 0
    with pytest.raises(DataError, match="shift them"):
        sk.m_sharpness(Repeating(), {**data, "decoder_input_ids": WORDS}, m=2, rho=0.1)


def test_the_loss_of_groups_is_that_of_their_tokens():
    """By a plain loop in float64; sequences have unequal numbers of labelled tokens."""
    model, labels = Tokens().double(), SHIFTED.clone()
    labels[0, 1:], labels[3], labels[4, :2] = -100, -100, -100
    keep = KEEP.double()
    increase = counted = 0.0
    for start in range(0, 6, 2):
        some = slice(start, start + 2)

        def total(some=some) -> Tensor:
            logits = model(WORDS[some], keep[some]).flatten(0, 1)
            return F.cross_entropy(logits, labels[some].flatten(), reduction="sum")

        weight = int((labels[some] != -100).sum())
        before = [p.detach().clone() for p in model.parameters()]
        loss = total() / weight
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        length = torch.stack([g.norm() for g in slopes]).norm()
        with torch.no_grad():
            for p, g in zip(model.parameters(), slopes, strict=True):
                p += 0.1 * g / length
            increase += float(total() - weight * loss)
            for p, b in zip(model.parameters(), before, strict=True):
                p.copy_(b)
        counted += weight
    data = {"input_ids": WORDS, "keep": keep, "labels": labels}
    found = sk.m_sharpness(model, data, m=2, rho=0.1, seed=None)
    assert found.value == pytest.approx(increase / counted, rel=1e-9)
    assert found.group_weights[2].tolist() == [
        float((labels[i : i + 2] != -100).sum()) for i in (0, 2, 4)
    ]
