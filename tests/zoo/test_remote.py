"""A zoo behind a URL: what the local zoo gives, and no file that is half, old or misplaced."""

from __future__ import annotations

import base64
import functools
import hashlib
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

import sharpkit as sk
from sharpkit.cli import main
from sharpkit.errors import ArgumentError, DownloadError, ZooFormatError
from sharpkit.workers import run_items
from sharpkit.zoo import remote

MEASURE = sk.MSharpness(m=[1, 2], rho=0.1)


class Server(MemoryFileSystem):
    """Does what its class attributes say when a file is copied from it or listed."""

    protocol = "server"
    store = {}  # noqa: RUF012  (as in the class above: one for all)
    pseudo_dirs = [""]  # noqa: RUF012
    cuts = []  # noqa: RUF012  per coming copy, the bytes after which it ends; None: all
    surplus = b""
    told = {}  # noqa: RUF012  further fields of every file
    before_copy = staticmethod(lambda path: None)
    listing = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("server://", "memory://"))

    def get_file(self, rpath, lpath, callback=None, **_):
        type(self).before_copy(rpath)
        content = self.cat_file(rpath)
        end = self.cuts.pop(0) if self.cuts else None
        Path(lpath).write_bytes(content[:end] + self.surplus)
        callback.relative_update(Path(lpath).stat().st_size)

    def info(self, path, **kwargs):
        return super().info(path, **kwargs) | self.told

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        if self.listing is not None:
            return {name: {"name": name, "size": 1, "type": "file"} for name in self.listing}
        return super().find(path, maxdepth, withdirs, detail, **kwargs)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARPKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def server(zoo_path, monkeypatch):
    fsspec.register_implementation("server", Server, clobber=True)
    for name, value in (("cuts", []), ("surplus", b""), ("told", {}), ("listing", None)):
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(Server, "before_copy", staticmethod(lambda path: None))
    monkeypatch.setattr(Server, "store", {})
    monkeypatch.setattr(Server, "pseudo_dirs", [""])
    Server().put(str(zoo_path), "/zoo", recursive=True)
    return Server()


def in_memory(zoo_path):
    name = f"zoo-{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(zoo_path), f"/{name}", recursive=True)
    return f"memory://{name}"


def in_folder(zoo_path):
    """Not this machine's files for load_zoo, and there for other processes as well."""
    return f"dir://{zoo_path.name}::file://{zoo_path.parent}"


def in_archive(zoo_path):
    archive = shutil.make_archive(
        str(zoo_path.with_name("packed")), "zip", zoo_path.parent, zoo_path.name
    )
    return f"zip://{zoo_path.name}::file://{archive}"


def copied(cache):
    """The files here, by their paths in the zoo."""
    files = (cache / "remote").glob("*/files/**/*")
    return sorted(p.as_posix().partition("/files/")[2] for p in files if p.is_file())


