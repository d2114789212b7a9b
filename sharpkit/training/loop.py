"""The loop of a training: epochs, steps, evaluation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sharpkit.contract.examples import Examples
from sharpkit.contract.losses import MeanLoss
from sharpkit.contract.parameters import check_finite_weights
from sharpkit.errors import DataError, DivergedError, ModelError
from sharpkit.training.augmentation import Augmenter, noisy_labels
from sharpkit.training.log import Reporter, reporting
from sharpkit.training.parallel import Ranks
from sharpkit.training.plain_pass import outputs_of
from sharpkit.training.run_files import PERTURBED, Row, RunFiles
from sharpkit.training.sam import SAM
from sharpkit.training.sam_groups import sam_groups, selection_of
from sharpkit.training.schedules import SCHEDULES, ScheduleRule
from sharpkit.training.settings import FitSettings
from sharpkit.training.step_tracker import StepTracker
from sharpkit.training.streams import global_stream, stream, stream_seed
from sharpkit.training.variants import PLAIN_SAM, SamVariant

_EVALUATION_BATCH = 500
_CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the GPU


class Training:
    """A model on its way: what changes from step to step, and the steps."""

    def __init__(
        self,
        model: nn.Module,
        train: Examples,
        test: Examples | None,
        settings: FitSettings,
        ranks: Ranks,
        directory: RunFiles,
        loss: MeanLoss,
        variant: SamVariant = PLAIN_SAM,
        rho_rule: ScheduleRule | None = None,
        track: StepTracker | None = None,
    ) -> None:
        parameter = next(model.parameters())
        self.loss = loss
        self.device = parameter.device
        self.model, self.settings, self.ranks, self.directory = model, settings, ranks, directory
        noisy = noisy_labels(train.labels, settings.label_noise, settings.seed)
        self.train = Examples(train.inputs, noisy).to(self.device, parameter.dtype)
        self.test = None if test is None else test.to(self.device, parameter.dtype)
        self.steps = len(train) // settings.batch_size
        total = settings.epochs * self.steps
        self.optimizer = _optimizer(model, settings, variant, total, rho_rule)
        everywhere = track is not None and track.on_every_rank
        self.track = track if ranks.rank == 0 or everywhere else None
        self.history = directory.restore(model, self.optimizer, self.track)
        if isinstance(self.optimizer, SAM):
            self.optimizer.steps = len(self.history) * self.steps
            self.history = [_with_share(row, settings) for row in self.history]

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the target is reached."""
        if not self.history:
            return False
        last, target = self.history[-1], self.settings.stop_at_loss
        reached = target is not None and last["train_loss"] <= target
        return reached or last["epoch"] >= self.settings.epochs

    def run(self, keep: set[int], every: int, board: Path | None, *, progress: bool) -> None:
        """Train to the end."""
        self.directory.begin()
        self.directory.require_kept(k for k in keep if self.history and k <= len(self.history))
        if 0 in keep and not self.history:
            self.directory.export(self.model, "epoch-0")
        network = self.ranks.wrap(self.model)
        if not self.history:
            self._tracked(0, epoch=0)
        with reporting(
            self.settings.epochs, self.steps, self.history, board, progress=progress
        ) as report:
            while not self.finished:
                epoch = len(self.history) + 1
                start = time.perf_counter()
                self.model.train()
                try:
                    row = self._epoch(network, epoch, report)
                    self.ranks.average_buffers(self.model)
                    row |= self._evaluation(epoch % every == 0 or epoch == self.settings.epochs)
                    check_finite_weights(self.model)
                except ModelError as error:
                    raise self._explained(error, epoch) from error
                self._tracked(epoch * self.steps, epoch=epoch)
                row["seconds"] = time.perf_counter() - start
                self.history.append(row)
                if epoch in keep:
                    self.directory.export(self.model, f"epoch-{epoch}")
                self.directory.save(self.model, self.optimizer, self.history, self.track)
                report.epoch(row)
        self.directory.write_log(self.history)
        self.directory.export(self.model, "model")
        self.ranks.wait()  # none of them may look for the files before they are there

    def _epoch(self, network: nn.Module, epoch: int, report: Reporter) -> Row:
        """All steps of an epoch; their mean loss."""
        settings, size = self.settings, self.settings.batch_size
        mine = self.ranks.share(size)
        order = torch.randperm(len(self.train), generator=stream(settings.seed, "order", epoch))
        order = order.to(self.device)
        augment = self._augmenter(epoch)
        step = _sam_step if isinstance(self.optimizer, SAM) else _sgd_step
        factor = SCHEDULES[settings.schedule]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        perturbed = 0
        dropout = stream_seed(settings.seed, "dropout", epoch, self.ranks.rank)
        with global_stream(dropout, self.device):
            for i in range(self.steps):
                done = (epoch - 1) * self.steps + i
                rate = settings.lr * factor(done / (settings.epochs * self.steps))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                start = i * size + mine.start
                chosen = order[start : i * size + mine.stop]
                inputs = _take(self.train.inputs, chosen)
                if augment is not None:
                    inputs = augment(inputs, start)
                labels = self.train.labels[chosen]
                perturbed += isinstance(self.optimizer, SAM) and self.optimizer.perturbs
                loss = step(network, self.optimizer, inputs, labels, settings, self.loss)
                total += loss
                if (i + 1) % _CHECK_EVERY == 0 or i + 1 == self.steps:
                    mean = float(self.ranks.total(total / (i + 1))) / self.ranks.world
                    if not math.isfinite(mean):
                        raise DivergedError(f"the loss is {mean} at step {i + 1} of {self.steps}")
                    report.loss(mean, self.history[-1] if self.history else None)
                report.step()
                self._tracked(done + 1)
        first = settings.lr * factor((epoch - 1) / settings.epochs)
        row = {"epoch": epoch, "lr": first, "loss": mean}
        return row | ({PERTURBED: perturbed / self.steps} if settings.optimizer == "sam" else {})

    def _tracked(self, step: int, epoch: int | None = None) -> None:
        if self.track is not None:
            self.track(self.model, self.optimizer, step=step, epoch=epoch)

    def _augmenter(self, epoch: int) -> Augmenter | None:
        kind = self.settings.augmentation
        if kind is None:
            return None
        images, shape = self.steps * self.settings.batch_size, tuple(self.train.inputs.shape[1:])
        return Augmenter(
            kind, images, shape, seed=self.settings.seed, epoch=epoch, device=self.device
        )

    def _evaluation(self, wanted: bool) -> Row:
        """Loss and accuracy on both sets; NaN for what is not wanted or not there."""
        row: Row = {}
        for name, examples in (("train", self.train), ("test", self.test)):
            loss = accuracy = math.nan
            if wanted and examples is not None:
                loss, accuracy = _evaluate(self.model, examples, self.ranks, self.loss)
                if not math.isfinite(loss):
                    raise DivergedError(f"the {name} loss after the epoch is {loss}")
            row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        return row

    def _explained(self, error: ModelError, epoch: int) -> ModelError:
        """The error with the epoch, and where the last good weights are."""
        done = len(self.history)
        path = self.directory.checkpoint
        if path is not None:
            advice = f"the last good checkpoint, of epoch {done}, is {path}"
        elif self.directory.path is not None:
            advice = "there was no good checkpoint yet"
        else:
            advice = "give out= to have checkpoints"
        return type(error)(f"training stopped in epoch {epoch}: {error}; {advice}")


