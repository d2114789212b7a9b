"""The measure that won the PGDL competition: clusters in the first layer, times errors on mixup."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import DataError
from sharpkit.measures.passes import Setup, images, setup
from sharpkit.measures.representations import layer_rows
from sharpkit.measures.weight_layers import first_layer

_BLOCK = 120  # examples among which the index is taken
_POOL = 4


def davies_bouldin_mixup(
    model: nn.Module, data: Data, *, layer: str | None = None, seed: int = 0
) -> dict[str, float]:
    """How badly a layer separates the classes, times how often mixtures of a class are mistaken.

        product         davies_bouldin · mixup
        davies_bouldin  mean over blocks of 120 examples of the Davies-Bouldin index of a layer
        mixup           mean over classes c of P[argmax f((x_i + x_j) / 2) ≠ c], y_i = y_j = c

    The index is that of `davies_bouldin`, on the output of the first convolution (with the
    activation that directly follows it), whose maps are max-pooled in windows of 4 x 4. It depends
    on the number of examples, since few of them give uncertain centres: hence blocks of the size
    that the winner used, of a random order. Pairs are all pairs of one class within blocks of ten
    examples a class. Invariant under rescaling layers and permuting units. Cost: 1 F for the index,
    and about 4.5 F for the mixtures.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        layer: Name of the module whose output is meant; None for the first convolution, or the
            first linear layer where there is none.
        seed: Of the order.

    Returns:
        dict: "product", "davies_bouldin" and "mixup"; smaller is better.

    Raises:
        ArgumentError: If there is no such layer.
        DataError: For inputs that are tokens or dicts, fewer than two classes, or no class with two
            examples.
        ModelError: For NaN or infinite outputs.

    Source:
        Natekar and Sharma (2012.02775), sections 3 and 4, and the authors' program for the sizes
        of blocks and windows (there 10 blocks, and the stored order for the mixtures).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)
        >>> model.weight.data, model.bias.data = torch.tensor([[0.0], [1.0]]), torch.zeros(2)
        >>> x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0], [-3.0]])
        >>> found = davies_bouldin_mixup(model, (x, torch.tensor([0, 0, 1, 1, 1])))
        >>> round(found["mixup"], 4)  # of 1, 1, -3 two of three pairs have a mean below 0
        0.3333
    """
    chosen = first_layer(model, data) if layer is None else layer
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "mixup")
        run.logits()  # refuses labels that do not fit
        labels = run.examples.labels.cpu()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        features = layer_rows(run, model, chosen, _pooled).double()
        mixup = _mixup_error(run, inputs, labels, order)
    index = _davies_bouldin(features, labels, order)
    return {"product": index * mixup, "davies_bouldin": index, "mixup": mixup}


def _pooled(rows: Tensor) -> Tensor:
    """Outputs of a layer as rows, maps max-pooled."""
    if rows.ndim == 4:
        rows = F.max_pool2d(rows, [min(_POOL, size) for size in rows.shape[2:]])
    return rows.flatten(1)


def _davies_bouldin(features: Tensor, labels: Tensor, order: Tensor) -> float:
    from sklearn.metrics import davies_bouldin_score

    found = []
    for block in _blocks(order, _BLOCK):
        classes = len(set(labels[block].tolist()))
        if 2 <= classes < len(block):
            found.append(davies_bouldin_score(features[block].numpy(), labels[block].numpy()))
    if not found:
        raise DataError(
            f"{len(labels)} examples of {len(set(labels.tolist()))} classes: expected at least 2 "
            "classes, and fewer than examples"
        )
    return float(np.mean(found))


def _mixup_error(run: Setup, inputs: Tensor, labels: Tensor, order: Tensor) -> float:
    wrong: dict[int, list[float]] = {}
    classes = sorted(set(labels.tolist()))
    for block in _blocks(order, 10 * len(classes)):
        pairs = [
            pair
            for label in classes
            for pair in combinations(block[labels[block] == label].tolist(), 2)
        ]
        if not pairs:
            continue
        first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
        target = labels[first]
        right = _hits(run, inputs, first, second, target)
        for label in set(target.tolist()):
            wrong.setdefault(label, []).append(1 - float(right[target == label].mean()))
    if not wrong:
        raise DataError("no class has two examples: there is nothing to mix")
    return float(np.mean([np.mean(shares) for shares in wrong.values()]))


def _hits(run: Setup, inputs: Tensor, first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """Whether each mixture is classified as its two parts are labelled, 0 or 1."""
    a, b = first.to(inputs.device), second.to(inputs.device)
    hits = []
    for i in range(0, len(a), 1024):  # pairs held at a time
        mixed = (inputs[a[i : i + 1024]] + inputs[b[i : i + 1024]]) / 2
        one = Setup(run.function, Examples(mixed, target[i : i + 1024]))
        hits.append((one.logits().argmax(1).cpu() == target[i : i + 1024]).double())
    return torch.cat(hits)


def _blocks(order: Tensor, size: int) -> list[Tensor]:
    """Blocks of one size; what is left over is left out, unless it is all there is."""
    return [order[i : i + size] for i in range(0, max(len(order) - size, 0) + 1, size)]
