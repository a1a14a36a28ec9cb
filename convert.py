"""Turns a public data set into a data folder: the parquet layout (seq/, item_feat/, user_feat/, indexer.pkl) and schema.json.

The recipes of converters/ read; here events are checked, ordered, numbered and written, once for all formats.
Must not know the format of any source.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atomic import fsync_folder, remove, sync_tree, temporary_folder
from converters import amazon, movielens, recbole, s3rec
from converters.raw import RawColumn, RawEvents, RawId, RawSet, RawTable
from errors import ArgumentParser, UserError, disk_full, run_cli
from schema import EXPOSURE, Feature, Schema

RECIPES: dict[str, Callable[[Path], RawSet]] = {
    "s3rec": s3rec.read,
    "movielens": movielens.read,
    "amazon": amazon.read,
    "recbole": recbole.read,
}
# In the order in which an old result is removed; a new one comes in the other way round. A folder without seq is no data folder: whenever
# this is cut short, nobody takes files of two conversions for one.
WRITTEN = ("seq", "item_feat", "user_feat", "indexer.pkl", "schema.json")
EVENTS_PER_PART = 1_000_000  # a part is about 10 MB, and some 60 MB while it is made
ROWS_PER_PART = 500_000
STRUCT = pa.struct([("item_id", pa.int64()), ("action_type", pa.int32()), ("timestamp", pa.int64())])


@dataclass(frozen=True)
class Options:
    """min_rating: None keeps all. k_core: 0 is off. repeats: None is the recipe's choice, else error, keep or drop."""

    min_rating: float | None = None
    k_core: int = 0
    repeats: str | None = None
    float_buckets: int = 10
    overwrite: bool = False


@dataclass
class Numbered:
    """Events by user, oldest first: user_offsets int64 (U+1), item_ids int64 (E) from 1, timestamps int64 (E).

    users, items: raw ids; the id at position i has the number i + 1.
    """

    user_offsets: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    has_time: bool
    users: list[RawId]
    items: list[RawId]


@dataclass
class FeatureTable:
    """The numbered features of one side: a column of the parquet table and {raw value: number} a feature."""

    features: list[Feature]
    columns: list[pa.Array]
    values: dict[str, dict[RawId, int]]


# ---- events ---------------------------------------------------------------------------------------------------------


