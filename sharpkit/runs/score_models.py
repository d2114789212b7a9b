"""Scoring modules that are not in a zoo: a user's own networks, by name."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sharpkit.contract.examples import Examples
from sharpkit.contract.loading import Data, as_data, load_examples, load_in_order
from sharpkit.contract.loss_text import loss_text
from sharpkit.contract.losses import Loss, MeanLoss, resolve_loss
from sharpkit.device import check_device
from sharpkit.digests import described, digest
from sharpkit.errors import RunError
from sharpkit.measures.measure import Measure, evaluate_measure
from sharpkit.progress import progress_bar
from sharpkit.run_directory import sole_driver
from sharpkit.runs.held_out import held_out_metrics
from sharpkit.runs.measure_values import stated_directions
from sharpkit.runs.model_metrics import accuracy_and_loss
from sharpkit.runs.own_models import Model, check_models, hash_model, level_table, ready
from sharpkit.runs.provenance import circumstances, dtype_name, restart_peak_memory
from sharpkit.runs.request import (
    check_request,
    named_measures,
    recorded,
    run_config,
    settings_hashes,
)
from sharpkit.runs.scores import STORE_NAME, Scores, finished
from sharpkit.runs.store import Key, Outcome, Store
from sharpkit.workers import error_message
from sharpkit.workers.threads import limited_threads

_TASK = "models"
_UNKNOWN = {"train_acc": math.nan, "test_acc": math.nan}
_UNKNOWN_LOSSES = {"train_loss": math.nan, "test_loss": math.nan}  # where there is no accuracy


def score_models(
    models: Mapping[str, Model],
    measures: Measure | Sequence[Measure],
    train: Data,
    test: Data,
    *,
    loss: Loss = "cross_entropy",
    hyperparameters: Mapping[str, Mapping[str, Any]] | None = None,
    initial: Mapping[str, Model] | None = None,
    out: str | Path | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    test_metrics: bool = False,
    progress: bool = True,
) -> Scores:
    """Every measure, and accuracies and losses, of models that are plain PyTorch modules.

    The counterpart of `score_zoo` for models that are not in a zoo; `evaluate`, `combine` and
    `write_report` take the result as they take that of a zoo. Models are scored one after the
    other, in eval mode, and left as they were found. One that fails is recorded with its error,
    and the others are scored.

    Started again with the same `out`, it skips what is done. A model is scored again if its
    parameters, buffers or printed form (`repr`) have changed, or the training data; its accuracies
    also if the test data have. A change in the code of a module alone is not noticed. Models can
    be added later. Failures are tried again at the next start.

    Args:
        models: Name -> module, or a function without arguments that returns one. A function is
            called when its turn comes and its module is released afterwards, so that only one is
            in memory.
        measures: One or several, each a callable `(model, data, *, seed)`. Those with a loss have
            it as an option of their own, such as `MSharpness(..., loss="mse")`.
        train: Training examples: a pair (inputs, labels), a `Dataset` or a `DataLoader`. Without
            random augmentation: the accuracies would be those of augmented images, and a later
            start would take them for other data.
        test: Test examples, in the same forms.
        loss: What `.metrics()` computes beside the accuracies: as for `m_sharpness`, such as "mse"
            for a regression, or "cross_entropy" for outputs (n, positions, vocabulary) with labels
            (n, positions). Accuracies are those of outputs (n, classes) with integer labels (n,).
        hyperparameters: Model -> hyperparameter -> its value (a number, text or bool), the same
            hyperparameters for all; None if none were varied on purpose.
        initial: Model -> the network before training, for measures that compare with it.
        out: Run directory; None keeps the results in memory.
        n: Examples that the measures see, a seeded subset of the training data as in `score_zoo`;
            None for all, in their own order. The accuracies are always those of all examples.
        seed: Of the subset and of the measures' random choices.
        device: Where the models run, such as "cpu" or "cuda".
        test_metrics: Also compute calibration and the accuracy on corrupted images of the test
            data, see `held_out_metrics`; a model that is no classifier then fails.
        progress: Show a bar with the time left.

    Returns:
        Scores: `.frame()`, `.metrics()`, `.failures`, `.provenance()`. The task is called "models".
        Its `.metrics()` are train_acc, test_acc, train_loss, test_loss and generalization_gap, the
        difference of the accuracies; or, where accuracies have no meaning (regression, tokens),
        train_loss, test_loss and loss_gap = test_loss − train_loss, which the evaluation then takes
        as the gap. Those of a model that fails are NaN, and the evaluation leaves it out. If all
        fail, a warning says with what.

    Raises:
        ArgumentError: If there are no models, two names are the same to the evaluation (which
            drops a leading `model_`), `hyperparameters` or `initial` do not fit the models, an
            argument is out of range, the device cannot be used, or a measure needs groups of more
            examples than there are.
        DataError: If the examples cannot be read.
        RunError: If `out` holds a run of another configuration or precision, of an older version's
            rules or with other models, belongs to another process, or cannot be written.

    Example:
        >>> import torch, sharpkit as sk
        >>> from torch import nn
        >>> train, test = (data.tensors for data in sk.load_dataset("embedded"))
        >>> def build(width):
        ...     torch.manual_seed(0)  # your own trained networks instead
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(196, width), nn.Linear(width, 10))
        >>> models = {f"width {w}": build(w) for w in (8, 16, 32)}
        >>> measure = sk.MSharpness(m=[1, 16], rho=0.05)
        >>> scores = sk.score_models(models, measure, train, test, n=32, progress=False)
        >>> len(scores.frame())
        6
        >>> list(scores.metrics().columns)[2:]
        ['train_acc', 'test_acc', 'train_loss', 'test_loss', 'generalization_gap']
    """
    named = named_measures(measures)
    loss_fn = resolve_loss(loss)
    check_models(models, initial)
    hparams = level_table(models, hyperparameters)
    check_request(named, n)
    check_device(device)
    whole, unseen = load_in_order(train), load_in_order(test)
    check_request(named, n or len(whole))
    measured = whole
    if n is not None:
        measured = load_examples(as_data(whole), n=n, seed=seed)
    run = None if out is None else Path(out)
    with sole_driver(run):
        threads = recorded(run).get("threads") or torch.get_num_threads()
        # in no file: only Python can start this run
        config = run_config(named, n, seed, device, threads, {_TASK: None})
        if loss_text(loss_fn) != "cross_entropy":  # which runs have not always noted
            config["loss"] = loss_text(loss_fn)
        store = Store(None if run is None else run / STORE_NAME, config)
        store.set_directions(stated_directions(named))
        scorer = _Scorer(
            store=store,
            done={key: (weights, data) for key, weights, _, data in store.done()},
            measures=named,
            whole=whole,
            test=unseen,
            measured=as_data(measured),
            loss=loss_fn,
            hashes=(_hash_examples(whole), _hash_examples(unseen)),
            settings=settings_hashes(config),
            configs=_model_configs(store, hparams),
            seed=seed,
            device=str(device),
            test_metrics=test_metrics,
        )
        with (
            limited_threads(threads),
            _cheap_collections(),
            progress_bar(
                total=len(models) * len(named), desc="score", unit="model", progress=progress
            ) as bar,
        ):
            for name, model in models.items():
                scorer.score(name, model, None if initial is None else initial[name], bar)
                gc.collect()  # modules may refer to themselves, and the next needs the memory
        scorer.settle()
    return finished(store, run)


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Let collections pass over what exists by now, which takes longer than a small model does."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class _Scorer:
    """Scores one model after the other and writes what it finds."""

    store: Store
    done: Mapping[Key, tuple[str | None, str | None]]  # hashes that a value was computed from
    measures: Mapping[str, Measure]
    whole: Examples
    test: Examples
    measured: Data
    loss: MeanLoss
    hashes: tuple[str, str]  # of training and test data
    settings: Mapping[str, str]
    configs: dict[str, dict[str, Any]]
    seed: int
    device: str
    test_metrics: bool

    def score(self, name: str, source: Model, initial: Model | None, bar: tqdm[Any]) -> None:
        """All measures of one model; whatever it does, nothing is raised."""
        began = time.perf_counter()
        try:
            with ready(source, self.device) as model:
                weights = hash_model(model)
                self._note_metrics(name, model, weights)
                for measure in self.measures:
                    self._measure(name, measure, model, weights, initial)
                    bar.update()
        except Exception as error:  # a model that cannot be used fails every measure
            self.configs[name] |= {"metrics": _UNKNOWN, "computed_from": None}
            self.store.add_task(_TASK, self.configs)
            for measure in self.measures:
                failed = Outcome(error=error_message(error), seconds=time.perf_counter() - began)
                self._write(name, measure, failed)
            bar.update(len(self.measures))

    def _note_metrics(self, name: str, model: nn.Module, weights: str) -> None:
        """Accuracies and losses, unless they are known for this model and these data."""
        further = (f"test_metrics {self.seed}",) if self.test_metrics else ()
        computed_from = _joined(weights, *self.hashes, *further)
        if self.configs[name].get("computed_from") != computed_from:
            found = [accuracy_and_loss(model, e, self.loss) for e in (self.whole, self.test)]
            metrics: dict[str, float] = {}
            if all("acc" in part for part in found):
                metrics |= {"train_acc": found[0]["acc"], "test_acc": found[1]["acc"]}
            metrics |= {"train_loss": found[0]["loss"], "test_loss": found[1]["loss"]}
            if self.test_metrics:
                metrics |= held_out_metrics(model, as_data(self.test), seed=self.seed)
            self.configs[name] |= {"metrics": metrics, "computed_from": computed_from}
            self.store.add_task(_TASK, self.configs)

    def settle(self) -> None:
        """Note for models that failed what the others have: no accuracies where there are none."""
        known = [c["metrics"] for c in self.configs.values() if c.get("computed_from")]
        if not known or any("train_acc" in metrics for metrics in known):
            return
        for config in self.configs.values():
            if not config.get("computed_from"):
                config["metrics"] = dict(_UNKNOWN_LOSSES)
        self.store.add_task(_TASK, self.configs)

    def _measure(
        self, name: str, measure: str, model: nn.Module, weights: str, initial: Model | None
    ) -> None:
        """One measure of one model, unless its value is known."""
        began = time.perf_counter()
        restart_peak_memory(self.device)
        called = self.measures[measure]
        outcome = Outcome(weights_hash=weights, dtype=dtype_name(model))
        try:
            with ExitStack() as stack:
                before = None
                if initial is not None and getattr(called, "needs_initial", False):
                    before = stack.enter_context(ready(initial, self.device))
                    weights = _joined(weights, hash_model(before))
                if getattr(called, "needs_metrics", False):
                    weights = _joined(weights, self.hashes[1])
                outcome = replace(outcome, weights_hash=weights)
                if self.done.get((_TASK, name, measure)) == (weights, self.hashes[0]):
                    return
                values = evaluate_measure(
                    called,
                    model,
                    self.measured,
                    seed=self.seed,
                    initial=None if before is None else (lambda: before),
                    metrics=lambda: self.configs[name]["metrics"],
                )
            outcome = replace(outcome, values=values)
        except Exception as error:  # whatever a measure does, the others are tried
            outcome = replace(outcome, error=error_message(error))
        self._write(name, measure, replace(outcome, seconds=time.perf_counter() - began))

    def _write(self, name: str, measure: str, outcome: Outcome) -> None:
        complete = replace(
            outcome,
            data_hash=self.hashes[0],
            settings_hash=self.settings[measure],
            **circumstances(self.device),
        )
        self.store.add(_TASK, name, measure, complete)


def _model_configs(store: Store, hparams: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hyperparameters of now and metrics as far as the store knows them; written to the store.

    Raises:
        RunError: If the run has models that are not given any more.
    """
    known = store.model_configs().get(_TASK, {})
    gone = [name for name in known if name not in hparams]
    if gone:
        raise RunError(
            f"{store.path}: the run has models that are not given: {', '.join(gone)}. Give them "
            "as well, or another directory"
        )
    configs = {
        name: {"metrics": _UNKNOWN} | known.get(name, {}) | {"hparams": own}
        for name, own in hparams.items()
    }
    store.add_task(_TASK, configs)
    return configs


def _hash_examples(examples: Examples) -> str:
    """SHA-256 of the examples in their order."""

    def parts() -> Iterator[str | Tensor]:
        for part in examples.chunks(len(examples)):
            leaves, structure = pytree.tree_flatten(part.inputs)
            yield str(structure)
            yield from described([*leaves, part.labels])

    return digest(parts())


def _joined(*hashes: str) -> str:
    return digest([" ".join(hashes)])
