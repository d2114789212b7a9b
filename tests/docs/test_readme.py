"""Every Python block of the README runs, in order."""

from __future__ import annotations

import pytest
import torch
from markdown_blocks import README, blocks
from torch import nn

import sharpkit as sk


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train, _ = sk.load_dataset("embedded")
    inputs, labels = (tensor[:256] for tensor in train.tensors)
    # what a reader has already: torch, a model, a batch
    namespace = {
        "torch": torch,
        "model": nn.Sequential(nn.Flatten(), nn.Linear(196, 10)),
        "inputs": inputs,
        "labels": labels,
    }
    python = [block for block in blocks(README) if block.language == "python"]
    assert python
    for block in python:
        exec(compile(block.text, block.place, "exec"), namespace)
    for value in namespace.values():
        if isinstance(value, sk.Scores):
            assert value.failures.empty
            value.close()
