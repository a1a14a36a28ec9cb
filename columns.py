"""Columns whose rows differ in length (lists, strings), embeddings with gaps, and the look-up of items by creative id.

Pure array code: must not open files or know what a column means.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

import kernels

ID_LIMIT = 2**64  # creative ids that are numbers lie below


def ragged_places(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indexes of the runs begin[i] .. begin[i] + counts[i], one after another: (sum of counts) int64."""
    counts = np.asarray(counts, dtype=np.int64)
    ahead = np.cumsum(counts) - counts
    return np.repeat(np.asarray(begin, dtype=np.int64) - ahead, counts) + np.arange(int(counts.sum()), dtype=np.int64)


class RaggedColumn(NamedTuple):
    """N lists of values. offsets (N+1) int64; values int32, those of row i at offsets[i]:offsets[i+1]."""

    offsets: np.ndarray
    values: np.ndarray

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lists of `rows` (M): their values one after another (sum) int32, and how many each has (M) int64."""
        begin = self.offsets[rows]
        counts = self.offsets[np.asarray(rows) + 1] - begin
        return self.values[ragged_places(begin, counts)], counts

    @classmethod
    def from_counts(cls, counts: np.ndarray, values: np.ndarray) -> RaggedColumn:
        """Of list lengths (N) and values."""
        return cls(offsets_of(counts), values)

    @classmethod
    def scatter(cls, num_rows: int, rows: np.ndarray, counts: np.ndarray, values: np.ndarray) -> RaggedColumn:
        """N = num_rows lists, those of `rows` (M, distinct) as given by counts (M) and values, the others empty."""
        at = np.zeros(num_rows, dtype=np.int64)
        at[rows] = counts
        offsets = offsets_of(at)
        out = np.empty(len(values), dtype=np.int32)
        out[ragged_places(offsets[rows], counts)] = values
        return cls(offsets, out)


def sorted_places(keys: np.ndarray, size: int) -> np.ndarray:
    """The stable ascending order of keys (Z) int32 in [0, size): (Z,) int64.

    Numpy sorts 16-bit integers by radix: 345,000 keys take 1.3 ms a pass, an argsort of 32-bit integers 25 ms.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if size <= 1 << 16:
        return order
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]


class Distinct(NamedTuple):
    """The different keys of an array, and where each stands; key 0 (padding) is left out."""

    keys: np.ndarray  # (R,) ascending, each once
    starts: np.ndarray  # (R,) int64 start of each key's part of `places`
    places: np.ndarray  # (Z',) int64 places of the array, key by key
    rank: np.ndarray  # (Z,) int32: 1 + number of the key at each place; 0 where it is 0


def distinct(keys: np.ndarray, size: int) -> Distinct:
    """The different keys of (Z) int32 in [0, size). By sorting: the time does not depend on `size`, and no scratch memory is kept."""
    if fast := kernels.compiled():
        return Distinct(*fast.distinct(kernels.contiguous(keys, np.int32), size))
    places = sorted_places(keys, size)
    ordered = np.take(keys, places)
    padding = int(np.searchsorted(ordered, 1))
    places, ordered = places[padding:], ordered[padding:]
    new = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    rank = np.zeros(len(keys), dtype=np.int32)
    rank[places] = np.cumsum(new, dtype=np.int32)
    return Distinct(ordered[starts], starts, places, rank)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """(N) counts -> (N+1) int64 offsets that start at 0."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


class StringColumn:
    """N strings as offsets (N+1) int64 into UTF-8 data (bytes) uint8."""

    def __init__(self, offsets: np.ndarray, data: np.ndarray) -> None:
        self.offsets, self.data = offsets, data

    @classmethod
    def from_list(cls, strings: Sequence[str]) -> StringColumn:
        """Of any strings; lone surrogates are kept."""
        encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
        data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(offsets_of(np.fromiter(map(len, encoded), np.int64, len(encoded))), data)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = int(row) % len(self)
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8", "surrogatepass")

    def take(self, rows: Iterable[int]) -> list[str]:
        """The strings of `rows`."""
        return [self[row] for row in np.asarray(rows).tolist()]

    def select(self, rows: np.ndarray) -> StringColumn:
        """A column of the strings of `rows` (M)."""
        begin = self.offsets[rows]
        counts = self.offsets[np.asarray(rows) + 1] - begin
        return StringColumn(offsets_of(counts), self.data[ragged_places(begin, counts)])


class EmbeddingColumn(NamedTuple):
    """Vectors of the items that have one. row_of_item (num_items+1) int32, 0 = missing; matrix (n+1, width) float16, row 0 zeros."""

    row_of_item: np.ndarray
    matrix: np.ndarray


class ItemLookup:
    """Item ids by creative id. raw: (num_items+1) uint64 or StringColumn, entry 0 and gaps 0 or ''."""

    def __init__(self, raw: np.ndarray | StringColumn) -> None:
        self._by_name: dict[str, int] = {}
        if isinstance(raw, StringColumn):
            self._by_name = {name: item for item, name in enumerate(raw.take(range(len(raw)))) if name}
            numbers = [(int(name), item) for name, item in self._by_name.items() if is_number(name)]
            numbers.sort()
            self._sorted = np.array([n for n, _ in numbers], dtype=np.uint64)
            self._items = np.array([i for _, i in numbers], dtype=np.int64)
        else:
            present = np.flatnonzero(raw)
            order = np.argsort(raw[present], kind="stable")
            self._items = present[order].astype(np.int64)
            self._sorted = np.asarray(raw)[self._items]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """(N) uint64 creative ids -> (N) int64 item ids, 0 where no item has it."""
        if not len(self._sorted):
            return np.zeros(len(ids), dtype=np.int64)
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._items[places], 0)

    def name(self, creative_id: str) -> int:
        """The item id of a creative id that is no number, else 0."""
        return self._by_name.get(creative_id, 0)

    def __call__(self, ids: Sequence[int | str]) -> np.ndarray:
        """(N) creative ids, ints or strings -> (N) int64 item ids, 0 where no item has it."""
        try:
            if set(map(type, ids)) <= {int}:
                return self.numbers(np.fromiter(ids, np.uint64, len(ids)))
        except OverflowError:
            pass  # a negative or wider number is no item's; the slow way says so for that one alone
        return np.fromiter((self._one(i) for i in ids), np.int64, len(ids))

    def _one(self, creative_id: object) -> int:
        text = str(creative_id)
        if is_number(text):
            return int(self.numbers(np.array([int(text)], dtype=np.uint64))[0])
        return self._by_name.get(text, 0)


def is_number(text: str) -> bool:
    """Whether a creative id in a string is a number, below ID_LIMIT.

    "007" is none: its zeros are part of the name (Amazon's product ids), and as a number it would come back without them.
    """
    return text.isascii() and text.isdigit() and len(text) <= 20 and (text[0] != "0" or text == "0") and int(text) < ID_LIMIT
