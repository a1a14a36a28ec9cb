"""Finds the multimodal vectors of a data folder in any of their forms, and compiles them to one float16 matrix in item order.

Streams: besides a pickle, which has to be read whole, memory does not grow with the file. Must not know how items are numbered
(the caller's `lookup` says) or what a store looks like.
Legend: N rows of a piece, W width of the vectors.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from candidates import normalise_column, normalise_id
from errors import RunError, UserError, disk_full
from plain_pickle import load_plain_pickle
from schema import Feature, Schema
from sources import Progress, Rejects
from sources_jsonl import read_range, why_not_json
from sources_parquet import batches, is_list, list_lengths, num_rows

CREATIVE_ID, VECTOR = "anonymous_cid", "emb"
FOLDERS = ("creative_emb", "mm_emb")
FORMS = ("parquet", "pickle", "json")  # the first one found of the right width is read
PIECE_BYTES = 4 << 20  # of float32, decoded at once
GATHER_BYTES, GATHER_ROWS = 8 << 20, 4096
HEADER_BYTES = 128
FLOAT16_EXPONENT = np.uint16(0x7C00)  # all ones: infinite or not a number
FLOAT16_OVERFLOW = 65_520.0  # from here on float32 rounds to infinity


@dataclass(frozen=True)
class EmbeddingSource:
    """Where one feature's vectors lie.

    form: "parquet", "pickle" or "json"; width: the one in the name, which may be wrong; files: sorted, at least one.
    """

    feature_id: str
    form: str
    width: int
    files: list[Path]


class _Rows(NamedTuple):
    """Rows of a piece of a file; lines count from 1.

    lines (N) int64; ids: N normalised ids; vectors (N, W) float32 or float64; num_rows: all that were read; missing: those without a
    vector; bad: [(line, reason)]; wrong_width: (line, width) of the first one that has another width, or None.
    """

    file: Path
    lines: np.ndarray
    ids: list
    vectors: np.ndarray
    num_rows: int
    missing: int
    bad: list[tuple[int, str]]
    wrong_width: tuple[int, int] | None


def find_embedding(data_path: str | Path, feature: Feature) -> EmbeddingSource | None:
    """The vectors of `feature` in a data folder; None where there are none.

    Looks into creative_emb/ and mm_emb/ for emb_ID_WIDTH.pkl, emb_ID_WIDTH/ and emb_ID_WIDTH_parquet/ (folders of parts, or one file). A
    name with another width counts too, after one with the right width. UserError for a folder without a part.
    """
    pattern = re.compile(rf"emb_{re.escape(feature.id)}_(\d+)(_parquet)?(\.pkl|\.parquet|\.jsonl?)?")
    found, empty = [], []
    for folder in (Path(data_path) / name for name in FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if match := pattern.fullmatch(path.name):
                source = _source(path, feature.id, int(match[1]))
                if source.files:
                    found.append((source.width != feature.width, FORMS.index(source.form), str(path), source))
                else:
                    empty.append(path)
    if empty and not found:
        raise UserError(f"{empty[0]}: a folder of vectors without any; expected part-* or *.json files of JSON lines, or *.parquet files.")
    return min(found)[3] if found else None


def required_embedding(schema: Schema, feature_id: str, has: Callable[[str], bool], where: str = "the data") -> Feature:
    """The embedding `feature_id` of a schema. has: whether the data, which `where` names, holds the vectors of an id.

    UserError where the schema has no such embedding, or the data no vectors of it.
    """
    known = [feature.id for feature in schema.embeddings]
    if feature_id not in known:
        raise UserError(
            f"multimodal_features: {feature_id!r} is not an embedding of this data's schema; give some of {', '.join(known) or 'none'}."
        )
    if not has(feature_id):
        raise UserError(
            f"multimodal_features: {where} has no vectors of {feature_id} in creative_emb/ or mm_emb/.\n"
            "Add them, or take it off the list ('auto' uses 81 where present)."
        )
    return schema[feature_id]


def _source(path: Path, feature_id: str, width: int) -> EmbeddingSource:
    if path.is_file():
        form = {".pkl": "pickle", ".json": "json", ".jsonl": "json"}.get(path.suffix) or ("parquet" if _is_parquet(path) else "json")
        return EmbeddingSource(feature_id, form, width, [path])
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")) and p.suffix != ".crc")
    files = [p for p in files if p.name.startswith("part") or p.suffix in (".json", ".jsonl", ".parquet")]
    parquet = [p for p in files if p.suffix == ".parquet" or path.name.endswith("_parquet")]
    return EmbeddingSource(feature_id, "parquet" if parquet else "json", width, parquet or files)


def _is_parquet(path: Path) -> bool:
    if path.suffix == ".parquet" or path.name.endswith("_parquet"):
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def compile_embedding(source: EmbeddingSource, feature: Feature, lookup: Callable[[list], np.ndarray], num_items: int,
                      out_dir: str | Path, *, max_bad_lines: int = 0, rejects: Rejects | None = None,
                      progress: bool = False) -> dict[str, int]:  # fmt: skip
    """Write OUT/matrix.npy (n + 1, W) float16, row 0 zeros, in item order, and OUT/row_of_item.npy (num_items + 1) int32, 0 = no vector.

    lookup: list of normalised creative ids (int or str) -> item ids (N) of whole numbers in 0..num_items, 0 = not an item.
    rejects: takes bad lines; None: made with `max_bad_lines` and OUT/rejects.jsonl. progress: show a bar, in bytes of the source.
    Result: how many {rows, covered, unknown, missing, duplicate, rejected}; rows is the sum of the others. Of an item that occurs twice
    the first row counts. Values are rounded to float32, then to float16.
    Errors: UserError where the whole file has another width than the schema, or for a bad line past the limit: no JSON, no id, a vector
    of a wrong width, NaN, Inf, a value that float16 cannot hold. RunError for a full disk.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    rejects = rejects if rejects is not None else Rejects(max_bad_lines, out_dir / "rejects.jsonl")
    counts, before = Counter(), rejects.count
    path = out_dir / "rows.tmp"
    row_of_item = np.zeros(num_items + 1, dtype=np.int32)
    try:
        with open(path, "wb") as out:
            _start_matrix(out, feature.width)
            with Progress(f"vectors {feature.id}", sum(f.stat().st_size for f in source.files), "B", enabled=progress) as bar:
                for rows in READERS[source.form](source, feature.width, bar):
                    _append(rows, feature, lookup, row_of_item, out, counts, rejects)
            _finish_matrix(out, counts["covered"], feature.width)
        _reorder(path, out_dir / "matrix.npy", row_of_item, counts["covered"], feature.width)
        with open(out_dir / "row_of_item.npy", "wb") as out:
            np.save(out, row_of_item, allow_pickle=False)
            _sync(out)
    except OSError as error:
        raise disk_full(error, out_dir, 2 * 2 * (num_items + 1) * feature.width) or error from None
    finally:
        path.unlink(missing_ok=True)
    counts["rejected"] = rejects.count - before
    return {name: counts[name] for name in ("rows", "covered", "unknown", "missing", "duplicate", "rejected")}


