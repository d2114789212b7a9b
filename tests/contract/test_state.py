"""What a module consists of besides its code, compared with what it was."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from sharpkit.contract.state import Found, differing

KINDS = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]


def tensor(rng: random.Random) -> Tensor:
    kind, shape = rng.choice(KINDS), rng.choice([(), (0,), (3,), (2, 4), (2**20 + 5,)])
    made = (torch.randn(shape) * 3).to(kind)
    if made.is_floating_point() and made.numel() and rng.random() < 0.3:
        made.view(-1)[0] = float(rng.choice(["nan", "inf", "-inf"]))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_differing_finds_what_a_look_at_every_pair_finds(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pairs = []
    for _ in range(12):
        a = tensor(rng)
        b = a.clone()
        if a.numel() and rng.random() < 0.3:
            b.view(-1)[-1] = ~b.view(-1)[-1] if a.dtype == torch.bool else b.view(-1)[-1] + 1
        pairs.append((a, tensor(rng) if rng.random() < 0.1 else b))
    alone = [
        i
        for i, (a, b) in enumerate(pairs)
        if a.shape != b.shape
        or a.dtype != b.dtype
        or not torch.all((a == b) | ((a != a) & (b != b)))
    ]
    assert differing(pairs) == alone


def test_a_model_is_put_back_as_it_was_found() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].running_mean[0] = torch.nan
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = Found(model)
    assert found.changed_parameters() == []
    with torch.no_grad():
        model[0].weight[1, 1] += 1
        model[1].running_var[2] = 5.0
        model[1].running_mean[0] = 0.0
    assert found.changed_parameters() == ["0.weight"]
    found.restore()
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)
