"""Small zoos in the folders that Ray Tune leaves, written and run by plain loops."""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "leakyrelu": lambda z: np.where(z > 0, z, 0.01 * z),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
}
# per type: (channels, kernel, pooled) of the convolutions, and features after flattening 28 x 28
PLAIN = {
    "CNN": ([(8, 5, True), (6, 5, True), (4, 2, False)], 36),
    "CNN2": ([(6, 5, True), (9, 5, True), (6, 2, False)], 54),
    "CNN3": ([(16, 3, True), (32, 3, True), (15, 3, True)], 60),
}


def plain_weights(kind, dropout, random, channels=1):
    """Name -> array, float32, numbered as in a list of all layers."""
    convolutions, features = PLAIN[kind]
    drop = dropout > 0 or kind == "CNN3"
    arrays, at = {}, 0
    for out, kernel, pooled in convolutions:
        shape = (out, channels, kernel, kernel)
        arrays[f"module_list.{at}.weight"] = random.normal(
            0, 1 / math.sqrt(channels * kernel), shape
        )
        arrays[f"module_list.{at}.bias"] = random.normal(0, 0.1, out)
        at += 2 + pooled + (drop and pooled)  # itself, pooling, activation, dropout
        channels = out
    at += 1  # flattening
    for out, inside in ((20, features), (10, 20)):
        arrays[f"module_list.{at}.weight"] = random.normal(0, 1 / math.sqrt(inside), (out, inside))
        arrays[f"module_list.{at}.bias"] = random.normal(0, 0.1, out)
        at += 2 + drop  # itself, activation, dropout
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def plain_logits(arrays, kind, activation, x):
    """Of images (n, channels, height, width), in float64."""
    act = ACTIVATIONS[activation]
    values = [a.astype(np.float64) for a in arrays.values()]
    x = x.astype(np.float64)
    for (_, kernel, pooled), weight, bias in zip(
        PLAIN[kind][0], values[0:6:2], values[1:6:2], strict=True
    ):
        side = x.shape[2] - kernel + 1
        out = np.empty((len(x), len(bias), side, side))
        for i in range(side):
            for j in range(side):
                window = x[:, :, i : i + kernel, j : j + kernel].reshape(len(x), -1)
                out[:, :, i, j] = window @ weight.reshape(len(bias), -1).T + bias
        if pooled:
            half = side // 2
            blocks = out[:, :, : 2 * half, : 2 * half].reshape(*out.shape[:2], half, 2, half, 2)
            out = blocks.max((3, 5))
        x = act(out)
    x = x.reshape(len(x), -1)
    return act(x @ values[6].T + values[7]) @ values[8].T + values[9]


def residual_weights(width, blocks, random, *, channels=3, classes=10, bottleneck=False, kernel=3):
    """Name -> tensor, with torchvision's names and BatchNorm's statistics."""
    state = {}

    def convolution(name, out, inside, size):
        spread = 1 / math.sqrt(inside * size * size)
        state[f"{name}.weight"] = random.normal(0, spread, (out, inside, size, size))

    def norm(name, out):
        state[f"{name}.weight"] = random.uniform(0.5, 1.5, out)
        state[f"{name}.bias"] = random.normal(0, 0.3, out)
        state[f"{name}.running_mean"] = random.normal(0, 0.3, out)
        state[f"{name}.running_var"] = random.uniform(0.5, 1.5, out)
        state[f"{name}.num_batches_tracked"] = np.array(100)

    convolution("conv1", width, channels, kernel)
    norm("bn1", width)
    inside = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        out = 4 * inner if bottleneck else inner
        for k in range(count):
            name = f"layer{stage + 1}.{k}"
            sizes = [(inner, 1), (inner, 3), (out, 1)] if bottleneck else [(inner, 3), (out, 3)]
            before = inside
            for i, (after, size) in enumerate(sizes, 1):
                convolution(f"{name}.conv{i}", after, before, size)
                norm(f"{name}.bn{i}", after)
                before = after
            if k == 0 and (stage > 0 or inside != out):
                convolution(f"{name}.downsample.0", out, inside, 1)
                norm(f"{name}.downsample.1", out)
            inside = out
    state["fc.weight"] = random.normal(0, 1 / math.sqrt(inside), (classes, inside))
    state["fc.bias"] = random.normal(0, 0.3, classes)
    return {
        name: torch.tensor(value, dtype=torch.int64 if value.dtype.kind == "i" else torch.float32)
        for name, value in state.items()
    }


def residual_logits(state, x):
    """Of images, in float64, convolution by convolution as the names tell."""
    s = {name: value.double() for name, value in state.items()}

    def norm(name, y):
        a, b, mean, var = (
            s[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / torch.sqrt(var + 1e-5) * a + b

    first = s["conv1.weight"].shape[-1]
    x = F.conv2d(x.double(), s["conv1.weight"], stride=1 + (first == 7), padding=first // 2)
    x = norm("bn1", x).clamp_min(0)
    if first == 7:
        x = F.max_pool2d(x, 3, 2, 1)
    names = sorted({".".join(n.split(".")[:2]) for n in s if n.startswith("layer")})
    for name in names:
        stride = 2 if name.endswith(".0") and not name.startswith("layer1.") else 1
        deep = f"{name}.conv3.weight" in s
        y = x
        for i in range(1, 4 if deep else 3):
            weight = s[f"{name}.conv{i}.weight"]
            here = stride if i == (2 if deep else 1) else 1
            y = norm(
                f"{name}.bn{i}", F.conv2d(y, weight, stride=here, padding=weight.shape[-1] // 2)
            )
            if i < (3 if deep else 2):
                y = y.clamp_min(0)
        if f"{name}.downsample.0.weight" in s:
            x = F.conv2d(x, s[f"{name}.downsample.0.weight"], stride=stride)
            x = norm(f"{name}.downsample.1", x)
        x = (x + y).clamp_min(0)
    return x.mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"]


def write_trial(folder, params, epochs, *, padded=True, before=None):
    """A network's folder; `epochs` is epoch -> (metrics, state or None where none was kept)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    lines = list(before or [])
    for epoch, (metrics, state) in epochs.items():
        ray = {"training_iteration": epoch, "time_total_s": 1.5 * epoch, "pid": 77, "done": False}
        lines.append(json.dumps({**metrics, **ray, "date": "2022-05-01", "config": params}))
        if state is not None:
            name = f"checkpoint_{epoch:06d}" if padded else f"checkpoint_{epoch}"
            (folder / name).mkdir(exist_ok=True)
            tensors = {name: torch.as_tensor(value) for name, value in state.items()}
            torch.save(tensors, folder / name / "checkpoints")
            torch.save({"state": {}}, folder / name / "optimizer")
    (folder / "result.json").write_text("\n".join(lines) + "\n")


def write_images(folder, train, test):
    """An .npz file of images as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(folder / "images.npz", **dict(zip(names, (*train, *test), strict=True)))
