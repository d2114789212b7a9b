"""A small zoo in the published layout of the Small CNN Zoo, written by plain loops."""

import csv
import gzip
import struct

import numpy as np

SIZES = [(16,), (3, 3, 1, 16), (16,), (3, 3, 16, 16), (16,), (3, 3, 16, 16), (10,), (16, 10)]
NAMES = [
    f"sequential/{layer}/{part}:0"
    for layer in ("conv2d", "conv2d_1", "conv2d_2", "dense")
    for part in ("bias", "kernel")
]
EPOCHS = (0, 1, 86)
ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "selu": lambda z: (
        1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * (np.exp(np.minimum(z, 0)) - 1))
    ),
}


def logits(row, x, activation, stride):
    """Of grey images (n, height, width), float64, by a loop over the pixels of the outputs."""
    parts, start = [], 0
    for shape in SIZES:
        count = int(np.prod(shape))
        parts.append(row[start : start + count].astype(np.float64).reshape(shape))
        start += count
    x = x[..., None].astype(np.float64)  # (n, height, width, channels)
    for bias, kernel in zip(parts[0:6:2], parts[1:6:2], strict=True):
        side = (x.shape[1] - 3) // stride + 1
        out = np.empty((len(x), side, side, len(bias)))
        for i in range(side):
            for j in range(side):
                a, b = i * stride, j * stride
                window = x[:, a : a + 3, b : b + 3].reshape(len(x), -1)
                out[:, i, j] = window @ kernel.reshape(-1, len(bias)) + bias
        x = ACTIVATIONS[activation](out)
    return x.mean((1, 2)) @ parts[7] + parts[6]


def grey(pixels):
    """Of bytes (n, height, width[, 3]): from -1 to 1, colours averaged."""
    x = -1 + 2 * (pixels / 255)
    return x if x.ndim == 3 else x.mean(-1)


def write_idx(folder, train, test):
    """The four files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(head + array.tobytes())


class SmallCnnFiles:
    """Eight networks: the further from the first, the more they differ from it."""

    def __init__(self, folder, *, stride=2, order=None, n=40, networks=8, seed=0):
        self.folder, self.stride, self.order = folder, stride, order or list(range(8))
        random = np.random.default_rng(seed)
        images = random.integers(0, 256, (2 * n, 28, 28), dtype=np.uint8)
        images[::2] //= 3  # some dark ones
        start, step = (random.normal(0, s, sum(map(np.prod, SIZES))) for s in (0.3, 0.25))
        self.settings = [
            {
                "activation": ("relu", "tanh", "sigmoid", "selu")[k % 4] if k else "tanh",
                "b_init": "zeros",
                "dataset": "mnist",
                "dnn_architecture": "cnn",
                "dropout": 0.05 * k,
                "init_std": 0.1,
                "l2reg": 10.0 ** (-k),
                "learning_rate": 0.001 * (k + 1),
                "num_layers": 3,
                "num_units": 16,
                "optimizer": ("adam", "sgd")[k // 4],
                "random_seed": 42,
                "train_fraction": 1.0 if k < 6 else 0.5,
                "w_init": "he_normal",
            }
            for k in range(networks)
        ]
        self.rows = {
            (k, e): (start + step * (0.1 * k + (EPOCHS[-1] - e) / 40)).astype(np.float32)
            for k in range(networks)
            for e in EPOCHS
        }
        best = logits(self.rows[0, 86], grey(images), "tanh", stride)
        labels = best.argmax(1)
        labels[::9] = (labels[::9] + 1) % 10  # the best network is right in eight of nine
        self.train, self.test = (
            (images[p], labels[p].astype(np.uint8)) for p in (slice(n), slice(n, None))
        )
        self.metrics = {key: self._metrics(*key) for key in self.rows}

    def _metrics(self, k, epoch):
        found = {}
        for name, (images, labels) in (("train", self.train), ("test", self.test)):
            z = logits(
                self.rows[k, epoch], grey(images), self.settings[k]["activation"], self.stride
            )
            found[f"{name}_accuracy"] = float((z.argmax(1) == labels).mean())
            z = z - z.max(1, keepdims=True)
            chosen = z[np.arange(len(z)), labels] - np.log(np.exp(z).sum(1))
            found[f"{name}_loss"] = float(-chosen.mean())
        return found

    def write(self, without=()):
        """layout.csv, metrics.csv.gz (without some columns) and weights.npy; images beside them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        counts = [int(np.prod(shape)) for shape in SIZES]
        starts = np.cumsum([0, *counts])
        ends, at = {}, 0
        for v in self.order:  # where each variable is put
            ends[v] = at, at + counts[v]
            at += counts[v]
        with (self.folder / "layout.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["varname", "start_idx", "end_idx", "size", "shape"])
            for v in self.order:
                table.writerow([NAMES[v], *ends[v], counts[v], SIZES[v]])
        weights = np.stack(
            [
                np.concatenate([row[starts[v] : starts[v + 1]] for v in self.order])
                for row in self.rows.values()
            ]
        )
        np.save(self.folder / "weights.npy", weights)
        with gzip.open(self.folder / "metrics.csv.gz", "wt", newline="") as file:
            rows = [
                {f"config.{name}": value for name, value in self.settings[k].items()}
                | {"modeldir": f"/runs/{7000 + k}/", "step": epoch, **metrics}
                for (k, epoch), metrics in self.metrics.items()
            ]
            columns = [name for name in rows[0] if name not in without]
            table = csv.DictWriter(file, ["", *columns], extrasaction="ignore")
            table.writeheader()
            table.writerows({"": i} | row for i, row in enumerate(rows))
        write_idx(self.folder / "images", self.train, self.test)
        return self.folder
