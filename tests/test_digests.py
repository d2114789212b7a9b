"""Runs go on only as long as what they have stored of tensors keeps its digest."""

from __future__ import annotations

import torch
from torch import nn

from sharpkit.contract.examples import Examples
from sharpkit.digests import described, digest
from sharpkit.runs.spectrum import _digest_of_examples, _digest_of_model
from sharpkit.training.run_files import examples_fingerprint, fingerprint

EXAMPLES = Examples(torch.arange(6.0).view(2, 3), torch.arange(2))


def model():
    linear = nn.Linear(2, 2)
    linear.load_state_dict({"weight": torch.arange(4.0).view(2, 2), "bias": torch.zeros(2)})
    linear.bias.requires_grad_(False)
    return linear


def test_the_digests_that_runs_have_stored_stay():
    assert fingerprint(*model().state_dict().values()) == "21b3fcdcb06e8e0d"
    assert examples_fingerprint(EXAMPLES) == "b51c110cbf66a25f"
    assert _digest_of_examples(EXAMPLES).startswith("3dc66d6752589310")
    assert _digest_of_model(model()).startswith("469ea0b15f465d14")
    assert digest([EXAMPLES.inputs, EXAMPLES.labels]).startswith("be37cf8ee19d9f38")  # of a zoo


def test_bytes_are_those_of_the_values_whatever_their_layout():
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert digest([x.t()]) == digest([x.t().contiguous()]) != digest([x])
    assert digest([torch.empty(0, 2), torch.tensor(1.5)]) == digest([torch.tensor([1.5])])


def test_shape_and_dtype_count_where_they_are_described():
    x = torch.zeros(2, 3)
    for other in (x.view(3, 2), x.view(torch.int32)):
        assert digest([x]) == digest([other])
        assert digest(described([x])) != digest(described([other]))
