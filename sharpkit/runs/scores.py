"""The scores of a run: what every measure gave for every model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.display import readable
from sharpkit.errors import ArgumentError, RunError
from sharpkit.evaluation.legend import in_whole_numbers, legend, legend_path
from sharpkit.files import atomic_path, disk_errors, write_csv
from sharpkit.runs.store import Store

if TYPE_CHECKING:
    import pandas as pd

STORE_NAME = "results.sqlite"
_OWN = {
    "model": ("name or id of the model", ""),
    "value": ("what the measure gave for the model", "that of the measure"),
    "std_error": ("standard error of the value; empty if unknown", "as value"),
    "m": ("group size of m-sharpness", "examples"),
}


@readable(lambda scores: scores._head(), table=lambda scores: scores._shown())
class Scores:
    """The scores of a run: what every measure gave for every model.

    Args:
        store: The open store of the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, run: str | Path) -> Scores:
        """The scores in a run directory.

        Raises:
            RunError: If the directory holds no run.
        """
        path = Path(run) / STORE_NAME
        if not path.is_file():
            raise RunError(f"{run}: not a run directory (there is no {STORE_NAME} in it)")
        return cls(Store(path))

    @property
    def folder(self) -> Path | None:
        """The run directory; None for results in memory."""
        return None if self._store.path is None else self._store.path.parent

    def frame(self) -> pd.DataFrame:
        """One row per value: task, model, measure, setting columns (m, rho), value, std_error."""
        return self._store.results()

    def metrics(self) -> pd.DataFrame:
        """Accuracies, losses and generalization gap of every model of the tasks.

        Returns:
            pandas.DataFrame: One row per task and model: task, model, a column for each metric that
            is known (train_acc, test_acc, train_loss, test_loss, ..., and those of `test_metrics`;
            NaN where a model lacks it),
            and generalization_gap = train_acc − test_acc; of models without accuracies, in its
            place, loss_gap = test_loss − train_loss.

        Example:
            >>> import sharpkit as sk
            >>> measure = sk.MSharpness(m=1, rho=0.1)
            >>> scores = sk.score_zoo(sk.embedded_zoo(), measure, n=8, limit=1)
            >>> columns = ["train_acc", "test_acc", "generalization_gap"]
            >>> scores.metrics()[columns].loc[0].round(4).to_dict()
            {'train_acc': 0.986, 'test_acc': 0.8207, 'generalization_gap': 0.1653}
        """
        import pandas as pd

        rows = [
            {"task": task, "model": model, **_metrics(entry)}
            for task, configs in self.model_configs.items()
            for model, entry in configs.items()
        ]
        computed = self._store.test_metrics()
        rows = [row | computed.get((row["task"], row["model"]), {}) for row in rows]
        frame = pd.DataFrame(rows, columns=None if rows else ["task", "model"])
        if "train_acc" not in frame and {"train_loss", "test_loss"} <= set(frame.columns):
            return frame.assign(loss_gap=frame["test_loss"] - frame["train_loss"])
        accuracies = frame.reindex(columns=["train_acc", "test_acc"]).astype(float)
        return frame.assign(generalization_gap=accuracies["train_acc"] - accuracies["test_acc"])

    @property
    def failures(self) -> pd.DataFrame:
        """One row per model and measure that failed: task, model, measure, error."""
        return self._store.failures()

    def provenance(self) -> pd.DataFrame:
        """One row per model and measure: time, hashes, device, precision, peak memory, versions."""
        return self._store.provenance()

    def export(self, path: str | Path) -> Path:
        """Write every value with its provenance to a .csv or .parquet file.

        Raises:
            ArgumentError: If it has another suffix, or the library for Parquet is missing.
        """
        path = Path(path)
        table = self.frame().merge(self.provenance(), on=["task", "model", "measure"])
        if path.suffix == ".csv":
            write_csv(table, path)
        elif path.suffix == ".parquet":
            try:
                with atomic_path(path) as temporary:
                    table.to_parquet(temporary, index=False)
            except ImportError as error:
                raise ArgumentError(
                    "Parquet needs pyarrow: pip install 'sharpkit[parquet]'"
                ) from error
        else:
            raise ArgumentError(f"{path}: expected a name that ends in .csv or .parquet")
        return path

    @property
    def model_configs(self) -> dict[str, dict[str, Any]]:
        """Task name -> its model_configs (hyperparameters and metrics of every model)."""
        return self._store.model_configs()

    @property
    def config(self) -> dict[str, Any]:
        """What the run computes: measures, n, seed, device, threads, rules, precision, tasks."""
        return self._store.config

    @property
    def directions(self) -> dict[str, Any]:
        """Measure -> what its large values should mean: 1 a large gap, -1 a small one, or None.

        Of a measure whose values differ in this, a dict of these by `form`. Measures of a run by
        an earlier version are absent.
        """
        return self._store.directions

    def _head(self) -> str:
        if self._store.closed:
            return f"{self._store.path or 'in memory'}, closed"
        frame, failed = self.frame(), len(self.failures)
        models, measures = (frame[name].nunique() for name in ("model", "measure"))
        return f"{models} models, {measures} measures, {len(frame)} values, {failed} failures"

    def _shown(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame() if self._store.closed else self.frame()

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def check_scores(scores: Scores) -> None:
    """Raise ArgumentError for something else, such as the path of a run."""
    if not isinstance(scores, Scores):
        raise ArgumentError(
            f"expected scores, as score_zoo returns and Scores.open(run) reads them, got {scores!r}"
        )


def finished(store: Store, run: Path | None) -> Scores:
    """The scores at the end of a run, its tables written; a warning if nothing could be scored."""
    scores = Scores(store)
    frame, failures = scores.frame(), scores.failures
    if len(failures) and frame.empty:
        first = failures.iloc[0]
        warnings.warn(
            f"nothing could be scored: all {len(failures)} attempts failed, the first "
            f"({first.model}, {first.measure}) with: {first.error}. `.failures` has all",
            stacklevel=3,
        )
    if run is not None:
        write_scores(frame, run)
    return scores


def write_scores(frame: pd.DataFrame, run: Path) -> Path:
    """Write `Scores.frame()` as RUN/scores.csv, exactly, and the meaning of its columns beside it.

    Raises:
        RunError: If they cannot be written, as on a full disk.

    Example:
        >>> import pandas as pd, tempfile
        >>> row = {"task": "t", "model": "0", "measure": "s", "m": 4.0, "value": 0.1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(write_scores(pd.DataFrame([row]), Path(folder)).read_text())
        task,model,measure,m,value
        t,0,s,4,0.1
    """
    path, described = run / "scores.csv", legend(frame)
    for column, (meaning, unit) in _OWN.items():
        described.loc[described["column"] == column, ["meaning", "unit"]] = [meaning, unit]
    with disk_errors(path):
        write_csv(in_whole_numbers(frame, "m"), path)
        write_csv(described, legend_path(path))
    return path


def _metrics(entry: Any) -> Mapping[str, Any]:
    """What a zoo recorded of a model, if it did."""
    metrics = entry.get("metrics") if isinstance(entry, Mapping) else None
    return metrics if isinstance(metrics, Mapping) else {}
