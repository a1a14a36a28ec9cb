"""Reading delimited text: large files by column through pyarrow, small ones record by record, with file:line in each error.

Must not know what the columns of any data set mean.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from errors import UserError

ARROW_TYPES = {"int": pa.int64(), "float": pa.float64(), "token": pa.dictionary(pa.int32(), pa.string()), "skip": pa.null()}
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """How a delimited file looks: its separator, the columns' names and kinds ("int", "float", "token"), a header line or not.

    quoted: fields may stand in double quotes (csv). Columns whose kind is "skip" are not read.
    """

    separator: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    header: bool = False
    quoted: bool = False

    def split(self, line: str) -> list[str]:
        if not self.quoted:
            return line.split(self.separator)
        try:
            return next(csv.reader([line]))
        except csv.Error:  # a bare carriage return: no csv line, so no fields
            return []


def require_file(path: Path, what: str) -> Path:
    """`path`, when it is a file with content; `what` says in the message what the file should be."""
    if not path.exists():
        raise UserError(f"{path}: no such file; expected {what}.")
    if not path.is_file():
        raise UserError(f"{path}: a folder; expected {what}.")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; expected {what}.")
    return path


def require_folder(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such folder; expected {what}.")
    if not path.is_dir():
        raise UserError(f"{path}: a file; expected {what}. Unpack an archive first, and name its folder.")
    return path


def open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where it starts like a gzip file, whatever its name."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of all lines that are not empty; UserError where a gzip file breaks off."""
    number = 0
    with open_binary(path) as file:
        try:
            for number, line in enumerate(file, 1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line:
                    yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}:{number + 1}: the gzip file is damaged or cut off here: {error}.\nFetch it again.") from None


def locate_record(path: Path, row: int, header: bool = False) -> str:
    """ "file:line" of the record `row` (from 0, empty lines and the header not counted)."""
    for position, (number, _) in enumerate(numbered_lines(path)):
        if position == row + header:
            return f"{path}:{number}"
    return str(path)


def decode(path: Path, number: int, line: bytes, encodings: Sequence[str] = ("utf-8",)) -> str:
    for encoding in encodings:
        try:
            return line.decode(encoding)
        except UnicodeDecodeError as error:
            problem = error
    raise UserError(f"{path}:{number}: found bytes that are not {' or '.join(encodings)} text: {problem}.")


def read_header(path: Path, separator: str) -> list[str]:
    for number, line in numbered_lines(path):
        return [name.strip().strip('"') for name in decode(path, number, line).split(separator)]
    raise UserError(f"{path}: the file is empty; expected a header line.")


def read_records(path: Path, layout: Layout, encodings: Sequence[str] = ("utf-8", "latin-1")) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a small file; UserError where a line has another number of fields. No field may hold a line end."""
    for position, (number, line) in enumerate(numbered_lines(path)):
        if layout.header and position == 0:
            continue
        fields = layout.split(decode(path, number, line, encodings))
        if len(fields) != len(layout.names):
            raise _wrong_count(path, number, fields, layout)
        yield number, fields


def read_columns(path: Path, layout: Layout) -> dict[str, pa.ChunkedArray]:
    """The columns of a large file that are not "skip", by name, without nulls.

    A field must be a number where the kind says so, and never empty. UserError names the first line that does not fit.
    """
    doubled = layout.separator == "::"  # pyarrow takes one character: read ':' and give the empty fields between to nobody
    names = [n for name in layout.names for n in (name, f"{name}::")][:-1] if doubled else list(layout.names)
    kinds = [k for kind in layout.kinds for k in (kind, "skip")][:-1] if doubled else list(layout.kinds)
    wanted = [name for name, kind in zip(layout.names, layout.kinds, strict=True) if kind != "skip"]
    try:
        table = pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=int(layout.header), block_size=BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(delimiter=layout.separator[0], quote_char='"' if layout.quoted else False),
            convert_options=pa_csv.ConvertOptions(
                column_types={n: ARROW_TYPES[k] for n, k in zip(names, kinds, strict=True)},
                include_columns=wanted + [n for n in names if n.endswith("::")],
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise _explain(path, layout, str(error).splitlines()[0]) from None
    if table.num_rows == 0:
        raise UserError(f"{path}: no records; expected lines of {', '.join(layout.names)}.")
    columns = {name: table.column(name) for name in wanted}
    for name, column in columns.items():
        bad_float = pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column), skip_nulls=True).as_py()
        if column.null_count or bad_float:
            raise _explain(path, layout, f"column {name} holds an empty or infinite value")
    return columns


def encode(column: pa.ChunkedArray) -> tuple[np.ndarray, list]:
    """(codes int32 (E), distinct values in order of first appearance)."""
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    column = column.unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks]).astype(np.int32, copy=False)
    return codes, column.chunk(0).dictionary.to_pylist()


def require_at_least(path: Path, layout: Layout, name: str, values: np.ndarray, smallest: int) -> None:
    """UserError naming the first line whose value of column `name` is below `smallest`."""
    below = np.flatnonzero(values < smallest)
    if len(below):
        row = int(below[0])
        where = locate_record(path, row, layout.header)
        raise UserError(f"{where}: {name} is {values[row]}; expected {smallest} or more.")


def _wrong_count(path: Path, number: int, fields: list[str], layout: Layout) -> UserError:
    expected = f"expected {len(layout.names)} ({', '.join(layout.names)})"
    return UserError(f"{path}:{number}: found {len(fields)} fields, {expected}, separated by {layout.separator!r}.")


def _explain(path: Path, layout: Layout, cause: str) -> UserError:
    """The error of the first line that does not fit; read slowly, once, since pyarrow's threads do not know line numbers."""
    for position, (number, line) in enumerate(numbered_lines(path)):
        if layout.header and position == 0:
            continue
        fields = layout.split(decode(path, number, line))
        if len(fields) != len(layout.names):
            return _wrong_count(path, number, fields, layout)
        for name, kind, value in zip(layout.names, layout.kinds, fields, strict=True):
            if kind != "skip" and not _fits(kind, value):
                expected = {"int": "a whole number", "float": "a finite number", "token": "text"}[kind]
                return UserError(f"{path}:{number}: {name} is {value!r}; expected {expected}.")
    return UserError(f"{path}: not readable: {cause}.")


def _fits(kind: str, value: str) -> bool:
    if kind == "token":
        return value != ""
    if kind == "int":  # not int(): it takes "1_000" and the digits of all scripts
        return bool(re.fullmatch(r"\s*-?[0-9]+\s*", value)) and -(2**63) <= int(value) < 2**63
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