def _append(rows: _Rows, feature: Feature, lookup: Callable[[list], np.ndarray], row_of_item: np.ndarray, out, counts: Counter,
            rejects: Rejects) -> None:  # fmt: skip
    """Add a piece's rows to the file of rows, in the order of the source, and count all of them."""
    if rows.wrong_width and not len(rows.ids) and not counts["good"]:
        line, width = rows.wrong_width
        raise UserError(f"{rows.file}:{line}: the vectors of feature {feature.id} have {width} values; the schema says {feature.width}.\n"
                        f"Give the file of the right width, or a schema.json in the data folder with width {width}.")  # fmt: skip
    with np.errstate(over="ignore"):
        single = rows.vectors.astype(np.float32, copy=False)
        half = single.astype(np.float16)
    unfit = ((half.view(np.uint16) & FLOAT16_EXPONENT) == FLOAT16_EXPONENT).any(axis=1)
    bad = rows.bad + [(int(rows.lines[k]), _unfit(rows.vectors[k], single[k])) for k in np.flatnonzero(unfit).tolist()]
    for line, reason in sorted(bad):
        rejects.add(rows.file, line, reason)
    items = np.asarray(lookup(rows.ids), dtype=np.int64)
    good, known = ~unfit, items > 0
    fresh = np.zeros(len(items), dtype=bool)
    candidates = np.flatnonzero(good & known)
    fresh[candidates[np.unique(items[candidates], return_index=True)[1]]] = True
    fresh &= row_of_item[items] == 0
    num_fresh = int(fresh.sum())
    row_of_item[items[fresh]] = np.arange(counts["covered"] + 1, counts["covered"] + num_fresh + 1)
    out.write((half if num_fresh == len(half) else half[fresh]).data)
    counts.update(good=len(items), rows=rows.num_rows, covered=num_fresh, missing=rows.missing, unknown=int((good & ~known).sum()),
                  duplicate=len(candidates) - num_fresh)  # fmt: skip


def _unfit(vector: np.ndarray, single: np.ndarray) -> str:
    """Why a vector does not fit float16; single: the same in float32."""
    place = int(np.flatnonzero(~(np.abs(single) < FLOAT16_OVERFLOW))[0])
    value = float(vector[place])
    if np.isfinite(value):
        return f"emb[{place}] is {value:g}, too large for float16 (up to 65504)"
    return f"emb[{place}] is {value}; expected finite numbers"


