"""The zoo inside the package is what its metrics say, and unpacking it is safe."""

import hashlib
import io
import lzma
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import sharpkit
from sharpkit.errors import ZooFormatError
from sharpkit.zoo import load_zoo
from sharpkit.zoo.embedded import ARCHIVE_NAME, _unpacked, embedded_zoo, pack_zoo
from sharpkit.zoo_training.grid_file import read_plan
from sharpkit.zoo_training.model import train_model
from sharpkit.zoo_training.recipe import Recipe

PLAN = read_plan("mini")
ARCHIVE = Path(sharpkit.__file__).parent / "data" / ARCHIVE_NAME


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARPKIT_CACHE", str(cache))
        return embedded_zoo()[PLAN.task]


def test_the_archive_fits_the_wheel():
    assert ARCHIVE.stat().st_size <= 10e6


def test_the_grid_is_complete(task):
    assert task.check() == []
    assert task.possible_values == {name: list(v) for name, v in PLAN.grid.items()}
    assert len(task) == np.prod([len(values) for values in PLAN.grid.values()])


def test_recorded_accuracies_and_losses_are_those_of_the_models(task):
    x, y = task.dataset("train").tensors
    test_x, test_y = task.dataset("test").tensors
    assert torch.bincount(y).tolist() == [200] * 10
    assert len(test_y) == 2000
    for entry in task.values():
        model = entry.load()
        with torch.no_grad():
            logits, test_logits = model(x), model(test_x)
        metrics = entry.metrics
        # another processor may decide a tie differently
        assert metrics["train_acc"] == pytest.approx(accuracy(logits, y), abs=1e-3)
        assert metrics["shipped_test_acc"] == pytest.approx(accuracy(test_logits, test_y), abs=1e-3)
        loss = torch.nn.functional.cross_entropy(logits.double(), y).item()
        assert metrics["train_loss"] == pytest.approx(loss, rel=1e-4)
        # 2,000 of the 10,000 images that test_acc counts: within 4 standard errors
        assert metrics["test_acc"] == pytest.approx(metrics["shipped_test_acc"], abs=0.04)


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def test_every_model_reached_the_same_training_loss(task):
    losses = [entry.metrics["train_loss"] for entry in task.values()]
    assert 0 < min(losses) <= max(losses) <= Recipe().stop_at_loss


def test_gaps_spread_at_least_three_sampling_errors(task):
    gaps = np.array([entry.generalization_gap for entry in task.values()])
    p = np.mean([entry.metrics["test_acc"] for entry in task.values()])
    assert gaps.std(ddof=1) >= 3 * np.sqrt(p * (1 - p) / 10_000)


def test_initial_weights_are_those_that_the_seed_gives(task):
    train, test = task.dataset("train"), task.dataset("test")
    for entry in list(task.values())[:: len(task) // 4]:
        recipe = Recipe(**entry.hyperparameters, stop_at_loss=1e9)  # one epoch
        model = train_model(recipe, train, test, seed=(PLAN.seed, int(entry.id)))
        assert model.config == entry.config
        for name, stored in entry.load("initial").state_dict().items():
            assert np.array_equal(model.initial[name], stored.numpy())


def test_unpacking_leaves_one_folder_named_after_the_content(task, cache, monkeypatch):
    digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    assert [p.name for p in cache.iterdir()] == [f"embedded_zoo-{digest}"]
    monkeypatch.setenv("SHARPKIT_CACHE", str(cache))
    monkeypatch.setattr("tarfile.open", None)  # the second call does not unpack
    assert list(embedded_zoo()[PLAN.task]) == list(task)


@pytest.fixture
def small_archive(zoo_path, tmp_path):
    return pack_zoo(zoo_path, tmp_path / "small.tar.xz")


def test_a_packed_zoo_unpacks_to_the_same_files(zoo_path, small_archive, tmp_path):
    (zoo_path / "training").mkdir()
    (zoo_path / "training" / "tiny.json").write_text("{}")
    again = pack_zoo(zoo_path, tmp_path / "again.tar.xz")
    assert again.read_bytes() == small_archive.read_bytes()
    target = _unpacked(small_archive, tmp_path / "cache")
    unpacked = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    packed = {p.relative_to(zoo_path): p.read_bytes() for p in zoo_path.rglob("*") if p.is_file()}
    del packed[Path("training", "tiny.json")]
    assert unpacked == packed
    assert len(load_zoo(target)["tiny"]) == 4


def test_processes_that_race_get_the_same_whole_folder(small_archive, tmp_path):
    cache = tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        targets = pool.starmap(_unpacked, [(small_archive, cache)] * 8)
    assert len(set(targets)) == 1
    assert list(cache.iterdir()) == [targets[0]]
    assert len(load_zoo(targets[0])["tiny"]) == 4


def test_a_damaged_or_missing_archive_leaves_nothing(small_archive, tmp_path):
    cache = tmp_path / "cache"
    content = bytearray(small_archive.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), small_archive.read_bytes()[:-200], b"no archive"):
        small_archive.write_bytes(damaged)
        with pytest.raises(ZooFormatError, match=r"small\.tar\.xz: expected an undamaged archive"):
            _unpacked(small_archive, cache)
        assert not list(cache.iterdir())
    with pytest.raises(ZooFormatError, match="cannot be read"):
        _unpacked(tmp_path / "absent", cache)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_an_archive_cannot_write_outside(tmp_path, kind):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        name = {"parent": "a/../../evil", "absolute": str(tmp_path / "evil"), "link": "evil"}[kind]
        member = tarfile.TarInfo(name)
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(member, io.BytesIO())
    archive = tmp_path / "evil.tar.xz"
    archive.write_bytes(lzma.compress(content.getvalue()))
    with pytest.raises(ZooFormatError, match="unexpected member"):
        _unpacked(archive, tmp_path / "cache")
    assert {p.name for p in tmp_path.rglob("*")} == {"evil.tar.xz", "cache"}


def test_a_cache_that_cannot_be_written_is_named(small_archive, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooFormatError, match=r"file.*: cannot unpack the embedded zoo"):
        _unpacked(small_archive, tmp_path / "file")


def test_packing_needs_a_zoo(tmp_path):
    with pytest.raises(ZooFormatError, match="no input_data"):
        pack_zoo(tmp_path, tmp_path / "out.tar.xz")
