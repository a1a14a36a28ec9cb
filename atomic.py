"""Files and folders that appear whole or not at all, and the sweeping of what processes that died left half-written.

Must not know what they hold. Folders that many processes share have locks besides (store.py, runs.py).
A temporary is held by a lock (flock) on itself, which the kernel lets go of when its maker dies. Its number says nothing: in a container
Python may have the same one at each start, and two containers that share a disk see each other's as dead.
"""

from __future__ import annotations

import errno
import fcntl
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


@contextmanager
def temporary_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder beside `path`, to be renamed to it or to work in; removed at the end of the block where it still has its name.

    What dead processes left under such names for `path` is removed first. mode: who may enter it, as for mkdir.
    """
    with _held(Path(path), folder=True, mode=mode) as (made, _):
        yield made


def probe(folder: Path) -> None:
    """Make a file in a folder and remove it; OSError where that cannot be."""
    with _held(Path(folder) / "probe", folder=False, mode=0o666):
        pass


def sweep(folder: Path, name: str) -> int:
    """Remove the unfinished files and folders that nobody holds, for things of a name (a regular expression); returns how many.

    What cannot be removed, or not be locked, stays. Network file systems that lock folders for one machine alone show those of others
    as dead: such a maker fails where it renames, and two machines that write the same thing at once are a mistake there anyway.
    """
    # Between name and numbers earlier versions had eight letters where the folder was to work in.
    pattern = re.compile(f"(?:{re.escape(TEMPORARY)})+(?:{name})(?:-[a-z0-9_]{{8}})?(?:-[0-9]+)+")
    return sum(_remove_dead(path) for path in sorted(Path(folder).glob(f"{TEMPORARY}*")) if pattern.fullmatch(path.name))


@contextmanager
def _held(path: Path, *, folder: bool, mode: int) -> Iterator[tuple[Path, int]]:
    """(name, descriptor) of a new temporary for `path` that is locked until the end of the block."""
    sweep(path.parent, re.escape(path.name))
    made, descriptor = _claim(path, folder, mode)
    try:
        yield made, descriptor
    finally:
        try:
            if _is_named(made, descriptor):
                remove(made)
        finally:
            os.close(descriptor)


def _claim(path: Path, folder: bool, mode: int) -> tuple[Path, int]:
    """Make a temporary for `path` under the first free name, and lock it."""
    for number in count():
        made = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{number}")
        try:
            if folder:
                os.mkdir(made, mode)
            descriptor = os.open(made, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            continue  # a living process's with our number, or one that could not be removed
        except FileNotFoundError:
            if path.parent.is_dir():
                continue  # swept before it was opened
            raise
        if _lock(descriptor) is not False and _is_named(made, descriptor):
            return made, descriptor
        os.close(descriptor)  # swept, or about to be, before it was locked
    raise AssertionError("there are more numbers than files")


def _lock(descriptor: int) -> bool | None:
    """Lock a file or folder: True; False where another holds it, None where its file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the path is still the file or folder of this descriptor."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _remove_dead(path: Path) -> bool:
    """Remove a temporary that nobody holds; False where it stays."""
    if not path.is_symlink():  # no process makes links under such names
        try:
            descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            if not _lock(descriptor) or not _is_named(path, descriptor):
                return False
            remove(path)
        finally:
            os.close(descriptor)
    else:
        remove(path)
    return True


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
    path = Path(path)
    try:
        with _held(path, folder=False, mode=0o666) as (temporary, descriptor), open(descriptor, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
            fsync_folder(path.parent)
    except BaseException as error:
        raise or_disk_full(error, path, bytes_needed) from None


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill that becomes `path`, where nothing or an empty folder is, when the block ends well; else it goes."""
    with temporary_folder(path) as made:
        yield made
        put_folder(made, path)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8) by `replacing`. RunError when the disk is full."""
    data = text.encode("utf-8")
    with replacing(path, len(data)) as file:
        file.write(data)
