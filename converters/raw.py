"""What a recipe hands to convert.py: events in the file's order and tables of attributes, under raw ids.

Must not read files, and must not number, sort or drop anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

RawId = int | str
KINDS = ("single", "multi", "float")

# Seconds, milliseconds, microseconds, nanoseconds: each unit's times of 1973-5138 lie above its own limit and below the next.
TIME_UNITS = ((1e11, 1, "seconds"), (1e14, 10**3, "milliseconds"), (1e17, 10**6, "microseconds"), (float("inf"), 10**9, "nanoseconds"))


@dataclass
class RawEvents:
    """E events in the order of the file.

    user_codes, item_codes: int32 (E), positions in raw_users and raw_items.
    raw_users, raw_items: the ids of the file, in any order, each once.
    timestamps: int64 (E) seconds since 1970, or None: then the file's order is the order in time.
    ratings: float32 (E), NaN where a record has none, or None.
    locate: row -> "file:line", for messages.
    keep_numbers: users, and likewise items, keep their raw ids as numbers where these are 1..N without a gap.
    repeats: what happens to an event equal in user, item and time to an earlier one: "error", "keep" or "drop".
    """

    user_codes: np.ndarray
    item_codes: np.ndarray
    raw_users: list[RawId]
    raw_items: list[RawId]
    timestamps: np.ndarray | None
    ratings: np.ndarray | None
    locate: Callable[[int], str]
    keep_numbers: bool = False
    repeats: str = "keep"


@dataclass
class RawColumn:
    """An attribute: `values` is aligned with its table's ids.

    kind single: str or None; multi: list of str or int, empty where missing; float: float, NaN where missing.
    keep_numbers: values that are the ints 1..N stay as they are.
    """

    id: str
    kind: str
    values: list
    keep_numbers: bool = False


@dataclass
class RawTable:
    """The attributes of one side ("user" or "item"), read from `path`; `ids` are raw ids, each once."""

    side: str
    path: str
    ids: list[RawId]
    columns: list[RawColumn]


@dataclass
class RawSet:
    """All that a recipe found; `notes` are lines for the person: what is missing, skipped or converted."""

    events: RawEvents
    tables: list[RawTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def to_seconds(times: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Whole seconds (int64) of times in any unit, and a note when the unit was not seconds.

    times: int64 or float64 (E), finite, not negative. The unit is told by the largest value.
    """
    largest = float(times.max()) if len(times) else 0.0
    divisor, unit = next((d, u) for limit, d, u in TIME_UNITS if largest < limit)
    if divisor == 1:
        return np.floor(times).astype(np.int64) if times.dtype.kind == "f" else times.astype(np.int64), None
    seconds = np.floor(times / divisor) if times.dtype.kind == "f" else times // divisor
    return seconds.astype(np.int64), f"timestamps are {unit} (the largest is {largest:.0f}); divided by {divisor:,} to give seconds"
