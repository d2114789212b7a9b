"""A folder of checkpoints and a table with a row for each are a task like any other."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.errors import ArgumentError, ZooFormatError
from sharpkit.zoo.folder.columns import read_columns
from sharpkit.zoo.folder.table import read_table

# what is told is looked at where it matters
pytestmark = pytest.mark.filterwarnings("ignore:task ", "ignore:conditioning", "ignore:given")
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
DATA = (X[:24], Y[:24]), (X[24:], Y[24:])


def build(width):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def network(i, width):
    torch.manual_seed(i)
    return build(width)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Twelve checkpoints in a folder whose name has a space, and their table's rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs").mkdir()
    rows = []
    for i, (width, seed) in enumerate(itertools.product((4, 8, 16), range(4))):
        path = f"my runs/net {i}.pt"
        torch.save({"epoch": 3, "state_dict": network(i, width).state_dict()}, tmp_path / path)
        rows.append({"path": path, "width": width, "seed": seed, "lr": 0.1 * (1 + i)})
        rows[-1] |= {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * i}
    return rows


def opened(rows, pattern="my runs/*.pt", **options):
    options = {"build": build, "data": DATA, "table": pd.DataFrame(rows)} | options
    (task,) = sk.load_zoo(pattern, **options).values()
    return task


def told(rows, pattern="my runs/*.pt", **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = opened(rows, pattern, **options)
    return task, "\n".join(str(w.message) for w in caught)


def plain_m_sharpness(model, rho, m):
    """Mean over groups of the loss after one step to the sphere, minus the loss, in float64."""
    model = model.double()
    parameters = list(model.parameters())
    rises = []
    for start in range(0, 24, m):
        x, y = (part[start : start + m] for part in (DATA[0][0].double(), DATA[0][1]))
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += rho * g / norm
            rises.append(float(nn.functional.cross_entropy(model(x), y) - loss))
            for p, g in zip(parameters, grads, strict=True):
                p -= rho * g / norm
    return float(np.mean(rises))


def test_it_is_scored_rated_and_reported_with_the_values_of_a_plain_loop(rows, tmp_path):
    task = opened(rows)
    assert list(task) == [f"net {i}" for i in range(12)]
    scores = sk.score_zoo(task, sk.MSharpness(m=1, rho=0.1), out=tmp_path / "run", progress=False)
    assert scores.failures.empty
    values = scores.frame().set_index("model")["value"]
    for i, width in enumerate(np.repeat((4, 8, 16), 4)):
        expected = plain_m_sharpness(network(i, width), 0.1, 1)  # of m = 1 no order matters
        assert values[f"net {i}"] == pytest.approx(expected, rel=1e-4)  # float32
    gaps = scores.metrics().set_index("model")["generalization_gap"]
    assert gaps["net 7"] == pytest.approx(0.17)
    table = sk.evaluate(scores, resamples=20)
    assert table["models"].item() == 12 and table["kendall_tau"].notna().all()
    page = sk.write_report(tmp_path / "run", resamples=20).read_text()
    assert "net 7" in page and "settings that the command line does not know" in page


def test_what_it_holds_is_listed_and_a_broken_file_costs_one_model(rows, tmp_path):
    zoo = sk.load_zoo("my runs/*.pt", build=build, table=pd.DataFrame(rows), data=DATA)
    table = sk.zoo_info(zoo, deep=True)
    assert set(table["problem"]) == {""} and list(table["layers"]) == [2] * 12
    assert list(table["parameters"][::4]) == [8 * w + 3 for w in (4, 8, 16)]
    (tmp_path / "my runs" / "net 5.pt").write_bytes(b"broken")
    torch.save(network(1, 4), tmp_path / "my runs" / "net 1.pt")  # a program: never loaded
    problems = sk.zoo_info(zoo).set_index("model")["problem"]
    assert list(problems[problems != ""].index) == ["net 1", "net 5"]
    scores = sk.score_zoo(zoo, sk.MSharpness(m=1, rho=0.1), progress=False)
    assert sorted(scores.failures["model"]) == ["net 1", "net 5"]
    assert scores.frame()["model"].nunique() == 10


def test_the_builder_is_given_what_its_parameters_are_called(rows):
    given = []

    def all_settings(**settings):
        given.append(settings)
        return build(settings["width"])

    opened(rows, build=all_settings)["net 5"].load()
    assert given == [{"width": 8, "seed": 1, "lr": pytest.approx(0.6)}]
    other = opened(rows, build=lambda width, depth=2, **more: build(width if depth == 2 else 1))
    assert other["net 9"].load()[0].out_features == 16
    fixed = opened(rows[:4], build=lambda: build(4))
    assert torch.equal(fixed["net 3"].load()[0].weight, network(3, 4)[0].weight)
    with pytest.raises(ArgumentError, match="needs 'depth', which no column of the table gives"):
        opened(rows, build=lambda width, depth: None)


def test_rows_and_files_that_do_not_fit_are_told_and_cost_themselves_alone(rows, tmp_path):
    torch.save({}, tmp_path / "my runs" / "extra.pt")
    rows[2]["path"] = "my runs/gone.pt"
    rows.append({**rows[4], "test_acc": 0.1})  # another result for the same file
    rows.append(rows[6])  # the same row again
    rows[8]["test_acc"] = float("nan")
    task, text = told(rows)
    assert list(task) == [f"net {i}" for i in range(12) if i not in (2, 4)]
    for part in (
        "rows without a file (1): my runs/gone.pt",
        "files without a row (2): extra.pt, net 2.pt",
        "files left out, whose rows differ (1): net 4.pt",
        "files with the same row twice, which counts once (1): net 6.pt",
        "models without a number as an accuracy, scored but not evaluated (1): net 8.pt",
    ):
        assert part in text
    assert "test_acc" not in task["net 8"].metrics
    scores = sk.score_zoo(task, sk.MSharpness(m=1, rho=0.1), n=8, progress=False)
    table = sk.evaluate(scores, resamples=10)
    assert table["models"].item() == 9 and table["left_out"].item() == "net 8"


def test_paths_are_found_from_the_table_and_from_other_places(rows, tmp_path):
    plain = list(opened(rows))
    (tmp_path / "tables").mkdir()
    ways = {
        "relative to the table": lambda p: f"../{p}",
        "absolute": lambda p: str(tmp_path / p),
        "a URL": lambda p: (tmp_path / p).as_uri(),
        "by name": lambda p: p.removeprefix("my runs/"),
        "without an ending": lambda p: p.removeprefix("my runs/").removesuffix(".pt"),
        "of another machine": lambda p: f"/scratch/x/{p}",
    }
    for way, change in ways.items():
        table = tmp_path / "tables" / "t.csv"
        pd.DataFrame([{**row, "path": change(row["path"])} for row in rows]).to_csv(table)
        assert list(opened(rows, table=table)) == plain, way
    assert list(opened(rows, "my runs")) == plain
    # of another machine, and two rows with one file name: nothing is guessed
    twice = [{**rows[0], "path": f"/other/{k}/net 0.pt"} for k in "ab"] + rows[1:]
    assert "net 0" not in opened(twice)


def test_a_folder_per_run_names_the_models(rows, tmp_path):
    for k, row in enumerate(rows):
        folder = tmp_path / "deep" / f"run{k}"
        folder.mkdir(parents=True)
        (tmp_path / row["path"]).rename(folder / "last.pt")
        row["path"] = f"run{k}"
    task = opened(rows, "deep/**/*.pt")
    assert list(task) == [f"run{k}" for k in range(12)]
    assert task["run11"].load()[0].out_features == 16


def test_an_export_of_wandb(rows, tmp_path):
    names = ["Name", "State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "width"]
    table = tmp_path / "wandb.csv"
    lines = [
        ",".join(f'"{n}"' for n in [*names, "lr", "test/accuracy", "train/accuracy", "val_loss"])
    ]
    for k, row in enumerate(rows):
        state = "crashed" if k == 3 else "finished"
        cells = [f"net {k}", state, "-", "me", "", f"2024-01-{k + 1:02}", 60 + k, "", row["width"]]
        cells += [row["lr"], 100 * row["test_acc"], 100.0, 0.5 + k]
        lines.append(",".join(f'"{c}"' for c in cells))
    table.write_text("\n".join(lines) + "\n")
    task, text = told(rows, table=table)
    assert len(task) == 11 and "rows left out, of runs that are crashed (1): net 3" in text
    assert "train/accuracy and test/accuracy taken as per cent" in text
    assert set(task.model_configs["net 0"]["hparams"]) == {"width", "lr"}
    assert task["net 5"].metrics == pytest.approx(
        {"train_acc": 1, "test_acc": 0.85, "val_loss": 5.5}
    )


def test_flattened_runs_of_wandb(rows):
    flat = [
        {"ID": f"net {k}", "State": "finished", "config.width": r["width"], "config.opt": "sgd",
         "config.loss_weight": k / 7, "summary.train_acc": 1.0, "summary.test_acc": r["test_acc"],
         "summary.test_loss": 2.0, "summary._step": k}
        for k, r in enumerate(rows)
    ]  # fmt: skip
    task, text = told(flat)
    assert set(task.model_configs["net 0"]["hparams"]) == {"width", "loss_weight"}
    assert "config.opt (the same in all rows)" in text
    assert task["net 2"].metrics["test_loss"] == 2.0


def test_an_export_of_mlflow(rows, tmp_path):
    runs = []
    for k, row in enumerate(rows):
        run_id = f"{k:032x}"
        folder = tmp_path / "mlruns" / "0" / run_id / "artifacts"
        folder.mkdir(parents=True)
        (tmp_path / row["path"]).rename(folder / "weights.pt")
        runs.append(
            {"run_id": run_id, "experiment_id": 0, "status": "FINISHED",
             "artifact_uri": folder.as_uri(), "start_time": f"2024-01-0{k % 9 + 1}",
             "metrics.train_acc": 1.0, "metrics.test_acc": row["test_acc"],
             "params.width": row["width"], "params.augment": k % 2 == 0,
             "tags.mlflow.user": "me", "tags.mlflow.runName": f"calm-{k}"}
        )  # fmt: skip
    task, text = told(runs, "mlruns/**/*.pt")
    assert len(task) == 12 and "taken as path 'run_id'" in text
    assert set(task.model_configs[next(iter(task))]["hparams"]) == {"width", "augment"}


def test_what_may_be_two_things_is_refused_with_the_way_out(rows):
    with pytest.raises(ZooFormatError, match=r"'train_accuracy' and 'final_train_acc' may both"):
        changed = [
            {k.replace("train_acc", "train_accuracy"): v for k, v in r.items()} for r in rows
        ]
        opened([{**r, "final_train_acc": 1.0} for r in changed])
    with pytest.raises(ZooFormatError, match=r"no column is test_acc.*--column test_acc=NAME"):
        opened([{k.replace("test_acc", "val_acc"): v for k, v in r.items()} for r in rows])
    named = [{k.replace("test_acc", "val_acc"): v for k, v in r.items()} for r in rows]
    assert opened(named, columns={"test_acc": "val_acc"})["net 1"].metrics["test_acc"] == 0.89
    with pytest.raises(ZooFormatError, match=r"'test_acc': expected numbers .* found \['90%'"):
        opened([{**row, "test_acc": "90%"} for row in rows])
    with pytest.raises(ZooFormatError, match=r"config, summary have dicts: pandas\.json_normalize"):
        opened([{"name": r["path"], "config": "{'lr': 1}", "summary": "{'a': 1}"} for r in rows])
    with pytest.raises(ArgumentError, match="no column 'depth'"):
        opened(rows, hyperparameters=["depth"])
    with pytest.raises(ZooFormatError, match="'file' and 'checkpoint' may both be path"):
        opened(
            [
                {**{k: v for k, v in r.items() if k != "path"}, "file": "a", "checkpoint": "b"}
                for r in rows
            ]
        )
    with pytest.raises(ZooFormatError, match=r"values from 0\.5 to 90"):
        mixed = [{**r, "test_acc": 0.5 if k else 90.0} for k, r in enumerate(rows)]
        opened(mixed)
    with pytest.raises(ArgumentError, match=r"needs table= \(--table\) as well"):
        sk.load_zoo("my runs/*.pt", build=build)
    with pytest.raises(ArgumentError, match=r"needs table= \(--table\) as well"):
        sk.load_zoo("my runs/*.pt")
    with pytest.raises(ZooFormatError, match="no such file"):
        opened(rows, "elsewhere/*.pt")


def test_named_columns_are_taken_and_nothing_is_told(rows):
    columns = {"path": "path", "train_acc": "train_acc", "test_acc": "test_acc"}
    task, text = told(rows, columns=columns, hyperparameters=["width"])
    assert text == "" and set(task.model_configs["net 0"]["hparams"]) == {"width"}


def test_losses_are_the_gap_where_there_are_no_accuracies(rows):
    losses = [
        {"path": r["path"], "width": r["width"], "train_loss": 0.1, "test_loss": 0.2 + k}
        for k, r in enumerate(rows)
    ]
    scores = sk.score_zoo(opened(losses), sk.MSharpness(m=1, rho=0.1), n=8, progress=False)
    assert sk.evaluate(scores, resamples=10)["models"].item() == 12


def test_weights_before_training(rows, tmp_path):
    (tmp_path / "start").mkdir()
    for k, row in enumerate(rows):
        torch.save(network(100 + k, row["width"]).state_dict(), tmp_path / "start" / f"{k}.pt")
        row["initial"] = f"start/{k}.pt"
    distance = sk.measures.make_measure("distance_from_initial")
    frame = sk.score_zoo(opened(rows), distance, progress=False).frame()
    found = frame[frame["form"] == "euclidean"].set_index("model")["value"]
    one, other = (
        torch.cat([p.detach().double().flatten() for p in network(i, 8).parameters()])
        for i in (5, 105)
    )
    assert found["net 5"] == pytest.approx(float((one - other).norm()), rel=1e-6)
    bare = [{k: v for k, v in r.items() if k != "initial"} for r in rows]
    with pytest.raises(ZooFormatError, match="names no file of the weights before training"):
        opened(bare)["net 5"].load("initial")


def test_what_has_changed_is_scored_again(rows, tmp_path):
    def values(rows, **options):
        scores = sk.score_zoo(
            opened(rows, **options),
            sk.MSharpness(m=1, rho=0.1),
            out=tmp_path / "run",
            progress=False,
        )
        found = scores.frame().set_index("model")["value"].sort_index()
        scores.close()
        return found

    before = values(rows)
    torch.save(network(99, 4).state_dict(), tmp_path / "my runs" / "net 0.pt")
    after = values(rows)
    assert after["net 0"] != before["net 0"] and after[1:].equals(before[1:])
    other = values(rows, data=(DATA[1], DATA[0]))  # in no file: known by the examples
    assert (other != after).all()

    def scaled(width, seed):
        return nn.Sequential(build(width), nn.Identity() if seed else nn.Softmax(1))

    # the files fit only `build`; what they are scored as follows the builder
    for row in rows:
        state = network(1, row["width"]).state_dict()
        torch.save({f"0.{k}": v for k, v in state.items()}, tmp_path / row["path"])
    first = values(rows, build=scaled)
    changed = [{**row, "seed": 1 - row["seed"] if row["seed"] < 2 else row["seed"]} for row in rows]
    second = values(changed, build=scaled)
    assert [first[f"net {i}"] != second[f"net {i}"] for i in range(4)] == [True, True, False, False]


def test_tables_with_other_commas_and_damaged_ones(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("path;lr\na.pt;0.1\nb.pt;0.2\n", encoding="utf-8-sig")
    assert read_table(path).columns == ("path", "lr")
    for text, message in (
        ("path,lr\na,b.pt,0.1\n", "line 2: has 3 cells, expected 2"),
        ("path,path\na,b\n", "two columns are called 'path'"),
        ("path,lr\n", "a row for each model"),
        ('path,lr\n"a,1\n', "expected a table as CSV"),
    ):
        path.write_text(text)
        with pytest.raises(ZooFormatError, match=message):
            read_table(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ZooFormatError, match="in UTF-8"):
        read_table(path)
    with pytest.raises(ZooFormatError, match="file is missing"):
        read_table(tmp_path / "gone.csv")


def test_a_number_that_is_chosen_is_no_result():
    table = read_table(pd.DataFrame([
        {"path": f"{k}.pt", "stop_at_loss": 0.1 * k, "label_smoothing": 0.1 * k, "test_error": 0.2,
         "train_acc": 1, "test_acc": 0.5, "epoch": k, "hours": 3 * k} for k in range(4)
    ]))  # fmt: skip
    found = read_columns(table, "path")
    assert list(found.hyperparameters) == ["stop_at_loss", "label_smoothing", "epoch", "hours"]
    assert list(found.metrics) == ["train_acc", "test_acc", "test_error"]