def number_ids(codes: np.ndarray, raw: Sequence[RawId], keep_numbers: bool) -> tuple[np.ndarray, list[RawId]]:
    """Numbers from 1 in order of first appearance, or the raw ints themselves where these are 1..N and `keep_numbers`.

    codes: int (E), positions in `raw`. Returns (number of each entry of `raw`, int64, 0 where it does not occur;
    the raw ids that occur, in the order of their numbers).
    """
    first = np.full(len(raw), -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # the last write wins: the first appearance
    occurring = np.flatnonzero(first >= 0)
    order = occurring[np.argsort(first[occurring])]
    if keep_numbers and all(isinstance(raw[i], int) for i in occurring):
        own = np.array([raw[i] for i in occurring], dtype=np.int64)
        if len(own) and own.min() == 1 and own.max() == len(own):  # raw ids are distinct, so 1..N without a gap
            order = occurring[np.argsort(own)]
    numbers = np.zeros(len(raw), dtype=np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers, [raw[i] for i in order.tolist()]


def find_repeats(order: np.ndarray, events: RawEvents) -> np.ndarray:
    """Rows (ascending) that are equal in user, item and time to an earlier row. order: rows by user, then time."""
    assert events.timestamps is not None
    users, times = events.user_codes[order], events.timestamps[order]
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = np.zeros(len(order), dtype=bool)
    tied[1:] |= same
    tied[:-1] |= same
    rows = order[tied]  # by user, time, row; the sort below is stable
    rows = rows[np.lexsort((events.item_codes[rows], events.timestamps[rows], events.user_codes[rows]))]
    equal = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for column in (events.user_codes, events.timestamps, events.item_codes):
        equal &= column[rows[1:]] == column[rows[:-1]]
    return np.sort(rows[1:][equal])


def _core(keep: np.ndarray, events: RawEvents, k: int) -> np.ndarray:
    """The largest part of the kept events in which each user and each item has k events or more."""
    while True:
        users = np.bincount(events.user_codes[keep], minlength=len(events.raw_users))
        items = np.bincount(events.item_codes[keep], minlength=len(events.raw_items))
        kept = keep & (users >= k)[events.user_codes] & (items >= k)[events.item_codes]
        if kept.sum() == keep.sum():
            return kept
        keep = kept


def _filter(events: RawEvents, order: np.ndarray, options: Options, notes: list[str]) -> np.ndarray:
    """bool (E), True = keep. Says in `notes` how many events each filter removed."""
    keep = np.ones(len(events.user_codes), dtype=bool)
    if events.timestamps is not None:
        repeats, policy = find_repeats(order, events), options.repeats or events.repeats
        if len(repeats) and policy == "error":
            where = events.locate(int(repeats[0]))
            raise UserError(f"{where}: user, item and time repeat an earlier line ({len(repeats):,} lines do); expected each event once.\n"
                            "Mend the file, or pass --repeats drop (first one stays) or --repeats keep.")  # fmt: skip
        if policy == "drop":
            keep[repeats] = False
        if len(repeats):
            done = "dropped" if policy == "drop" else "kept"
            notes.append(f"{len(repeats):,} events repeat an earlier one in user, item and time: {done}")
    if options.min_rating is not None:
        if events.ratings is None:
            raise UserError("--min_rating: this source has no ratings. Leave the option out.")
        unrated = np.flatnonzero(np.isnan(events.ratings))
        if len(unrated):
            where = events.locate(int(unrated[0]))
            raise UserError(f"{where}: no rating; --min_rating needs one in each record ({len(unrated):,} have none).")
        before = int(keep.sum())
        keep &= events.ratings >= options.min_rating
        notes.append(f"--min_rating {options.min_rating:g} removed {before - int(keep.sum()):,} events")
    if options.k_core > 0:
        before = int(keep.sum())
        keep = _core(keep, events, options.k_core)
        notes.append(f"--k_core {options.k_core} removed {before - int(keep.sum()):,} events")
    if not keep.any():
        raise UserError(f"no event is left of {len(keep):,}; expected some. Relax --min_rating or --k_core.")
    return keep


def order_events(events: RawEvents, options: Options, notes: list[str]) -> Numbered:
    """Check, filter, sort (by user, then time, ties by the file's order) and number the events.

    Without timestamps an event's time is its position, 0, 1, 2 ..., in its user's sequence.
    """
    has_time = events.timestamps is not None
    keys = (events.timestamps, events.user_codes) if has_time else (events.user_codes,)
    order = np.lexsort(keys)  # stable
    keep = _filter(events, order, options, notes)
    order = order[keep[order]]
    user_numbers, users = number_ids(events.user_codes[keep], events.raw_users, events.keep_numbers)
    item_numbers, items = number_ids(events.item_codes[keep], events.raw_items, events.keep_numbers)
    numbers = user_numbers[events.user_codes[order]]
    if (numbers[1:] < numbers[:-1]).any():
        order = order[np.argsort(numbers, kind="stable")]
    lengths = np.bincount(numbers, minlength=len(users) + 1)[1:]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = events.timestamps[order] if has_time else np.arange(len(order)) - np.repeat(offsets[:-1], lengths)
    return Numbered(offsets, item_numbers[events.item_codes[order]], times.astype(np.int64), has_time, users, items)


# ---- features -------------------------------------------------------------------------------------------------------


def bucket_floats(values: np.ndarray, num_buckets: int) -> tuple[list[str | None], int]:
    """Quantile buckets of numbers: (label or None where NaN, number of buckets). Few distinct values get one bucket each.

    values: float64 (N). A label is the bucket's largest value: "<=3.5".
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return [None] * len(values), 0
    edges = np.unique(finite)
    if len(edges) > num_buckets:
        edges = np.unique(np.quantile(finite, np.arange(1, num_buckets + 1) / num_buckets, method="inverted_cdf"))
    labels = [f"<={edge:.12g}" for edge in edges]
    rows = np.searchsorted(edges, np.where(np.isfinite(values), values, edges[0]))
    return [labels[row] if ok else None for row, ok in zip(rows.tolist(), np.isfinite(values).tolist(), strict=True)], len(edges)


def _index_values(column: RawColumn, rows: Sequence[object]) -> dict[RawId, int]:
    """{raw value: number from 1}, in order of first appearance; the values' own numbers where these are 1..N."""
    flat = (value for row in rows for value in row) if column.kind == "multi" else (value for value in rows if value is not None)
    distinct = list(dict.fromkeys(flat))
    if column.keep_numbers and all(isinstance(v, int) for v in distinct) and sorted(distinct) == list(range(1, len(distinct) + 1)):
        return {value: value for value in sorted(distinct)}
    return {str(value): number for number, value in enumerate(distinct, 1)}


def _place(kind: str, rows: Sequence, positions: np.ndarray, index: dict[RawId, int], size: int) -> pa.Array:
    """The parquet column of `size` rows: rows[j] stands at positions[j]; null where nothing is known."""
    by_text = {str(value): number for value, number in index.items()}
    if kind != "multi":
        out = np.zeros(size, dtype=np.int64)
        out[positions] = [0 if value is None else by_text[str(value)] for value in rows]
        return pa.array(out, mask=out == 0)
    out_lists: list[list[int] | None] = [None] * size
    for position, row in zip(positions.tolist(), rows, strict=True):
        if row:
            out_lists[position] = [by_text[str(value)] for value in row]
    return pa.array(out_lists, type=pa.list_(pa.int64()))


def number_features(
    tables: Sequence[RawTable], side: str, raw_ids: Sequence[RawId], taken: set[str], options: Options, notes: list[str]
) -> FeatureTable:
    """Number the attributes of those ids that have events; the records of others are counted in `notes`.

    taken: feature ids in use; a name that occurs on both sides gets its side in front.
    """
    result = FeatureTable([], [], {})
    number_of = {raw: i for i, raw in enumerate(raw_ids)}
    for table in (t for t in tables if t.side == side):
        known = [(row, number_of[raw]) for row, raw in enumerate(table.ids) if raw in number_of]
        positions = np.array([position for _, position in known], dtype=np.int64)
        if ignored := len(table.ids) - len(known):
            notes.append(f"{ignored:,} {side}s of {Path(table.path).name} have no event and are ignored")
        if missing := len(raw_ids) - len(known):
            notes.append(f"{missing:,} {side}s with events are not in {Path(table.path).name}: their features are missing")
        for column in table.columns:
            rows = [column.values[row] for row, _ in known]
            if column.kind == "float":
                rows, buckets = bucket_floats(np.array(rows, dtype=np.float64), options.float_buckets)
                notes.append(f"{side} feature {column.id}: numbers put into {buckets} quantile buckets")
            index = _index_values(column, rows)
            if not index:
                notes.append(f"{side} feature {column.id} has no value and is left out")
                continue
            name = column.id.replace("/", "_").lstrip(".") or "feature"
            name = name if name not in taken else f"{side}_{name}"
            taken.add(name)
            kind = "multi" if column.kind == "multi" else "single"
            result.features.append(Feature(name, side, kind, cardinality=len(index), name=column.id))
            result.columns.append(_place(column.kind, rows, positions, index, len(raw_ids)))
            result.values[name] = index
    return result


def plain_keys(raw_ids: Sequence[RawId]) -> list[RawId]:
    """Creative ids as ints where every one is a whole number in plain digits (below 2**64), else all as text: "007" stays itself."""
    if all(isinstance(raw, int) or (raw.isascii() and raw.isdigit() and str(int(raw)) == raw) for raw in raw_ids):
        numbers = [int(raw) for raw in raw_ids]
        if all(0 <= number < 2**64 for number in numbers):
            return numbers
    return [str(raw) for raw in raw_ids]


# ---- writing --------------------------------------------------------------------------------------------------------


def _write_seq(folder: Path, data: Numbered) -> None:
    folder.mkdir()
    offsets, part, start, num_users = data.user_offsets, 0, 0, len(data.users)
    while start < num_users:
        stop = int(np.searchsorted(offsets, offsets[start] + EVENTS_PER_PART, side="right")) - 1
        stop = min(max(stop, start + 1), num_users)
        low, high = int(offsets[start]), int(offsets[stop])
        actions = np.full(high - low, EXPOSURE, dtype=np.int32)
        columns = [pa.array(data.item_ids[low:high]), pa.array(actions), pa.array(data.timestamps[low:high])]
        records = pa.StructArray.from_arrays(columns, fields=list(STRUCT))
        lists = pa.ListArray.from_arrays(pa.array((offsets[start : stop + 1] - low).astype(np.int32)), records)
        users = pa.array(np.arange(start + 1, stop + 1, dtype=np.int64))
        pq.write_table(pa.table({"user_id": users, "seq": lists}), folder / f"part-{part:05d}.parquet", row_group_size=65_536)
        part, start = part + 1, stop


def _write_features(folder: Path, id_name: str, size: int, features: FeatureTable) -> None:
    folder.mkdir()
    names = [id_name, *(feature.id for feature in features.features)]
    ids = pa.array(np.arange(1, size + 1, dtype=np.int64))
    table = pa.Table.from_arrays([ids, *features.columns], names=names)
    for part, start in enumerate(range(0, size, ROWS_PER_PART)):
        pq.write_table(table.slice(start, ROWS_PER_PART), folder / f"part-{part:05d}.parquet")


def write_folder(out: Path, data: Numbered, items: FeatureTable, users: FeatureTable) -> Schema:
    """Write the data folder; it is made beside `out` and moved in at the end, so that a failure leaves `out` as it was."""
    schema = Schema((*items.features, *users.features), data.has_time)
    indexer = {
        "u": {str(raw): number for number, raw in enumerate(data.users, 1)},
        "i": {raw: number for number, raw in enumerate(plain_keys(data.items), 1)},
        "f": items.values | users.values,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(out) as temporary:
            _write_seq(temporary / "seq", data)
            _write_features(temporary / "item_feat", "item_id", len(data.items), items)
            _write_features(temporary / "user_feat", "user_id", len(data.users), users)
            with open(temporary / "indexer.pkl", "wb") as file:
                pickle.dump(indexer, file, protocol=4)
            (temporary / "schema.json").write_text(json.dumps(schema.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            sync_tree(temporary)
            out.mkdir(parents=True, exist_ok=True)
            for name in WRITTEN:
                remove(out / name)
            fsync_folder(out)
            for name in reversed(WRITTEN):
                os.replace(temporary / name, out / name)
            fsync_folder(out)
    except OSError as error:
        raise disk_full(error, out) or error from None
    return schema


def check_out(out: Path, overwrite: bool) -> None:
    """UserError when `out` cannot be written to without loss. --overwrite replaces what this script writes and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: a file; expected a new or empty folder for the result.")
    present = sorted(path.name for path in out.iterdir())
    if present and not overwrite:
        raise UserError(f"{out}: not empty (holds {', '.join(present[:5])}). Name another folder, or pass --overwrite.")
    if foreign := [name for name in present if name not in WRITTEN]:
        raise UserError(f"{out}: holds {', '.join(foreign[:5])}, which convert.py did not write; --overwrite replaces only its own files.\n"
                        "Name another folder, or move those away.")  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------------


def _summary(data: Numbered, schema: Schema, tables: Sequence[FeatureTable], notes: Sequence[str]) -> list[str]:
    num_users, num_items, num_events = len(data.users), len(data.items), len(data.item_ids)
    lengths = np.diff(data.user_offsets)
    lines = [f"users {num_users:,}, items {num_items:,}, events {num_events:,}, density {num_events / (num_users * num_items):.4%}"]
    lines.append(f"events a user: {lengths.min():,} to {lengths.max():,}, mean {lengths.mean():.2f}, median {np.median(lengths):g}")
    if schema.has_time:
        first, last = (_when(int(t)) for t in (data.timestamps.min(), data.timestamps.max()))
        lines.append(f"time: {first} to {last} (UTC)")
    else:
        lines.append("time: none in the source; positions 0, 1, 2 ... are written (has_time: false)")
    for table in tables:
        for feature, column in zip(table.features, table.columns, strict=True):
            have = 1 - column.null_count / len(column)
            what = f"{feature.kind}, {feature.cardinality:,} values, {have:.1%} of {feature.side}s have it"
            lines.append(f"{feature.side} feature {feature.id}: {what}")
    if short := int((lengths < 3).sum()):
        lines.append(f"note: {short:,} users have fewer than 3 events, the least that leave-one-out needs")
    return lines + [f"note: {note}" for note in notes]


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def convert(kind: str, source: Path, out: Path, options: Options = Options(), log: Callable[[str], object] = print) -> Schema:
    """Convert `source`, of the format `kind` (a key of RECIPES), to the data folder `out`; print a summary; return its schema.

    Errors: UserError for a source that is missing or malformed (file:line, found, expected), and for an `out` that is in use.
    """
    source, out = Path(source), Path(os.path.abspath(out))  # absolute, so that "." has a name
    check_out(out, options.overwrite)
    begin = time.perf_counter()
    log(f"reading {source} ({kind})")
    raw = RECIPES[kind](source)
    notes = list(raw.notes)
    log(f"read {len(raw.events.user_codes):,} events in {time.perf_counter() - begin:.1f} s; ordering and numbering")
    tables, data = raw.tables, order_events(raw.events, options, notes)
    del raw  # the file's order is no longer needed: a third of the memory
    taken = {"user_id", "item_id"}
    items = number_features(tables, "item", data.items, taken, options, notes)
    users = number_features(tables, "user", data.users, taken, options, notes)
    schema = write_folder(out, data, items, users)
    for line in _summary(data, schema, (items, users), notes):
        log(line)
    log(f"wrote {out} in {time.perf_counter() - begin:.1f} s; train on it: python main.py --config configs/public.yaml --data_path {out}")
    return schema


def _parser() -> ArgumentParser:
    def count(text: str) -> int:
        if not text.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
        return int(text)

    def buckets(text: str) -> int:
        if count(text) < 1:
            raise argparse.ArgumentTypeError("expected 1 bucket or more")
        return count(text)

    parser = ArgumentParser(prog="convert.py", description="Turn a public data set into a data folder (parquet + schema.json).")
    parser.add_argument("format", choices=sorted(RECIPES), help="format of the source")
    parser.add_argument("source", metavar="SOURCE", type=Path,
                        help="s3rec: the .txt; movielens: the folder; amazon: the review file; recbole: the set's folder")  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="data folder to write; new or empty")
    parser.add_argument("--min_rating", type=float, default=None, help="keep events of this rating or more (default: keep all)")
    parser.add_argument("--k_core", type=count, default=0,
                        help="keep users and items with this many events or more, repeated until stable (default 0: off)")  # fmt: skip
    parser.add_argument("--repeats", choices=("error", "keep", "drop"), default=None,
                        help="events equal to an earlier one in user, item, time (default: error for movielens, else keep)")  # fmt: skip
    parser.add_argument("--float_buckets", type=buckets, default=10, help="quantile buckets for features that are numbers (default 10)")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier conversion in OUT")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        args = _parser().parse_args(argv)
        convert(args.format, args.source, args.out, Options(args.min_rating, args.k_core, args.repeats, args.float_buckets, args.overwrite))

    return run_cli(run, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
