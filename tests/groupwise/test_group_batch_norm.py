"""BatchNorm in training over groups as one batch: each has statistics of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.groupwise.one_batch import OneBatch, Point

GROUPS, CHANNELS = 3, 4


def layer(shape: tuple[int, ...], affine: bool) -> nn.Module:
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(shape)]
    return kind(CHANNELS, affine=affine, track_running_stats=False).double()


def inputs(size: int, shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(GROUPS * size, CHANNELS, *shape, dtype=torch.float64)
    return (x * torch.arange(1, GROUPS * size + 1).view(-1, *[1] * (x.ndim - 1))).requires_grad_()


def own_values(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.randn(GROUPS, *p.shape, dtype=torch.float64, requires_grad=True)
        for name, p in model.named_parameters()
    }


def as_one_batch(model: nn.Module, x: Tensor, own: dict[str, Tensor]) -> Tensor:
    values = {name: t.detach() for name, t in own.items()}
    point = Point(GROUPS, len(x) // GROUPS, values, targets=own)
    with OneBatch(dict(model.named_parameters()), point):
        return model(x)


def group_by_group(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    parts = x.split(len(x) // GROUPS)
    return torch.cat(
        [
            F.batch_norm(part, None, None, *(own[k][i] for k in own), training=True)
            if own
            else F.batch_norm(part, None, None, training=True)
            for i, part in enumerate(parts)
        ]
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("size", "shape"), [(2, ()), (3, (5,)), (1, (3, 2)), (4, (3, 2)), (2, (2, 2, 2))]
)
def test_equals_one_group_after_the_other(size, shape, affine):
    model, x = layer(shape, affine), inputs(size, shape)
    own = own_values(model)
    found, expected = as_one_batch(model, x, own), group_by_group(x, own)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(found)
    by = [x, *own.values()]
    for a, b in zip(
        torch.autograd.grad(found, by, slope), torch.autograd.grad(expected, by, slope), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_those_of_every_group():
    x = inputs(4, (3, 2)).detach()
    mean, variance = torch.zeros((2, GROUPS * CHANNELS), dtype=torch.float64)
    with OneBatch({}, Point(GROUPS, 4, {})):
        F.batch_norm(x, mean, variance, training=True, momentum=1.0)
    for i, part in enumerate(x.split(4)):
        expected = torch.var_mean(part, (0, 2, 3))
        found = variance.view(GROUPS, -1)[i], mean.view(GROUPS, -1)[i]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_of_the_whole_batch_are_left_to_torch():
    model, x = nn.BatchNorm2d(CHANNELS).double(), inputs(4, (3, 2)).detach()
    with OneBatch(dict(model.named_parameters()), Point(GROUPS, 4, own_values(model))) as batch:
        model(x)
    assert batch.elsewhere == {"weight", "bias"}  # so it is not taken for one that is known


def test_a_single_value_per_channel_is_refused():
    model, x = layer((), True), inputs(1, ())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        as_one_batch(model, x, own_values(model))
