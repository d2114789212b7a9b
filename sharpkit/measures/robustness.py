"""How predictions change when the training inputs are mixed or moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError, DataError
from sharpkit.measures.measure import Estimate
from sharpkit.measures.passes import Setup, images, mean_of, setup


def mixup_error(
    model: nn.Module, data: Data, *, weight: float = 0.5, draws: int = 1, seed: int = 0
) -> Estimate:
    """The share of wrong predictions on mixtures of two training inputs of the same class.

        mean over i of 1[argmax f(λ x_i + (1 − λ) x_j) ≠ y_i],   y_j = y_i, j ≠ i

    Each example is mixed with the next one in a random cyclic order of its class. Classes with a
    single example are left out. Cost: `draws` forward passes.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Inputs of shape (n, ...), real numbers, and labels of shape (n,).
        weight: λ, from 0 to 1.
        draws: Random orders.
        seed: Of the orders.

    Returns:
        Estimate: The share, and its standard error over examples.

    Raises:
        ArgumentError: For weight or draws out of range.
        DataError: For inputs that are tokens or dicts, or no class with two examples.
        ModelError: For NaN or infinite outputs.

    Source:
        Natekar and Sharma (2012.02775), label-wise mixup, with λ = ½.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 2)
        >>> model.weight.data = torch.tensor([[0.0], [1.0]])
        >>> model.bias.data = torch.tensor([0.0, -1.5])
        >>> x, y = torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([1, 1, 1])
        >>> mixup_error(model, (x, y), draws=50).value  # 0 and 2 mix to 1 < 1.5
        0.666...
    """
    if not 0 <= weight <= 1:
        raise ArgumentError(f"weight must be between 0 and 1, got {weight}")
    _check_draws(draws)
    generator = torch.Generator().manual_seed(seed)
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "mixup")
        run.logits()  # refuses labels that do not fit
        labels = run.examples.labels.cpu()
        errors = []
        for _ in range(draws):
            chosen, partner = same_class_pairs(labels, generator)
            chosen, partner = chosen.to(inputs.device), partner.to(inputs.device)
            mixed = weight * inputs[chosen] + (1 - weight) * inputs[partner]
            wrong = _predictions(run, mixed) != labels[chosen.cpu()].to(run.function.device)
            errors.append(wrong.double())
    return mean_of(torch.stack(errors).mean(0))


def same_class_pairs(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every example whose class has another one, in order, and its partner."""
    order = torch.randperm(len(labels), generator=generator)
    partner = torch.full((len(labels),), -1)
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label]
        if len(members) > 1:
            partner[members] = members.roll(-1)
    chosen = torch.nonzero(partner >= 0).squeeze(1)
    if len(chosen) == 0:
        raise DataError("no class has two examples: there is nothing to mix")
    return chosen, partner[chosen]


def augmentation_inconsistency(
    model: nn.Module,
    data: Data,
    *,
    shift: int = 2,
    flip: bool = True,
    draws: int = 4,
    seed: int = 0,
) -> Estimate:
    """The share of predictions that change when the training images are shifted and mirrored.

        mean over i of P[argmax f(T x_i) ≠ argmax f(x_i)],   T random

    T moves an image by up to `shift` pixels along each axis, filling with zeros, and mirrors it
    left to right with probability ½. Labels are not used. Cost: `draws` + 1 forward passes.

    Args:
        model: Any module with outputs of shape (n, classes).
        data: Images of shape (n, channels, height, width) and labels of shape (n,).
        shift: Largest shift in pixels.
        flip: Also mirror; turn it off where left and right differ in meaning, as in digits.
        draws: Random transformations of each image.
        seed: Of the transformations.

    Returns:
        Estimate: The share, and its standard error over examples.

    Raises:
        ArgumentError: For shift or draws out of range.
        DataError: For inputs that are not images.
        ModelError: For NaN or infinite outputs.

    Source:
        The competition's family of augmentation scores; see Jiang et al. (2012.07976) and
        Aithal et al. (2101.06459).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
        >>> data = torch.ones(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
        >>> augmentation_inconsistency(model, data, shift=0).value  # a mean ignores mirroring
        0.0
    """
    if shift < 0:
        raise ArgumentError(f"shift must not be negative, got {shift}")
    _check_draws(draws)
    generator = torch.Generator().manual_seed(seed)
    with frozen(model) as found:
        run = setup(model, data, found)
        inputs = images(run.examples, "augmentation")
        if inputs.ndim != 4:
            raise DataError(f"expected images (n, c, h, w), got shape {tuple(inputs.shape)}")
        before = run.logits().argmax(1)
        changes = [
            (_predictions(run, moved(inputs, shift, flip, generator)) != before).double()
            for _ in range(draws)
        ]
    return mean_of(torch.stack(changes).mean(0))


def moved(inputs: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Images shifted by up to `shift` pixels, filled with zeros, and mirrored half of the time."""
    n, _, height, width = inputs.shape
    offsets = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator).to(inputs.device)
    mirrored = torch.randint(0, 2, (n, 1), generator=generator).to(inputs.device)
    rows = offsets[0] + torch.arange(height, device=inputs.device)  # (n, h)
    columns = torch.arange(width, device=inputs.device).expand(n, -1)
    if flip:
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
    columns = offsets[1] + columns  # (n, w)
    padded = F.pad(inputs, (shift, shift, shift, shift))
    index = torch.arange(n, device=inputs.device)[:, None, None]
    # advanced indices around the slice: (n, h, w, c)
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _predictions(run: Setup, inputs: Tensor) -> Tensor:
    other = Setup(run.function, Examples(inputs, torch.zeros(len(inputs), dtype=torch.int64)))
    return other.logits().argmax(1)


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise ArgumentError(f"draws must be at least 1, got {draws}")
