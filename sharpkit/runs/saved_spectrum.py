"""The spectrum of one model in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sharpkit.curvature.density import SpectralDensity
from sharpkit.curvature.grids import Spacing
from sharpkit.data.npz import read_npz
from sharpkit.doors import parse_json, reading
from sharpkit.errors import RunError
from sharpkit.files import atomic_path

_NUMBERS = {
    "parameters", "loss", "lambda_max", "lambda_max_over_lambda_5", "eigenvalues",
    "residual_norms", "lambda_min", "trace", "trace_std_error", "frobenius_norm",
    "frobenius_norm_std_error", "seconds",
}  # fmt: skip
_KINDS = {"spacing": "U", "size": "iu", "breakdowns": "iu"}  # of arrays; the others are floats


def save_spectrum(
    path: Path, density: SpectralDensity, numbers: dict[str, Any], weights: str
) -> None:
    """Write a density, numbers about it, and the digest of the model's weights."""
    arrays: dict[str, Any] = {f.name: np.asarray(getattr(density, f.name)) for f in fields(density)}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, **arrays, numbers=np.asarray(json.dumps(numbers)), weights_digest=weights
        )


def read_spectrum(path: Path) -> tuple[SpectralDensity, dict[str, Any], str] | None:
    """What `save_spectrum` wrote; None if the file is damaged."""
    names = [*(f.name for f in fields(SpectralDensity)), "numbers", "weights_digest"]
    try:
        saved = read_npz(path, names, RunError)
        with reading(path, RunError, "a spectrum"):
            values: dict[str, Any] = {f.name: saved[f.name] for f in fields(SpectralDensity)}
            numbers = parse_json(path, str(saved["numbers"]), RunError)
            weights = str(saved["weights_digest"])
            _require_fit(values, numbers)
            scalars = {k: v.item() for k, v in values.items() if v.ndim == 0}
            return SpectralDensity(**{**values, **scalars}), numbers, weights
    except RunError:  # it is computed again
        return None


def _require_fit(values: Mapping[str, Any], numbers: Any) -> None:
    """Refuse arrays that are not those of a spectrum."""
    probes, steps = values["nodes"].shape
    points = values["grid"].shape
    shapes = {"weights": (probes, steps), "breakdowns": (probes,), "density": points}
    shapes |= {"std_error": points}
    for name, value in values.items():
        kinds = _KINDS.get(name, "f")
        if value.dtype.kind not in kinds or value.shape != shapes.get(name, value.shape):
            raise ValueError(f"{name} is {value.dtype} of shape {value.shape}")
    if str(values["spacing"]) not in get_args(Spacing) or set(numbers) != _NUMBERS:
        raise ValueError("its grid or numbers are others")
