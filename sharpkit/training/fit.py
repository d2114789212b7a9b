"""Training with SGD or SAM: the same seed gives the same weights, interrupted or not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sharpkit.contract.checks import check_rows
from sharpkit.contract.examples import Examples
from sharpkit.contract.half_precision import refuse_half
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_in_order
from sharpkit.contract.loss_text import loss_text
from sharpkit.contract.losses import (
    Loss,
    MeanLoss,
    check_class_labels,
    check_is_mean,
    check_labels,
    resolve_loss,
)
from sharpkit.contract.parameters import Parameters, check_finite_weights
from sharpkit.device import check_device
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, DataError, ModelError
from sharpkit.memory import freed_memory_kept
from sharpkit.run_directory import sole_driver
from sharpkit.training.loop import Training, classifies
from sharpkit.training.parallel import Ranks
from sharpkit.training.plain_pass import outputs_of
from sharpkit.training.run_files import (
    COLUMNS,
    PERTURBED,
    Row,
    RunFiles,
    examples_fingerprint,
    fingerprint,
)
from sharpkit.training.sam_groups import ALL, sam_groups, selection_of, selection_text
from sharpkit.training.schedules import Schedule, ScheduleRule
from sharpkit.training.settings import Augmentation, FitSettings, OptimizerName
from sharpkit.training.step_tracker import StepTracker
from sharpkit.training.variants import PLAIN_SAM, SamVariant

if TYPE_CHECKING:
    import pandas as pd


@readable(
    lambda r: (
        f"{type(r.model).__name__} after {len(r.history)} epochs, train_loss "
        f"{r.history['train_loss'].iloc[-1]:.4g}{'' if r.path is None else f', in {r.path}'}"
    )
)
@dataclass(frozen=True)
class FitResult:
    """A finished training.

    Args:
        model: The trained model, in eval mode.
        history: One row per epoch: epoch (from 1), lr (of its first step), loss (mean over its
            steps, before each), perturbed (of SAM: the share of its steps that were), train_loss,
            train_accuracy, test_loss, test_accuracy (at its end, in eval mode, without
            augmentation, on the labels trained on; NaN where not evaluated, and the accuracies of
            what is no classification), seconds.
        path: The run directory, or None.
    """

    model: nn.Module
    history: pd.DataFrame
    path: Path | None

    def frame(self) -> pd.DataFrame:
        """The history: one row per epoch."""
        return self.history


def fit(
    model: nn.Module,
    train: Data,
    test: Data | None = None,
    *,
    epochs: int,
    optimizer: OptimizerName = "sgd",
    loss: Loss = "cross_entropy",
    m: int | None = None,
    rho: float | None = None,
    adaptive: bool = False,
    variant: SamVariant = PLAIN_SAM,
    sam_interval: int = 1,
    sam_start: float = 0.0,
    sam_stop: float = 1.0,
    sam_parameters: Parameters = ALL,
    rho_schedule: Schedule | ScheduleRule = "constant",
    rho_warmup: float = 0.0,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "cosine",
    augmentation: Augmentation | None = None,
    label_noise: float = 0.0,
    stop_at_loss: float | None = None,
    seed: int = 0,
    compile: bool = False,
    out: str | Path | None = None,
    keep: Collection[int] = (),
    evaluate_every: int = 1,
    tensorboard: bool = False,
    track: StepTracker | None = None,
    provenance: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a model in place with SGD or SAM.

    One epoch is the n // batch_size full batches of a random order of the training set; what is
    left over is left out, each time other examples. Order,
    augmentation, label noise and dropout each come from a stream of their own that the seed and
    the epoch fix, never from torch's global state, which is put back.

    With `out`, a checkpoint is written after every epoch, in one step that no crash can leave half
    done. The same call then goes on where it stopped, with a freshly built model, and reaches the
    same weights bit for bit (on the same kind of device, with as many threads); if it is finished,
    it returns at once.

    Under `torchrun` (or any initialised process group) every process calls this with the same
    arguments; each works on its share of every batch, and rank 0 writes. `out` must be a folder
    that all of them see.

    Args:
        model: Takes the inputs, returns what the loss takes. All of it is put in training mode.
        train: Inputs and labels: a `Dataset`, a `DataLoader` (its data set in index order, with
            any batch size), or a pair of tensors. Held in memory on the device.
        test: The same, only to be evaluated.
        epochs: Epochs at most; the schedule spans them.
        optimizer: "sgd" or "sam"; SAM takes its steps with SGD.
        loss: As for `m_sharpness`: "cross_entropy" of logits (n, classes) with labels (n,), or of
            tokens (n, positions, vocabulary) with (n, positions); "mse"; a torch loss module; or a
            callable. With several processes, each of their means counts the same.
        m: SAM's group size: each group of m examples has its own perturbation (see
            `m_sam_gradient`); if m does not divide the batch, its last group is smaller. None for
            the batch, or a process's share of it.
        rho: SAM's radius; None for 0.05.
        adaptive: SAM's perturbation in units of |w| (ASAM).
        variant: Of SAM, with a first or second step of its own.
        sam_interval: Every sam_interval-th step is perturbed; the others are those of "sgd", at
            their cost.
        sam_start: The part of the training after which steps are perturbed: 0.8 for SAM in the last
            fifth. The training is that of all `epochs`, also if `stop_at_loss` ends it sooner.
        sam_stop: The part after which they are perturbed no more.
        sam_parameters: The parameters that are perturbed, of those that are trained: as for
            `m_sharpness`, such as "norm" for those of normalisation layers (see `sam_groups`).
        rho_schedule: Of the radius from `sam_start` to `sam_stop`: "constant"; from 1 to 0 times
            rho, "linear", "cosine", or "step" as below; or a function of the progress between them,
            from 0 to 1, that gives the factor.
        rho_warmup: The part of the steps between them, 0 to 1, over which the radius first rises
            from 0 along a line; the schedule takes the rest.
        batch_size: Examples of a step, over all processes together.
        lr: Learning rate of the first step. 0.1 is for networks with BatchNorm; those without it
            (the plain vgg and nin) want 0.05 or less.
        momentum: Of SGD.
        weight_decay: Of SGD, on all parameters.
        schedule: Of the learning rate over the steps: "cosine" or "linear" to 0; "step", a tenth
            after half and a hundredth after three quarters; "constant".
        augmentation: "flip", "crop", "flip-crop", or None; see `augmentation.Augmenter`.
        label_noise: Fraction of the training labels that are replaced by another class, once,
            before training.
        stop_at_loss: Stop after the first evaluated epoch whose train_loss is at most this.
        seed: Of every random choice here. The initial weights are the caller's.
        compile: Of SAM with m: compile the passes over groups, which takes a minute or so at the
            start and again after an interruption; the weights are the same to rounding (see
            `m_sam_gradient`).
        out: Run directory (see `training.run_files`); None keeps nothing.
        keep: Epochs whose weights are kept as `epoch-K.safetensors`; 0 is before training.
        evaluate_every: Epochs from one evaluation to the next; the last epoch is always evaluated.
        tensorboard: Log to `out`/tensorboard as well.
        track: A `Tracker`, which is shown the model before the first step and after every one, on
            rank 0, or on every rank if it has `DistributedData`. With `out` its rows are in
            `out`/tracking.csv, and it resumes with the training, which has the same weights with it
            as without.
        provenance: Where model and data come from, for config.json; a run with another one is
            refused like one with other settings. Anything that JSON holds.
        device: Where to train, such as "cuda"; the model is moved there. None: where it is.
        progress: Show a bar with loss, accuracy and time left, and a line per epoch.

    Returns:
        FitResult: model, history, path.

    Raises:
        ArgumentError: A setting is out of range, or does not fit the number of examples; or the
            device cannot be used.
        DataError: Data that do not fit the model.
        DivergedError: The loss or a weight is NaN or infinite. The last good checkpoint stays.
        RunError: `out` belongs to another configuration, process or program, its checkpoint is
            corrupt, or it cannot be written (a full disk).

    Source:
        Foret et al., ICLR 2021, Algorithm 1 and section 4.1 (m); Zhou et al. 2024 (2410.10373),
        SAM late in training; Mueller et al., NeurIPS 2023 (2306.04226), SAM of normalisation
        layers.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(2, 2)
        >>> result = fit(model, (x, (x[:, 0] > 0).long()), epochs=5, optimizer="sam", m=16,
        ...              batch_size=32, progress=False)
        >>> result.history.shape
        (5, 9)
    """
    if rho and optimizer != "sam":
        raise ArgumentError(f'rho = {rho} belongs to SAM: give optimizer="sam" with it')
    radius = FitSettings.rho if rho is None else rho
    settings = FitSettings(
        epochs=epochs, optimizer=optimizer, m=m, rho=radius, adaptive=adaptive,
        batch_size=batch_size, lr=lr, momentum=momentum, weight_decay=weight_decay,
        schedule=schedule, augmentation=augmentation, label_noise=label_noise,
        stop_at_loss=stop_at_loss, seed=seed, sam_interval=sam_interval, sam_start=sam_start,
        sam_stop=sam_stop, sam_parameters=selection_text(model, sam_parameters),
        rho_schedule="constant" if callable(rho_schedule) else rho_schedule,
        rho_warmup=rho_warmup, compile=compile,
    )  # fmt: skip
    rule = rho_schedule if callable(rho_schedule) else None
    if rule is not None and optimizer != "sam":
        raise ArgumentError('rho_schedule belongs to SAM: give optimizer="sam" with it')
    if variant != PLAIN_SAM and optimizer != "sam":
        raise ArgumentError('variant belongs to SAM: give optimizer="sam" with it')
    loss_fn = resolve_loss(loss)
    ranks = Ranks.current()
    if device is not None:
        check_device(device)
    place = torch.device(device) if device is not None else _device(model)
    model.to(place)
    examples = load_in_order(train)
    held_out = None if test is None else load_in_order(test)
    _check(model, examples, held_out, settings, ranks, loss_fn)
    _check_outputs(settings, keep, evaluate_every, tensorboard, out)
    config = {
        **settings.asdict(),
        "evaluate_every": evaluate_every,
        "processes": ranks.world,
        "device": place.type,
        "training data": examples_fingerprint(examples),
        "test data": examples_fingerprint(held_out),
        "initial weights": fingerprint(*model.state_dict().values()),
        # noted where it is another than what every training once had
        **({} if loss_fn.given == "cross_entropy" else {"loss": loss_text(loss_fn)}),
        **({} if variant == PLAIN_SAM else {"variant": loss_text(variant)}),
        **({} if rule is None else {"rho_schedule": loss_text(rule)}),
        **({"provenance": dict(provenance)} if provenance else {}),
    }
    path = None if out is None else Path(out)
    directory = RunFiles(path, config, writes=ranks.rank == 0)
    driver = sole_driver(path if ranks.rank == 0 else None)
    with driver, _reproducible(place), freed_memory_kept():
        training = Training(
            model, examples, held_out, settings, ranks, directory, loss_fn, variant, rule, track
        )
        board = path / "tensorboard" if path and tensorboard and ranks.rank == 0 else None
        training.run(set(keep), evaluate_every, board, progress=progress and ranks.rank == 0)
    return FitResult(model.eval(), _frame(training.history), path)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ModelError(f"{type(model).__name__} has no parameters to train")
    return parameter.device


