"""What each column of a table of models is: which names the file, which are metrics, and so on.

A column is recognised by its name, or named by the user; what can be taken two ways is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sharpkit.doors import shown
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.folder.table import Table, Value

MAIN_METRICS = ("train_acc", "test_acc", "train_loss", "test_loss")
# what MLflow puts before the names of parameters, metrics and tags, and wandb's runs flattened
_SETTINGS = ("params.", "config.", "config/")
_RESULTS = ("metrics.", "summary.", "summary/", "summary_metrics.")
_TAGS = ("tags.",)
_PATHS = {
    *("path", "file", "filename", "file_name", "file_path", "filepath", "weights", "weights_file"),
    *("checkpoint", "checkpoint_path", "checkpoint_file", "ckpt", "ckpt_path", "weights_path"),
    *("model_path", "model_file", "save_path"),
}
_INITIAL = {
    f"{a}{b}" for a in ("initial", "init") for b in ("", "_path", "_weights", "_checkpoint")
}
_NAMES = ("run_id", "id", "name", "run_name", "mlflow_runname", "model", "model_id", "run")
_STATES = {
    *("finished", "crashed", "failed", "running", "killed", "scheduled", "pending", "preempted"),
    "preempting",
}
_OF_SPLIT = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_OF_QUANTITY = {"acc": "acc", "accuracy": "acc", "acc1": "acc", "top1": "acc", "loss": "loss"}
# words of names that tell a result of training from what was chosen before
_RESULT_WORDS = {
    *("acc", "accuracy", "acc1", "acc5", "top1", "top5", "loss", "error", "err", "nll", "ece"),
    *("auc", "f1", "perplexity", "ppl", "bleu", "gap", "val", "valid", "validation", "eval"),
}
_CHOSEN_WORDS = {
    *("target", "stop", "threshold", "weight", "coef", "lambda", "size", "fraction", "split"),
    *("every", "interval", "freq", "batch", "patience", "ratio"),
}
# what a service or script notes of a run beside its hyperparameters
_NOTED = {
    *("state", "status", "notes", "user", "tags", "created", "created_at", "updated", "runtime"),
    *("updated_at", "sweep", "job_type", "hostname", "host", "commit", "git_commit", "github"),
    *("description", "agent", "command", "gpu_type", "gpu_count", "cpu_count", "heartbeat_at"),
    *("python_version", "os", "end_time", "start_time", "experiment_id", "artifact_uri", "date"),
    *("duration", "source_type", "source_name", "lifecycle_stage", "timestamp", "comment"),
    *("wall_time", "seconds", "training_time", "time", "relative_time_process", "version"),
    *("id", "run_id", "run_name", "mlflow_runname", "model_id", "index", "idx", "unnamed_0", "row"),
    *("trial", "trial_number", "trial_id"),
}


@dataclass(frozen=True)
class Columns:
    """What the columns of a table were taken for."""

    path: str  # what names the file
    metrics: dict[str, str]  # name -> column
    hyperparameters: dict[str, str]  # name -> column
    settings: dict[str, str]  # all that `build` may ask for: name -> column
    state: str | None  # whether a run came to its end
    initial: str | None  # the file of the weights before training
    unused: dict[str, str]  # column -> why
    guessed: bool  # whether the user has left something to be recognised

    def told(self, table: str) -> str:
        """One sentence about what was taken for what."""
        used = {"path": self.path, **self.metrics}
        if self.initial is not None:
            used["initial"] = self.initial
        text = f"{table}: taken as " + ", ".join(f"{role} {c!r}" for role, c in used.items())
        text += f"; as hyperparameters {', '.join(self.hyperparameters) or 'none'}"
        if self.unused:
            text += "; not used: " + ", ".join(f"{c} ({why})" for c, why in self.unused.items())
        return text


def path_columns(table: Table, named: Mapping[str, str] | None = None) -> list[str]:
    """Columns that may name the file: the one called a path, else those called an id or a name.

    Raises:
        ZooFormatError: There is none, or two are called a path.
        ArgumentError: The one that is named is not there.
    """
    if named and "path" in named:
        return [find_column(table, named["path"])]
    path = _only(table, [c for c in table.columns if word(c) in _PATHS], "path")
    found = [c for name in _NAMES for c in table.columns if word(c) == name]
    if path is None and not found:
        raise ZooFormatError(
            f"{table.name}: no column names the files; it has {', '.join(table.columns)}. Say "
            'which does, as columns={"path": NAME} or --column path=NAME'
        )
    return found if path is None else [path]


def read_columns(
    table: Table,
    path: str,
    named: Mapping[str, str] | None = None,
    hyperparameters: Sequence[str] | None = None,
) -> Columns:
    """What each column of a table is.

    Args:
        table: Of models.
        path: The column that names the file.
        named: What is named by the user: "path", "initial", or a metric -> column.
        hyperparameters: Columns that were varied; None for all numbers, bools and words that are
            neither results nor notes of a run, and differ between models.

    Raises:
        ZooFormatError: No column for the accuracies (or, without them, the losses), or two, or one
            without a number.
        ArgumentError: There is no such column.
    """
    named = {role: find_column(table, column) for role, column in (named or {}).items()}
    chosen = None if hyperparameters is None else [find_column(table, c) for c in hyperparameters]
    metrics = {role: column for role, column in named.items() if role not in ("path", "initial")}
    metrics |= _recognised_metrics(table, {path, *named.values(), *(chosen or ())}, metrics)
    _check_metrics(table, metrics)
    state = next((c for c in table.columns if _is_state(table, c)), None)
    initial = named.get("initial") or _only(
        table, [c for c in table.columns if word(c) in _INITIAL], "initial"
    )
    rest = [c for c in table.columns if c not in {*metrics.values(), path, initial, state}]
    unused: dict[str, str] = {}
    varied = chosen if chosen is not None else _varied(table, rest, unused)
    names = [short(c) for c in varied]
    if len(set(names)) < len(names):
        names = list(varied)
    settings = {short(c): c for c in rest if _kind(c) != "result"}
    of_names = dict(zip(names, varied, strict=True))
    guessed = chosen is None or not {"path", *set(MAIN_METRICS) & set(metrics)} <= set(named)
    return Columns(path, metrics, of_names, settings | of_names, state, initial, unused, guessed)


def find_column(table: Table, name: str) -> str:
    """The column of this name, or the one with this name after its prefix, as "lr" of params.lr.

    Raises:
        ArgumentError: There is none, or several.
    """
    if name in table.columns:
        return name
    found = [c for c in table.columns if short(c) == name]
    if len(found) != 1:
        which = f"several columns {', '.join(found)} for" if found else "no column"
        raise ArgumentError(f"{table.name}: {which} {name!r}; it has {', '.join(table.columns)}")
    return found[0]


def short(column: str) -> str:
    """A name without the prefix of MLflow or wandb.

    Example:
        >>> short("params.lr"), short("config.optimizer.name"), short("width")
        ('lr', 'optimizer.name', 'width')
    """
    for prefix in (*_SETTINGS, *_RESULTS, *_TAGS):
        if column.startswith(prefix) and len(column) > len(prefix):
            return column[len(prefix) :]
    return column


def word(column: str) -> str:
    """A name in lower case with single underscores: "Test Accuracy" is test_accuracy."""
    return re.sub("[^a-z0-9]+", "_", short(column).lower()).strip("_")


def _kind(column: str) -> str:
    """ "setting", "result", "note", or "" for a name that alone does not tell."""
    if column.startswith(_SETTINGS):
        return "setting"
    if column.startswith(_RESULTS):
        return "result"
    if column.startswith((*_TAGS, "_")) or word(column) in _NOTED:
        return "note"
    words = set(word(column).split("_"))
    return "result" if words & _RESULT_WORDS and not words & _CHOSEN_WORDS else ""


def _main_metric(column: str) -> str | None:
    """Which of the main metrics a name means, if it says nothing else."""
    words = set(word(column).split("_")) - {"final", "last"}
    splits = {_OF_SPLIT[w] for w in words if w in _OF_SPLIT}
    quantities = {_OF_QUANTITY[w] for w in words if w in _OF_QUANTITY}
    if len(splits) != 1 or len(quantities) != 1 or words - set(_OF_SPLIT) - set(_OF_QUANTITY):
        return None
    return f"{splits.pop()}_{quantities.pop()}"


def _recognised_metrics(table: Table, taken: set[str], known: Mapping[str, str]) -> dict[str, str]:
    """Metrics by the names of their columns: the main ones, and all other results in numbers."""
    free = [c for c in table.columns if c not in taken and not c.startswith((*_SETTINGS, *_TAGS))]
    found: dict[str, str] = {}
    for metric in MAIN_METRICS:
        same = [c for c in free if _main_metric(c) == metric]
        if metric not in known and (column := _only(table, same, metric)) is not None:
            found[metric] = column
    for column in free:
        name = short(column)
        numbers = [v for v in table.values(column) if v is not None]
        if (
            _kind(column) == "result"
            and _main_metric(column) is None
            and name not in {*known, *found, *MAIN_METRICS}
            and numbers
            and all(map(is_number, numbers))
        ):
            found[name] = column
    return found


def _only(table: Table, found: Sequence[str], role: str) -> str | None:
    """The column of a role; of several, the one with just that name."""
    exact = [c for c in found if short(c) == role] if len(found) > 1 else found
    if len(found) > 1 and len(exact) != 1:
        raise ZooFormatError(
            f"{table.name}: {' and '.join(map(repr, found))} may both be {role}; say which, as "
            f'columns={{"{role}": {found[0]!r}}} or --column {role}={found[0]}'
        )
    return exact[0] if exact else None


def _check_metrics(table: Table, metrics: Mapping[str, str]) -> None:
    """All have numbers, and both accuracies are known, or neither and both losses."""
    for metric, column in metrics.items():
        values = table.values(column)
        if not any(map(is_number, values)):
            raise ZooFormatError(
                f"{table.name}, {column!r}: expected numbers for {metric}, found {shown(values)}"
            )
    accuracies = [m for m in MAIN_METRICS[:2] if m in metrics]
    if len(accuracies) == 2 or (not accuracies and set(MAIN_METRICS[2:]) <= set(metrics)):
        return
    missing = [m for m in MAIN_METRICS[:2] if m not in metrics]
    raise ZooFormatError(
        f"{table.name}: no column is {' or '.join(missing)}; it has {', '.join(table.columns)}. "
        f'Say which, as columns={{"{missing[0]}": NAME}} or --column {missing[0]}=NAME (without '
        "accuracies, train_loss and test_loss will do). If they were not recorded, give the files "
        f"to score_models or --checkpoint, which compute them{_of_dicts(table)}"
    )


def _of_dicts(table: Table) -> str:
    columns = [c for c in table.columns if table.rows[0][c].lstrip().startswith("{")]
    return f". {', '.join(columns)} have dicts: pandas.json_normalize flattens" if columns else ""


def _is_state(table: Table, column: str) -> bool:
    values = {row[column].strip().lower() for row in table.rows}
    return word(column) in ("state", "status") and values <= {*_STATES, ""}


def _varied(table: Table, columns: Sequence[str], unused: dict[str, str]) -> list[str]:
    """The hyperparameters among the columns, why each other is none."""
    found = []
    for column in columns:
        values = table.values(column)
        texts = [v for v in values if isinstance(v, str)]
        if _kind(column) == "result":
            unused[column] = "a result that is no number in every row"
        elif _kind(column) == "note":
            unused[column] = "a note on the run"
        elif len({str(v) for v in values}) < 2:
            unused[column] = "the same in all rows"
        elif len(texts) > 2 and len(set(texts)) == len(values):
            unused[column] = "a text of its own in every row"
        elif word(column).endswith("seed") and len(set(map(str, values))) == len(values):
            unused[column] = "a seed of its own in every row"
        else:
            found.append(column)
    return found


def is_number(value: Value) -> bool:
    """Whether a cell is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
