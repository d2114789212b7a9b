"""Evaluations kept beside the results of a run, so that nobody waits twice for the same table."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.doors import read_json, reading
from sharpkit.errors import RunError
from sharpkit.files import atomic_path, remove_leftovers

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "evaluations"
_KEPT = 100  # tables of other options; the oldest make place
_NUMBERS = ("float64", "int64", "Int64")


def kept_table(
    folder: Path | None, function: Callable[..., pd.DataFrame], *arguments: Any
) -> pd.DataFrame:
    """What the function makes of the arguments: from the folder if it stands there, else computed.

    A table is taken only if the arguments, the code of the statistics and the versions of its
    libraries are the same, and its file is as it was written; its warnings are given again. Where
    nothing can be written, nothing is kept.

    Args:
        folder: Of the run; None for results in memory.
        function: Makes a table with columns of numbers and of text, the same for equal arguments.
        arguments: Tables of numbers, and what JSON takes.

    Example:
        >>> import pandas as pd, tempfile
        >>> def compute(seed):
        ...     print("computed")
        ...     return pd.DataFrame({"value": [0.5, float("nan")], "note": ["", "a note"]})
        >>> folder = Path(tempfile.mkdtemp())
        >>> table = kept_table(folder, compute, 0)
        computed
        >>> kept_table(folder, compute, 0).equals(table)
        True
    """
    from pandas.api.types import is_string_dtype

    if folder is None:
        return function(*arguments)
    digest = _digest([function.__qualname__, *arguments])
    path = folder / FOLDER / f"{digest[:32]}.json"
    with suppress(RunError, OSError):  # a derived file that is missing or damaged is made again
        if path.is_file():
            return _read(path, digest)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        table = function(*arguments)
    messages = [str(w.message) for w in given]
    _warn(messages)
    if all(str(c.dtype) in _NUMBERS or is_string_dtype(c) for _, c in table.items()):
        with suppress(OSError):
            _write(path, digest, table, messages)
    return table


def _digest(question: Sequence[Any]) -> str:
    """SHA-256 of the question, the code that answers it and the libraries below that."""
    import numpy as np
    import pandas as pd

    found = hashlib.sha256(_code())
    for part in question:
        if isinstance(part, pd.DataFrame):
            content = np.ascontiguousarray(part.to_numpy(dtype=np.float64))
            labels = [list(part.shape), list(map(str, part.index)), list(map(str, part.columns))]
            text = json.dumps(labels)
            found.update(text.encode() + content.tobytes())
        else:
            found.update(json.dumps(part, default=repr).encode())
        found.update(b"\n")
    return found.hexdigest()


@functools.cache
def _code() -> bytes:
    """SHA-256 of the sources of the statistics, with the versions of numpy, pandas and scipy."""
    import numpy as np
    import pandas as pd
    import scipy

    import sharpkit
    import sharpkit.evaluation

    versions = [sharpkit.__version__, np.__version__, pd.__version__, scipy.__version__]
    found = hashlib.sha256(" ".join(versions).encode())
    for source in sorted(Path(sharpkit.evaluation.__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    return found.digest()


def _write(path: Path, digest: str, table: pd.DataFrame, messages: list[str]) -> None:
    columns = [
        [name, str(column.dtype), [_plain(v) for v in column.tolist()]]
        for name, column in table.items()
    ]
    content = {"question": digest, "columns": columns, "warnings": messages}
    with atomic_path(path) as temporary:
        content["checksum"] = _checksum(content)
        temporary.write_text(json.dumps(content), encoding="utf-8")
    remove_leftovers(path.parent)
    for old in sorted(path.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)


def _read(path: Path, digest: str) -> pd.DataFrame:
    """The table of the file; RunError if it cannot be read, or is of another question."""
    import pandas as pd

    content = read_json(path, RunError)
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise RunError(f"{path}: is not as it was written")
    with reading(path, RunError, "a table as it was kept"):  # anybody can write a checksum
        if content["question"] != digest:
            raise RunError(f"{path}: is of another question")
        columns = {
            name: pd.Series(list(map(float, v)) if dtype == "float64" else v, dtype=dtype)
            for name, dtype, v in content["columns"]
        }
        table, messages = pd.DataFrame(columns), list(map(str, content["warnings"]))
    _warn(messages)
    return table


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A cell as JSON has it: numbers that are not finite by their names."""
    import pandas as pd

    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return None if value is pd.NA else value


def _warn(messages: Sequence[str]) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=4)
