"""Recipe for S3-Rec's files: NAME.txt (user id, then its item ids, oldest first) and NAME_item2attributes.json beside it.

Source: the data files of "S3-Rec" (arXiv 2008.07873). The files' own numbers are kept where they have no gaps.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np

from converters.raw import RawColumn, RawEvents, RawSet, RawTable
from converters.text import numbered_lines, require_file
from errors import UserError

EXPECTED = "a text file of lines 'user item item ...'"


def read(source: Path) -> RawSet:
    """Read NAME.txt and, where it exists, NAME_item2attributes.json."""
    path = require_file(source, EXPECTED)
    events = _read_sequences(path)
    beside = path.with_name(f"{path.stem}_item2attributes.json")
    if not beside.exists():
        return RawSet(events, [], [f"no {beside.name} beside {path.name}: no item features"])
    return RawSet(events, [_read_attributes(require_file(beside, "a JSON object {item: [attribute, ...]}"))])


def _read_sequences(path: Path) -> RawEvents:
    users, lines, counts, items = [], [], array("q"), array("q")
    first_line: dict[int, int] = {}
    for number, line in numbered_lines(path):
        fields = line.split()
        if not all(map(bytes.isdigit, fields)):
            bad = next(field for field in fields if not field.isdigit()).decode("utf-8", "replace")
            raise UserError(f"{path}:{number}: found {bad[:40]!r}; expected {EXPECTED}, all whole numbers.")
        if not fields:  # spaces only
            continue
        user, *rest = map(int, fields)
        if not rest:
            raise UserError(f"{path}:{number}: user {user} has no items; expected at least one after the user id. Remove the line.")
        if min(rest) < 1 or max(rest) >= 2**31:
            raise UserError(f"{path}:{number}: items from {min(rest)} to {max(rest)}; expected 1 to {2**31 - 1} (0 is padding).")
        if user in first_line:
            raise UserError(f"{path}:{number}: user {user} is already in line {first_line[user]}; expected one line a user.")
        first_line[user] = number
        users.append(user)
        lines.append(number)
        counts.append(len(rest))
        items.extend(rest)
    if not users:
        raise UserError(f"{path}: no records; expected {EXPECTED}.")
    lengths = np.frombuffer(counts, dtype=np.int64)
    ends = np.cumsum(lengths)
    raw_items, item_codes = np.unique(np.frombuffer(items, dtype=np.int64), return_inverse=True)
    return RawEvents(
        user_codes=np.repeat(np.arange(len(users), dtype=np.int32), lengths),
        item_codes=item_codes.astype(np.int32),
        raw_users=users,
        raw_items=raw_items.tolist(),
        timestamps=None,
        ratings=None,
        locate=lambda row: f"{path}:{lines[int(np.searchsorted(ends, row, side='right'))]}",
        keep_numbers=True,
    )


def _read_attributes(path: Path) -> RawTable:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise UserError(f"{path}: item {twice!r} is listed twice; expected each item once.")
        return tree

    try:
        tree = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}; expected {{item: [attribute, ...]}}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}; expected a JSON object {{item: [attribute, ...]}}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found a JSON {type(tree).__name__}; expected an object {{item: [attribute, ...]}}.")
    ids, values = [], []
    for key, attributes in tree.items():
        # isascii: str.isdigit holds for digits of all scripts, which int() then takes or refuses
        if not (key.isascii() and key.isdigit()):
            raise UserError(f"{path}: found the key {key!r}; expected an item's number.")
        if not isinstance(attributes, list) or not all(isinstance(a, (int, str)) and not isinstance(a, bool) for a in attributes):
            raise UserError(f"{path}: item {key} has {str(attributes)[:60]!r}; expected a list of attribute numbers.")
        ids.append(int(key))
        values.append(attributes)
    return RawTable("item", str(path), ids, [RawColumn("attributes", "multi", values, keep_numbers=True)])
