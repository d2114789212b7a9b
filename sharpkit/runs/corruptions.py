"""A small set of seeded corruptions of test images, each of one stated severity.

Images have the shape (n, channels, height, width); noise and shifts are those of the seed, on every
device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.measures.robustness import moved

# severities, one of each kind; on the embedded zoo they cost from 2 (noise) to 45 points (shift)
BLUR = 1.0  # standard deviation of the Gaussian in pixels
NOISE = 0.25  # standard deviation, in units of that of all pixels of the images
CONTRAST = 0.4  # factor of the distance from the image's mean
SHIFT = 2  # largest shift in pixels along each axis


def blurred(images: Tensor, seed: int = 0) -> Tensor:
    """Images convolved with a Gaussian of σ = 1 pixel, cut at 3σ; the border is continued.

        x̃(r, c) = Σ_{i, j = −3}^3 k_i k_j x(r + i, c + j),   k_i ∝ exp(−i² / 2),  Σ k_i = 1

    Example:
        >>> float(blurred(torch.ones(1, 1, 5, 5)).sub(1).abs().max()) < 1e-6
        True
    """
    radius = int(3 * BLUR)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(offsets**2) / (2 * BLUR**2))
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def noisy(images: Tensor, seed: int = 0) -> Tensor:
    """Images with Gaussian noise of a quarter of the standard deviation s of all their pixels.

        x̃ = x + s/4 · ε,   ε ~ N(0, 1) for every pixel and channel

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).repeat(5000).view(1, 1, 100, 100)
        >>> round(float((noisy(x) - x).std()), 2)
        0.25
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return images + NOISE * images.double().std(unbiased=False).to(images) * noise


def less_contrast(images: Tensor, seed: int = 0) -> Tensor:
    """Images nearer to their mean x̄ over pixels and channels: x̃ = x̄ + 0.4 (x − x̄).

    Example:
        >>> less_contrast(torch.tensor([[[[0.0, 2.0]]]]))
        tensor([[[[0.6000, 1.4000]]]])
    """
    means = images.mean((1, 2, 3), keepdim=True)
    return means + CONTRAST * (images - means)


def shifted(images: Tensor, seed: int = 0) -> Tensor:
    """Images moved by −2 to 2 pixels along each axis, uniformly; the darkest value fills the rest.

    Example:
        >>> x = torch.zeros(1, 1, 5, 5)
        >>> x[0, 0, 2, 2] = 1.0
        >>> float(shifted(x, seed=1).sum())
        1.0
    """
    floor = images.amin()
    generator = torch.Generator().manual_seed(seed)
    return moved(images - floor, SHIFT, False, generator) + floor


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "blur": blurred,
    "noise": noisy,
    "contrast": less_contrast,
    "shift": shifted,
}
