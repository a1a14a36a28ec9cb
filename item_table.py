"""The features of items while a store is built: authoritative rows first, then records' and candidates' where those say nothing.

Must not read sources. Items 1..num_known lie in a file that is written in place; items found only in predict data grow in memory.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from columns import ItemLookup, RaggedColumn, StringColumn
from schema import Schema
from sources import FeatureRows, Ragged
from store_files import ArrayFiles, write_json

NAME = "item_single"
ROWS_A_STEP = 1 << 18


class ItemTable:
    """Rows of item features by item id. single columns in the schema's order; `num_items` counts the appended ones too.

    raw: creative ids of the known items, (num_known+1) uint64 or StringColumn.
    """

    def __init__(self, files: ArrayFiles, schema: Schema, raw: np.ndarray | StringColumn) -> None:
        self._files, self._raw = files, raw
        self.num_known = self.num_items = len(raw) - 1
        self.lookup = ItemLookup(raw)
        self._features = schema.select("item", "single")
        num_single = len(self._features)
        self.single = files.allocate(NAME, np.int32, (self.num_known + 1, num_single))
        self.covered = np.zeros(self.num_known + 1, dtype=bool)
        self._extra = np.zeros((0, num_single), dtype=np.int32)
        self._extra_covered = np.zeros(0, dtype=bool)
        self._new: dict[int | str, int] = {}
        self._pieces: dict[str, list] = {f.id: [] for f in schema.select("item", "multi")}

    def put(self, rows: FeatureRows) -> int:
        """Authoritative rows of known items (ids 1..num_known). Of one that comes twice the last row counts. Returns how many did."""
        ids, last = np.unique(rows.ids[::-1], return_index=True)
        keep = np.zeros(len(rows.ids), dtype=bool)
        keep[len(rows.ids) - 1 - last] = True
        twice = len(rows.ids) - len(ids) + int(self.covered[ids].sum())
        self._store(rows.select(keep))
        return twice

    def put_if_new(self, rows: FeatureRows) -> int:
        """Rows (ids distinct, 1..num_items) for items without features so far.

        Returns how many of the others differ from what is there, in single-valued columns.
        """
        has_any = rows.single.any(axis=1)
        for ragged in rows.multi.values():
            has_any |= ragged.counts > 0
        covered = self._is_covered(rows.ids)
        differ = int((self._rows(rows.ids[covered]) != rows.single[covered]).any(axis=1).sum())
        self._store(rows.select(has_any & ~covered))
        return differ

    def resolve(self, creative_ids: np.ndarray, odd: list[tuple[int, str]], *, plain_numbers: bool) -> tuple[np.ndarray, int]:
        """Item ids of creative ids (N) uint64; unknown ones are appended in order of their first occurrence.

        odd: [(place, id)] of ids that are no number. plain_numbers: values up to num_known are item ids already.
        Returns (item ids (N) int64, how many creative ids were those of known items).
        """
        out = np.zeros(len(creative_ids), dtype=np.int64)
        small = (creative_ids <= self.num_known) if plain_numbers else np.zeros(len(creative_ids), dtype=bool)
        out[small] = creative_ids[small].astype(np.int64)
        places = np.flatnonzero(~small)
        found = self.lookup.numbers(creative_ids[places])
        odd_at = dict(odd)
        if odd_at:
            found[np.isin(places, list(odd_at))] = 0
        translated = int((found > 0).sum())
        out[places] = found
        unknown = places[found == 0]
        if len(unknown):
            out[unknown] = self._append(unknown, creative_ids, odd_at)
        return out, translated

    def _append(self, unknown: np.ndarray, creative_ids: np.ndarray, odd_at: dict[int, str]) -> np.ndarray:
        values, first, inverse = np.unique(creative_ids[unknown], return_index=True, return_inverse=True)
        if odd_at:
            return np.fromiter((self._new_id(odd_at.get(p, int(creative_ids[p]))) for p in unknown.tolist()), np.int64, len(unknown))
        items = np.zeros(len(values), dtype=np.int64)
        for k in np.argsort(first).tolist():
            items[k] = self._new_id(int(values[k]))
        return items[inverse]

    def _new_id(self, creative_id: int | str) -> int:
        if isinstance(creative_id, str) and (known := self.lookup.name(creative_id)):
            return known
        item = self._new.setdefault(creative_id, self.num_known + 1 + len(self._new))
        self.num_items = self.num_known + len(self._new)
        return item

    def new_ids(self, creative_ids: np.ndarray) -> np.ndarray:
        """(N) uint64 creative ids -> (N) int64 ids of appended items, 0 where none has it."""
        return np.fromiter((self._new.get(i, 0) for i in creative_ids.tolist()), np.int64, len(creative_ids))

    def _is_covered(self, ids: np.ndarray) -> np.ndarray:
        self._grow()
        known = ids <= self.num_known
        out = np.zeros(len(ids), dtype=bool)
        out[known] = self.covered[ids[known]]
        out[~known] = self._extra_covered[ids[~known] - self.num_known - 1]
        return out

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        known = ids <= self.num_known
        out = np.empty((len(ids), self.single.shape[1]), dtype=np.int32)
        out[known] = self.single[ids[known]]
        out[~known] = self._extra[ids[~known] - self.num_known - 1]
        return out

    def _store(self, rows: FeatureRows) -> None:
        self._grow()
        ids = rows.ids.astype(np.int64)
        known = ids <= self.num_known
        self.single[ids[known]] = rows.single[known]
        self.covered[ids[known]] = True
        self._extra[ids[~known] - self.num_known - 1] = rows.single[~known]
        self._extra_covered[ids[~known] - self.num_known - 1] = True
        for name, ragged in rows.multi.items():
            if len(ids):
                self._pieces[name].append((ids, ragged))

    def _grow(self) -> None:
        needed = self.num_items - self.num_known
        if needed > len(self._extra):
            size = max(needed, 2 * len(self._extra))
            self._extra = np.concatenate([self._extra, np.zeros((size - len(self._extra), self._extra.shape[1]), np.int32)])
            self._extra_covered = np.concatenate([self._extra_covered, np.zeros(size - len(self._extra_covered), bool)])

    def multi(self, name: str) -> RaggedColumn:
        """A multi-valued feature as it is now, (num_items+2) offsets: row 0 and items without are empty; an item's last row counts."""
        pieces = self._pieces[name]
        if not pieces:
            return RaggedColumn.from_counts(np.zeros(self.num_items + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        rows = np.concatenate([ids for ids, _ in pieces])
        ragged = Ragged(np.concatenate([r.counts for _, r in pieces]), np.concatenate([r.values for _, r in pieces]))
        unique, last = np.unique(rows[::-1], return_index=True)
        if len(unique) < len(rows):
            keep = np.zeros(len(rows), dtype=bool)
            keep[len(rows) - 1 - last] = True
            rows, ragged = rows[keep], ragged.select(keep)
        return RaggedColumn.scatter(self.num_items + 1, rows, ragged.counts, ragged.values)

    def share(self, folder: Path) -> None:
        """Tell the readers of sequences what is known so far (sources_workers.load_known). The rows themselves stay where they are."""
        folder.mkdir()
        shared = ArrayFiles(folder)
        shared.write("covered", self.covered)
        for name in self._pieces:
            column = self.multi(name)
            shared.write(f"{name}.offsets", column.offsets)
            shared.write(f"{name}.values", column.values)
        single = {"folder": str(self._files.folder), "name": NAME, "spec": self._files.arrays[NAME]}
        write_json(folder / "known.json", {"single": single, "arrays": shared.arrays, "multi": list(self._pieces)})

    def finish(self) -> Counter:
        """Write everything, creative ids included. Returns the largest value of each feature."""
        largest = Counter({f.id: 0 for f in self._features})
        for begin in range(0, len(self.single), ROWS_A_STEP):
            self._note_largest(largest, self.single[begin : begin + ROWS_A_STEP])
        self._note_largest(largest, self._extra)
        extra = self._extra[: self.num_items - self.num_known]
        if isinstance(self.single, np.memmap):
            self.single.flush()
        if len(extra):
            with open(self._files.path(NAME), "ab") as file:
                file.write(np.ascontiguousarray(extra).reshape(-1).view(np.uint8).data)
            self._files.arrays[NAME]["shape"][0] = self.num_items + 1
        for name in self._pieces:
            column = self.multi(name)
            self._files.write(f"item_multi.{name}.offsets", column.offsets)
            self._files.write(f"item_multi.{name}.values", column.values)
            largest[name] = int(column.values.max(initial=0))
        raw = self._raw
        if isinstance(raw, StringColumn) or any(isinstance(i, str) for i in self._new):
            names = raw.take(range(len(raw))) if isinstance(raw, StringColumn) else [str(i) if i else "" for i in raw.tolist()]
            raw = StringColumn.from_list(names + [str(i) for i in self._new])
            self._files.write("raw_item_ids.offsets", raw.offsets)
            self._files.write("raw_item_ids.data", raw.data)
        else:
            self._files.write("raw_item_ids", np.concatenate([raw, np.fromiter(self._new, np.uint64, len(self._new))]))
        return largest

    def _note_largest(self, largest: Counter, rows: np.ndarray) -> None:
        for feature, value in zip(self._features, rows.max(axis=0, initial=0).tolist(), strict=True):
            largest[feature.id] = max(largest[feature.id], value)
