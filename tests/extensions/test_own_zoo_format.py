"""A zoo in a format of one's own: scored and rated without a line in the package."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import sharpkit as sk
from sharpkit.errors import ArgumentError
from sharpkit.zoo import Zoo
from sharpkit.zoo.grid import model_configs


# a folder with data.pt, models.json and <id>.pt: all that sharpkit needs to know of it
@dataclass(frozen=True)
class Entry:
    path: Path
    width: int
    metrics: dict

    def files(self, weights="final"):
        return [self.path]

    def load(self, weights="final"):
        network = nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, 2))
        network.load_state_dict(torch.load(self.path)[weights])
        return network.eval()


class FolderTask(dict):
    mirror = None

    def __init__(self, path):
        known = json.loads((path / "models.json").read_text())
        self.name, self.location, self.path = path.name, str(path), path
        metrics = {id_: model["metrics"] for id_, model in known.items()}
        self.model_configs = model_configs({i: known[i]["setting"] for i in known}, metrics)
        for id_, model in known.items():
            self[id_] = Entry(path / f"{id_}.pt", model["setting"]["width"], metrics[id_])

    def files(self, split="train"):
        return [self.path / "data.pt"]

    def dataset(self, split="train"):
        return TensorDataset(*torch.load(self.path / "data.pt")[split])


# -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    path, known = tmp_path / "mine", {}
    path.mkdir()
    x, y = torch.randn(40, 4), torch.arange(40) % 2
    torch.save({"train": (x[:24], y[:24]), "test": (x[24:], y[24:])}, path / "data.pt")
    for i, (width, seed) in enumerate(itertools.product((4, 8, 16), (0, 1, 2))):
        layers = [nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)) for _ in "ab"]
        states = dict(zip(("initial", "final"), (n.state_dict() for n in layers), strict=True))
        torch.save(states, path / f"net{i}.pt")
        metrics = {"train_acc": 1.0, "test_acc": 0.9 - 0.01 * i}
        known[f"net{i}"] = {"setting": {"width": width, "seed": seed}, "metrics": metrics}
    (path / "models.json").write_text(json.dumps(known))
    return path


def test_what_it_holds_is_listed_and_what_is_broken_is_told(folder):
    zoo = Zoo(folder, [FolderTask(folder)])
    table = sk.zoo_info(zoo, deep=True)
    assert list(table["model"]) == [f"net{i}" for i in range(9)] and set(table["problem"]) == {""}
    assert list(table["layers"]) == [2] * 9
    assert list(table["parameters"][::3]) == [4 * w + w + 2 * w + 2 for w in (4, 8, 16)]
    assert table["generalization_gap"].tolist() == pytest.approx([0.1 + 0.01 * i for i in range(9)])
    (folder / "net4.pt").write_bytes(b"broken")
    zoo[folder.name].model_configs["net9"] = zoo[folder.name].model_configs["net8"]
    table = sk.zoo_info(zoo)
    assert list(table["model"][table["problem"] != ""].fillna("")) == ["", "net4"]
    assert table["problem"][0] == "model net9 is listed but absent"


def test_only_the_layout_of_the_competition_is_copied(folder, tmp_path):
    with pytest.raises(ArgumentError, match="task mine is a FolderTask, expected a PgdlTask"):
        sk.write_zoo(Zoo(folder, [FolderTask(folder)]), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def score(folder, **options):
    distance = sk.measures.make_measure("distance_from_initial")
    measures = [sk.MSharpness(m=[1, 8], rho=0.05), distance]
    return sk.score_zoo(FolderTask(folder), measures, n=16, progress=False, **options)


def euclidean(scores):
    frame = scores.frame()
    return frame[frame["form"] == "euclidean"].set_index("model")["value"]


def distance(path):
    final, initial = (torch.load(path)[weights] for weights in ("final", "initial"))
    return (
        sum(float((final[k].double() - initial[k].double()).square().sum()) for k in final) ** 0.5
    )


def test_it_is_scored_and_rated(folder, tmp_path):
    scores = score(folder, out=tmp_path / "run", test_metrics=True)
    assert scores.failures.empty and len(scores.frame()) == 9 * 6
    gaps = [0.1 + 0.01 * i for i in range(9)]
    assert scores.metrics()["generalization_gap"].tolist() == pytest.approx(gaps)
    assert scores.metrics()["test_ece"].notna().all()
    table = sk.evaluate(scores, resamples=20)
    assert len(table) == 6 and table["kendall_tau"].notna().all()


def test_the_weights_are_those_of_the_files(folder):
    for id_, found in euclidean(score(folder)).items():
        assert found == pytest.approx(distance(folder / f"{id_}.pt"), rel=1e-6)


def test_workers_give_the_same_values(folder):
    alone, two = (
        score(folder, workers=workers).frame().sort_values(["model", "measure", "form", "m"])
        for workers in (1, 2)
    )
    assert alone.reset_index(drop=True).equals(two.reset_index(drop=True))


def test_a_model_whose_file_has_changed_is_scored_again(folder, tmp_path):
    before = euclidean(score(folder, out=tmp_path / "run"))
    path = folder / "net3.pt"
    states = torch.load(path)
    states["final"] = {name: 2 * tensor for name, tensor in states["final"].items()}
    torch.save(states, path)
    after = euclidean(score(folder, out=tmp_path / "run"))
    assert after["net3"] == pytest.approx(distance(path), rel=1e-6)
    assert after["net3"] != before["net3"]
    assert after.drop("net3").sort_index().equals(before.drop("net3").sort_index())
