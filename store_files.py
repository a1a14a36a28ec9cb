"""Flat array files of a store: written by appending or in place, never through a path that a full disk turns into a crash.

Must not know what an array means. A file is raw little-endian values; dtype and shape stand in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

COPY_ROWS = 1 << 20


class ArrayFiles:
    """The arrays of a folder that is being written. `arrays`: {name: {"dtype", "shape"}}, what the manifest says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, dict] = {}

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole array."""
        out = self.append(name, array.dtype, array.shape[1:])
        for begin in range(0, len(array), COPY_ROWS):
            out.add(array[begin : begin + COPY_ROWS])
        out.close()

    def append(self, name: str, dtype: np.dtype, row_shape: tuple[int, ...] = ()) -> AppendFile:
        """An array that grows row by row; it counts once it is closed."""
        return AppendFile(self, name, np.dtype(dtype), row_shape)

    def allocate(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array of zeros to be written in place.

        The blocks are reserved first: writing to a hole of a map on a full disk kills the process.
        """
        path, dtype = self.path(name), np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        with open(path, "wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        self.arrays[name] = {"dtype": dtype.str, "shape": list(shape)}
        return np.memmap(path, dtype, mode="r+", shape=shape) if size else np.zeros(shape, dtype)

    def path(self, name: str) -> Path:
        return array_path(self.folder, name)

    def drop(self, name: str) -> None:
        """Remove an array."""
        self.path(name).unlink()
        self.arrays.pop(name)

    def rename(self, name: str, new: str) -> None:
        """Give an array another name."""
        self.path(name).rename(self.path(new))
        self.arrays[new] = self.arrays.pop(name)

    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(map(array_bytes, self.arrays.values()))

    def load(self, name: str) -> np.ndarray:
        """A read-only map of a closed array."""
        return load_array(self.folder, name, self.arrays[name])

    def sync(self) -> None:
        """Have the disk hold every file."""
        for name in self.arrays:
            sync_path(self.path(name))


class AppendFile:
    """One array that grows; see ArrayFiles.append."""

    def __init__(self, files: ArrayFiles, name: str, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self._files, self._name, self._dtype, self._row_shape = files, name, dtype, row_shape
        self._file = open(files.path(name), "wb")  # noqa: SIM115  (closed by close())
        self.rows = 0

    def add(self, rows: np.ndarray) -> None:
        """Append rows (N, *row_shape), cast to the array's dtype."""
        rows = np.ascontiguousarray(rows, dtype=self._dtype)
        if rows.size:
            self._file.write(rows.reshape(-1).view(np.uint8).data)  # not tofile: it hides the errno of a full disk
        self.rows += len(rows)

    def close(self) -> None:
        """End the array."""
        self._file.close()
        self._files.arrays[self._name] = {"dtype": self._dtype.str, "shape": [self.rows, *self._row_shape]}


def array_path(folder: Path, name: str) -> Path:
    """Where an array lies."""
    return folder / f"{name}.bin"


def load_array(folder: Path, name: str, spec: dict) -> np.ndarray:
    """A read-only map of an array; spec: its entry in the manifest."""
    shape, dtype = tuple(spec["shape"]), np.dtype(spec["dtype"])
    if 0 in shape:
        empty = np.zeros(shape, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(array_path(folder, name), dtype, mode="r", shape=shape)


def array_bytes(spec: dict) -> int:
    """Size of an array's file."""
    return int(np.prod(spec["shape"], dtype=np.int64)) * np.dtype(spec["dtype"]).itemsize


def sync_path(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, tree: object) -> None:
    """Write a JSON file that is on the disk when this returns."""
    write_synced(path, json.dumps(tree, indent=1).encode())


def file_facts(files: list[Path] | tuple[Path, ...], folder: Path) -> list:
    """[relative path, bytes, mtime in ns] of each file, sorted: what a fingerprint is made of."""
    facts = []
    for path in files:
        stat = path.stat()
        facts.append([os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns])
    return sorted(facts)


def digest(tree: object) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()
