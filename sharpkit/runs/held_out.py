"""What a classifier is worth on test data beside its accuracy: calibration, and robustness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data
from sharpkit.errors import ArgumentError
from sharpkit.measures.passes import Setup, setup
from sharpkit.runs.corruptions import CORRUPTIONS
from sharpkit.runs.store import TEST_METRICS

BINS = 15  # of the calibration error


def held_out_metrics(model: nn.Module, data: Data, *, seed: int = 0) -> dict[str, float]:
    """Calibration on test data, and of images the accuracy under four corruptions.

    test_nll and test_brier are proper scores, test_ece is `calibration_error` in 15 bins. Of inputs
    (n, channels, height, width), test_acc_blur, test_acc_noise, test_acc_contrast and
    test_acc_shift are the accuracies on the test images after `sharpkit.runs.corruptions`: a
    Gaussian blur of σ = 1 pixel, Gaussian noise of a quarter of the pixels' standard deviation,
    40 % of the contrast, and shifts of up to 2 pixels. All models of a task see the same images.
    Cost: 5 F of the test data.

    Args:
        model: Any module with outputs of shape (n, classes), taken as logits.
        data: Test inputs of shape (n, ...) and labels of shape (n,).
        seed: Of noise and shifts.

    Returns:
        dict: Column of `Scores.metrics()` -> value; accuracies and test_ece from 0 to 1, test_brier
        from 0 to 2, test_nll in nats.

    Raises:
        DataError: If labels and outputs are not those of a classification.
        ModelError: For NaN or infinite weights or outputs.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.eye(2)
        >>> found = held_out_metrics(model, (torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])))
        >>> {name: round(value, 4) for name, value in found.items()}  # p = ½ for both classes
        {'test_ece': 0.25, 'test_nll': 0.6931, 'test_brier': 0.5}
    """
    with frozen(model) as found:
        run = setup(model, data, found)
        logits, labels = run.logits(), run.labels
        scores = {
            "test_ece": calibration_error(logits, labels),
            "test_nll": negative_log_likelihood(logits, labels),
            "test_brier": brier_score(logits, labels),
        }
        inputs = run.examples.inputs
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4:
            for name, corrupt in CORRUPTIONS.items():
                other = Setup(run.function, Examples(corrupt(inputs, seed), run.examples.labels))
                scores[f"test_acc_{name}"] = other.accuracy()
    return scores


@dataclass(frozen=True)
class HeldOut:
    """`held_out_metrics` as a work item of a run: its settings are columns of `metrics()`."""

    name = TEST_METRICS
    needs_test_data = True

    def __call__(self, model: nn.Module, data: Data, *, seed: int) -> dict[str, float]:
        """The columns of one model on the test data."""
        return held_out_metrics(model, data, seed=seed)


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """The expected calibration error (ECE): how far confidence is from accuracy.

        Σ_b |B_b| / n · |acc(B_b) − conf(B_b)|

    B_b are the examples whose confidence, the largest probability, is in ((b − 1)/bins, b/bins];
    acc is the share of them that is right, conf their mean confidence. The estimate is biased
    upwards where bins hold few examples, and depends on their number.

    Args:
        logits: Shape (n, classes).
        labels: Shape (n,), integers.
        bins: Bins of equal width on [0, 1].

    Returns:
        float: From 0 to 1.

    Raises:
        ArgumentError: For fewer than one bin.

    Source:
        Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017,
        equation 5, with their 15 bins.

    Example:
        >>> logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]]).log()
        >>> round(calibration_error(logits, torch.tensor([0, 1, 1])), 4)  # (2 · 0.3 + 0.4) / 3
        0.3333
    """
    if bins < 1:
        raise ArgumentError(f"bins must be at least 1, got {bins}")
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    # the right end belongs to a bin, so that certainty has one
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    off = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    off.index_add_(0, bin_of, right - confidence)
    return float(off.abs().sum() / len(labels))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """The mean of −log p_y, in nats: the cross-entropy.

    Args:
        logits: Shape (n, classes).
        labels: Shape (n,), integers.

    Example:
        >>> round(negative_log_likelihood(torch.zeros(1, 4), torch.tensor([2])), 4)  # log 4
        1.3863
    """
    log_p = logits.double().log_softmax(1)
    return float(-log_p.gather(1, labels[:, None]).mean())


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """The mean of Σ_c (p_c − 1[c = y])² over all classes, from 0 to 2.

    Args:
        logits: Shape (n, classes).
        labels: Shape (n,), integers.

    Source:
        Brier, Monthly Weather Review 1950.

    Example:
        >>> round(brier_score(torch.zeros(1, 4), torch.tensor([2])), 4)  # 3/16 + 9/16
        0.75
    """
    p = logits.double().softmax(1)
    hit = torch.zeros_like(p).scatter_(1, labels[:, None], 1.0)
    return float((p - hit).square().sum(1).mean())
