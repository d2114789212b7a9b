"""Spectra of several models side by side: picture, tables and summary, resumable per model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from sharpkit.contract.examples import Examples
from sharpkit.contract.holding import frozen
from sharpkit.contract.loading import Data, load_examples
from sharpkit.contract.measuring_rules import measuring_rules
from sharpkit.curvature.density import SpectralDensity
from sharpkit.curvature.eigenvalues import top_eigenvalues
from sharpkit.curvature.grids import Spacing
from sharpkit.curvature.hessian import HessianOperator
from sharpkit.curvature.quadrature import spectral_density
from sharpkit.device import check_device
from sharpkit.digests import digest
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, RunError
from sharpkit.files import atomic_path, disk_errors, remove_leftovers, write_csv
from sharpkit.progress import progress_bar
from sharpkit.run_directory import claim, sole_driver
from sharpkit.runs.saved_spectrum import read_spectrum, save_spectrum
from sharpkit.safe_text import printable
from sharpkit.workers import error_message

if TYPE_CHECKING:
    import pandas as pd

_CONFIG, _SUMMARY, _MODELS = "config.json", "summary.json", "models"
_RANKS = 5


@readable(lambda s: f"{len(s.densities)} models, {len(s.failures)} failed")
@dataclass(frozen=True)
class Spectra:
    """What `spectrum` found.

    Attributes:
        densities: Name of each model to its density.
        summary: Name of each model to its numbers, as in summary.json.
        failures: Name of each model that could not be measured to the reason.
    """

    densities: dict[str, SpectralDensity]
    summary: dict[str, dict[str, Any]]
    failures: dict[str, str]

    def frame(self) -> pd.DataFrame:
        """One row per model: its size, λmax, λmax/λ5, trace, norm, loss and errors."""
        import pandas as pd

        rows = [
            {"model": name} | {k: np.nan if v is None else v for k, v in row.items()}
            for name, row in self.summary.items()
        ]
        return pd.DataFrame(rows).drop(columns=["eigenvalues", "residual_norms"], errors="ignore")


@dataclass(frozen=True)
class _Settings:
    """What decides the numbers; a run directory holds one of these."""

    loss: str
    parameters: list[str] | None
    n: int
    steps: int
    probes: int
    seed: int
    data: str  # digest
    rules: int
    precision: str


def spectrum(
    models: Mapping[str, Callable[[], nn.Module]],
    data: Data,
    out: str | Path,
    *,
    loss: str = "cross_entropy",
    parameters: str | Iterable[str] | None = None,
    n: int | None = None,
    steps: int = 80,
    probes: int = 4,
    seed: int = 0,
    grid: Spacing = "linear",
    bandwidth: float | None = None,
    share_axes: bool | None = None,
    device: str | torch.device = "cpu",
    memory_budget: int | None = None,
    progress: bool = True,
) -> Spectra:
    """The Hessian spectrum of every model, with pictures and tables.

    Writes into `out`: spectrum.png (one panel per model), density.csv (model, eigenvalue, density,
    std_error), nodes.csv (model, probe, node, weight), summary.json, config.json, and for every
    model models/<name>.npz as soon as it is there. Started again, models that are done are read
    back; grid, bandwidth and axes may change between starts, anything else is refused. A model
    that fails is recorded and the others go on; it is tried again at the next start.

    Args:
        models: Name to a function that builds the model; called one at a time.
        data: As for `HessianOperator`; the same for all models.
        out: The run directory; made if missing.
        loss: "cross_entropy" or "mse".
        parameters: Names or patterns; None for those that require gradients (all if none does).
        n: How many examples, in a seeded order; None for all.
        steps: Lanczos steps; at most P are taken.
        probes: Number of probes.
        seed: Of the order of examples and the probes.
        grid: "linear", "log" or "symlog".
        bandwidth: Smoothing; None for 1/200 of the range.
        share_axes: The same axes in every panel; None for yes if the spectra are of similar width.
        device: Where to compute.
        memory_budget: Bytes for kept graphs, as for `HessianOperator`.
        progress: Show progress bars.

    Returns:
        Spectra: densities, summary and failures, with `.frame()`.

    Raises:
        ArgumentError: For no models, arguments out of range, or a device that cannot be used.
        RunError: If the directory holds a run with other settings, another precision or an older
            version's rules, belongs to another process, or cannot be written; or every model
            failed.

    Source:
        Foret et al., ICLR 2021, Figure 3, left.

    Example:
        >>> import tempfile
        >>> data = torch.randn(20, 3), torch.randint(0, 2, (20,))
        >>> out = tempfile.mkdtemp()
        >>> result = spectrum({"first": lambda: nn.Linear(3, 2)}, data, out, steps=5)
        >>> list(result.frame()["model"]), result.failures
        (['first'], {})
        >>> sorted(p.name for p in Path(out).glob("[!.]*"))  # doctest: +NORMALIZE_WHITESPACE
        ['config.json', 'density.csv', 'models', 'nodes.csv', 'spectrum.png', 'summary.json']
    """
    if not models:
        raise ArgumentError("there are no models to measure")
    for name, value in (("steps", steps), ("probes", probes)):
        if value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    if loss not in ("cross_entropy", "mse"):
        raise ArgumentError(f'loss must be "cross_entropy" or "mse", got {loss!r}')
    if grid not in ("linear", "log", "symlog"):
        raise ArgumentError(f'grid must be "linear", "log" or "symlog", got {grid!r}')
    check_device(device)
    examples = load_examples(data, n=n, seed=seed)
    if isinstance(parameters, str):
        parameters = [parameters]
    settings = _Settings(
        loss=loss,
        parameters=None if parameters is None else list(parameters),
        n=len(examples),
        steps=steps,
        probes=probes,
        seed=seed,
        data=_digest_of_examples(examples),
        **measuring_rules(),
    )
    root = Path(out)
    densities: dict[str, SpectralDensity] = {}
    summary: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    with sole_driver(root), disk_errors(root):
        remove_leftovers(root / _MODELS)
        claim(root / _CONFIG, asdict(settings))
        bar = progress_bar(
            iterable=models.items(), desc="spectrum", unit="model", progress=progress
        )
        for name, build in bar:
            bar.set_postfix_str(printable(name))
            try:
                model = build().to(device)
                path = root / _MODELS / f"{_file_name(name)}.npz"
                density, numbers = _measured(
                    model, examples, path, settings, memory_budget, progress=progress
                )
                densities[name] = density.on(grid, bandwidth=bandwidth)
                summary[name] = numbers
            except Exception as error:  # the model is the user's: it raises whatever it does
                failures[name] = error_message(error)
        _write(root, densities, summary, failures, share_axes)
    if not densities:
        raise RunError(f"no model could be measured; the first: {next(iter(failures.values()))}")
    return Spectra(densities, summary, failures)


def _measured(
    model: nn.Module,
    examples: Examples,
    path: Path,
    settings: _Settings,
    memory_budget: int | None,
    *,
    progress: bool,
) -> tuple[SpectralDensity, dict[str, Any]]:
    """The spectrum of one model, from its file if that is of the same weights."""
    weights = _digest_of_model(model)
    if path.is_file():
        known = read_spectrum(path)
        if known is not None and known[2] == weights:
            return known[:2]
    dataset: Any = examples.inputs, examples.labels
    if isinstance(examples.inputs, Tensor):
        dataset = TensorDataset(examples.inputs, examples.labels)
    with (
        frozen(model),
        HessianOperator(
            model,
            dataset,
            loss=settings.loss,
            parameters=settings.parameters,
            memory_budget=memory_budget,
            progress=progress,
        ) as operator,
    ):
        size = operator.shape[0]
        density = spectral_density(
            operator,
            steps=min(settings.steps, size),
            probes=settings.probes,
            seed=settings.seed,
            progress=progress,
        )
        top = top_eigenvalues(operator, min(_RANKS, size), seed=settings.seed, progress=progress)
        numbers = _numbers(operator.loss, density, top.values, top.residual_norms)
    save_spectrum(path, density, numbers, weights)
    return density, numbers


def _numbers(loss: float, density: SpectralDensity, top: Any, residuals: Any) -> dict[str, Any]:
    ratio = float(top[0] / top[-1]) if len(top) == _RANKS and top[-1] > 0 else None
    return {
        "parameters": density.size,
        "loss": loss,
        "lambda_max": float(top[0]),
        "lambda_max_over_lambda_5": ratio,
        "eigenvalues": [float(v) for v in top],
        "residual_norms": [float(v) for v in residuals],
        "lambda_min": float(density.nodes.min()),
        "trace": density.trace,
        "trace_std_error": _finite(density.trace_std_error),
        "frobenius_norm": density.frobenius_norm,
        "frobenius_norm_std_error": _finite(density.frobenius_norm_std_error),
        "seconds": density.seconds,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _write(
    root: Path,
    densities: dict[str, SpectralDensity],
    summary: dict[str, dict[str, Any]],
    failures: dict[str, str],
    share_axes: bool | None,
) -> None:
    import pandas as pd

    from sharpkit.plot.canvas import forget, save_picture
    from sharpkit.plot.spectrum import spectrum as draw

    with atomic_path(root / _SUMMARY) as temporary:
        text = json.dumps({"models": summary, "failures": failures}, indent=2)
        temporary.write_text(text + "\n")
    if not densities:
        return
    for file, tables in (
        ("density.csv", {name: d.frame() for name, d in densities.items()}),
        ("nodes.csv", {name: d.nodes_frame() for name, d in densities.items()}),
    ):
        table = pd.concat([frame.assign(model=name) for name, frame in tables.items()])
        table.insert(0, "model", table.pop("model"))
        write_csv(table, root / file)
    figure = draw(densities, share_axes=share_axes)
    save_picture(figure, root / "spectrum.png")
    forget(figure)


def _file_name(name: str) -> str:
    """A readable file name that no other model name shares."""
    plain = re.sub(r"[^\w.-]+", "_", name)[:80]
    return plain if plain == name else f"{plain}-{digest([name])[:8]}"


def _named(tensors: Mapping[str, Any]) -> str:
    """Digest of names, dtypes, shapes and bytes."""
    return digest(
        part
        for name, t in tensors.items()
        if isinstance(t, Tensor)
        for part in (f"{name} {t.dtype} {tuple(t.shape)}", t)
    )


def _digest_of_model(model: nn.Module) -> str:
    """That of the state, and of which parameters are frozen: they are left out."""
    held = [name for name, p in model.named_parameters() if not p.requires_grad]
    return digest([f"{_named(model.state_dict())} {held}"])


def _digest_of_examples(examples: Examples) -> str:
    leaves = pytree.tree_leaves((examples.inputs, examples.labels))
    return _named({str(i): leaf for i, leaf in enumerate(leaves)})
