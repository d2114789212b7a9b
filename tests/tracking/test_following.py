"""λmax followed through matrices that change, beside their known eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sharpkit.curvature.linear_map import as_linear_map
from sharpkit.tracking.following import Followed, follow

P = 200


def rotated(*top, angle=0.0):
    """A bulk from −1 to 1, these eigenvalues above; eigenvectors turn a little with the angle."""
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64)).Q
    turn = torch.randn(P, P, generator=generator, dtype=torch.float64)
    vectors = base @ torch.linalg.matrix_exp(angle * (turn - turn.T) / P**0.5)
    values = torch.tensor([*np.linspace(-1, 1, P - len(top)), *top], dtype=torch.float64)
    return vectors @ torch.diag(values) @ vectors.T, vectors.T


def test_an_eigenvalue_that_overtakes_is_found_for_five_products_or_six():
    last = follow(as_linear_map(rotated(7.0, 9.0, 10.0)[0]))
    for number, rising in enumerate([9.5, 10.5, 12.0, 15.0], start=1):
        last = follow(as_linear_map(rotated(7.0, rising, 10.0, angle=0.02 * number)[0]), last)
        assert last.value == pytest.approx(max(rising, 10.0), rel=0.02)
        assert last.value <= max(rising, 10.0) * (1 + 1e-12)
        assert last.products <= 6 and last.converged


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_that_is_new_is_found_through_a_gradient_with_a_small_part_in_it(sign):
    """Its eigenvector is orthogonal to both vectors of the start, in which it stays unseen."""
    after, (*bulk, new, second, first) = rotated(12.0, 9.0, 10.0)
    rest = torch.stack(bulk).sum(0) / len(bulk) ** 0.5
    last = Followed(10.0, 0.0, first + 0.05 * rest, second, 5)
    unseen = follow(as_linear_map(after), last)
    assert unseen.value == pytest.approx(10.0, rel=1e-3) and unseen.converged
    noise = torch.randn(P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = sign * (first + 0.5 * new + noise / P**0.5)
    found = follow(as_linear_map(after), last, toward=1e-30 * gradient)
    assert found.value == pytest.approx(12.0, rel=0.02)
    assert found.products < 10


@pytest.mark.parametrize("gradient", [torch.zeros(P), torch.full((P,), torch.nan)])
def test_a_gradient_without_a_direction_is_left_out(gradient):
    matrix = as_linear_map(rotated(9.0, 10.0)[0])
    last = follow(matrix)
    assert follow(matrix, last, toward=gradient).value == follow(matrix, last).value
