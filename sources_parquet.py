"""Reads layout B (parquet) into column chunks by record batches, without a Python loop over users or events.

Must not write the store. A column of another type is read where every value fits (and counted), else it is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from columns import is_number
from errors import UserError
from schema import EXPOSURE, IGNORED_FEATURES
from sources import INT32_MAX, FeatureRows, Progress, Ragged, Rules, SeqChunk, check_sequences, drop_rejected, sort_events
from sources_jsonl import MISSING_TIMES, ODD_ITEM

USERS_A_BATCH = 8192  # of about 100 events: some 20 MB decoded
ROWS_A_BATCH = 65536


def num_rows(files: list[Path]) -> int:
    """Rows of parquet files, from their footers."""
    return sum(open_parquet(path).metadata.num_rows for path in files)


def largest(path: Path, column: str) -> int:
    """The largest value of an id column of one file, 0 where it has no rows."""
    return max(
        (
            int(integers(b.column(column), f"{path}: column '{column}'", Counter())[0].max(initial=0))
            for _, b in batches(path, (column,), ROWS_A_BATCH)
        ),
        default=0,
    )


def read_sequences(path: Path, rules: Rules, progress: Progress) -> Iterator[SeqChunk]:
    """The users of one file of seq/, in file order; `lines` are row numbers from 1, `users` and `items` stay None."""
    for _, batch in batches(path, ("user_id", "seq"), USERS_A_BATCH):
        tally: Counter = Counter()
        chunk = _sequence_chunk(path, batch, rules, tally)
        chunk.num_lines, chunk.tally = batch.num_rows, tally
        progress.update(batch.num_rows)
        yield chunk


def _sequence_chunk(path: Path, batch: pa.RecordBatch, rules: Rules, tally: Counter) -> SeqChunk:
    seq = batch.column("seq")
    if not (is_list(seq.type) and pa.types.is_struct(seq.type.value_type)):
        raise UserError(f"{path}: column 'seq' is of type {seq.type}; expected list<struct<item_id, action_type, timestamp>>.")
    fields = {seq.type.value_type.field(k).name for k in range(seq.type.value_type.num_fields)}
    needed = {"item_id", "action_type"} | ({"timestamp"} if rules.schema.has_time else set())
    if needed - fields:
        raise UserError(
            f"{path}: the records of column 'seq' lack {', '.join(sorted(needed - fields))}; found {', '.join(sorted(fields))}."
        )
    counts = list_lengths(seq)
    events = seq.flatten()
    user_ids, no_user = integers(batch.column("user_id"), f"{path}: column 'user_id'", tally)
    bad = dict.fromkeys(np.flatnonzero(no_user).tolist(), "user_id is null")
    rows = np.repeat(np.arange(len(counts)), counts)

    def read(name: str, *, odd: bool = False) -> tuple[np.ndarray, np.ndarray, list]:
        column = pc.struct_field(events, name)
        where = f"{path}: column 'seq', field '{name}'"
        if name == "timestamp" and pa.types.is_timestamp(column.type):  # as plain numbers they would count its unit
            tally[f"coerced: {path.name}: column 'seq', field 'timestamp' is of type {column.type}, read as seconds since 1970"] += len(
                column
            )
            column = pc.cast(pc.cast(column, pa.timestamp("s", column.type.tz), safe=False), pa.int64())
        return creative_ids(column, where, tally) if odd else (*integers(column, where, tally), [])

    def missing(mask: np.ndarray, name: str) -> None:
        for row in np.unique(rows[mask]).tolist():
            bad.setdefault(row, f"{name} is null in an event")

    items, null, odd_items = read("item_id", odd=rules.kind == "predict")
    missing(null, "item_id")
    actions, null, _ = read("action_type")
    if rules.public or rules.kind == "predict":
        actions[null] = EXPOSURE
        tally["coerced: missing action types, read as exposures"] += int(null.sum())
    else:
        missing(null, "action_type")
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    positions = np.arange(len(rows)) - starts
    times, null, _ = read("timestamp") if "timestamp" in fields else (positions, np.zeros(len(rows), dtype=bool), [])
    if not rules.schema.has_time:
        times = np.where(null, positions, times)
    elif rules.lenient:
        ahead = np.maximum.accumulate(np.where(null, -1, np.arange(len(rows))))
        times = np.where(ahead >= starts, times[ahead], 0)
        tally[MISSING_TIMES] += int(null.sum())
    else:
        missing(null, "timestamp")
    chunk = SeqChunk(np.arange(1, len(counts) + 1), 0, user_ids, counts, items, actions, times, odd_items=odd_items)
    for row, reason in check_sequences(rules, user_ids if rules.kind == "train" else None, counts, items, actions, times).items():
        bad.setdefault(row, reason)
    chunk = drop_rejected(chunk, bad)
    sort_events(rules, chunk, tally)
    chunk.action_types = chunk.action_types.astype(np.int8)
    return chunk


def read_features(
    files: list[Path], side: str, rules: Rules, progress: Progress, tally: Counter
) -> Iterator[tuple[Path, int, FeatureRows, list]]:
    """Rows of user_feat/ or item_feat/ in bounded pieces.

    Yields (file, rows of it ahead of the piece, rows, rejects [(row of the piece, reason)]).
    Nulls are 0 (missing); the ids are int64, or uint64 for items in predict.
    """
    for path in files:
        key = f"{side}_id"
        wanted = [f.id for kind in ("single", "multi") for f in rules.schema.select(side, kind)]
        found = open_parquet(path).schema_arrow.names
        for name in sorted(set(wanted) - set(found)):
            tally[f"missing: {side} feature {name} has no column in {path.parent.name}/{path.name}"] += 1
        for name in sorted(set(found) - set(wanted) - {key} - IGNORED_FEATURES):
            tally[f"ignored: {side} feature {name[:40]!r} is not in the schema"] += 1
        for first, batch in batches(path, (key, *(n for n in wanted if n in found)), ROWS_A_BATCH, needed=(key,)):
            rows, rejects = _feature_rows(path, batch, side, rules, tally)
            progress.update(batch.num_rows)
            yield path, first, rows, rejects


def _feature_rows(path: Path, batch: pa.RecordBatch, side: str, rules: Rules, tally: Counter) -> tuple[FeatureRows, list]:
    bad: dict[int, str] = {}

    def checked(values: np.ndarray, name: str, rows: np.ndarray | None) -> np.ndarray:
        wrong = (values < 0) | (values > INT32_MAX)
        if wrong.any():
            if rules.lenient:
                tally[f"coerced: {side} feature {name}: not a whole number from 0 up, read as missing"] += int(wrong.sum())
            else:
                places = np.flatnonzero(wrong)
                for row, value in zip((places if rows is None else rows[places]).tolist(), values[places].tolist(), strict=True):
                    bad.setdefault(row, f"{side} feature {name} is {value}; expected a whole number from 0 to {INT32_MAX}")
            values = np.where(wrong, 0, values)
        return values.astype(np.int32)

    for name in set(batch.schema.names) - {f"{side}_id"}:
        if batch.num_rows and batch.column(name).null_count == batch.num_rows:
            tally[f"missing: {side} feature {name} is null in all of these rows of {path.parent.name}/{path.name}"] += batch.num_rows
    single = np.zeros((batch.num_rows, len(rules.schema.select(side, "single"))), dtype=np.int32)
    for column, feature in enumerate(rules.schema.select(side, "single")):
        if feature.id in batch.schema.names:
            values, _ = integers(batch.column(feature.id), f"{path}: column '{feature.id}'", tally)
            single[:, column] = checked(values, feature.id, None)
    multi = {}
    for feature in rules.schema.select(side, "multi"):
        counts, values = np.zeros(batch.num_rows, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if feature.id in batch.schema.names:
            counts, values = _lists(batch.column(feature.id), f"{path}: column '{feature.id}'", tally)
        rows = np.repeat(np.arange(len(counts)), counts)
        multi[feature.id] = Ragged(counts, checked(values, feature.id, rows)).without_zeros()
    column, where = batch.column(f"{side}_id"), f"{path}: column '{side}_id'"
    if side == "item" and rules.kind == "predict":
        ids, null, odd = creative_ids(column, where, tally)
        bad |= {row: f"item_id {name!r} is not a number" for row, name in odd}
    else:
        ids, null = integers(column, where, tally)
    bad |= dict.fromkeys(np.flatnonzero(null).tolist(), f"{side}_id is null")
    limit = rules.item_limit if side == "item" and rules.kind == "train" else None
    wrong = ids < 1 if limit is None else (ids < 1) | (ids > limit)
    for row in np.flatnonzero(wrong & ~null).tolist():
        bad.setdefault(
            row, f"{side} id {ids[row]} is " + ("below 1" if limit is None else f"outside 1..{limit} (the items of indexer.pkl)")
        )
    rows = FeatureRows(ids, single, multi)
    if bad:
        keep = np.ones(len(ids), dtype=bool)
        keep[list(bad)] = False
        rows = rows.select(keep)
    return rows, sorted((row + 1, reason) for row, reason in bad.items())


def integers(column: pa.Array, where: str, tally: Counter) -> tuple[np.ndarray, np.ndarray]:
    """A column as int64 (N), 0 where null, and the mask of nulls (N). UserError where the values are no whole numbers."""
    null = column.is_null().to_numpy(zero_copy_only=False)
    if column.type != pa.int64():
        column = _cast(column, pa.int64(), where, tally)
    values = (pc.fill_null(column, 0) if null.any() else column).to_numpy(zero_copy_only=False)
    return values if values.flags.writeable else values.copy(), null


def _cast(column: pa.Array, target: pa.DataType, where: str, tally: Counter) -> pa.Array:
    if not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        if pa.types.is_boolean(column.type) or pa.types.is_temporal(column.type):
            raise UserError(f"{where} is of type {column.type}; expected whole numbers.")
        tally[f"coerced: {where.rsplit('/', 1)[-1]} is of type {column.type}, read as whole numbers"] += len(column)
    try:
        return pc.cast(column, target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{where} is of type {column.type}; expected whole numbers: {str(error).splitlines()[0][:120]}") from None


def creative_ids(column: pa.Array, where: str, tally: Counter) -> tuple[np.ndarray, np.ndarray, list]:
    """Ids as uint64 (N), the mask of nulls (N), and [(place, id)] of those that are no number (their value is ODD_ITEM)."""
    null = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        names = column.to_pylist()
        odd = [(k, name) for k, name in enumerate(names) if name is not None and not is_number(name)]
        values = [0 if name is None else int(name) if is_number(name) else ODD_ITEM for name in names]
        return np.fromiter(values, np.uint64, len(names)), null, odd
    if column.type != pa.uint64():
        column = _cast(column, pa.int64(), where, tally)
        if column.null_count < len(column) and pc.min(column).as_py() < 0:
            raise UserError(
                f"{where} holds {pc.min(column).as_py()}; ids are not negative (64-bit creative ids need type uint64 or string)."
            )
        column = pc.cast(column, pa.uint64())
    return (pc.fill_null(column, 0) if null.any() else column).to_numpy(zero_copy_only=False), null, []


def _lists(column: pa.Array, where: str, tally: Counter) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists as counts (N) int64 and values int64 (0 where null); a plain column is lists of one."""
    if is_list(column.type):
        return list_lengths(column), integers(column.flatten(), where, tally)[0]
    if pa.types.is_null(column.type):
        return np.zeros(len(column), dtype=np.int64), np.zeros(0, dtype=np.int64)
    values, null = integers(column, where, tally)
    tally[f"coerced: {where.rsplit('/', 1)[-1]}: one value where the schema says a list"] += len(values)
    return (~null).astype(np.int64), values[~null]


def is_list(kind: pa.DataType) -> bool:
    """Whether a parquet type is a list of any of the three sorts."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_lengths(column: pa.Array) -> np.ndarray:
    """The lengths (N) int64 of a column of lists, 0 where null."""
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def open_parquet(path: Path, needed: tuple[str, ...] = ()) -> pq.ParquetFile:
    """A parquet file that has the columns `needed`; UserError where it is damaged or lacks one.

    Read through a buffer of 1 MiB a column: otherwise a whole row group of wide vectors would be loaded at once.
    """
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not readable as parquet: {str(error).splitlines()[0][:160]}.\nCopy the file anew; it may be cut off."
        ) from None
    found = file.schema_arrow.names
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{path}: column {', '.join(map(repr, missing))} is missing; it has {', '.join(found[:20])}.")
    return file


def batches(path: Path, columns: tuple[str, ...], size: int, needed: tuple[str, ...] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Record batches of at most `size` rows with the number of rows ahead of each.

    UserError where one of the columns `needed` (None: all) is missing or the data is broken.
    """
    file = open_parquet(path, columns if needed is None else needed)
    first = 0
    try:
        for batch in file.iter_batches(size, columns=list(columns), use_threads=True):
            yield first, batch
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: broken after row {first:,}: {str(error).splitlines()[0][:160]}.\nCopy the file anew.") from None