def _optimizer(
    model: nn.Module,
    settings: FitSettings,
    variant: SamVariant,
    total: int,
    rho_rule: ScheduleRule | None,
) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    kwargs: dict[str, Any] = {
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "sam":
        sam = SAM(
            sam_groups(model, selection_of(settings.sam_parameters)), torch.optim.SGD,
            rho=settings.rho, adaptive=settings.adaptive, variant=variant,
            **settings.sam_steps(total, rho_rule), **kwargs,
        )  # fmt: skip
        sam.splits_batches = settings.m is not None and settings.m < settings.batch_size
        return sam
    return torch.optim.SGD(parameters, **kwargs)


def _with_share(row: Row, settings: FitSettings) -> Row:
    """A row with the share of perturbed steps, which are all in runs that do not tell it."""
    first = {name: row[name] for name in ("epoch", "lr", "loss")}
    return {**first, PERTURBED: float(settings.rho > 0), **row}


def _sgd_step(
    network: nn.Module, optimizer: Any, inputs: Any, labels: Tensor, _: FitSettings, loss: MeanLoss
) -> Tensor:
    optimizer.zero_grad()
    value = loss(outputs_of(network, inputs, loss), labels)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.detach()


def _sam_step(
    network: nn.Module,
    optimizer: Any,
    inputs: Any,
    labels: Tensor,
    settings: FitSettings,
    loss: MeanLoss,
) -> Tensor:
    m = len(labels) if settings.m is None else settings.m
    value: Tensor = optimizer.step_batch(
        network, inputs, labels, m=m, loss=loss, compile=settings.compile
    )
    return value


def _take(inputs: Any, chosen: Tensor) -> Any:
    return pytree.tree_map(lambda t: t.index_select(0, chosen), inputs)


def classifies(outputs: Any, labels: Tensor) -> bool:
    """Whether outputs are (n, classes) and labels integers (n,), so that accuracies mean something.

    Example:
        >>> classifies(torch.zeros(4, 3), torch.zeros(4).long())
        True
        >>> classifies(torch.zeros(4, 3), torch.zeros(4, 3))
        False
    """
    return (
        isinstance(outputs, Tensor)
        and outputs.ndim == 2
        and outputs.shape[1] > 1
        and labels.ndim == 1
        and not labels.is_floating_point()
    )


@torch.no_grad()
def _evaluate(
    model: nn.Module, examples: Examples, ranks: Ranks, loss: MeanLoss
) -> tuple[float, float]:
    """Mean loss and accuracy (NaN if it has no meaning) in eval mode, each process on its share."""
    model.eval()
    share = ranks.share(len(examples))
    sums = torch.zeros(3, dtype=torch.float64, device=examples.labels.device)
    accuracies = True
    for batch in examples.slice(share.start, share.stop).chunks(_EVALUATION_BATCH):
        outputs = outputs_of(model, batch.inputs, loss)
        precise = pytree.tree_map(_in_double, outputs)
        mean, weight = loss.terms(precise, batch.labels)
        sums[0] += mean * weight
        sums[1] += weight
        accuracies = classifies(outputs, batch.labels)
        if accuracies:
            sums[2] += (outputs.argmax(1) == batch.labels).sum()
    total, counted, right = ranks.total(sums).tolist()
    if not counted > 0:
        raise DataError("no label counts in the loss: all are ignored, or weigh 0")
    return total / counted, right / len(examples) if accuracies else math.nan


def _in_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
