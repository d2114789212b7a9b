"""Flips, crops and wrong labels, one image at a time."""

from __future__ import annotations

import pytest
import torch

from sharpkit.errors import ArgumentError
from sharpkit.training.augmentation import Augmenter, noisy_labels

CPU = torch.device("cpu")


def candidates(image, kind):
    """Every version of an image that an augmentation can give."""
    flips = [image, image.flip(-1)] if "flip" in kind else [image]
    if "crop" not in kind:
        return flips
    versions = []
    height, width = image.shape[1:]
    pad = height // 8, width // 8
    for flipped in flips:
        for down in range(-pad[0], pad[0] + 1):
            for right in range(-pad[1], pad[1] + 1):
                shifted = torch.zeros_like(image)
                for i in range(height):
                    for j in range(width):
                        if 0 <= i + down < height and 0 <= j + right < width:
                            shifted[:, i, j] = flipped[:, i + down, j + right]
                versions.append(shifted)
    return versions


@pytest.mark.parametrize("kind", ["flip", "crop", "flip-crop"])
def test_every_version_of_an_image_comes_and_no_other(kind):
    image = torch.randn(2, 16, 8)
    augment = Augmenter(kind, 400, image.shape, seed=3, epoch=1, device=CPU)
    images = augment(image.expand(400, 2, 16, 8), 0)
    versions = candidates(image, kind)
    assert len(versions) == {"flip": 2, "crop": 15, "flip-crop": 30}[kind]
    counts = [sum(torch.equal(found, version) for found in images) for version in versions]
    assert sum(counts) == 400
    assert min(counts) > 0
    assert max(counts) < 3 * 400 / len(versions)


def test_batches_do_not_change_the_choices_and_epochs_do():
    images = torch.randn(20, 1, 16, 16)
    augment = Augmenter("flip-crop", 20, (1, 16, 16), seed=0, epoch=1, device=CPU)
    parts = [augment(images[i : i + 7], i) for i in range(0, 20, 7)]
    assert torch.equal(torch.cat(parts), augment(images, 0))
    other = Augmenter("flip-crop", 20, (1, 16, 16), seed=0, epoch=2, device=CPU)
    assert not torch.equal(other(images, 0), augment(images, 0))


def test_label_noise_makes_exactly_the_fraction_wrong():
    labels = torch.arange(3000) % 5
    noisy = noisy_labels(labels, 0.4, seed=0)
    wrong = noisy != labels
    assert int(wrong.sum()) == 1200
    assert set(noisy.tolist()) == set(range(5))
    shifts = torch.bincount((noisy - labels)[wrong] % 5, minlength=5).tolist()
    assert shifts[0] == 0
    assert all(240 < count < 360 for count in shifts[1:])  # 300 each
    assert torch.equal(noisy, noisy_labels(labels, 0.4, seed=0))
    assert not torch.equal(noisy, noisy_labels(labels, 0.4, seed=1))
    assert torch.equal(labels, torch.arange(3000) % 5)


def test_label_noise_needs_another_class():
    with pytest.raises(ArgumentError, match="two classes"):
        noisy_labels(torch.zeros(4, dtype=torch.int64), 0.5, seed=0)
