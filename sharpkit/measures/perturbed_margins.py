"""Margins of examples that were not in the training set: mixed up, or moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.measures.layer_margins import layer_margins
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import Setup, images, mean_of, setup
from sharpkit.measures.robustness import moved, same_class_pairs
from sharpkit.measures.weight_layers import first_layer

_FLOOR = 1e-7  # of the gradient's norm and the spread, as in the authors' program
_TRIMMED = 0.05  # share of the features' variances left out at either end


def mixup_margin(model: nn.Module, data: Data, *, seed: int = 0) -> Estimate:
    """The mean normalised margin of midpoints of two training inputs of one class.

        mean over i of  γ(x̃_i) / (‖∂γ(x̃_i) / ∂h‖₂ s),   x̃_i = (x_i + x_j) / 2,  y_j = y_i

    h is the output of the first convolution (of the first linear layer where there is none), with
    the activation that directly follows it, γ = z_y − max_{j≠y} z_j, and s² the mean over the
    features of h, trimmed by 5 % at either end, of their variances over the x̃_i. Each example is
    mixed with the next one in a random cyclic order of its class. Invariant under rescaling layers
    and permuting units. Cost: 1 G.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        seed: Of the orders.

    Returns:
        Estimate: The mean, and its standard error over examples; larger is better.

    Raises:
        DataError: For inputs that are tokens or dicts, labels that do not fit the outputs, or no
            class with two examples.
        ModelError: For NaN or infinite weights or outputs, or a layer that gives the same for all.

    Source:
        Natekar and Sharma (2012.02775), the margin summary of perturbed samples, and the authors'
        program; there an example may be its own partner.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> x = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]])
        >>> value, _ = mixup_margin(model, (x, torch.tensor([0, 0, 1, 1])))  # midpoints 2, -2
        >>> round(value, 4)  # margin 4, slope √2 in (z, -z), standard deviation 2
        1.4142
    """
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "mixup")
        labels = run.examples.labels.cpu()
        chosen, partner = same_class_pairs(labels, torch.Generator().manual_seed(seed))
        a, b = (index.to(inputs.device) for index in (chosen, partner))
        return _mean_margin(run, model, data, (inputs[a] + inputs[b]) / 2, labels[chosen])


def augmented_margin(
    model: nn.Module, data: Data, *, shift: int = 2, flip: bool = True, seed: int = 0
) -> Estimate:
    """The mean normalised margin of training images that were shifted and mirrored.

    As `mixup_margin`, with x̃_i the image moved by up to `shift` pixels along each axis, filled with
    zeros, and mirrored left to right with probability ½. Cost: 1 G.

    Args:
        model: Any module whose examples do not influence each other, with outputs (n, classes).
        data: Images of shape (n, channels, height, width) and labels of shape (n,).
        shift: Largest shift in pixels.
        flip: Also mirror; turn it off where left and right differ in meaning, as in digits.
        seed: Of the transformations.

    Returns:
        Estimate: The mean, and its standard error over examples; larger is better.

    Raises:
        ArgumentError: For a negative shift.
        DataError: For inputs that are not images.
        ModelError: For NaN or infinite weights or outputs, or a layer that gives the same for all.

    Source:
        Natekar and Sharma (2012.02775), the margin summary of augmented samples; their
        augmentation mirrors, crops and changes colours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> rows = torch.randn(4, 1, 6, 1).expand(4, 1, 6, 6)  # the same when mirrored
        >>> data = rows, torch.tensor([0, 1, 0, 1])
        >>> plain = augmented_margin(model, data, shift=0, flip=False)
        >>> augmented_margin(model, data, shift=0) == plain
        True
    """
    if shift < 0:
        raise ArgumentError(f"shift must not be negative, got {shift}")
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "augmentation")
        if inputs.ndim != 4:
            raise DataError(f"expected images (n, c, h, w), got shape {tuple(inputs.shape)}")
        changed = moved(inputs, shift, flip, torch.Generator().manual_seed(seed))
        return _mean_margin(run, model, data, changed, run.examples.labels)


def _mean_margin(
    run: Setup, model: nn.Module, data: Data, inputs: Tensor, labels: Tensor
) -> Estimate:
    module = first_layer(model, data)
    other = Setup(run.function, Examples(inputs, labels))
    at = layer_margins(other, model, module, output=True)
    spread = trimmed_mean(at.rows.var(0, unbiased=False)) ** 0.5
    if not spread > 0:
        raise ModelError("the first layer gives the same for all examples")
    return mean_of(at.margins / (at.slopes + _FLOOR) / (spread + _FLOOR))


def trimmed_mean(values: Tensor) -> float:
    """The mean without the smallest and the largest 5 % of the values.

    Example:
        >>> trimmed_mean(torch.tensor([*range(20), 1000.0]))  # without 0 and 1000
        10.0
    """
    cut = int(_TRIMMED * len(values))
    return float(values.sort().values[cut : len(values) - cut].mean())
