"""Files and folders that appear whole or not at all, and the sweeping of what processes that died left half-written.

Must not know what they hold. Folders that many processes share have locks besides (store.py, runs.py).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO

from errors import disk_full

TEMPORARY = ".tmp-"


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable. Some network file systems refuse this for folders; there it is left out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """mkdir -p, durably: what is fsynced in a folder is lost with it where a power cut forgets the folder's own name."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_folder(folder.parent)


def put_folder(made: Path, path: Path) -> None:
    """Rename a finished folder to `path`, where nothing or an empty folder is, after the disk holds all that is in it."""
    sync_tree(made)
    os.rename(made, path)
    fsync_folder(Path(path).parent)


def sync_tree(folder: Path) -> None:
    """Have the disk hold a folder with all that is in it."""
    for found in sorted(Path(folder).rglob("*")):
        if found.is_dir() and not found.is_symlink():
            fsync_folder(found)
        elif found.is_file():
            descriptor = os.open(found, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(folder)


def or_disk_full(error: BaseException, path: Path, bytes_needed: int) -> BaseException:
    """The RunError that explains a full disk, else `error` itself."""
    return (disk_full(error, path, bytes_needed) if isinstance(error, OSError) else None) or error


def unused(path: Path) -> Path:
    """The path, or the first with a number from 2 behind it that does not exist."""
    return next(free for free in chain((path,), (path.with_name(f"{path.name}-{n}") for n in count(2))) if not free.exists())


def temporary_for(path: Path) -> Path:
    """The name beside `path` under which this process makes what will take its place; what dead processes left under theirs is removed."""
    path = Path(path)
    sweep(path.parent, re.escape(path.name))
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")


def sweep(folder: Path, name: str) -> int:
    """Remove the unfinished files and folders of dead processes for things of a name (a regular expression); returns how many.

    Their names end in the process that made them. One on another machine that shares the disk may be alive: it fails where it renames, and
    two that write the same thing at once are a mistake there anyway. What cannot be removed stays.
    """
    pattern, found = re.compile(f"(?:{re.escape(TEMPORARY)})+(?:{name})(?:-[0-9]+)*-([0-9]+)"), 0
    for path in sorted(Path(folder).glob(f"{TEMPORARY}*")):
        match = pattern.fullmatch(path.name)
        if match and not os.path.exists(f"/proc/{match.group(1)}"):
            found += 1
            remove(path)
    return found


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # another's file: it is in nobody's way


@contextmanager
def replacing(path: Path, bytes_needed: int) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well: a reader, or a crash, sees the old or the new content.

    RunError with the path and bytes_needed when the disk is full; the old content is whole then, as after any other error.
    """
    path, temporary = Path(path), temporary_for(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        remove(temporary)
        raise or_disk_full(error, path, bytes_needed) from None


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that becomes `path`, where nothing or an empty folder is, when the block ends well; else it goes."""
    made = temporary_for(path)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        yield made
        put_folder(made, path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8) by `replacing`. RunError when the disk is full."""
    data = text.encode("utf-8")
    with replacing(path, len(data)) as file:
        file.write(data)
