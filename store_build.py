"""Compiles a raw data folder into the files of a store, by streaming, in a folder that the caller renames when it is whole.

Must not know of caches, locks or who reads the store (store.py). Both layouts give equal arrays for equal data.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import sources_parquet
import sources_workers
from candidates import read_candidates
from columns import RaggedColumn, StringColumn, ragged_places
from errors import UserError
from indexer import Indexer, no_indexer, read_indexer
from item_table import ItemTable
from plain_pickle import load_plain_pickle
from sources import SEQUENCES, FeatureRows, Progress, Ragged, Rejects, Rules, SeqChunk, Source, add_rejects, numbered, parts
from sources_jsonl import ODD_ITEM
from store_files import ArrayFiles

USERS_A_STEP = 65536  # when events are put in the order of users
MAX_NUMBER = 2**31 - 2
EVENT_COLUMNS = {"item_ids": np.int32, "action_types": np.int8, "timestamps": np.int64}


class StoreBuilder:
    """Builds one store. folder: an empty folder for its files; scratch: another, removed by the caller; rejects: where bad lines go."""

    def __init__(
        self, source: Source, folder: Path, scratch: Path, rejects: Rejects, *, progress: bool, log: Callable[[str], None]
    ) -> None:
        self.source, self.scratch, self.rejects, self.log = source, scratch, rejects, log
        self.schema, self.files, self.tally = source.schema, ArrayFiles(folder), Counter()
        self._show, self._warnings = progress, []
        self.indexer: Indexer = no_indexer()
        self.rules = Rules(source.kind, source.schema, public=source.public)
        self.items: ItemTable | None = None
        self._users: dict[str, list] = {"ids": [], "counts": [], "lines": [], "names": [], "features": []}
        self._file_starts: list[tuple[int, Path]] = []
        self._strays: list[FeatureRows] = []
        self._num_users = self._max_item = 0
        self._workers = sources_workers.Workers()

    def build(self) -> dict:
        """Write every array; returns {"arrays", "counts", "cardinalities", "summary"} for the manifest."""
        try:
            return self._build()
        finally:
            self._workers.close()

    def _build(self) -> dict:
        begin = time.monotonic()
        if self.source.layout == "A":  # they get ready while the indexer is read
            names = ("item_feat_dict.json", SEQUENCES[self.source.kind, "A"])
            self._workers.start(max(path.stat().st_size for path in self.source.files if path.name in names))
        path = self.source.data_path / "indexer.pkl"
        if path.exists():
            self.indexer = read_indexer(path, self.scratch)
            self.rules = Rules(self.source.kind, self.schema, self.indexer.num_items, self.indexer.max_user, self.source.public)
            self.items = ItemTable(self.files, self.schema, self.indexer.item_raw)
        if self.source.layout == "A":
            self._read_item_dict()
        self._read_sequences()
        if self.items is None:
            self.items = ItemTable(self.files, self.schema, np.arange(self._highest_item() + 1, dtype=np.uint64))
        if self.source.layout == "B":
            self._read_item_features()
        num_users, num_events, largest = self._finish_users()
        if self.source.kind == "predict":
            self._read_candidates()
        largest.update(self.items.finish())
        self.files.sync()
        counts = {
            "num_users": num_users,
            "num_items": self.items.num_items,
            "num_known_items": self.items.num_known,
            "num_events": num_events,
        }
        return {"arrays": self.files.arrays, "counts": counts, "cardinalities": self._cardinalities(largest),
                "summary": self._summary(counts, time.monotonic() - begin)}  # fmt: skip

    def _progress(self, name: str, total: int, unit: str) -> Progress:
        return Progress(name, total, unit, enabled=self._show, log=self.log)

    # Items

    def _read_item_dict(self) -> None:
        path = self.source.data_path / "item_feat_dict.json"
        if path.exists():
            with self._progress(f"reading {path.name}", path.stat().st_size, "B") as progress:
                for chunk in numbered(
                    sources_workers.read_item_dict(path, self.rules, self.scratch, progress, workers=self._workers),
                    path,
                    self.rejects,
                    self.tally,
                    "items in " + path.name,
                ):
                    self._put_items(chunk.items)
            self._count_bare(path.name)
        else:
            self._warnings.append("no item_feat_dict.json: item features are taken from the records, the first of each item")
        self.items.share(self.scratch / "known")

    def _read_item_features(self) -> None:
        files = parts(self.source.data_path, "item_feat")
        with self._progress("reading item_feat", sources_parquet.num_rows(files), "rows") as progress:
            for path, ahead, rows, rejects in sources_parquet.read_features(files, "item", self.rules, progress, self.tally):
                add_rejects(self.rejects, path, ahead, rejects)
                self._put_items(rows)
        if files:
            self._count_bare("item_feat")

    def _count_bare(self, name: str) -> None:
        """Note the items of training data that the file or folder of item features has no row of."""
        if self.source.kind == "train":
            self.tally[f"missing: items without a row in {name}"] += int((~self.items.covered[1:]).sum())

    def _put_items(self, rows: FeatureRows) -> None:
        """Authoritative rows of known items. In predict, rows of creative ids beyond them wait for appended items that lack features."""
        known = rows.ids <= self.items.num_known
        if not known.all():
            self._strays.append(rows.select(~known))
            rows = rows.select(known)
        self.tally["coerced: items listed twice, the last one counts"] += self.items.put(rows._replace(ids=rows.ids.astype(np.int64)))

    def _highest_item(self) -> int:
        """The number of items of data without indexer.pkl."""
        highest = max([self._max_item] + [sources_parquet.largest(path, "item_id") for path in parts(self.source.data_path, "item_feat")])
        if highest > MAX_NUMBER:
            raise UserError(
                f"{self.source.data_path}: item id {highest} is above {MAX_NUMBER}; expected numbers from 1.\n"
                "Add the indexer.pkl of this data."
            )
        return highest

    # Sequences

    def _read_sequences(self) -> None:
        """Stream all sequences: events go to files in file order, users to memory (some 100 bytes each)."""
        self._events = {name: self.files.append(f"unordered.{name}", dtype) for name, dtype in EVENT_COLUMNS.items()}
        name = SEQUENCES[self.source.kind, self.source.layout]
        if self.source.layout == "A":
            path = self.source.data_path / name
            with self._progress(f"reading {name}", path.stat().st_size, "B") as progress:
                known = self.scratch / "known"
                chunks = sources_workers.read_sequences(path, self.rules, known, self.scratch, progress, workers=self._workers)
                last_offset = max([self._add(chunk) for chunk in self._numbered(chunks, path)], default=-1)
            self._check_offsets(path, last_offset)
        else:
            files = parts(self.source.data_path, name)
            with self._progress(f"reading {name}", sources_parquet.num_rows(files), "users") as progress:
                for path in files:
                    for chunk in self._numbered(sources_parquet.read_sequences(path, self.rules, progress), path):
                        self._add(chunk)
        for file in self._events.values():
            file.close()
        if not self._num_users:
            raise UserError(
                f"{self.source.data_path / name}: holds no user ({self.rejects.count:,} lines rejected); expected one user a line or row."
            )

    def _numbered(self, chunks: Iterator[SeqChunk], path: Path) -> Iterator[SeqChunk]:
        self._file_starts.append((self._num_users, path))
        return numbered(chunks, path, self.rejects, self.tally)

    def _add(self, chunk: SeqChunk) -> int:
        """Take a chunk in; returns the byte at which its last line begins (layout A)."""
        items = chunk.item_ids
        if self.source.kind == "predict":
            items, translated = self.items.resolve(items, chunk.odd_items, plain_numbers=True)
            self.tally["coerced: creative ids of known items in sequences, read as their numbers"] += translated
            self.tally["ignored: record features of items whose creative id is no number"] += len(chunk.odd_items)
        self._max_item = max(self._max_item, int(items.max(initial=0)))
        for name, values in zip(EVENT_COLUMNS, (items, chunk.action_types, chunk.timestamps), strict=True):
            self._events[name].add(values)
        users = self._users
        self._num_users += len(chunk.counts)
        users["ids"].append(chunk.user_ids)
        users["counts"].append(chunk.counts)
        users["lines"].append(chunk.lines)
        users["names"] += chunk.user_names or []
        if chunk.users is not None:
            users["features"].append(chunk.users)
        if chunk.items is not None and len(chunk.items.ids):
            self._put_record_features(chunk.items)
        return chunk.last_offset

    def _put_record_features(self, rows: FeatureRows) -> None:
        if self.source.kind == "predict":
            ids = np.where(rows.ids <= self.items.num_known, rows.ids, 0).astype(np.int64)
            other = np.flatnonzero(ids == 0)
            known = self.items.lookup.numbers(rows.ids[other])
            ids[other] = np.where(known > 0, known, self.items.new_ids(rows.ids[other]))
            rows = _distinct(rows._replace(ids=ids))
        self.tally["differences: later records of an item not in item_feat_dict.json that differ from its first"] += self.items.put_if_new(
            rows
        )

    def _check_offsets(self, path: Path, last_offset: int) -> None:
        """seq_offsets.pkl is not needed, but must not contradict the file."""
        offsets_path = path.with_name(path.name.replace(".jsonl", "_offsets.pkl"))
        if not offsets_path.exists():
            return
        offsets = load_plain_pickle(offsets_path)
        values = list(offsets.values()) if isinstance(offsets, dict) else offsets
        count = self.tally["read: lines"]
        found = (len(values), values[0], values[-1]) if isinstance(values, list) and values else (0, None, None)
        if found != (count, 0, last_offset):
            self._warnings.append(
                f"{offsets_path.name}: {found[0]:,} offsets from {found[1]} to {found[2]}; "
                f"{path.name} has {count:,} lines, the last at {last_offset}"
            )
        elif wrong := _wrong_offset(path, values):
            place, offset = wrong
            self._warnings.append(f"{offsets_path.name}: offset {place + 1:,} is {offset}, where no line of {path.name} begins")

    # Users

    def _finish_users(self) -> tuple[int, int, Counter]:
        """Put users in order, with their features and events; returns (users, events, largest value of each feature)."""
        ids, counts, lines = (np.concatenate(self._users[k]) for k in ("ids", "counts", "lines"))
        features, row_of_user = self._user_features(ids, lines)
        if self.source.kind == "train":
            order = self._train_order(ids, lines, row_of_user)
            raw, known = self.indexer.raw_users(ids[order])
            if self.indexer.num_items:
                self.tally["missing: users without a raw id in indexer.pkl, their number serves"] += int((~known).sum())
            ids = ids[order]
        else:
            order = np.arange(len(ids))
            ids, raw = self._predict_ids(ids)
        largest = Counter({f.id: int(features.single[:, k].max(initial=0)) for k, f in enumerate(self.schema.select("user", "single"))})
        self.files.write("user_ids", ids)
        self.files.write("raw_user_ids.offsets", raw.offsets)
        self.files.write("raw_user_ids.data", raw.data)
        self.files.write("user_single", features.single[row_of_user[order]])
        for name, ragged in features.multi.items():
            values, lengths = RaggedColumn.from_counts(*ragged).gather(row_of_user[order])
            column = RaggedColumn.from_counts(lengths, values)
            self.files.write(f"user_multi.{name}.offsets", column.offsets)
            self.files.write(f"user_multi.{name}.values", column.values)
            largest[name] = int(values.max(initial=0))
        self._order_events(counts, order)
        self.files.write("user_offsets", RaggedColumn.from_counts(counts[order], counts).offsets)
        return len(order), int(counts[order].sum()), largest

    def _train_order(self, ids: np.ndarray, lines: np.ndarray, row_of_user: np.ndarray) -> np.ndarray:
        """Users by ascending id, without those that come twice or lack a profile; these are rejects."""
        order = np.argsort(ids, kind="stable")
        bad = np.zeros(len(ids), dtype=bool)
        again = np.flatnonzero(ids[order][1:] == ids[order][:-1]) + 1
        bad[order[again]] = True
        reasons = {int(user): f"user {ids[user]} comes twice; expected one sequence a user" for user in order[again]}
        for user in np.flatnonzero(row_of_user < 0).tolist():
            reasons.setdefault(user, f"user {ids[user]} has no row in user_feat; expected exactly one")
            bad[user] = True
        for user, reason in sorted(reasons.items()):
            path = [path for start, path in self._file_starts if start <= user][-1]
            self.rejects.add(path, int(lines[user]), reason)
        return order[~bad[order]]

    def _user_features(self, ids: np.ndarray, lines: np.ndarray) -> tuple[FeatureRows, np.ndarray]:
        """Features, and which of their rows is whose (U), -1 = none (train)."""
        if self.source.layout == "A":
            return sources_workers.join_rows(self._users["features"]), np.arange(len(ids))
        files = parts(self.source.data_path, "user_feat")
        unique, row_of_user = np.unique(ids, return_inverse=True)
        single = np.zeros((len(unique) + 1, len(self.schema.select("user", "single"))), dtype=np.int32)
        have = np.zeros(len(unique) + 1, dtype=bool)
        pieces: dict[str, list] = {f.id: [] for f in self.schema.select("user", "multi")}
        with self._progress("reading user_feat", sources_parquet.num_rows(files), "rows") as progress:
            for path, ahead, rows, rejects in sources_parquet.read_features(files, "user", self.rules, progress, self.tally):
                add_rejects(self.rejects, path, ahead, rejects)
                places = np.minimum(np.searchsorted(unique, rows.ids), len(unique) - 1)
                ours = unique[places] == rows.ids
                self.tally["ignored: rows of user_feat whose user has no sequence"] += int((~ours).sum())
                twice = ours & have[places]
                twice[ours] |= _repeated(places[ours])  # the place of a row that is not ours is another user's
                for row in np.flatnonzero(twice).tolist():
                    self.rejects.add(path, ahead + row + 1, f"user {rows.ids[row]} comes twice; expected one row a user")
                keep = ours & ~twice
                places, rows = places[keep], rows.select(keep)
                single[places], have[places] = rows.single, True
                for name, ragged in rows.multi.items():
                    pieces[name].append((places, ragged))
        if not files:
            return FeatureRows(unique, single, {}), row_of_user
        missing = ~have[row_of_user]
        if self.source.kind == "predict":
            self.tally["coerced: users with no profile record, or more than one"] += int(missing.sum())
        multi = {name: _scatter(len(unique) + 1, found) for name, found in pieces.items()}
        return FeatureRows(unique, single, multi), np.where(missing & (self.source.kind == "train"), -1, row_of_user)

    def _predict_ids(self, numbers: np.ndarray) -> tuple[np.ndarray, StringColumn]:
        """(U) user numbers, 0 where the raw id is unknown, and raw ids, of users to predict."""
        names = self._users["names"]
        if self.source.layout == "B":
            raw, known = self.indexer.raw_users(numbers)
            return np.where(known, numbers, 0), raw
        by_name = {}
        if any(type(name) is str for name in names):
            by_name = dict(
                zip(self.indexer.user_raw.take(range(len(self.indexer.user_raw))), self.indexer.user_numbers.tolist(), strict=True)
            )
        given = np.array([name if type(name) is int and 0 < name <= MAX_NUMBER else 0 for name in names], dtype=np.int64)
        raw, known = self.indexer.raw_users(given)
        ids = np.where(known, given, 0)
        raws = raw.take(range(len(raw)))
        for row, name in enumerate(names):
            if not known[row]:
                raws[row] = str(name)
                ids[row] = by_name.get(str(name), 0)
        return ids, StringColumn.from_list(raws)

    def _order_events(self, counts: np.ndarray, order: np.ndarray) -> None:
        """Events in the order of users; where that is the order of the file, the files serve as they are."""
        same = len(order) == len(counts) and bool((order == np.arange(len(order))).all())
        begin = np.cumsum(counts) - counts
        for name, dtype in EVENT_COLUMNS.items():
            unordered = f"unordered.{name}"
            if same:
                self.files.rename(unordered, name)
                continue
            values, out = self.files.load(unordered), self.files.append(name, dtype)
            for step in range(0, len(order), USERS_A_STEP):
                users = order[step : step + USERS_A_STEP]
                out.add(values[ragged_places(begin[users], counts[users])])
            out.close()
            del values
            self.files.drop(unordered)

    # Candidates

    def _read_candidates(self) -> None:
        table = read_candidates(self.source.data_path, self.schema, rejects=self.rejects)
        odd = [(k, name) for k, name in enumerate(table.creative_ids) if isinstance(name, str)]
        numbers = table.creative_ids
        if odd:
            numbers = [ODD_ITEM if isinstance(name, str) else name for name in table.creative_ids]
        before = self.items.num_items
        ids, _ = self.items.resolve(np.fromiter(numbers, np.uint64, len(numbers)), odd, plain_numbers=False)
        for rows in self._strays:
            found = self.items.new_ids(rows.ids)
            self.tally["ignored: rows of unknown items in item features"] += int((found == 0).sum())
            self.items.put_if_new(_distinct(rows._replace(ids=found)))
        differ = self.items.put_if_new(FeatureRows(ids, table.single, table.multi))
        self.tally["differences: candidates whose features differ from the item's"] += differ
        self.tally.update({f"candidates: {k}": v for k, v in table.summary.items()})
        self.tally["candidates: unknown in training"] += int((ids > self.items.num_known).sum())
        self.tally["candidates: seen in no sequence either"] += self.items.num_items - before
        self.files.write("candidate_item_ids", ids.astype(np.int32))
        self.files.write("retrieval_ids", table.retrieval_ids.astype(np.uint64))

    # The end

    def _cardinalities(self, largest: Counter) -> dict[str, int]:
        features = [f for f in self.schema.features if f.kind != "embedding"]
        return {f.id: max(self.indexer.feature_max.get(f.id, 0), largest.get(f.id, 0)) for f in features}

    def _summary(self, counts: dict, seconds: float) -> dict:
        groups: dict[str, dict[str, int]] = {k: {} for k in ("read", "ignored", "coerced", "cold", "missing", "differences", "candidates")}
        for key, count in sorted(self.tally.items()):
            group, _, what = key.partition(": ")
            if count:
                groups[group][what] = int(count)
        return counts | groups | {
            "kind": self.source.kind, "layout": self.source.layout, "rejected": self.rejects.count,
            "rejected_reasons": dict(self.rejects.by_reason),
            "rejects_file": str(self.rejects.path) if self.rejects.count else "", "warnings": self._warnings, "seconds": round(seconds, 3),
            "source_bytes": sum(p.stat().st_size for p in self.source.files), "store_bytes": self.files.num_bytes()}  # fmt: skip


def _wrong_offset(path: Path, offsets: list) -> tuple[int, object] | None:
    """(place, value) of the first offset at which no line of the file begins, or that does not lie behind the one ahead; None where all do.

    As many ascending beginnings of lines as there are lines are all of them, so one byte a line is looked at instead of each.
    """
    size, whole = path.stat().st_size, (int, np.integer)
    numbers = np.array([offset if isinstance(offset, whole) and 0 <= offset < size else -1 for offset in offsets], dtype=np.int64)
    sound = numbers >= 0
    sound[1:] &= numbers[1:] > np.maximum.accumulate(numbers)[:-1]
    behind = np.flatnonzero(sound & (numbers > 0))
    sound[behind] = np.memmap(path, np.uint8, "r")[numbers[behind] - 1] == ord("\n")
    return None if sound.all() else (int(np.argmin(sound)), offsets[int(np.argmin(sound))])


def _repeated(values: np.ndarray) -> np.ndarray:
    """Which values (N) came before in the array."""
    out = np.ones(len(values), dtype=bool)
    out[np.unique(values, return_index=True)[1]] = False
    return out


def _distinct(rows: FeatureRows) -> FeatureRows:
    """The first row of each id; rows of id 0 are left out."""
    return rows.select(~_repeated(rows.ids) & (rows.ids > 0))


def _scatter(num_rows: int, pieces: list[tuple[np.ndarray, Ragged]]) -> Ragged:
    rows = np.concatenate([places for places, _ in pieces])
    column = RaggedColumn.scatter(num_rows, rows, *(np.concatenate([ragged[part] for _, ragged in pieces]) for part in (0, 1)))
    return Ragged(np.diff(column.offsets), column.values)
