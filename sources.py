"""What both readers of raw data share: layouts, rejects, counts, progress, the rules a sequence must keep.

Must not parse records (sources_jsonl.py, sources_parquet.py), write the store (store_build.py) or know of torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import UserError
from schema import NUM_ACTION_TYPES, Schema

INT32_MAX = 2**31 - 1
PLAIN_PROGRESS_SECONDS = 10.0
LISTED = 100_000  # rejects that are looked through for the first of each reason

# What a layout is told apart by, and the item's files in it. A name without suffix is a folder of parquet parts or NAME.parquet.
SEQUENCES = {("train", "A"): "seq.jsonl", ("predict", "A"): "predict_seq.jsonl", ("train", "B"): "seq", ("predict", "B"): "seq"}


class Rejects:
    """Lines and rows that are left out, each with its reason, up to a limit.

    limit: how many are allowed (0: the first one stops). path: JSON-lines file that lists them; made at the first reject.
    kind: the store's; in "predict" the error proposes no flag, as infer.py has none.
    `count` int, `by_reason` Counter keyed by the reason with its numbers taken out.
    """

    def __init__(self, limit: int, path: Path, *, kind: str = "train") -> None:
        self.limit, self.path, self.kind = limit, Path(path), kind
        self.count = 0
        self.by_reason: Counter[str] = Counter()

    def add(self, file: object, line: int | None, reason: str) -> None:
        """Record one reject; UserError names file:line and the reason as soon as there are more than `limit`."""
        self.count += 1
        self.by_reason[_shape_of(reason)] += 1
        if self.count > self.limit:
            where = f"{file}" if line is None else f"{file}:{line}"
            listed = f" ({self.limit:,} rejects before it are listed in {self.path})" if self.count > 1 else ""
            remedy = f"Mend it, or allow rejects: --max_bad_lines N (now {self.limit}) leaves out and lists up to N."
            if self.kind == "predict":
                remedy = f"Mend it, or take it out of the file; as many as the checkpoint was trained with ({self.limit}) are left out."
            raise UserError(f"{where}: {reason}{listed}.\n{remedy}")
        mode = "w" if self.count == 1 else "a"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, mode, encoding="utf-8") as out:
            out.write(json.dumps({"file": str(file), "line": line, "reason": reason}) + "\n")


def _shape_of(reason: str) -> str:
    """A reason without its numbers and quoted parts, so that equal mistakes count together."""
    words = [w for w in reason.split() if not any(c.isdigit() for c in w) and "'" not in w]
    return " ".join(words)[:80]


def first_places(path: Path, most: int = 3) -> dict[str, list[str]]:
    """The first places, `file:line`, of each reason of a file that Rejects wrote; of a long one its first LISTED lines are looked at."""
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, islice(file, LISTED)):
            places = found.setdefault(_shape_of(row["reason"]), [])
            if len(places) < most:
                places.append(row["file"] if row["line"] is None else f"{row['file']}:{row['line']}")
    return found


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere, nothing when switched off. Unit: bytes, rows ..."""

    def __init__(self, name: str, total: int, unit: str, *, enabled: bool, log: Callable[[str], None] = print) -> None:
        self.name, self.total, self.unit, self.log = name, max(int(total), 1), unit, log
        self.done, self._enabled, self._last = 0, enabled, time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=name, unit=unit, unit_scale=True, file=sys.stderr, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """Add `count` units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last >= PLAIN_PROGRESS_SECONDS:
            self._last = time.monotonic()
            self.log(f"{self.name}: {self.done:,} of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)")


class Ragged(NamedTuple):
    """Lists of values, one after another. counts (N) int64, values (sum of counts) int32."""

    counts: np.ndarray
    values: np.ndarray

    def select(self, keep: np.ndarray) -> Ragged:
        """The lists where `keep` (N) bool holds."""
        return Ragged(self.counts[keep], self.values[np.repeat(keep, self.counts)])

    def without_zeros(self) -> Ragged:
        """The lists without their zeros, which are missing values."""
        keep = self.values != 0
        if keep.all():
            return self
        rows = np.repeat(np.arange(len(self.counts)), self.counts)[keep]
        return Ragged(np.bincount(rows, minlength=len(self.counts)).astype(np.int64), self.values[keep])


class FeatureRows(NamedTuple):
    """Feature values of N users or items.

    ids (N) int64, or uint64 creative ids; single (N, F) int32 in the schema's order; multi {feature id: Ragged}.
    """

    ids: np.ndarray
    single: np.ndarray
    multi: dict[str, Ragged]

    def select(self, rows: np.ndarray) -> FeatureRows:
        """The rows where `rows` (N) bool holds."""
        return FeatureRows(self.ids[rows], self.single[rows], {k: v.select(rows) for k, v in self.multi.items()})


@dataclass
class SeqChunk:
    """Users of a piece of a source, in file order, all valid.

    lines (U) int64, counted from 1 within the piece; num_lines: lines of the piece, rejected ones included.
    user_ids (U) int64, or user_names: list of int or str (predict); counts (U) int64 events a user.
    item_ids (E) int64, or uint64 in predict (creative ids of 64 bits occur); odd_items: [(event, creative id that is no number)].
    action_types (E) int8; timestamps (E) int64 in seconds; users, items: features found in the records, or None.
    """

    lines: np.ndarray
    num_lines: int
    user_ids: np.ndarray
    counts: np.ndarray
    item_ids: np.ndarray
    action_types: np.ndarray
    timestamps: np.ndarray
    user_names: list | None = None
    odd_items: list = field(default_factory=list)
    users: FeatureRows | None = None
    items: FeatureRows | None = None
    rejects: list = field(default_factory=list)
    tally: Counter = field(default_factory=Counter)
    last_offset: int = -1


@dataclass(frozen=True)
class Rules:
    """What a sequence must keep.

    num_items: items known (0 = not known beforehand); max_user: largest user id (0 = not known); public: data with a schema.json of
    its own, where a missing action is an exposure.
    """

    kind: str
    schema: Schema
    num_items: int = 0
    max_user: int = 0
    public: bool = False

    @property
    def lenient(self) -> bool:
        """Users to predict must be answered: odd values, a missing profile or time, events out of order are counted, not rejected."""
        return self.kind == "predict"

    @property
    def item_limit(self) -> int:
        return self.num_items or INT32_MAX - 1

    @property
    def user_limit(self) -> int:
        return self.max_user or INT32_MAX - 1

    def to_dict(self) -> dict:
        return {
            "kind": self.kind,
            "schema": self.schema.to_dict(),
            "num_items": self.num_items,
            "max_user": self.max_user,
            "public": self.public,
        }

    @classmethod
    def from_dict(cls, tree: dict) -> Rules:
        return cls(**(tree | {"schema": Schema.from_dict(tree["schema"])}))


def check_sequences(rules: Rules, user_ids: np.ndarray | None, counts: np.ndarray, item_ids: np.ndarray, action_types: np.ndarray,
                    timestamps: np.ndarray) -> dict[int, str]:  # fmt: skip
    """Which users break the rules, and how: {row: reason}. Arrays as in SeqChunk; user_ids None: not checked (predict).

    The order of events is checked in train alone; in predict, sort_events mends it.
    """
    ends = np.cumsum(counts)
    bad: dict[int, str] = {}

    def mark(mask: np.ndarray, reason: Callable[[int], str]) -> None:
        events = np.flatnonzero(mask)
        rows, first = np.unique(np.searchsorted(ends, events, side="right"), return_index=True)
        for row, event in zip(rows.tolist(), events[first].tolist(), strict=True):
            bad.setdefault(row, f"event {event - (ends[row] - counts[row]) + 1}: {reason(event)}")

    if user_ids is not None:
        for row in np.flatnonzero((user_ids < 1) | (user_ids > rules.user_limit)).tolist():
            bad[row] = f"user id {user_ids[row]} is outside 1..{rules.user_limit} (the users of indexer.pkl)"
    if rules.kind == "train":
        for row in np.flatnonzero(counts == 0).tolist():
            bad.setdefault(row, "the user has no event; a sequence needs at least one")
        outside = (item_ids < 1) | (item_ids > rules.item_limit)
        mark(outside, lambda e: f"item id {item_ids[e]} is outside 1..{rules.item_limit} (the items of indexer.pkl)")
    else:
        mark(item_ids < 1, lambda e: f"item id {item_ids[e]} is below 1")
    mark(
        (action_types < 0) | (action_types >= NUM_ACTION_TYPES),
        lambda e: f"action type {action_types[e]} is outside 0..{NUM_ACTION_TYPES - 1}",
    )
    if rules.schema.has_time and not rules.lenient:
        mark(
            _backwards(counts, timestamps),
            lambda e: f"timestamp {timestamps[e]} comes before the one ahead of it, {timestamps[e - 1]}; events are ordered oldest first",
        )
    return bad


def _backwards(counts: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """Which events (E) bool come before the one ahead of them of the same user."""
    out = np.zeros(len(timestamps), dtype=bool)
    out[1:] = timestamps[1:] < timestamps[:-1]
    out[(np.cumsum(counts) - counts)[counts > 0]] = False
    return out


def sort_events(rules: Rules, chunk: SeqChunk, tally: Counter) -> None:
    """Put events of users to predict in the order of their times, equal ones as they stand; the users this changes are counted."""
    if not (rules.lenient and rules.schema.has_time):
        return
    backwards = _backwards(chunk.counts, chunk.timestamps)
    if not backwards.any():
        return
    rows = np.repeat(np.arange(len(chunk.counts)), chunk.counts)
    tally["coerced: users whose events were out of order, sorted by time"] += len(np.unique(rows[backwards]))
    order = np.lexsort((chunk.timestamps, rows))  # stable
    places = np.argsort(order)
    chunk.odd_items = sorted((int(places[event]), name) for event, name in chunk.odd_items)
    chunk.item_ids, chunk.action_types, chunk.timestamps = (a[order] for a in (chunk.item_ids, chunk.action_types, chunk.timestamps))


def drop_rejected(chunk: SeqChunk, bad: dict[int, str]) -> SeqChunk:
    """The chunk without the users in `bad` {row: reason}, which become rejects of it."""
    if not bad:
        return chunk
    keep = np.ones(len(chunk.counts), dtype=bool)
    keep[list(bad)] = False
    events = np.repeat(keep, chunk.counts)
    places = np.cumsum(events) - 1
    chunk.rejects += [(int(chunk.lines[row]), reason) for row, reason in sorted(bad.items())]
    chunk.odd_items = [(int(places[e]), name) for e, name in chunk.odd_items if events[e]]
    if chunk.user_names is not None:
        chunk.user_names = [name for name, kept in zip(chunk.user_names, keep.tolist(), strict=True) if kept]
    chunk.users = None if chunk.users is None else chunk.users.select(keep)
    chunk.lines, chunk.user_ids, chunk.counts = chunk.lines[keep], chunk.user_ids[keep], chunk.counts[keep]
    chunk.item_ids, chunk.action_types, chunk.timestamps = chunk.item_ids[events], chunk.action_types[events], chunk.timestamps[events]
    return chunk


def parts(data_path: Path, name: str) -> list[Path]:
    """The parquet files of one item of layout B, sorted: name.parquet, name (a file), or name/**/*.parquet. Empty: absent."""
    for path in (data_path / f"{name}.parquet", data_path / name):
        if path.is_file():
            return [path]
    folder = data_path / name
    if not folder.is_dir():
        folder = data_path / f"{name}.parquet"
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".", "_"))] if folder.is_dir() else []
    return sorted(p for p in found if p.suffix in (".parquet", ".parq", ".pq") or p.name.startswith("part"))


class Source(NamedTuple):
    """Where the raw data of a store lies. layout "A" or "B"; files: every file that matters, absolute."""

    data_path: Path
    kind: str
    layout: str
    schema: Schema
    files: tuple[Path, ...]

    @property
    def public(self) -> bool:
        return (self.data_path / "schema.json").exists()


def find_source(data_path: Path, kind: str) -> Source:
    """Tell the layout of a data folder.

    UserError where the folder or a needed file is missing, or sequences of both layouts or of none are there.
    """
    data_path = Path(data_path)
    if not data_path.is_dir():
        raise UserError(f"{data_path}: no such data folder ({'a file lies there' if data_path.exists() else 'nothing lies there'}).\n"
                        "Give the folder that holds seq.jsonl (layout A) or seq/ (layout B): --data_path or TRAIN_DATA_PATH.")  # fmt: skip
    jsonl = data_path / SEQUENCES[kind, "A"]
    parquet = parts(data_path, SEQUENCES[kind, "B"])
    if jsonl.exists() == bool(parquet):
        raise UserError(f"{data_path}: {'both' if parquet else 'none'} of {jsonl.name} (layout A) and seq/*.parquet or seq.parquet "
                        f"(layout B) found; exactly one is expected.\nFound: {_listing(data_path)}")  # fmt: skip
    layout = "B" if parquet else "A"
    schema = Schema.load(data_path)
    files = [jsonl] if layout == "A" else parquet
    files += [p for p in (data_path / n for n in ("indexer.pkl", "schema.json")) if p.exists()]
    if layout == "A":
        extra = "predict_seq_offsets.pkl" if kind == "predict" else "seq_offsets.pkl"
        files += [p for p in (data_path / n for n in ("item_feat_dict.json", extra)) if p.exists()]
    else:
        files += parts(data_path, "item_feat") + parts(data_path, "user_feat")
    if kind == "predict":
        candidates = [data_path / "predict_set.jsonl"] if (data_path / "predict_set.jsonl").exists() else parts(data_path, "candidate")
        if not candidates:
            raise UserError(f"{data_path}: no candidates: neither predict_set.jsonl nor candidate/ found.\nFound: {_listing(data_path)}")
        files += candidates
    source = Source(data_path, kind, layout, schema, tuple(files))
    _check_complete(source)
    return source


def _check_complete(source: Source) -> None:
    """UserError where a file that the layout cannot do without is missing."""
    folder, schema = source.data_path, source.schema
    if not (folder / "indexer.pkl").exists() and not (source.kind == "train" and source.layout == "B" and source.public):
        raise UserError(f"{folder / 'indexer.pkl'}: missing; the ids of this data cannot be read without it.\n"
                        "Only converted data (layout B with a schema.json) may do without. Found: " + _listing(folder))  # fmt: skip
    if source.layout == "B":
        for side in ("user", "item"):
            if (schema.select(side, "single") or schema.select(side, "multi")) and not parts(folder, f"{side}_feat"):
                raise UserError(f"{folder}: {side}_feat/ (or {side}_feat.parquet) is missing, and the schema lists {side} features.\n"
                                f"Add it, or list the features that exist in schema.json. Found: {_listing(folder)}")  # fmt: skip


def _listing(folder: Path) -> str:
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "an empty folder"


def add_rejects(rejects: Rejects, file: Path, first_line: int, found: list) -> None:
    """Hand a piece's rejects [(line within the piece, reason)] on, with `first_line` lines ahead of the piece."""
    for line, reason in found:
        rejects.add(file, first_line + line, reason)


def numbered(chunks: Iterator[SeqChunk], file: Path, rejects: Rejects, tally: Counter, what: str = "lines") -> Iterator[SeqChunk]:
    """Chunks of one file with line numbers of the whole file; their rejects and counts are handed on."""
    lines = 0
    for chunk in chunks:
        add_rejects(rejects, file, lines, chunk.rejects)
        tally.update(chunk.tally)
        chunk.lines = chunk.lines + lines
        lines += chunk.num_lines
        tally[f"read: {what}"] += chunk.num_lines
        yield chunk
