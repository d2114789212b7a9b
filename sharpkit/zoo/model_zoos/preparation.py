"""How the training programs of the model zoos prepared the images, by data set and network.

Each ordered the published training images by `torch.randperm` with seed 42, trained on the first
part and kept the rest for validation; the test images are all of the published ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from sharpkit.data.published import Images
from sharpkit.errors import ZooFormatError
from sharpkit.zoo.task import Split

_SEED = 42  # of the order of the training images


@dataclass(frozen=True)
class Preparation:
    """From bytes to what the networks took.

    Attributes:
        mean, std: Of x = (pixel / 255 − mean) / std, one number or one per channel.
        trained: How many training images were trained on, and how many there are.
        size: Height and width after bilinear resizing, or `crop`; None as they are.
        crop: Height and width of the middle.
        grey: Colours are made grey by their luma.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    trained: tuple[int, int]
    size: int | None = None
    crop: int | None = None
    grey: bool = False

    def __call__(self, images: Images, split: Split, where: str) -> TensorDataset:
        """The examples of a split; ZooFormatError if these are not the published images."""
        pixels, labels = images
        if split == "train":
            used, published = self.trained
            if len(pixels) != published:
                raise ZooFormatError(
                    f"{where}: {len(pixels):,} training images; the data set has {published:,}, of "
                    f"which these networks saw {used:,}. For others, give prepared ones: an .npz "
                    "file whose x_train and x_test are floats"
                )
            if used < published:
                order = torch.randperm(published, generator=torch.Generator().manual_seed(_SEED))
                rows = order[:used].numpy()
                pixels, labels = pixels[rows], labels[rows]
        inputs = self._scaled(self._shaped(pixels))
        return TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64)))

    def _shaped(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        grey = self.grey and pixels.shape[1] == 3
        resized = self.size is not None and pixels.shape[2:] != (self.size, self.size)
        if grey or resized:
            from PIL import Image

            rows = []
            for row in pixels:  # as the programs did, image by image
                image = Image.fromarray(row[0] if len(row) == 1 else row.transpose(1, 2, 0))
                image = image.convert("L") if grey else image
                if self.size is not None:
                    image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
                array = np.asarray(image)
                rows.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
            pixels = np.stack(rows)
        if self.crop is not None:
            top, left = ((side - self.crop + 1) // 2 for side in pixels.shape[2:])
            pixels = pixels[:, :, top : top + self.crop, left : left + self.crop]
        return pixels

    def _scaled(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        inputs = pixels.astype(np.float32)
        inputs /= np.float32(255)
        inputs -= mean
        inputs /= std
        return inputs


_HALF, _MNIST = ((0.5,), (0.5,)), ((0.1307,), (0.3081,))
_CIFAR10 = tuple(x / 255 for x in (125.3, 123.0, 113.9)), tuple(x / 255 for x in (63.0, 62.1, 66.7))
_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_SVHN = (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (data set, kind of network) -> how it may have been; kinds are those of `kind_of`
PREPARATIONS: dict[tuple[str, str], dict[str, Preparation]] = {
    ("mnist", "CNN"): {"as published": Preparation(*_MNIST, (50_000, 60_000))},
    ("fashion_mnist", "CNN"): {"as published": Preparation(*_HALF, (50_000, 60_000))},
    ("usps", "CNN"): {"as published": Preparation(*_MNIST, (6_000, 7_291), size=28)},
    ("svhn", "CNN"): {
        "mean 0.5": Preparation(*_HALF, (60_000, 73_257), crop=28, grey=True),
        "mean 0.1307": Preparation(*_MNIST, (60_000, 73_257), crop=28, grey=True),
    },
    ("cifar10", "CNN"): {"as published": Preparation(*_HALF, (42_000, 50_000), size=28)},
    ("cifar10", "CNN3"): {"as published": Preparation(*_HALF, (42_000, 50_000))},
    ("stl10", "CNN"): {"as published": Preparation(*_HALF, (4_200, 5_000), size=28)},
    ("stl10", "CNN3"): {"as published": Preparation(*_HALF, (4_200, 5_000), size=32)},
    ("cifar10", "Resnet"): {"as published": Preparation(*_CIFAR10, (40_000, 50_000))},
    ("cifar100", "Resnet"): {"as published": Preparation(*_CIFAR100, (40_000, 50_000))},
    ("tiny_imagenet", "Resnet"): {"as published": Preparation(*_IMAGENET, (100_000, 100_000))},
    ("cifar10", "width"): {"as published": Preparation(*_CIFAR10, (50_000, 50_000))},
    ("cifar100", "width"): {"as published": Preparation(*_CIFAR100, (50_000, 50_000))},
    ("svhn", "width"): {"as published": Preparation(*_SVHN, (73_257, 73_257))},
    ("tiny_imagenet", "width"): {"as published": Preparation(*_IMAGENET, (100_000, 100_000))},
}
_NAMES = {
    "fashion_mnist": r"fashion|f[_-]?mnist",
    "mnist": "mnist",
    "svhn": "svhn",
    "usps": "usps",
    "cifar100": r"cifar[_-]?100",
    "cifar10": r"cifar[_-]?10",
    "stl10": r"stl[_-]?10",
    "tiny_imagenet": r"tiny[_-]?imagenet",
}


def data_set_in(*texts: str) -> str:
    """The data set that one of the texts names, the first ones first; "" if none does.

    Example:
        >>> data_set_in("tune_zoo_f_mnist_uniform"), data_set_in("mine", "/data/cifar_100/set.pt")
        ('fashion_mnist', 'cifar100')
    """
    for text in texts:
        for name, pattern in _NAMES.items():
            if re.search(pattern, text, re.IGNORECASE):
                return name
    return ""


def kind_of(model_type: object) -> str:
    """What the preparation depends on: "CNN", "CNN3", "Resnet" or "width".

    Example:
        >>> kind_of("CNN2"), kind_of("Resnet18"), kind_of("Resnet50_width")
        ('CNN', 'Resnet', 'width')
    """
    text = str(model_type)
    if text.lower().startswith("resnet"):
        return "width" if text.endswith("_width") else "Resnet"
    return "CNN3" if text == "CNN3" else "CNN"