@pytest.mark.parametrize("place", [in_memory, in_folder, in_archive])
def test_a_remote_zoo_is_the_local_one_bit_for_bit(zoo_path, place):
    here, there = sk.load_zoo(zoo_path)["tiny"], sk.load_zoo(place(zoo_path))["tiny"]
    assert list(there) == list(here)
    assert there.model_configs == here.model_configs
    for split in ("train", "test"):
        pairs = zip(there.dataset(split).tensors, here.dataset(split).tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for id_ in here:
        assert there[id_].config == here[id_].config
        for weights in ("final", "initial"):
            mine, theirs = here[id_].load(weights), there[id_].load(weights)
            pairs = zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    tables = [sk.score_zoo(task, MEASURE, n=8, progress=False).frame() for task in (here, there)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_only_what_is_used_is_copied(zoo_path, cache):
    url = in_memory(zoo_path)
    top = url.removeprefix("memory://")
    task = sk.load_zoo(url)["tiny"]
    seen = {f"{top}/reference_data/tiny/model_configs.json"}
    assert set(copied(cache)) == seen
    table = sk.zoo_info(url)
    assert (table["problem"] == "").all()
    configs = {f"{top}/input_data/tiny/model_{i}/config.json" for i in task}
    assert set(copied(cache)) == seen | configs
    task["10"].load()
    weights = {f"{top}/input_data/tiny/model_10/weights.hdf5"}
    assert set(copied(cache)) == seen | configs | weights
    task.dataset("train")
    folder = zoo_path / "input_data" / "tiny" / "dataset_1" / "train"
    shards = {f"{top}/input_data/tiny/dataset_1/train/{p.name}" for p in folder.iterdir()}
    assert set(copied(cache)) == seen | configs | weights | shards


def test_a_copy_is_used_again_without_a_download(zoo_path, monkeypatch):
    url = in_memory(zoo_path)
    before = sk.load_zoo(url)["tiny"]["10"].load().state_dict()

    def refuse(*_):
        raise AssertionError("it is here already")

    monkeypatch.setattr(remote, "download", refuse)
    after = sk.load_zoo(url)["tiny"]["10"].load().state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_changed_file_is_noticed_at_the_next_opening(zoo_path, cache):
    url = in_folder(zoo_path)
    old = sk.load_zoo(url)["tiny"]["10"].load("final").state_dict()
    folder = zoo_path / "input_data" / "tiny" / "model_10"
    shutil.copy(folder / "weights_init.hdf5", folder / "weights.hdf5")  # of the same size
    new = sk.load_zoo(url)["tiny"]["10"].load("final").state_dict()
    initial = sk.load_zoo(zoo_path)["tiny"]["10"].load("initial").state_dict()
    assert all(torch.equal(new[k], initial[k]) for k in new)
    assert not all(torch.equal(new[k], old[k]) for k in new)


def test_a_copy_that_someone_edited_is_made_again(zoo_path, cache):
    url = in_folder(zoo_path)
    before = sk.load_zoo(url)["tiny"]["10"].load().state_dict()
    (copy,) = (cache / "remote").glob("*/files/**/model_10/weights.hdf5")
    content = bytearray(copy.read_bytes())
    content[-1] ^= 255
    copy.write_bytes(content)
    after = sk.load_zoo(url)["tiny"]["10"].load().state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_what_the_server_lacks_goes_at_the_next_opening(zoo_path, cache):
    url = in_folder(zoo_path)
    task = sk.load_zoo(url)["tiny"]
    task["10"].load()
    shutil.rmtree(zoo_path / "input_data" / "tiny" / "model_10")
    shutil.rmtree(zoo_path / "input_data" / "tiny" / "model_2")
    with pytest.raises(ZooFormatError, match=r"dir://zoo/.*model_2/config.json.*missing"):
        task["2"].load()
    with pytest.warns(UserWarning, match="absent: 2, 10|absent: 10, 2"):
        assert list(sk.load_zoo(url)["tiny"]) == ["1", "33"]
    assert not any("model_10" in name for name in copied(cache))


def test_one_task_finds_its_model_configs_above_it(zoo_path):
    zoo = sk.load_zoo(f"dir://zoo/input_data/tiny::file://{zoo_path.parent}")
    assert list(zoo) == ["tiny"]
    assert zoo["tiny"].model_configs == sk.load_zoo(zoo_path)["tiny"].model_configs
    assert zoo["tiny"].location == f"dir://zoo/input_data/tiny::file://{zoo_path.parent}"


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(zoo_path, cache, tmp_path):
    url = in_folder(zoo_path)
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fsspec.implementations.dirfs import DirFileSystem\n"
        "import sharpkit as sk\n\n"
        "entry = sk.load_zoo(sys.argv[1])['tiny']['10']\n"
        "entry.config\n"
        "def half(self, rpath, lpath, **_):\n"
        "    content = self.cat_file(rpath)\n"
        "    Path(lpath).write_bytes(content[: len(content) // 2])\n"
        "    print('half', flush=True)\n"
        "    time.sleep(100_000)\n"
        "DirFileSystem.get_file = half\n"
        "entry.load()\n"
    )
    with subprocess.Popen([sys.executable, str(script), url], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert not any("weights" in name for name in copied(cache))
    there, here = (sk.load_zoo(z)["tiny"]["10"].load().state_dict() for z in (url, zoo_path))
    assert all(torch.equal(here[k], there[k]) for k in here)


def weights_of(server, id_="10"):
    return server.cat_file(f"/zoo/input_data/tiny/model_{id_}/weights.hdf5")


def fetched(entry):
    return entry.task.local(entry.weights_path()).read_bytes()


def test_a_broken_connection_is_tried_again(server):
    entry = sk.load_zoo("server://zoo")["tiny"]["10"]
    Server.cuts += [100, 0]
    assert fetched(entry) == weights_of(server)


def test_a_file_that_stays_broken_is_refused_with_the_numbers(server, cache):
    entry = sk.load_zoo("server://zoo")["tiny"]["10"]
    size = len(weights_of(server))
    Server.cuts += [100] * 3
    with pytest.raises(DownloadError, match=rf"weights.hdf5: .*got 100 of {size:,} bytes"):
        fetched(entry)
    Server.surplus = b"more"
    with pytest.raises(DownloadError, match=rf"more than the {size:,} bytes"):
        fetched(entry)
    assert not any("weights" in name for name in copied(cache))


def test_checksums_that_the_server_tells_are_checked(server):
    entry = sk.load_zoo("server://zoo")["tiny"]["10"]
    digest = hashlib.md5(weights_of(server)).digest()
    Server.told = {"md5Hash": base64.b64encode(digest[::-1]).decode()}
    with pytest.raises(DownloadError, match=rf"md5 is {digest.hex()}, the server told"):
        fetched(entry)
    Server.told = {"md5Hash": base64.b64encode(digest).decode()}
    assert fetched(entry) == weights_of(server)


def test_a_file_that_changes_while_it_is_copied_is_copied_again(server):
    entry = sk.load_zoo("server://zoo")["tiny"]["10"]
    newer = weights_of(server)[::-1]
    changes = [newer]

    def change_after_reading(path):
        if changes:
            server.pipe_file(path, changes.pop())

    original = server.cat_file

    def read_then_change(self, path):
        content = original(path)
        if path.endswith("weights.hdf5"):
            change_after_reading(path)
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "cat_file", read_then_change)
        assert fetched(entry) == newer


def test_a_server_that_tells_no_size_is_refused(server):
    entry = sk.load_zoo("server://zoo")["tiny"]["10"]
    Server.told = {"size": None}
    with pytest.raises(DownloadError, match="does not tell its size"):
        fetched(entry)


@pytest.mark.parametrize(
    "name",
    [
        "/zoo/../../outside",
        "/zoo/input_data/../../../outside",
        "/zoo/..",
        "/zoo/./x",
        "/zoo/a//outside",
        "/zoo/..\\outside",
        "/zoo/nul\0byte",
    ],
)
def test_names_that_leave_the_folder_are_refused(server, cache, name):
    Server.listing = ["/zoo/input_data/tiny/model_1/config.json", name]
    with pytest.raises(ZooFormatError, match="no path below a folder"):
        sk.load_zoo("server://zoo")
    assert not cache.exists()


def test_names_beside_the_folder_are_left_alone(server, cache):
    names = ["/zoo/input_data/tiny/model_1/config.json", "/zoo", "/zoo/", "/zoology/x", "/etc/x"]
    Server.listing = names
    mirror = remote.Mirror("server://zoo")
    assert mirror.children(mirror.path) == [mirror.path / "input_data"]
    assert not list(cache.rglob("etc")) + list(cache.rglob("zoology"))


def test_a_url_cannot_leave_the_cache_either(server):
    with pytest.raises(ZooFormatError, match="no path below a folder"):
        remote.Mirror("server://zoo/../../outside")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # an import of it fails
    with pytest.raises(ArgumentError, match=r"s3://.*s3fs.*sharpkit\[remote\]") as caught:
        sk.load_zoo("s3://key:secret@bucket/zoo")
    assert "secret" not in str(caught.value)


def test_an_unknown_protocol_and_an_empty_place_are_refused():
    with pytest.raises(ArgumentError, match="nowhere"):
        sk.load_zoo("nowhere://zoo")
    with pytest.raises(ZooFormatError, match="memory://no-such-zoo: nothing there"):
        sk.load_zoo("memory://no-such-zoo")


def test_a_cache_that_cannot_be_written_is_told(zoo_path, cache):
    cache.write_text("a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        sk.load_zoo(in_memory(zoo_path))


def test_a_local_url_is_read_in_place(zoo_path, cache):
    assert sk.load_zoo(f"file://{zoo_path}")["tiny"].path == zoo_path / "input_data" / "tiny"
    assert not cache.exists()


def test_worker_processes_share_the_copies(zoo_path):
    here = sk.score_zoo(
        sk.load_zoo(zoo_path), MEASURE, n=8, workers=sk.Workers(threads=1), progress=False
    )
    there = sk.score_zoo(
        sk.load_zoo(in_folder(zoo_path)),
        MEASURE,
        n=8,
        workers=2,
        progress=False,
    )
    assert there.failures.empty
    pd.testing.assert_frame_equal(here.frame(), there.frame(), check_exact=True)


def test_processes_that_want_the_same_file_get_it_whole(zoo_path):
    entry = sk.load_zoo(in_folder(zoo_path))["tiny"]["10"]

    def digest(item, device):
        return hashlib.sha256(fetched(entry)).hexdigest()

    results = dict(run_items(digest, range(6), 3))
    content = (zoo_path / "input_data" / "tiny" / "model_10" / "weights.hdf5").read_bytes()
    assert results == dict.fromkeys(range(6), hashlib.sha256(content).hexdigest())


def seconds_of(scores):
    table = scores.provenance()
    return dict(zip(table["model"], table["seconds"], strict=True))


def test_a_finished_run_resumes_without_copies_and_rescores_what_changed(zoo_path, cache, tmp_path):
    url = in_folder(zoo_path)
    arguments = {"out": tmp_path / "run", "n": 8, "progress": False}
    sk.score_zoo(sk.load_zoo(url), MEASURE, **arguments).close()
    shutil.rmtree(cache)
    again = sk.score_zoo(sk.load_zoo(url), MEASURE, **arguments)
    assert again.config["tasks"] == {"tiny": sk.load_zoo(url)["tiny"].location}
    seconds = seconds_of(again)
    again.close()
    assert [name.rpartition("/")[2] for name in copied(cache)] == ["model_configs.json"]
    folder = zoo_path / "input_data" / "tiny" / "model_10"
    shutil.copy(folder / "weights_init.hdf5", folder / "weights.hdf5")
    changed = sk.score_zoo(sk.load_zoo(url), MEASURE, **arguments)
    new = {model for model, s in seconds_of(changed).items() if s != seconds[model]}
    assert new == {"10"}


def test_the_command_line_takes_urls(zoo_path, tmp_path):
    url = in_folder(zoo_path)
    shown = CliRunner().invoke(main, ["zoo", "info", url])
    assert shown.exit_code == 0, shown.output
    assert "0 with problems" in shown.output
    tables = []
    for name, zoo in (("here", str(zoo_path)), ("there", url)):
        command = ["score", zoo, "--out", str(tmp_path / name), "--m", "1,2", "--n", "8"]
        done = CliRunner().invoke(main, [*command, "--backend", "inline"])
        assert done.exit_code == 0, done.output
        tables.append(pd.read_csv(tmp_path / name / "scores.csv"))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_zoo_on_a_web_server(zoo_path, cache):
    pytest.importorskip("aiohttp", reason="fsspec's http:// needs it: pip install aiohttp")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(zoo_path.parent))
    handler.log_message = lambda *_: None
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{web.server_port}/zoo"
        here, there = sk.load_zoo(zoo_path)["tiny"], sk.load_zoo(url)["tiny"]
        assert not any("weights" in name for name in copied(cache))
        assert list(there) == list(here)
        pairs = zip(there.dataset().tensors, here.dataset().tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        mine, theirs = here["10"].load().state_dict(), there["10"].load().state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
