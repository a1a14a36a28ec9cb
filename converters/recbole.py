"""Recipe for RecBole's atomic files: NAME.inter, and where they exist NAME.item and NAME.user, tab-separated.

The first line names the columns as field:type with type token, token_seq, float or float_seq. Source: recbole.io/atomic_files.html.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from converters.raw import RawColumn, RawEvents, RawSet, RawTable, to_seconds
from converters.text import (
    Layout,
    encode,
    locate_record,
    read_columns,
    read_header,
    read_records,
    require_at_least,
    require_file,
    require_folder,
)
from errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")
USER_FIELDS = ("user_id", "session_id")
ITEM_FIELD, TIME_FIELD, RATING_FIELD = "item_id", "timestamp", "rating"


def read(source: Path) -> RawSet:
    """Read the one set of a folder."""
    folder = require_folder(source, "a RecBole set's folder with NAME.inter")
    path = _find_inter(folder)
    notes: list[str] = []
    events, user_field = _read_inter(path, notes)
    tables = []
    for side, id_field in (("item", ITEM_FIELD), ("user", user_field)):
        beside = path.with_suffix(f".{side}")
        if beside.exists():
            tables.append(_read_table(require_file(beside, f"{side}s of a RecBole set"), side, id_field, notes))
        else:
            notes.append(f"no {beside.name} in {folder}: no {side} features")
    return RawSet(events, tables, notes)


def _find_inter(folder: Path) -> Path:
    found = sorted(folder.glob("*.inter"))
    named = [path for path in found if path.stem == folder.resolve().name]
    if len(found) == 1 or named:
        return require_file((named or found)[0], "interactions of a RecBole set")
    what = ", ".join(path.name for path in found[:5]) or "none"
    raise UserError(f"{folder}: expected one NAME.inter file, or one named {folder.resolve().name}.inter; found {what}.")


def _fields(path: Path) -> dict[str, str]:
    """{field: type} of the header, in the file's order."""
    fields: dict[str, str] = {}
    for text in read_header(path, "\t"):
        name, _, kind = text.rpartition(":")
        if not name or kind not in TYPES:
            raise UserError(f"{path}:1: found {text[:60]!r}; expected field:type, tab-separated, type one of {', '.join(TYPES)}.")
        if name in fields:
            raise UserError(f"{path}:1: field {name!r} is named twice; expected each once.")
        fields[name] = kind
    return fields


def _read_inter(path: Path, notes: list[str]) -> tuple[RawEvents, str]:
    fields = _fields(path)
    user_field = next((name for name in USER_FIELDS if name in fields), None)
    if user_field is None or ITEM_FIELD not in fields:
        raise UserError(f"{path}:1: found the fields {', '.join(fields)}; expected {' or '.join(USER_FIELDS)}, and {ITEM_FIELD}.")
    use = {user_field: "token", ITEM_FIELD: "token", RATING_FIELD: "float", TIME_FIELD: "float"}
    if unused := [name for name in fields if name not in use]:
        notes.append(f"fields of {path.name} that are not used: {', '.join(unused)}")
    layout = Layout("\t", tuple(fields), tuple(use.get(name, "skip") for name in fields), header=True)
    columns = read_columns(path, layout)
    seconds = None
    if TIME_FIELD in columns:
        times = columns[TIME_FIELD].to_numpy()
        require_at_least(path, layout, TIME_FIELD, times, 0)
        seconds, note = to_seconds(times)
        notes += [note] if note else []
    user_codes, raw_users = encode(columns[user_field])
    item_codes, raw_items = encode(columns[ITEM_FIELD])
    ratings = columns[RATING_FIELD].to_numpy().astype(np.float32) if RATING_FIELD in columns else None
    locate = lambda row: locate_record(path, row, header=True)  # noqa: E731
    return RawEvents(user_codes, item_codes, raw_users, raw_items, seconds, ratings, locate), user_field


def _read_table(path: Path, side: str, id_field: str, notes: list[str]) -> RawTable:
    fields = _fields(path)
    if id_field not in fields:
        raise UserError(f"{path}:1: found the fields {', '.join(fields)}; expected {id_field} among them.")
    if lists := [name for name, kind in fields.items() if kind == "float_seq"]:
        notes.append(f"lists of numbers of {path.name} are skipped: {', '.join(lists)}")
    layout = Layout("\t", tuple(fields), tuple(fields.values()), header=True)
    position = list(fields).index(id_field)
    wanted = [(i, name, kind) for i, (name, kind) in enumerate(fields.items()) if i != position and kind != "float_seq"]
    lines: dict[str, int] = {}
    values: dict[str, list] = {name: [] for _, name, _ in wanted}
    for number, row in read_records(path, layout, ("utf-8",)):
        raw = row[position]
        if not raw or raw in lines:
            what = f"already in line {lines[raw]}" if raw in lines else "empty"
            raise UserError(f"{path}:{number}: the {side} {raw!r} is {what}; expected each {side} once.")
        lines[raw] = number
        for i, name, kind in wanted:
            values[name].append(_value(path, number, name, kind, row[i]))
    kinds = {"token": "single", "token_seq": "multi", "float": "float"}
    columns = [RawColumn(name, kinds[kind], values[name]) for _, name, kind in wanted]
    return RawTable(side, str(path), list(lines), columns)


def _value(path: Path, number: int, name: str, kind: str, text: str) -> str | None | list[str] | float:
    if kind == "token":
        return text or None
    if kind == "token_seq":
        return text.split()
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{path}:{number}: {name} is {text!r}; expected a number, as the header says.") from None
    return value if math.isfinite(value) else math.nan
