"""From a plan to the picture: train, measure, score, draw; each step goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpkit.contract.measuring_rules import measuring_rules, refuse_other_rules
from sharpkit.curvature.density import SpectralDensity
from sharpkit.device import check_device
from sharpkit.display import readable
from sharpkit.errors import ArgumentError, RunError
from sharpkit.evaluation.legend import write_with_legend
from sharpkit.files import write_csv
from sharpkit.measures import MSharpness
from sharpkit.progress import progress_bar
from sharpkit.run_directory import read_claim, refuse_another, sole_driver, write_claim
from sharpkit.runs.evaluate import evaluate
from sharpkit.runs.figure3.plan import Plan, read_plan
from sharpkit.runs.figure3.trainings import (
    ArrayExamples,
    Run,
    Snapshot,
    best_lr,
    measure,
    sam_runs,
    sgd_runs,
    spectrum_runs,
    summary,
    train,
)
from sharpkit.runs.score import score_zoo
from sharpkit.safe_text import printable
from sharpkit.workers import Failure, Workers, on_one_thread, run_items

if TYPE_CHECKING:
    import pandas as pd

PANELS = ("left", "middle", "right")
_MEASURED = {"left": "spectra", "right": "scores"}  # panels with measurements, and their folders


@readable(
    lambda f: f"{f.picture}, panels {', '.join(f.tables())}, {len(f.failures)} failed", brief=True
)
@dataclass(frozen=True)
class Figure3:
    """What `figure3` made; a panel that was not asked for is None.

    Args:
        picture: The file.
        spectra: Left: one row per training and epoch, with lambda_max and
            lambda_max_over_lambda_5.
        test_error: Middle: one row per optimizer, m, rho and lr, with mean and standard error over
            seeds.
        predictive_power: Right: as from `sharpkit.evaluate`.
        failures: Name of each training, spectrum or model without a result to the reason.
    """

    picture: Path
    spectra: pd.DataFrame | None
    test_error: pd.DataFrame | None
    predictive_power: pd.DataFrame | None
    failures: dict[str, str]

    def tables(self) -> dict[str, pd.DataFrame]:
        """The table of each panel that there is: "left", "middle", "right"."""
        tables = zip(PANELS, (self.spectra, self.test_error, self.predictive_power), strict=True)
        return {panel: table for panel, table in tables if table is not None}

    def frame(self) -> pd.DataFrame:
        """The rows of all panels, told apart by `panel`; a column that a panel lacks is NaN."""
        import pandas as pd

        parts = [table.assign(panel=panel) for panel, table in self.tables().items()]
        return pd.concat(parts, ignore_index=True)


def figure3(
    preset: str | Path | Plan,
    *,
    out: str | Path,
    panels: Collection[str] = PANELS,
    data: str | None = None,
    zoo: str | None = None,
    workers: int | Workers = 1,
    device: str = "cpu",
    build: str | None = None,
    progress: bool = True,
) -> Figure3:
    """The three panels of the SAM paper's Figure 3 in one picture, with their tables.

    - left: Hessian spectra in the course of training with SGD and with SAM;
    - middle: test error of SAM against ρ for several m, with SGD for comparison;
    - right: how well m-sharpness predicts the generalization gap over a zoo, against m.

    Everything is kept in `out`: figure3.png, spectra.csv, density.csv, test_error.csv,
    trainings.csv, predictive_power.csv (with the meaning of its columns beside it),
    every training in trainings/, every spectrum in spectra/, the scores in scores/. The same call
    goes on where it stopped, epoch by epoch, and skips what is done. A training that diverges or
    fails is recorded and the rest goes on. The number of workers changes no number.

    Args:
        preset: "mini" (20 minutes on two cores), "fashion" and "cifar10" (hours on a CPU), "paper"
            (the paper's setting), or a TOML file of the same form.
        out: The run directory.
        panels: Which of "left", "middle" and "right".
        data: Another folder with the data set's files, or another data set, for the trainings.
        zoo: Another zoo for the right panel.
        workers: How many trainings, spectra and models at a time, or who computes them
            (`Workers`). A script that uses processes needs the usual `if __name__ == "__main__":`;
            the nodes of a Ray cluster must share the disk of `out`.
        device: Where to train and measure, such as "cpu" or "cuda".
        build: As for `read_plan`.
        progress: Whether to show progress bars.

    Returns:
        Figure3: The picture's path, the tables and the failures.

    Raises:
        ArgumentError: No such preset or panel, or a setting out of range; names file and field.
        DataError: The data are missing or damaged.
        RunError: `out` holds another figure, measurements of another precision or of an older
            version's rules, belongs to another process, or a panel has no result.

    Source:
        Foret et al., ICLR 2021, section 4 and Figure 3.

    Example:
        >>> import sharpkit as sk
        >>> result = sk.figure3("mini", out="runs/mini", panels=["right"])  # doctest: +SKIP
        >>> result.predictive_power[["m", "cmi_pgdl"]]  # doctest: +SKIP
    """
    from sharpkit.plot.canvas import forget, save_picture
    from sharpkit.plot.figure3 import figure3 as draw

    check_device(device)
    plan = preset if isinstance(preset, Plan) else read_plan(preset, build)
    if data is not None:
        plan = replace(plan, data=plan.data.at(data))
    if zoo is not None:
        plan = replace(plan, power=replace(plan.power, zoo=zoo))
    unknown = [panel for panel in panels if panel not in PANELS]
    if unknown or not panels:
        raise ArgumentError(f"panels is {list(panels)}, expected some of {', '.join(PANELS)}")
    given = on_one_thread(workers)
    root = Path(out)
    with sole_driver(root):
        _claim(root, plan, panels)
        driver = _Driver(given, device, progress, {})
        spectra = densities = test_error = power = None
        if "left" in panels or "middle" in panels:
            examples = ArrayExamples.of(*plan.data.load())
            lr, trainings = _train_all(driver, plan, examples, root, panels)
            if "middle" in panels:
                test_error = _written(summary(trainings), root / "test_error.csv")
            if "left" in panels:
                spectra, densities = _measure_all(driver, plan, examples, root, lr)
        if "right" in panels:
            power = _predictive_power(driver, plan, root)
        figure = draw(
            densities=densities, spectra=spectra, test_error=test_error, predictive_power=power
        )
        save_picture(figure, root / "figure3.png")
        forget(figure)
    return Figure3(root / "figure3.png", spectra, test_error, power, driver.failures)


@dataclass(frozen=True)
class _Driver:
    """How work items are done, and which of them failed."""

    workers: Workers
    device: str
    progress: bool
    failures: dict[str, str]

    def results(self, label: str, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        """What a function gives for the items, in their order; failures are noted and left out."""
        found: dict[Any, Any] = {}
        outcomes = run_items(function, items, self.workers, device=self.device)
        bar = progress_bar(total=len(items), desc=label, progress=self.progress)
        with closing(outcomes), bar:
            for item, result in outcomes:
                if isinstance(result, Failure):
                    self.failures[item.name] = result.message
                    bar.write(f"{item.name} failed: {printable(result.message)}")
                else:
                    found[item] = result
                bar.update()
        return [found[item] for item in items if item in found]


def _train_all(
    driver: _Driver, plan: Plan, examples: ArrayExamples, root: Path, panels: Collection[str]
) -> tuple[float, pd.DataFrame]:
    """The learning rate that SGD chose, and a row per training."""
    import pandas as pd

    rates = plan.training.lr
    kept = frozenset(run for lr in rates for run in spectrum_runs(plan, lr))
    one = partial(train, plan, examples, root, kept)
    rows = driver.results("SGD", one, sgd_runs(plan))
    if not rows:
        raise RunError(f"every training with SGD failed: {_first(driver.failures)}")
    lr = best_lr(pd.DataFrame(rows), len(plan.training.seeds))
    runs: list[Run] = sam_runs(plan, lr) if "middle" in panels else []
    if "left" in panels:
        runs += [run for run in spectrum_runs(plan, lr) if run.optimizer == "sam"]
    rows += driver.results("SAM", one, list(dict.fromkeys(runs)))
    return lr, _written(pd.DataFrame(rows), root / "trainings.csv")


def _measure_all(
    driver: _Driver, plan: Plan, examples: ArrayExamples, root: Path, lr: float
) -> tuple[pd.DataFrame, dict[tuple[str, int], SpectralDensity]]:
    """A row per training and epoch, and the densities of the first seed by optimizer and epoch."""
    import pandas as pd

    snapshots = [
        Snapshot(run, epoch)
        for run in spectrum_runs(plan, lr)
        if run.name not in driver.failures
        for epoch in plan.spectra.epochs
    ]
    results = driver.results("spectra", partial(measure, plan, examples, root), snapshots)
    if not results:
        raise RunError(f"there is no spectrum: {_first(driver.failures)}")
    table = _written(pd.DataFrame([row for _, row in results]), root / "spectra.csv")
    densities: dict[tuple[str, int], SpectralDensity] = {}
    for density, row in results:
        densities.setdefault((row["optimizer"], row["epoch"]), density)
    frames = [
        density.frame().assign(optimizer=optimizer, epoch=epoch)
        for (optimizer, epoch), density in densities.items()
    ]
    _written(pd.concat(frames), root / "density.csv")
    return table, densities


def _predictive_power(driver: _Driver, plan: Plan, root: Path) -> pd.DataFrame:
    from sharpkit.zoo import embedded_zoo, load_zoo

    power = plan.power
    zoo = embedded_zoo() if power.zoo == "embedded" else load_zoo(power.zoo)
    unknown = [task for task in power.tasks if task not in zoo]
    if unknown:
        raise ArgumentError(f"no task {unknown[0]!r} in {power.zoo}: it has {', '.join(zoo)}")
    scores = score_zoo(
        {name: task for name, task in zoo.items() if not power.tasks or name in power.tasks},
        MSharpness(m=list(power.m), rho=power.rho),
        out=root / "scores",
        n=power.n,
        workers=driver.workers,
        device=driver.device,
        progress=driver.progress,
    )
    for row in scores.failures.itertuples():
        driver.failures[f"{row.task} model {row.model}"] = str(row.error)
    table = evaluate(scores)
    write_with_legend(table, root / "predictive_power.csv")
    scores.close()
    return table


def _claim(root: Path, plan: Plan, panels: Collection[str]) -> None:
    """Note what the panels are made of, or refuse a directory that has them of something else."""
    path = root / "figure3.json"
    measured = set(panels) & set(_MEASURED)
    parts = measured | ({"power"} if "right" in panels else set())
    parts |= {"data", "training", "spectra"} if set(panels) != {"right"} else set()
    wanted = json.loads(json.dumps(asdict(plan))) | dict.fromkeys(_MEASURED, measuring_rules())
    wanted = {part: wanted[part] for part in sorted(parts)}
    there = read_claim(path) if path.is_file() else {}
    if not all(isinstance(part, dict) for part in there.values()):
        raise RunError(f"{path} is damaged: delete it, or choose another directory")
    for panel in sorted(measured):
        if (root / _MEASURED[panel]).is_dir():
            refuse_other_rules(there.get(panel, {}), root)
    known = {part: there[part] for part in wanted if part in there}
    refuse_another(known, {part: wanted[part] for part in known}, path)
    write_claim(path, there | wanted)


def _written(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    write_csv(table, path)
    return table


def _first(failures: dict[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in failures.items()), "nothing was trained")
