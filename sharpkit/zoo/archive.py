"""Unpacking an archive that someone else made: nothing may land outside the target folder."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from sharpkit.containers import open_zip, require_sizes
from sharpkit.doors import MAX_MEMBERS, reason, shown
from sharpkit.errors import DownloadError, SharpkitError
from sharpkit.files import temporary_folder
from sharpkit.progress import progress_bar
from sharpkit.zoo.files import is_litter


class BadArchiveError(DownloadError):
    """The archive itself is at fault: to try again, it must be downloaded again."""


_MAX_BYTES = 2**40  # of one archive; its content goes to the disk, not into memory


def unpack_zip(archive: str | Path, target: str | Path, *, progress: bool = False) -> Path:
    """Unpack a zip archive into a folder that appears only when everything is in it.

    A single folder at the top of the archive becomes the target itself. `__MACOSX`, `.DS_Store`
    and the like are skipped.

    Returns:
        Path: The target.

    Raises:
        DownloadError: Not a zip file, a damaged member, one whose path leaves the target (absolute,
            `..`, drive letter, link), an implausible size, no disk space. Nothing is left behind.
    """
    archive, target = Path(archive), Path(target)
    try:
        with (
            temporary_folder(target) as temporary,
            open_zip(archive, BadArchiveError, _MAX_BYTES) as file,
        ):
            members = _checked_members(file, archive, target.parent)
            for member in progress_bar(iterable=members, desc="unpacking", progress=progress):
                _extract(file, member, temporary)
            top = list(temporary.iterdir())
            (top[0] if len(top) == 1 and top[0].is_dir() else temporary).rename(target)
    except (SharpkitError, MemoryError):
        raise
    except OSError as error:
        raise DownloadError(f"{archive}: cannot be unpacked into {target} ({error})") from error
    except Exception as error:  # zipfile raises whatever its layers do
        raise BadArchiveError(
            f"{archive}: damaged or not a zip archive ({reason(error)})"
        ) from error
    return target


def _checked_members(file: zipfile.ZipFile, archive: Path, folder: Path) -> list[zipfile.ZipInfo]:
    """The members to unpack, all of them looked at before anything is written."""
    infos = file.infolist()
    if len(infos) > MAX_MEMBERS:
        raise BadArchiveError(f"{archive}: has {len(infos):,} members; at most {MAX_MEMBERS:,}")
    for info in infos:
        danger = _danger(info)
        if danger:
            name = shown(info.filename)
            raise BadArchiveError(f"{archive}: member {name} {danger}; nothing unpacked")
    members = [i for i in infos if not any(map(is_litter, PurePosixPath(i.filename).parts))]
    names = [i.filename.rstrip("/") for i in members]
    if len(set(names)) < len(names):
        raise BadArchiveError(f"{archive}: holds the same path twice; nothing unpacked")
    stored, size = archive.stat().st_size, sum(info.file_size for info in infos)
    require_sizes(archive, infos, stored, BadArchiveError)
    if sum(info.compress_size for info in infos) > stored:
        raise BadArchiveError(f"{archive}: has members that overlap; nothing unpacked")
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(f"{archive}: needs {size:,} bytes of disk; {folder} has {free:,} free")
    return members


def _danger(info: zipfile.ZipInfo) -> str:
    """Why a member must not be unpacked, or ""."""
    name = info.orig_filename
    if not name or "\0" in name or "\\" in name:
        return "has a path with a backslash or null byte"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "has a path that leaves the target folder"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or special file"
    if info.flag_bits & 0x1:
        return "is encrypted"
    return ""


def _extract(file: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    path = folder.joinpath(*PurePosixPath(member.filename).parts)
    if member.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open(member) as source, path.open("xb") as out:
        shutil.copyfileobj(source, out, 2**20)
