"""Files are written whole or not at all, and their names reach the disk."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pandas as pd
import pytest

from sharpkit.data.idx import read_idx
from sharpkit.data.images import read_image_tree
from sharpkit.data.matlab import read_matlab
from sharpkit.digests import digest_of_files
from sharpkit.doors import read_toml
from sharpkit.errors import ArgumentError, DataError, ModelError, RunError, ZooFormatError
from sharpkit.evaluation.legend import write_with_legend
from sharpkit.files import atomic_path, disk_errors, read_regular, write_csv
from sharpkit.plot.canvas import new_figure, save
from sharpkit.run_directory import read_claim, sole_driver
from sharpkit.runs.checkpoints import load_arrays
from sharpkit.runs.scores import write_scores
from sharpkit.runs.trained import load_trained
from sharpkit.tensor_files import read_safetensors, read_torch
from sharpkit.zoo.files import read_json
from sharpkit.zoo.folder.table import read_table
from sharpkit.zoo.shards.tfrecord import _count_records, read_shards
from sharpkit.zoo.small_cnn_zoo.files import open_weights, read_layout, read_metrics
from sharpkit.zoo.stacked.file import read_stack

TABLE = pd.DataFrame({"task": ["=cmd|' /C calc'!A0", "t\x1b[2J"], "value": [-0.5, 1.0]})


def test_content_and_name_reach_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recording(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(("folder" if folder else "file", (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("content")
    assert synced == [("file", False), ("folder", True)]


def test_a_disk_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("content")
    assert (tmp_path / "a").read_text() == "content"


def save_picture(table, path):
    save(new_figure(1, 1), path.with_suffix(".png"), table)


WRITERS = {
    "write_csv": write_csv,
    "write_scores": lambda table, path: write_scores(table, path.parent),
    "write_with_legend": write_with_legend,
    "save": save_picture,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch, writer):
    path = tmp_path / "scores.csv"
    WRITERS[writer](TABLE, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(self, file, **options):
        file.write_text("task,val")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises((OSError, RunError), match="No space left"):
        WRITERS[writer](TABLE.assign(value=7.0), path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) == set(before)
    assert after["scores.csv"] == before["scores.csv"]


@pytest.mark.parametrize("writer", WRITERS)
def test_text_of_a_table_does_nothing_in_a_spreadsheet(tmp_path, writer):
    path = tmp_path / "scores.csv"
    WRITERS[writer](TABLE, path)
    content = path.read_text()
    assert "\x1b" not in content
    read = pd.read_csv(path)
    assert read["task"].tolist() == ["'=cmd|' /C calc'!A0", "t\\x1b[2J"]
    assert read["value"].tolist() == [-0.5, 1.0]


def test_columns_that_are_no_text_are_as_pandas_writes_them(tmp_path):
    table = pd.DataFrame(
        {
            "whole": pd.array([1, None], "Int64"),
            "mixed": pd.Series([None, 4], dtype=object),
            "x": [0.1, float("nan")],
            "flag": [True, False],
            "kind": pd.Categorical(["a", "b"]),
        },
        index=[3, 3],
    )
    write_csv(table, tmp_path / "a.csv", digits="%.6g")
    assert (tmp_path / "a.csv").read_text() == table.to_csv(index=False, float_format="%.6g")


def test_a_full_disk_is_the_projects_error(tmp_path):
    with (
        pytest.raises(RunError, match=r"here: cannot be written \(No space left on device\)"),
        disk_errors(tmp_path / "here"),
    ):
        raise OSError(28, "No space left on device")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def hole(path):
    path.touch()
    os.truncate(path, 2**40)


READERS = {
    "read_regular": (read_regular, OSError),
    "read_json": (read_json, ZooFormatError),
    "read_shards": (lambda path: read_shards([path]), ZooFormatError),
    "read_idx": (read_idx, DataError),
    "read_toml": (lambda path: read_toml(path, ArgumentError), ArgumentError),
    "read_claim": (read_claim, RunError),
    "read_matlab": (lambda path: read_matlab(path, ["X"], DataError), DataError),
    "read_torch": (lambda path: read_torch(path, str(path), ModelError), ModelError),
    "read_safetensors": (lambda path: read_safetensors(path, str(path), ModelError), ModelError),
    "read_stack": (read_stack, ZooFormatError),
    "load_arrays": (load_arrays, DataError),
    "read_table": (read_table, ZooFormatError),
    "read_image_tree": (read_image_tree, DataError),
    "read_layout": (read_layout, ZooFormatError),
    "read_metrics": (read_metrics, ZooFormatError),
    "open_weights": (lambda path: open_weights(path, 1, 1), ZooFormatError),
    "load_trained": (lambda path: load_trained(path.with_name("model.safetensors")), RunError),
}


@pytest.mark.parametrize("make", [pipe, device, hole], ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", READERS)
def test_what_would_block_or_never_end_is_not_read(tmp_path, reader, make):
    path = tmp_path / "config.json"
    make(path)
    read, error = READERS[reader]
    with pytest.raises(error, match=r"not a regular file|has 1,099,511,627,776 bytes; at most"):
        read(path)
    assert digest_of_files([path]) == ""  # as of a file that cannot be read


def test_a_hole_in_a_shard_is_not_counted_record_by_record(tmp_path):
    path = tmp_path / "shard_0.tfrecord"
    path.touch()
    os.truncate(path, 2**27)  # 8 million records of no byte
    with pytest.raises(ZooFormatError, match="record 0"):
        read_shards([path])
    assert _count_records(path) == (1, 0)


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_nothing_else(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from sharpkit.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1], 'scores.csv')) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    kept = [tmp_path / ".notes.tmp", tmp_path / "a.tmp", tmp_path / "b.csv"]
    for path in kept:
        path.touch()
    with atomic_path(tmp_path / "evaluation.csv") as written_now:
        written_now.touch()
        with sole_driver(tmp_path):
            there = {path for path in tmp_path.iterdir() if path.name != ".lock"}
            assert there == {*kept, written_now}
