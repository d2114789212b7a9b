"""Downloads survive a broken connection and a changed file; archives cannot reach outside."""

import io
import stat
import zipfile

import numpy as np
import pytest
from file_server import FileServer

from sharpkit import download
from sharpkit.errors import ArgumentError, DownloadError
from sharpkit.zoo import archive, fetch_zoo, load_zoo


def zipped(members, compression=zipfile.ZIP_STORED):
    """A zip archive of name (or ZipInfo) -> content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for member, content in members.items():
            file.writestr(member, content)
    return buffer.getvalue()


def noise(seed, size=3_000_000):
    return np.random.default_rng(seed).bytes(size)


ARCHIVE = zipped({"public_data/a.bin": noise(0), "public_data/b/c.txt": b"hello"})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(download, "_FIRST_PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with FileServer(ARCHIVE).running() as running:
        yield running


def get(server, folder, **options):
    return fetch_zoo("public", folder, url=server.url, progress=False, **options)


def is_complete(path, seed=0):
    return (path / "a.bin").read_bytes() == noise(seed) and (path / "b" / "c.txt").is_file()


def test_an_archive_is_downloaded_and_unpacked_once(server, tmp_path):
    path = get(server, tmp_path)
    assert path == tmp_path / "public" and is_complete(path)
    assert [p.name for p in tmp_path.iterdir()] == ["public"]
    assert get(server, tmp_path) == path
    assert server.requests == [None]


def test_a_zoo_goes_all_the_way(zoo_path, tmp_path):
    files = [p for p in sorted(zoo_path.rglob("*")) if p.is_file()]
    content = {f"zoo/{p.relative_to(zoo_path)}": p.read_bytes() for p in files}
    content |= {"__MACOSX/zoo/._x": b"", "zoo/.DS_Store": b""}
    with FileServer(zipped(content)).running() as server:
        path = get(server, tmp_path / "target", size=len(server.content))
    assert not list(path.rglob(".DS_Store"))
    assert len(load_zoo(path)["tiny"].dataset("train")) == 10


def test_a_broken_connection_is_continued_within_a_call(server, tmp_path):
    server.breaks = [1_500_000, 300_000, 0, None]
    assert is_complete(get(server, tmp_path))
    assert server.requests[0] is None
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in server.requests[1:]]
    assert len(starts) == 3 and 0 < starts[0] <= starts[1] == starts[2]


def test_a_broken_download_is_continued_by_the_next_call(server, tmp_path):
    server.breaks = [2_000_000] + [0] * 10
    with pytest.raises(DownloadError, match="bytes are kept, run again to continue"):
        get(server, tmp_path)
    kept = (tmp_path / "public.zip.part").stat().st_size
    assert 0 < kept <= 2_000_000
    server.breaks, server.requests = [], []
    assert is_complete(get(server, tmp_path))
    assert server.requests == [f"bytes={kept}-"]


def broken_then_changed(server, tmp_path):
    """Break a download, then put another file of the same size in its place."""
    server.breaks = [2_000_000] + [0] * 10
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    server.content = zipped({"public_data/a.bin": noise(1), "public_data/b/c.txt": b"hello"})
    server.breaks = []


@pytest.mark.parametrize("obeys_if_range", [True, False])
def test_a_changed_file_is_not_spliced(server, tmp_path, obeys_if_range):
    broken_then_changed(server, tmp_path)
    server.etag, server.obeys_if_range = '"two"', obeys_if_range
    assert is_complete(get(server, tmp_path), seed=1)


def test_without_a_validator_nothing_is_spliced(server, tmp_path):
    server.etag = None
    broken_then_changed(server, tmp_path)
    server.requests = []
    assert is_complete(get(server, tmp_path), seed=1)
    assert server.requests == [None]


def test_a_weak_etag_is_no_validator(server, tmp_path):
    server.etag = 'W/"one"'
    broken_then_changed(server, tmp_path)
    assert is_complete(get(server, tmp_path), seed=1)


def test_a_server_without_ranges_is_asked_for_everything_again(server, tmp_path):
    server.ranges = False
    server.breaks = [2_000_000, None]
    assert is_complete(get(server, tmp_path))
    assert len(server.requests) == 2


def test_another_url_does_not_continue_the_first(server, tmp_path):
    server.breaks = [2_000_000] + [0] * 10
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    with FileServer(zipped({"a.bin": noise(2), "b/c.txt": b""})).running() as other:
        assert is_complete(get(other, tmp_path), seed=2)
        assert other.requests == [None]


def test_a_part_longer_than_the_file_starts_over(server, tmp_path):
    server.breaks = [2_000_000] + [0] * 10
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    with (tmp_path / "public.zip.part").open("ab") as file:
        file.write(bytes(5_000_000))
    server.breaks = []
    assert is_complete(get(server, tmp_path))


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.statuses = [503, 429, 500]
    assert is_complete(get(server, tmp_path))


def test_a_refusal_is_final(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(DownloadError, match="server answers 404"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_an_unreachable_server_is_an_error(tmp_path):
    with pytest.raises(DownloadError, match="run again to continue"):
        fetch_zoo("public", tmp_path, url="http://127.0.0.1:9/x.zip", progress=False)


def test_another_size_than_expected_is_refused(server, tmp_path):
    with pytest.raises(DownloadError, match=r"expected 5$"):
        get(server, tmp_path, size=5)


def test_a_full_disk_is_noticed_beforehand(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(DownloadError, match="has 1,000 free"):
        get(server, tmp_path)


def test_a_download_survives_a_full_disk_while_unpacking(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(archive.shutil, "copyfileobj", full)
        with pytest.raises(DownloadError, match="No space left"):
            get(server, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["public.zip"]
    assert is_complete(get(server, tmp_path))
    assert len(server.requests) == 1


def test_a_damaged_archive_is_downloaded_again(server, tmp_path):
    good = server.content
    server.content = good[:1000] + bytes(1000) + good[2000:]
    with pytest.raises(DownloadError, match="damaged"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.content = good
    assert is_complete(get(server, tmp_path))


@pytest.mark.parametrize("content", [b"", b"<html>sign in</html>", ARCHIVE[: len(ARCHIVE) // 2]])
def test_what_is_no_archive_is_refused(tmp_path, content):
    with (
        FileServer(content).running() as server,
        pytest.raises(DownloadError, match="damaged or not a zip archive"),
    ):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


HOSTILE = {
    "leaves the target": {"../evil": b"x"},
    "leaves the target folder": {"good/../../evil": b"x"},
    "absolute": {"/tmp/evil": b"x"},
    "absolute path": {"C:/evil": b"x"},
    "backslash": {"..\\evil": b"x"},
    "link": {link("link"): b"/etc", "link/passwd": b"x"},
    "members state 200,000,004 bytes": {"bomb": bytes(200_000_000)},
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(tmp_path, message):
    members = {"good/first.txt": b"good", **HOSTILE[message]}
    folder = tmp_path / "a" / "b"
    with (
        FileServer(zipped(members, zipfile.ZIP_DEFLATED)).running() as server,
        pytest.raises(DownloadError, match=message),
    ):
        get(server, folder)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert list(folder.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_path_that_comes_twice_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", b"1")
        file.writestr("a", b"2")
    with (
        FileServer(buffer.getvalue()).running() as server,
        pytest.raises(DownloadError, match="twice"),
    ):
        get(server, tmp_path)


def test_a_file_that_is_also_a_folder_is_refused(tmp_path):
    members = {"a": b"1", "a/b": b"2"}
    with FileServer(zipped(members)).running() as server, pytest.raises(DownloadError):
        get(server, tmp_path)
    assert not (tmp_path / "public").exists()


def test_names_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match="expected one of public, phase-one, phase-two"):
        fetch_zoo("private", tmp_path)
    with pytest.raises(ArgumentError, match="cannot be a directory name"):
        fetch_zoo("../x", tmp_path, url="http://127.0.0.1:9/")


def test_a_folder_that_cannot_be_made_is_an_error(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="cannot be written"):
        get(server, tmp_path / "file" / "folder")


def test_the_default_folder_is_the_users_cache(server, tmp_path, monkeypatch):
    monkeypatch.delenv("SHARPKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get(server, None) == tmp_path / "sharpkit" / "zoos" / "public"
