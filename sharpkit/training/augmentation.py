"""Random flips and crops of whole batches, and labels that are wrong on purpose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpkit.errors import ArgumentError, DataError
from sharpkit.training.streams import stream

AUGMENTATIONS = ("flip", "crop", "flip-crop")


class Augmenter:
    """The random choices of one epoch, drawn before it begins, applied batch by batch.

    - "flip": mirrored left to right with probability 1/2.
    - "crop": shifted by up to an eighth of the height and width (4 pixels of 32), each way with
      equal probability. Zeros come in at the edge: in normalised data, the mean colour.
    - "flip-crop": both.

    Every epoch has choices of its own; a shape is (channels, height, width).

    Example:
        >>> augment = Augmenter("flip", 2, (1, 1, 2), seed=1, epoch=1, device=torch.device("cpu"))
        >>> augment(torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]), 0).flatten().tolist()
        [2.0, 1.0, 3.0, 4.0]
    """

    def __init__(
        self,
        kind: str,
        images: int,
        shape: tuple[int, ...],
        *,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> None:
        if len(shape) != 3:
            raise DataError(
                f"augmentation {kind!r} needs images of shape (channels, height, width); an input "
                f"has the shape {tuple(shape)}"
            )
        draws = stream(seed, "augmentation", epoch)
        self._pads = (shape[1] // 8, shape[2] // 8)
        self._flips = self._shifts = None
        if "flip" in kind:
            self._flips = torch.rand(images, generator=draws).lt(0.5).to(device)
        if "crop" in kind:
            rows, columns = (
                torch.randint(2 * pad + 1, (images,), generator=draws).to(device)
                for pad in self._pads
            )
            self._shifts = rows, columns

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """The images, of shape (n, channels, height, width), with the choices from number start."""
        chosen = slice(start, start + len(images))
        if self._flips is not None:
            mirrored = self._flips[chosen, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        if self._shifts is not None:
            (tall, wide), (rows, columns) = self._pads, self._shifts
            height, width = images.shape[-2:]
            windows = (
                F.pad(images, (wide, wide, tall, tall)).unfold(2, height, 1).unfold(3, width, 1)
            )
            each = torch.arange(len(images), device=images.device)
            images = windows[each, :, rows[chosen], columns[chosen]]
        return images


def noisy_labels(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The labels with a fraction of them replaced by another class, every other one equally likely.

    Of n labels, round(fraction · n) are wrong.

    Raises:
        ArgumentError: If there is only one class.

    Example:
        >>> labels = torch.arange(10) % 5
        >>> int((noisy_labels(labels, 0.3, seed=0) != labels).sum())
        3
    """
    count = round(fraction * len(labels))
    if not count:
        return labels
    classes = int(labels.max()) + 1
    if classes < 2:
        raise ArgumentError("label_noise needs at least two classes in the training labels")
    draws = stream(seed, "label noise")
    chosen = torch.randperm(len(labels), generator=draws)[:count].to(labels.device)
    shift = torch.randint(1, classes, (count,), generator=draws).to(labels.device)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy
