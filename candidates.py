"""Reads the candidates to rank, of either layout, into columns; says how ids are normalised before anything is joined.

Must not know of the store or of items known in training: whether a candidate is cold is the caller's to find out.
Legend: C candidates, F single-valued item features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from columns import ID_LIMIT, is_number
from errors import UserError
from schema import IGNORED_FEATURES, Schema
from sources import INT32_MAX, Ragged, Rejects, Rules, parts
from sources_jsonl import FeatureReader, read_range, why_not_json
from sources_parquet import batches, is_list, list_lengths, open_parquet

BATCH_ROWS = 65_536
EXACT_FLOAT = 2**53  # whole numbers above are not exact in a float
CANDIDATE_FILE, CANDIDATE_FOLDER = "predict_set.jsonl", "candidate"
CREATIVE_ID, RETRIEVAL_ID = "creative_id", "retrieval_id"
NOT_FEATURES = frozenset({CREATIVE_ID, RETRIEVAL_ID, "reid_creative_id"}) | IGNORED_FEATURES


@dataclass(frozen=True)
class CandidateTable:
    """Candidates in file order, each creative id once.

    creative_ids: (C) int, or str where an id is no 64-bit number; retrieval_ids (C) uint64; single (C, F) int32 in the schema's order of
    single-valued item features; multi {feature id: Ragged(counts (C) int64, values int32)}; summary {what: how many}, what is counted:
    read, cold, coerced, ignored, duplicates, missing, rejected.
    """

    creative_ids: list[int | str]
    retrieval_ids: np.ndarray
    single: np.ndarray
    multi: dict[str, Ragged]
    summary: dict[str, int]


class _Rows(NamedTuple):
    """Candidates of a piece of a file.

    ids (N) uint64, or a list where one is no number; retrieval_ids (N) uint64; numbered (N) bool: which have a retrieval id.
    """

    ids: np.ndarray | list
    retrieval_ids: np.ndarray
    numbered: np.ndarray
    single: np.ndarray
    multi: dict[str, Ragged]


def normalise_id(value: object) -> int | str:
    """One creative id in the form in which ids are compared: an int below 2**64 where it is a number, else its string.

    Whole numbers (int, numpy or float) and digit-only strings become int; other strings stay, "007" among them. UserError for anything
    else: negative, too large, a float that is not whole or not exact, an empty string, a bool, null.
    """
    if isinstance(value, str):
        if value:
            return int(value) if is_number(value) else str(value)
    elif isinstance(value, (float, np.floating)):
        if 0 <= value <= EXACT_FLOAT and value == int(value):
            return int(value)
    elif isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < ID_LIMIT:
        return int(value)
    raise UserError(f"{str(value)[:40]!r} is no creative id; expected a whole number from 0 to 2**64 - 1, or a string")


def normalise_column(column: pa.Array) -> tuple[list, list[tuple[int, str]]]:
    """Ids of a parquet column: (one id a row, None where there is none; [(row, reason)] of rows whose value is no id, null apart)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    whole = None
    if pa.types.is_integer(column.type):
        whole = column
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if pc.all(
            pc.match_substring_regex(column, r"^(0|[1-9][0-9]{0,18})$")
        ).as_py():  # 19 digits fit 64 bits; longer ones take the slow way
            whole = column.cast(pa.uint64())
    if whole is not None and (pa.types.is_unsigned_integer(whole.type) or (pc.min(whole).as_py() or 0) >= 0):
        return (whole.to_pylist() if whole.null_count else whole.to_numpy().tolist()), []
    ids, bad = column.to_pylist(), []
    for row, value in enumerate(ids):
        if value is not None:
            try:
                ids[row] = normalise_id(value)
            except UserError as error:
                bad.append((row, str(error)))
                ids[row] = None
    return ids, bad


def read_candidates(path: str | Path, schema: Schema, *, rejects: Rejects | None = None) -> CandidateTable:
    """Read predict_set.jsonl (layout A), candidate/ (layout B), or a folder that holds one of them.

    A value unseen in training (a string, or is_str = 1) becomes 0 and is counted as cold; features that the schema does not list are
    ignored and counted. Of a creative id that occurs twice the first row counts. A missing retrieval_id becomes the row's index.
    rejects: takes lines and rows that cannot be read; None: the first one is an error.
    Errors: UserError for a missing file, columns of a wrong type, a bad line (naming it), or no candidate at all.
    """
    path = Path(path)
    files, is_parquet = _find(path)
    rejects = rejects if rejects is not None else Rejects(0, path.parent / "rejects.jsonl")
    before, tally = rejects.count, Counter()
    pieces = []
    for file in files:
        pieces += (_parquet_rows if is_parquet else _json_rows)(file, schema, rejects, tally)
    if not sum(len(piece.ids) for piece in pieces):
        raise UserError(f"{path}: holds no candidate; expected one a {'row' if is_parquet else 'line'}, with its creative_id and features.")
    tally["rejected: candidates"] = rejects.count - before
    return _assemble(pieces, tally)


def _find(path: Path) -> tuple[list[Path], bool]:
    """(the files, whether they are parquet)."""
    if path.is_dir():
        if (path / CANDIDATE_FILE).is_file():
            return [path / CANDIDATE_FILE], False
        folder = path.resolve()
        is_the_folder = folder.name == CANDIDATE_FOLDER or any(folder.glob("*.parquet"))
        found = parts(path, CANDIDATE_FOLDER) or (parts(folder.parent, folder.name) if is_the_folder else [])
        if not found:
            raise UserError(f"{path}: no candidates here; expected {CANDIDATE_FILE}, or {CANDIDATE_FOLDER}/ with parquet files.")
        return found, True
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; expected {CANDIDATE_FILE}, {CANDIDATE_FOLDER}/ or a folder that holds one.")
    with open(path, "rb") as file:
        return [path], file.read(4) == b"PAR1"


def _json_rows(path: Path, schema: Schema, rejects: Rejects, tally: Counter) -> Iterator[_Rows]:
    reader = FeatureReader(Rules("predict", schema), "item")
    first_line = 1
    for _, lines in read_range(path, 0, path.stat().st_size):
        ids, retrieval_ids, features = [], [], []
        for number, line in enumerate(lines, first_line):
            try:
                found = _json_row(line)
            except (UserError, orjson.JSONDecodeError) as error:
                rejects.add(path, number, str(error) if isinstance(error, UserError) else why_not_json(line, error))
                continue
            ids.append(found[0])
            retrieval_ids.append(found[1])
            features.append(found[2])
        first_line += len(lines)
        tally["read: candidates"] += len(lines)
        yield _Rows(_pack(ids), *_retrieval(retrieval_ids), *reader.columns(features, tally))


def _json_row(line: bytes) -> tuple[int | str, int | None, dict]:
    row = orjson.loads(line)
    if type(row) is not dict:
        raise UserError(f'expected {{"creative_id", "retrieval_id", "features"}}, found {type(row).__name__}')
    creative_id, retrieval_id, features = row.get(CREATIVE_ID), row.get(RETRIEVAL_ID), row.get("features")
    if type(creative_id) is not int or creative_id < 0:
        if creative_id is None:
            raise UserError("creative_id is missing")
        creative_id = normalise_id(creative_id)
    if retrieval_id is not None and (type(retrieval_id) is not int or retrieval_id < 0):
        retrieval_id = _retrieval_id(retrieval_id)
    if features is None:
        features = {}
    if type(features) is not dict:
        raise UserError(f"features is of type {type(features).__name__}; expected an object")
    return creative_id, retrieval_id, features


def _retrieval_id(value: object) -> int:
    try:
        number = normalise_id(value)
    except UserError:
        number = ""
    if isinstance(number, str):
        raise UserError(f"retrieval_id {str(value)[:40]!r} is not a whole number from 0 to 2**64 - 1")
    return number


def _pack(ids: list) -> np.ndarray | list:
    return ids if set(map(type, ids)) - {int} else np.fromiter(ids, np.uint64, len(ids))


def _retrieval(ids: list) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint64, 0 where missing; which are there bool)."""
    if None in ids:
        numbered = np.fromiter((i is not None for i in ids), bool, len(ids))
        return np.fromiter((i or 0 for i in ids), np.uint64, len(ids)), numbered
    return np.fromiter(ids, np.uint64, len(ids)), np.ones(len(ids), dtype=bool)


def _parquet_rows(path: Path, schema: Schema, rejects: Rejects, tally: Counter) -> Iterator[_Rows]:
    single, multi = ([f.id for f in schema.select("item", kind)] for kind in ("single", "multi"))
    file = open_parquet(path, (CREATIVE_ID,))
    names = file.schema_arrow.names
    for name in set(names) - NOT_FEATURES - set(single) - set(multi):
        tally[f"ignored: item feature {name[:40]!r} is not in the schema"] += file.metadata.num_rows
    for ahead, batch in batches(path, tuple(n for n in names if n in {CREATIVE_ID, RETRIEVAL_ID, *single, *multi}), BATCH_ROWS):
        keep, ids, retrieval_ids = _row_ids(batch, path, ahead + 1, rejects)
        if not keep.all():
            batch = batch.filter(pa.array(keep))
        tally["read: candidates"] += len(keep)
        matrix = np.zeros((batch.num_rows, len(single)), dtype=np.int32)
        lists = {}
        try:
            for column, name in enumerate(single):
                if name in batch.schema.names:
                    matrix[:, column] = _values(batch[name], name, tally)
            for name in multi:
                lists[name] = _ragged(batch[name], name, tally) if name in batch.schema.names else _no_lists(batch.num_rows)
        except _ColumnTypeError as error:
            raise UserError(f"{path}: column {name!r} is {error}; expected struct<feature_value, is_str> or whole numbers.") from None
        yield _Rows(_pack(ids), *_retrieval(retrieval_ids), matrix, lists)


class _ColumnTypeError(Exception):
    """A column whose type cannot hold feature values; the text is the type."""


def _row_ids(batch: pa.RecordBatch, path: Path, first_row: int, rejects: Rejects) -> tuple[np.ndarray, list, list]:
    """(rows with usable ids bool, their creative ids, their retrieval ids or None); the others become rejects."""
    ids, bad = normalise_column(batch[CREATIVE_ID])
    retrieval_ids, bad_retrieval = [None] * len(ids), []
    if RETRIEVAL_ID in batch.schema.names:
        retrieval_ids, bad_retrieval = normalise_column(batch[RETRIEVAL_ID])
        bad_retrieval += [(row, f"{i!r} is text") for row, i in enumerate(retrieval_ids) if type(i) is str]
    keep = np.ones(len(ids), dtype=bool)
    if not bad and not bad_retrieval and None not in ids:
        return keep, ids, retrieval_ids
    reasons = {row: "creative_id is missing" for row, value in enumerate(ids) if value is None}
    reasons |= {row: f"retrieval_id: {reason}" for row, reason in bad_retrieval} | dict(bad)
    for row, reason in sorted(reasons.items()):
        keep[row] = False
        rejects.add(path, first_row + row, reason)
    return keep, list(compress(ids, keep.tolist())), list(compress(retrieval_ids, keep.tolist()))


def _values(column: pa.Array, name: str, tally: Counter, cold: np.ndarray | None = None) -> np.ndarray:
    """(n) int32 of struct<feature_value, is_str> or of plain numbers; 0 where missing, cold or no whole number from 0 up."""
    if pa.types.is_struct(column.type):
        column, cold = _unpack(column)
        return _values(column, name, tally, cold)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    cold_rows = np.zeros(len(column), dtype=bool) if cold is None else cold
    there = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if cold is None:
            raise _ColumnTypeError(column.type)
        numeric = pc.match_substring_regex(column, r"^[0-9]{1,10}(\.0)?$")  # text with is_str = 0 holds a number; else it is cold after all
        cold_rows = cold_rows | (there & ~pc.fill_null(numeric, False).to_numpy(zero_copy_only=False))
        column = pc.if_else(pa.array(cold_rows), pa.scalar("0", column.type), column).cast(pa.float64())
    if pa.types.is_null(column.type):
        return np.zeros(len(column), dtype=np.int32)
    if pa.types.is_floating(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(column.type):
        values = column.fill_null(0).to_numpy()
    else:
        raise _ColumnTypeError(column.type)
    ok = (values >= 0) & (values <= INT32_MAX)
    if values.dtype.kind == "f":
        ok &= values == np.floor(values)
    odd = int((there & ~ok & ~cold_rows).sum())
    if cold_rows.any():
        tally[f"cold: item feature {name}"] += int(cold_rows.sum())
    if odd:
        tally[f"coerced: item feature {name}: not a whole number from 0 up, read as missing"] += odd
    return np.where(ok & there & ~cold_rows, values, 0).astype(np.int32)


def _unpack(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The values of a struct<feature_value, is_str> column, and which are unseen in training (bool)."""
    fields = {field.name: field.type for field in column.type}
    if "feature_value" not in fields:
        raise _ColumnTypeError(column.type)
    values = pc.struct_field(column, "feature_value")
    flag = fields.get("is_str")
    if flag is None or not (pa.types.is_integer(flag) or pa.types.is_boolean(flag) or pa.types.is_null(flag)):
        raise _ColumnTypeError(column.type)
    is_str = pc.struct_field(column, "is_str").cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return values, is_str != 0


def _ragged(column: pa.Array, name: str, tally: Counter) -> Ragged:
    """Lists of numbers or of structs, or a struct of one list and one is_str; a single value becomes a list of one. Zeros are dropped."""
    cold = None
    if pa.types.is_struct(column.type) and any(field.name == "feature_value" and is_list(field.type) for field in column.type):
        column, cold = _unpack(column)
    if not is_list(column.type):
        values = _values(column, name, tally)
        tally[f"coerced: item feature {name}: one value where the schema says a list"] += int((values > 0).sum())
        return Ragged(np.ones(len(values), dtype=np.int64), values).without_zeros()
    counts = list_lengths(column)
    return Ragged(counts, _values(column.flatten(), name, tally, None if cold is None else np.repeat(cold, counts))).without_zeros()


def _no_lists(rows: int) -> Ragged:
    return Ragged(np.zeros(rows, dtype=np.int64), np.zeros(0, dtype=np.int32))


def _assemble(pieces: list[_Rows], tally: Counter) -> CandidateTable:
    """One table, the first row of each creative id, in file order."""
    retrieval_ids, numbered, single = map(np.concatenate, zip(*((p.retrieval_ids, p.numbered, p.single) for p in pieces), strict=True))
    multi = {name: Ragged(*map(np.concatenate, zip(*(p.multi[name] for p in pieces), strict=True))) for name in pieces[0].multi}
    if all(isinstance(p.ids, np.ndarray) for p in pieces):
        numbers = np.concatenate([p.ids for p in pieces])
        first = np.unique(numbers, return_index=True)[1]
        ids = numbers.tolist()
    else:
        ids = [i for p in pieces for i in (p.ids.tolist() if isinstance(p.ids, np.ndarray) else p.ids)]
        first = np.fromiter({i: row for row, i in zip(range(len(ids) - 1, -1, -1), reversed(ids), strict=True)}.values(), np.int64)
    if len(first) < len(ids):
        tally["duplicates: candidates with a creative id that came before, left out"] += len(ids) - len(first)
        keep = np.zeros(len(ids), dtype=bool)
        keep[first] = True
        ids, retrieval_ids, numbered, single = list(compress(ids, keep.tolist())), retrieval_ids[keep], numbered[keep], single[keep]
        multi = {name: column.select(keep) for name, column in multi.items()}
    if not numbered.all():
        tally["missing: retrieval ids, numbered by row instead"] += int((~numbered).sum())
        retrieval_ids = np.where(numbered, retrieval_ids, np.arange(len(ids), dtype=np.uint64))
    tally["duplicates: retrieval ids that stand for more than one candidate, kept"] += len(ids) - len(np.unique(retrieval_ids))
    return CandidateTable(ids, retrieval_ids, single, multi, {k: v for k, v in sorted(tally.items()) if v})