# Readers of the three forms.


def _json_rows(source: EmbeddingSource, width: int, bar: Progress) -> Iterator[_Rows]:
    for path in source.files:
        first_line, last_offset, size = 1, 0, path.stat().st_size
        for offset, lines in read_range(path, 0, size):
            bar.update(offset - last_offset)
            last_offset = offset
            yield _json_piece(path, lines, first_line, width)
            first_line += len(lines)
        bar.update(size - last_offset)


def _json_piece(path: Path, lines: list[bytes], first_line: int, width: int) -> _Rows:
    kept, missing, bad = [], 0, []
    for number, line in enumerate(lines, first_line):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            bad.append((number, why_not_json(line, error)))
            continue
        if type(row) is not dict:
            bad.append((number, f'expected {{"anonymous_cid": ..., "emb": [...]}}, found {type(row).__name__}'))
        elif _is_absent(row.get(VECTOR)):
            missing += 1
        else:
            kept.append((number, row.get(CREATIVE_ID), row[VECTOR]))
    return _checked_rows(path, kept, width, len(lines), missing, bad)


def _is_absent(vector: object) -> bool:
    if isinstance(vector, str):
        return vector in ("", "[]", "null")
    return vector is None or (isinstance(vector, (list, tuple)) and not vector) or (isinstance(vector, np.ndarray) and not vector.size)


def _checked_rows(path: Path, kept: list[tuple], width: int, num_rows: int, missing: int, bad: list) -> _Rows:
    """Rows from [(line, id, vector as list, array or JSON text)], each looked at; what is no id or no vector becomes bad."""
    numbers, ids, vectors, wrong_width = [], [], [], None
    for number, creative_id, vector in kept:
        try:
            if type(creative_id) is not int or creative_id < 0:
                creative_id = normalise_id(creative_id)
            if type(vector) is str:
                vector = orjson.loads(vector)
            if not isinstance(vector, (list, tuple)) and not (isinstance(vector, np.ndarray) and vector.ndim == 1):
                bad.append((number, f"emb is of type {type(vector).__name__}; expected a list of {width} numbers"))
                continue
        except UserError as error:
            bad.append((number, str(error)))
            continue
        except orjson.JSONDecodeError as error:
            bad.append((number, f"emb is text that is no JSON: {error}"))
            continue
        if len(vector) != width:
            bad.append((number, f"emb has {len(vector)} values; expected {width}"))
            wrong_width = wrong_width or (number, len(vector))
            continue
        numbers.append(number)
        ids.append(creative_id)
        vectors.append(vector)
    matrix = _matrix(vectors, width)
    if matrix is None:  # somewhere is something that is no number
        good = [_matrix([vector], width) is not None for vector in vectors]
        bad += [(number, "emb holds something that is no number") for number, ok in zip(numbers, good, strict=True) if not ok]
        numbers, ids, vectors = ([value for value, ok in zip(values, good, strict=True) if ok] for values in (numbers, ids, vectors))
        matrix = _matrix(vectors, width)
    return _Rows(path, np.array(numbers, dtype=np.int64), ids, matrix, num_rows, missing, bad, wrong_width)


def _matrix(vectors: list, width: int) -> np.ndarray | None:
    """(N, W) floats; None where something in it is no number. No dtype is asked for: numpy would then read text and bools as numbers."""
    try:
        matrix = np.array(vectors) if vectors else np.zeros((0, width), dtype=np.float32)
    except ValueError:
        return None
    if matrix.ndim != 2 or matrix.dtype.kind not in "iuf":
        return None
    return matrix.astype(np.float64) if matrix.dtype.kind in "iu" else matrix


