"""Convolutions of groups by windows, beside torch's grouped convolution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sharpkit.groupwise import group_layers, windows
from sharpkit.groupwise.layer_calls import Geometry

CASES = [
    (window, stride, padding, dilation)
    for window, stride, padding, dilation in itertools.product(
        ((1, 1), (3, 3), (2, 3)), ((1, 1), (2, 1)), ((0, 0), (1, 2)), ((1, 1), (1, 2))
    )
]


@pytest.mark.parametrize(("window", "stride", "padding", "dilation"), CASES)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_windows_equal_a_grouped_convolution(
    window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Outputs and gradients in float64, to 1e-12 of the largest: sums in another order."""
    torch.manual_seed(0)
    groups, geometry = 2, Geometry(stride, padding, dilation, 1)
    x = torch.randn(groups * size, 3, 7, 8, dtype=torch.float64)
    weight = torch.randn(groups, 5, 3, *window, dtype=torch.float64)
    bias = torch.randn(groups, 5, dtype=torch.float64)

    def found(by_windows: bool) -> list[Tensor]:
        monkeypatch.setattr(windows, "pays", lambda *_, **__: by_windows)
        own = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = group_layers.GroupConvolution.apply(
            own[0], own[1], weight, own[2], bias, groups, geometry
        )
        return [out, *torch.autograd.grad(out.square().sum(), own)]

    for a, b in zip(found(True), found(False), strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max() / b.detach().abs().max()) < 1e-12


def test_one_bias_for_all_groups() -> None:
    x, weight, bias = torch.randn(4, 3, 5, 5), torch.randn(2, 6, 3, 3, 3), torch.randn(6)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    found = windows.convolved(x, weight, bias, geometry)
    expected = [torch.conv2d(x[2 * i : 2 * i + 2], weight[i], bias, 1, 1) for i in (0, 1)]
    torch.testing.assert_close(found, torch.cat(expected))


def test_a_cpu_keeps_its_grouped_convolutions() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    assert not windows.pays(torch.randn(2, 3, 8, 8), (4, 3, 3, 3), geometry, 2, backward=True)


@pytest.mark.parametrize(("window", "stride", "padding", "dilation"), CASES)
def test_rows_are_those_of_unfold(
    window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:  # fmt: skip
    x, geometry = torch.randn(6, 3, 7, 8), Geometry(stride, padding, dilation, 1)
    columns = torch.nn.functional.unfold(x, window, dilation, padding, stride)
    rows = windows.rows_of_windows(x, window, geometry, 2)
    assert torch.equal(rows, columns.mT.reshape(2, -1, columns.shape[1]))
    own = windows.columns_of(x, window, geometry, 2)
    assert torch.equal(own.mT, rows)
    assert torch.equal(windows._seen(x, window, geometry).flatten(4).flatten(1, 3), columns)
