"""Sharpness while training happens: a callable that a training loop calls after its steps."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from sharpkit.contract.checksum import checksum
from sharpkit.contract.distributed_data import DistributedData
from sharpkit.contract.loading import Data, as_data, load_examples
from sharpkit.contract.loss_text import loss_text
from sharpkit.contract.losses import Loss
from sharpkit.contract.modules import unwrapped
from sharpkit.contract.ranks import ALONE
from sharpkit.contract.shares import read_share
from sharpkit.digests import digest
from sharpkit.display import readable
from sharpkit.errors import ArgumentError
from sharpkit.measures import Measure
from sharpkit.run_directory import refuse_another
from sharpkit.tracking.loggers import Logger, check_logger, send
from sharpkit.tracking.pace import Pace
from sharpkit.tracking.quantities import Memory, Moment, Quantities, standing
from sharpkit.tracking.table import Row, Table, tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FILE = "tracking.csv"


@readable(lambda t: t.summary())
class Tracker:
    """Measures a model every few steps of its training, and leaves the training as it was.

    Called after every step with the model, its optimizer and the number of steps made, it measures
    when it is time and does nothing otherwise. Weights, gradients, buffers, modes, random states
    and the optimizer are as before: training reaches the same bits with a tracker as without.

    Names of what can be measured, and their columns:

    - "loss": the mean loss of the examples, in eval mode.
    - "stability": λmax of the matrix that the optimizer's threshold bounds, and `threshold`. For
      SGD with one group of parameters it is the Hessian, in `lambda_max`; for Adam, AdamW and
      RMSprop, and for groups with settings of their own, P^-½ H P^-½ in
      `preconditioned_lambda_max`, which is NaN before the first step. Above the threshold a
      quadratic diverges: (2 + 2β) / η for SGD with momentum, 38 / η for Adam (see the page "The
      edge of stability"). For mini-batches it is that of their mean, the full-batch step.
    - "lambda_max": that of the Hessian, whatever the optimizer.
    - "trace": Hutch++ with 30 products; `trace_std_error`.
    - "critical_sharpness": 2/η_c from forward passes (see `measures.critical_sharpness`).
    - "distance": ‖w − w₀‖₂ from the first weights seen, and `update_cosine`, the cosine between
      the movement since the last row and the one before it.
    - any name of `sharpkit.measures.measure_names()`, such as "gradient_noise", and any measure,
      such as `MSharpness(m=4, rho=0.05)`.

    λmax is followed from the eigenvector of the last row: 5 products with the matrix where it has
    turned little, more where the residual says that it has turned further. `..._residual` is
    ‖Hv − λv‖ and `..._products` what was spent; a residual past 2 % is warned of. With an optimizer
    all of them are of the parameters that it moves.

    What cannot be measured at a step, such as of NaN weights, is empty in its row, with the reason
    in `failed`, and warned of once; wrong arguments raise.

    Args:
        data: The probe examples, in any form that `m_sharpness` takes; held in memory. With
            `DistributedData` all processes call the tracker and measure together the names above
            (BatchNorm with rank 0's statistics) and `MSharpness`; each has all rows, rank 0
            writes them.
        measures: Names or measures, as above.
        loss: As for `m_sharpness`; a measure given as an object has its own.
        every: Measure at every such step (or epoch), counted from 0.
        per: "step", or "epoch" to look at calls that give an epoch only.
        budget: Share of the training time that measuring may take, such as 0.05: what is due
            sooner is skipped, counted in `skipped` (and the rows then depend on the clock). The
            first measurement is always made. None for no limit.
        n: How many of the examples; None for all.
        seed: Which n examples; of random probes and groups.
        out: CSV file that gets each row when it is measured; None for none.
        loggers: Whatever has `add_scalar(name, value, step)`, such as TensorBoard's writer,
            `log_metrics(values, step=)`, such as the module mlflow, or `log(values)`, such as a
            run of wandb; or a callable that takes the values. Names begin with "sharpness/".

    Attributes:
        rows: One dictionary per measurement.
        skipped: The steps at which a measurement was due and the budget did not allow it.

    Raises:
        ArgumentError: For an unknown measure or a value out of range.

    Source:
        Cohen et al., ICLR 2021 (2103.00065); Cohen et al. 2022 (2207.14484).

    Example:
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> model = nn.Linear(5, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> tracker = Tracker((x, y), every=10)
        >>> for step in range(31):
        ...     row = tracker(model, optimizer, step=step)
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> list(tracker.frame().step), list(tracker.frame().threshold)
        ([0, 10, 20, 30], [4.0, 4.0, 4.0, 4.0])
        >>> bool((tracker.frame().lambda_max < 4).all())
        True
    """

    def __init__(
        self,
        data: Data | DistributedData,
        *,
        measures: Sequence[str | Measure] | str = ("loss", "stability"),
        loss: Loss = "cross_entropy",
        every: int = 100,
        per: Literal["step", "epoch"] = "step",
        budget: float | None = None,
        n: int | None = None,
        seed: int = 0,
        out: str | Path | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every is {every!r}: expected a whole number >= 1")
        if per not in ("step", "epoch"):
            raise ArgumentError(f'per is {per!r}: expected "step" or "epoch"')
        for logger in loggers:
            check_logger(logger)
        self.team = data.team if isinstance(data, DistributedData) else ALONE
        self._quantities = self.team.together(lambda: Quantities(measures, loss))
        if self.team.world > 1:
            self._quantities.require_together()
        with torch.random.fork_rng(devices=[]):  # a loader draws a number when it is begun
            self._data, self._examples = _held(data, n, seed if n is not None else None)
        self._pace = Pace(budget)
        self.every, self.per, self.seed = every, per, seed
        self.loggers = list(loggers) if self._writes else []
        self.rows: list[Row] = []
        self.skipped: list[int] = []
        self._table = Table(Path(out)) if out is not None and self._writes else None
        self._memory = Memory()
        self._seen = -1  # the last step that was looked at
        self._told: set[str] = set()

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        step: int,
        epoch: int | None = None,
    ) -> Row | None:
        """Measure, if it is time.

        Args:
            model: The model that is trained, in any mode; wrappers of DataParallel,
                DistributedDataParallel and `torch.compile` are taken off. Of several processes,
                one calls the tracker, and all of them if it has `DistributedData`.
            optimizer: The one that trains it; for "stability" and the column `lr`.
            step: Steps that have been made; a step seen before is passed over.
            epoch: Epochs that have been made, where one has just ended.

        Returns:
            The new row; None if nothing was measured.

        Raises:
            ArgumentError: For a step before the last one, "stability" without an optimizer or
                with one whose threshold is not known.
            DataError: For examples that do not fit the model.
            RunError: If the CSV file has other rows, or cannot be written.
        """
        step = int(step)  # of whatever kind the caller counts in
        count = step if self.per == "step" else epoch
        if count is None or count % self.every or step == self._seen:
            return None
        if step < self._seen:
            raise ArgumentError(
                f"step is {step}, after step {self._seen}: of a resumed training, load the "
                "tracker's state as well (load_state_dict); for another one, make another tracker"
            )
        self._seen = step
        if any(p.device.type == "cuda" for p in model.parameters()):
            torch.cuda.synchronize()  # what training has queued is not the tracker's time
        if not self.team.gathered(self._pace.begin)[0]:  # as the clock of rank 0 says
            self.skipped.append(step)
            return None
        row = self._measured(model, optimizer, step, epoch)
        if self._table is not None:
            self._table.append(row, self.rows)
        self.rows.append(row)
        for logger in self.loggers:
            send(logger, row, step)
        return row

    def _measured(
        self, model: nn.Module, optimizer: Optimizer | None, step: int, epoch: int | None
    ) -> Row:
        row: Row = {"step": step}
        if self.per == "epoch":
            row["epoch"] = epoch
        if optimizer is not None:
            row["lr"] = max(float(group["lr"]) for group in optimizer.param_groups)
        with standing(model):
            self.team.take_buffers_of_first(unwrapped(model).buffers())
            now = Moment(
                model, optimizer, self._data, self._quantities.loss, self.seed, self._memory
            )
            try:
                found, failed = self._quantities.measure(now)
            finally:
                now.close()
        row |= tidy(found)
        if failed:
            row["failed"] = "; ".join(f"{name}: {why}" for name, why in failed.items())
            for name in failed.keys() - self._told:
                warnings.warn(f"step {step}: not measured: {name}: {failed[name]}", stacklevel=3)
            self._told |= set(failed)
        if self._pace.budget is not None:
            row["skipped"] = len(self.skipped) - sum(r.get("skipped", 0) for r in self.rows)
        row["seconds"] = self._pace.end()
        return self.team.gathered(lambda: row)[0]

    @property
    def on_every_rank(self) -> bool:
        """Whether all of several processes call it, not one of them."""
        return self.team.world > 1

    @property
    def _writes(self) -> bool:
        return self.team.rank == 0

    def frame(self) -> pd.DataFrame:
        """One row per measurement: step, lr, what was measured, skipped, seconds."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def plot(
        self, out: str | Path | None = None, *, ax: Axes | Sequence[Axes] | None = None
    ) -> Figure:
        """λmax and its threshold against the step, and the loss below: see `plot.tracking`."""
        from sharpkit.plot.tracking import tracking

        return tracking(self.frame(), out, ax=ax)

    def summary(self) -> str:
        """What was measured and what was skipped, in a line."""
        text = f"{len(self.rows)} measurements of {', '.join(self._quantities.names)}"
        if self._pace.budget is None:
            return text
        due = len(self.rows) + len(self.skipped)
        return (
            f"{text}; {len(self.skipped)} of {due} that were due skipped to stay within "
            f"{self._pace.budget:.0%} of the training time"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to have the rows it would have had anyway."""
        return {
            "configuration": self._configuration(),
            "rows": [dict(row) for row in self.rows],
            "skipped": list(self.skipped),
            "seen": self._seen,
            "pace": self._pace.state_dict(),
            "memory": self._memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the CSV file is brought to its rows.

        Raises:
            RunError: If the state is that of a tracker with other settings.
        """
        refuse_another(state["configuration"], self._configuration(), "the tracker's state")
        self.rows = [dict(row) for row in state["rows"]]
        self.skipped, self._seen = list(state["skipped"]), int(state["seen"])
        self._pace.load_state_dict(state["pace"])
        self._memory.load_state_dict(state["memory"])
        if self._table is not None:
            self._table.write(self.rows)

    def begin(self, folder: Path | None, state: Mapping[str, Any] | None) -> None:
        """Begin a training that may go on from a checkpoint, as `sharpkit.fit` does.

        Args:
            folder: Its run directory, for `tracking.csv` unless `out` was given.
            state: What its checkpoint holds; None if it begins.

        Raises:
            ArgumentError: If the tracker has followed another training.
            RunError: If the state is that of a tracker with other settings.
        """
        if self._seen >= 0:
            raise ArgumentError("the tracker has rows of another training: make a new one")
        if self._table is None and folder is not None and self._writes:
            self._table = Table(folder / _FILE)
        if state is not None:
            self.load_state_dict(state)
        elif self._table is not None:  # a start that left no checkpoint may have left rows
            self._table.path.unlink(missing_ok=True)

    def _configuration(self) -> dict[str, Any]:
        config = {
            "measures": self._quantities.configuration(),
            "loss": loss_text(self._quantities.loss),
            "every": self.every,
            "per": self.per,
            "seed": self.seed,
            "examples": self._examples,
        }
        plain: dict[str, Any] = json.loads(json.dumps(config))
        return plain


def _held(
    data: Data | DistributedData, n: int | None, seed: int | None
) -> tuple[Data | DistributedData, str]:
    """The examples in memory, and a fingerprint of all of them."""
    if not isinstance(data, DistributedData) or data.team.world == 1:
        given = data.data if isinstance(data, DistributedData) else data
        examples = load_examples(given, n=n, seed=seed)
        return as_data(examples), f"{checksum(examples):016x}"
    if data.shares:
        examples = read_share(data, n=n, seed=seed).examples
    else:
        # all of them on every rank: each measure divides them in its own way
        examples = data.team.together(lambda: load_examples(data.data, n=n, seed=seed))
    prints = data.team.gathered(lambda: f"{checksum(examples):016x}")
    if not data.shares:
        data.team.require_same(lambda: {"the examples": prints[data.team.rank]})
    held = DistributedData(as_data(examples), shares=data.shares, process_group=data.process_group)
    return held, digest(prints)[:16] if data.shares else prints[0]