def _parquet_rows(source: EmbeddingSource, width: int, bar: Progress) -> Iterator[_Rows]:
    rows = max(16, min(65_536, PIECE_BYTES // (4 * width)))
    for path in source.files:
        size, total = path.stat().st_size, max(1, num_rows([path]))
        for ahead, batch in batches(path, (CREATIVE_ID, VECTOR), rows):
            yield _parquet_piece(path, batch[CREATIVE_ID], batch[VECTOR], ahead + 1, width)
            bar.update(size * batch.num_rows // total)


def _parquet_piece(path: Path, ids: pa.Array, vectors: pa.Array, first_row: int, width: int) -> _Rows:
    if pa.types.is_dictionary(vectors.type):
        vectors = vectors.dictionary_decode()
    kind = vectors.type
    names, bad_ids = normalise_column(ids)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = {k: text for k, text in enumerate(vectors.to_pylist()) if not _is_absent(text)}
        reasons = {k: reason for k, reason in bad_ids if k in texts}
        kept = [(first_row + k, names[k], text) for k, text in texts.items() if k not in reasons]
        bad = [(first_row + k, reason) for k, reason in reasons.items()]
        return _checked_rows(path, kept, width, len(names), len(names) - len(texts), bad)
    if not is_list(kind) or not (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        raise UserError(f"{path}: column {VECTOR!r} is of type {kind}; expected a list of float, or text that is JSON.")
    there = vectors.is_valid().to_numpy(zero_copy_only=False)
    lengths = list_lengths(vectors)
    there &= lengths > 0
    reasons = {int(k): f"emb has {lengths[k]} values; expected {width}" for k in np.flatnonzero(there & (lengths != width))}
    wrong_width = next(((first_row + k, int(lengths[k])) for k in reasons), None)
    reasons |= {k: "anonymous_cid is missing" for k, name in enumerate(names) if name is None and there[k]}
    reasons |= {k: reason for k, reason in bad_ids if there[k]}
    keep = there.copy()
    keep[list(reasons)] = False
    flat = (vectors if keep.all() else vectors.filter(pa.array(keep))).flatten()
    if flat.null_count:
        holes = flat.is_null().to_numpy(zero_copy_only=False).reshape(-1, width).any(axis=1)
        rows = np.flatnonzero(keep)[holes]
        reasons |= dict.fromkeys(rows.tolist(), "emb holds a null; expected numbers")
        keep[rows] = False
        flat = vectors.filter(pa.array(keep)).flatten()
    matrix = flat.to_numpy().reshape(-1, width)
    names = names if keep.all() else [name for name, ok in zip(names, keep.tolist(), strict=True) if ok]
    bad = [(first_row + k, reason) for k, reason in reasons.items()]
    return _Rows(path, first_row + np.flatnonzero(keep), names, matrix, len(keep), int((~there).sum()), bad, wrong_width)


def _pickle_rows(source: EmbeddingSource, width: int, bar: Progress) -> Iterator[_Rows]:
    path = source.files[0]
    table = load_plain_pickle(path)
    if not isinstance(table, dict):
        raise UserError(f"{path}: holds {type(table).__name__}; expected a dict of creative id -> vector.")
    first, entries = 1, iter(table.items())
    while piece := list(islice(entries, max(16, min(16_384, PIECE_BYTES // (4 * width))))):
        kept = [(first + k, name, vector) for k, (name, vector) in enumerate(piece) if not _is_absent(vector)]
        yield _checked_rows(path, kept, width, len(piece), len(piece) - len(kept), [])
        first += len(piece)
        bar.update(path.stat().st_size * len(piece) // len(table))


READERS = {"parquet": _parquet_rows, "pickle": _pickle_rows, "json": _json_rows}


# Writing: rows go to disk in the order of the source and are then put into item order.


def _start_matrix(out, width: int) -> None:
    out.write(bytes(HEADER_BYTES))
    out.write(bytes(2 * width))


def _finish_matrix(out, num_rows: int, width: int) -> None:
    """The .npy header, now that the number of rows is known. Of fixed length, unlike numpy's."""
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({num_rows + 1}, {width}), }}"
    out.seek(0)
    out.write(b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.ljust(HEADER_BYTES - 11).encode() + b"\n")
    _sync(out)


def _sync(out) -> None:
    out.flush()
    os.fsync(out.fileno())


def _reorder(path: Path, target: Path, row_of_item: np.ndarray, num_rows: int, width: int) -> None:
    """Turn the file of rows into the matrix in item order and renumber `row_of_item` in place. Memory: a few chunks."""
    order = row_of_item[row_of_item > 0]
    if (order[1:] > order[:-1]).all():
        os.replace(path, target)
        return
    size = 2 * width
    chunk = max(1, min(GATHER_ROWS, GATHER_BYTES // size))
    buffer = memoryview(bytearray(chunk * size))
    places = [buffer[start : start + size] for start in range(0, len(buffer), size)]
    # Read by offset, not through a map: the kernel maps up to 2 MiB around each row touched, which made 350 MiB of a chunk of 8.
    with open(path, "rb", buffering=0) as file, open(target, "wb") as out:
        _start_matrix(out, width)
        for start in range(0, num_rows, chunk):
            offsets = (HEADER_BYTES + order[start : start + chunk].astype(np.int64) * size).tolist()
            read = sum(os.preadv(file.fileno(), (place,), offset) for place, offset in zip(places, offsets, strict=False))
            if read != len(offsets) * size:
                raise RunError(f"{path}: shorter than what was written to it. Is another process at work in this folder?")
            out.write(buffer[: len(offsets) * size])
        _finish_matrix(out, num_rows, width)
    row_of_item[row_of_item > 0] = np.arange(1, num_rows + 1, dtype=np.int32)