def _check(
    model: nn.Module,
    train: Examples,
    test: Examples | None,
    settings: FitSettings,
    ranks: Ranks,
    loss: MeanLoss,
) -> None:
    """Raise for a batch size or data that cannot be trained with."""
    size = settings.batch_size
    if size > len(train):
        raise ArgumentError(f"batch_size is {size}, but there are {len(train)} training examples")
    if size % ranks.world:
        raise ArgumentError(f"batch_size is {size}: {ranks.world} processes cannot share it evenly")
    if settings.optimizer == "sam":
        settings.sam_steps(settings.epochs * (len(train) // size))
        sam_groups(model, selection_of(settings.sam_parameters))
    check_finite_weights(model)
    refuse_half((p for p in model.parameters() if p.requires_grad), "fit")
    parameter = next(model.parameters())
    one = train.slice(0, 1).to(parameter.device, parameter.dtype)
    with frozen(model), torch.no_grad():
        try:
            outputs = outputs_of(model, one.inputs, loss)
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = [(tuple(t.shape[1:]), t.dtype) for t in pytree.tree_leaves(one.inputs)]
            raise DataError(
                f"the model does not take the training inputs, (shape, dtype) {shapes}: {error}"
            ) from error
    if loss.exact:
        check_rows(model, outputs, 1)
    else:
        some = train.slice(0, 8).to(parameter.device, parameter.dtype)
        with frozen(model), torch.no_grad():
            check_is_mean(loss, outputs_of(model, some.inputs, loss), some.labels)
    for examples in (train, test):
        if examples is not None:
            _check_labels(examples.labels, outputs, loss)
    if settings.label_noise and not classifies(outputs, one.labels):
        raise ArgumentError("label_noise needs one class per example: leave it out here")


def _check_labels(labels: Tensor, outputs: Any, loss: MeanLoss) -> None:
    """Raise DataError unless labels fit the outputs of one example; nothing ignored in classes."""
    if loss.given == "cross_entropy" and labels.ndim == 1:
        check_class_labels(labels, outputs)
    elif loss.exact:
        check_labels(labels, outputs, loss)


def _check_outputs(
    settings: FitSettings, keep: Collection[int], every: int, board: bool, out: Any
) -> None:
    """Raise for what cannot be written or evaluated."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ArgumentError(f"evaluate_every is {every!r}: expected a whole number >= 1")
    if out is None and (keep or board):
        raise ArgumentError("keep and tensorboard write files: give out= a directory for them")
    wrong = [epoch for epoch in keep if not 0 <= epoch <= settings.epochs]
    if wrong:
        raise ArgumentError(f"keep has epoch {wrong[0]}: expected 0 to {settings.epochs}")


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """On a GPU, convolutions by algorithms that always give the same bits."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def _frame(history: list[Row]) -> pd.DataFrame:
    import pandas as pd

    columns = [*COLUMNS[:3], *([PERTURBED] if PERTURBED in history[0] else []), *COLUMNS[3:]]
    return pd.DataFrame(history, columns=columns).astype({"epoch": int})
