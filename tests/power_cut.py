"""What a machine that loses its power may forget: the ends of files that were not fsynced, and names in folders that were not.

A file that was not fsynced is cut in half. Of what was done to the names in a folder (made, renamed, linked, removed) since the folder was
last fsynced, the last few may be undone, in order; each folder for itself, as a file system with a journal has it at worst.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path


class PowerCut:
    """Wraps the calls that change the disk; `lose` then makes the folders what the power cut left.

    folders: what counts of the disk. stash: a folder on the same disk, for what is removed, which may come back.
    """

    def __init__(self, folders: list[Path], stash: Path) -> None:
        self.folders, self.stash = [Path(folder).resolve() for folder in folders], Path(stash)
        self.real = {name: getattr(os, name) for name in ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")}
        self.real["mkdir"](self.stash)
        self.before = {path.stat().st_ino for folder in self.folders for path in folder.rglob("*") if path.is_file()}
        self.synced: set[int] = set()
        self.done: list[tuple[int, Callable[[], None]]] = []  # (inode of the folder whose name changed, how to undo it)
        self.held: dict[int, int] = {}  # descriptors of these folders, so that none's inode is given to another
        self.back: dict[int, Path] = {}  # removed folders that came back

    # -- while it runs

    def wrap(self, name: str, function: Callable) -> Callable:
        """The call of os (or open), which notes what it did. function: os's, or one around it."""

        def wrapped(*args, **kwargs):
            note = getattr(self, f"_{name}", None)
            undo = note(*args, **kwargs) if note else None
            result = function(*args, **kwargs)
            if undo is not None:
                self.done.append(undo)
            return result

        return wrapped

    def _fsync(self, descriptor) -> None:
        number = os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno()).st_ino
        self.synced.add(number)
        self.done = [entry for entry in self.done if entry[0] != number]

    def _place(self, path, dir_fd: int | None = None) -> tuple[int, str] | None:
        """(inode of the folder that holds the name, name); None outside of what counts."""
        folder, name = os.path.split(os.fspath(path))
        descriptor = os.open(folder or ".", os.O_RDONLY, dir_fd=dir_fd) if dir_fd is None or folder else os.dup(dir_fd)
        where = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not any(where == known or known in where.parents for known in self.folders):
            os.close(descriptor)
            return None
        number = os.fstat(descriptor).st_ino
        if number in self.held:
            os.close(descriptor)
        else:
            self.held[number] = descriptor
        return number, name

    def _kept(self, path, dir_fd: int | None = None) -> Path | None:
        """A second name for a file that is about to go."""
        copy = self.stash / str(len(os.listdir(self.stash)))
        try:
            self.real["link"](path, copy, src_dir_fd=dir_fd, follow_symlinks=False)
        except OSError:
            return None  # a folder, or nothing there
        return copy

    def _mkdir(self, path, *args, dir_fd: int | None = None):
        place = self._place(path, dir_fd) if not os.path.lexists(path) else None
        return place and (place[0], lambda: shutil.rmtree(self._now(place)))

    def _rmdir(self, path, *, dir_fd: int | None = None):
        place, number = self._place(path, dir_fd), os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino

        def undo() -> None:
            self.real["mkdir"](self._now(place))
            self.back[number] = self._now(place)

        return place and (place[0], undo)

    def _unlink(self, path, *, dir_fd: int | None = None):
        place, copy = self._place(path, dir_fd), self._kept(path, dir_fd)
        return place and copy and (place[0], lambda: self.real["link"](copy, self._now(place)))

    def _link(self, source, target, **_):
        place = self._place(target)
        return place and (place[0], lambda: self.real["unlink"](self._now(place)))

    def _open(self, path, mode="r", *args, **kwargs):
        if not isinstance(path, (str, os.PathLike)) or not set(mode) & set("wxa") or os.path.exists(path):
            return None
        place = self._place(path)
        return place and (place[0], lambda: self.real["unlink"](self._now(place)))

    def _rename(self, source, target, **_):
        before, after, replaced = self._place(source), self._place(target), self._kept(target)
        if before is None or after is None or os.path.exists(target) and os.path.samefile(source, target):
            return None

        def undo() -> None:
            self.real["rename"](self._now(after), self._now(before))
            if replaced is not None:
                self.real["link"](replaced, self._now(after))

        return after[0], undo

    _replace = _rename

    # -- the cut

    def _now(self, place: tuple[int, str]) -> Path:
        number, name = place
        return (self.back.get(number) or Path(os.readlink(f"/proc/self/fd/{self.held[number]}"))) / name

    def lose(self, chance: random.Random | None) -> int:
        """Undo the last few name changes of each folder that were not fsynced (without `chance` all), and halve unsynced files.

        Returns how many names changed back.
        """
        keep, undone = {}, 0
        for number in {entry[0] for entry in self.done}:
            pending = sum(entry[0] == number for entry in self.done)
            keep[number] = 0 if chance is None else chance.randint(0, pending)
        count = dict.fromkeys(keep, 0)
        lost = []
        for number, undo in self.done:
            count[number] += 1
            if count[number] > keep[number]:
                lost.append(undo)
        for undo in reversed(lost):
            try:
                undo()
                undone += 1
            except OSError:
                continue  # in a folder that is gone with all that was in it
        for path in [path for folder in self.folders for path in folder.rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # another thread may remove one meanwhile
                if path.is_file() and path.stat().st_ino not in self.synced | self.before:
                    os.truncate(path, path.stat().st_size // 2)
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held = {}
        return undone
