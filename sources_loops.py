"""Compiled loops that read plain JSON of layout A into columns at once, straight from the bytes, without an object a value.

They know plain records alone and give up at anything else, which sources_jsonl.py then reads by orjson: so they reject nothing, repair
nothing and cannot change a result. Numba compiles them, once a machine, and keeps the code on disk. Must not open files or know of chunks.

Legend: N dictionaries of one side (events or users), K names, F single-valued features, M lists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kernels import usable_numba
from schema import IGNORED_FEATURES
from sources import INT32_MAX


class Slots(NamedTuple):
    """The feature names of one side. codes (K,) uint64: the bytes of a name; kinds (K,) int64: a single column, IGNORED, or LIST - list."""

    codes: np.ndarray
    kinds: np.ndarray


class Outputs(NamedTuple):
    """Columns of N dictionaries. single (N, F) int32; counts (M, N) int64, values (M, any) int32, filled (M,) int64: of M lists.

    cold (K,) int64: how many values of each slot were strings.
    """

    single: np.ndarray
    counts: np.ndarray
    values: np.ndarray
    filled: np.ndarray
    cold: np.ndarray


class Loops(NamedTuple):
    """The compiled functions."""

    lines: Callable
    items: Callable


IGNORED, LIST = -1, -2
PADDING = bytes(8)  # past the last line's end, so that the loops may look ahead
MAX_DIGITS = 18  # of a number that fits int64 whatever its digits
COLON, COMMA, QUOTE, ESCAPE, NEWLINE = b':,"\\\n'
OPEN, CLOSE, OPEN_LIST, CLOSE_LIST, NULL, ZERO = b"{}[]n0"
_lock = threading.Lock()
_thread: threading.Thread | None = None
_loops: Loops | None = None


def start() -> None:
    """Load the loops in a thread: 0.5 s, or 5 s once a machine, where they must be made; meanwhile orjson serves."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_load, name="loops")  # no daemon: a process that ends inside LLVM may crash
            _thread.start()


def compiled(*, wait: float | None = 0.0) -> Loops | None:
    """The loops, or None: not started, not ready within `wait` seconds (None: as long as it takes), or there is no numba."""
    if _loops is None and _thread is not None and (wait is None or wait > 0):
        _thread.join(wait)
    return _loops


def slots_of(single: tuple[str, ...], multi: tuple[str, ...]) -> Slots | None:
    """None where the loops cannot tell the names apart."""
    ignored = tuple(sorted(IGNORED_FEATURES - {*single, *multi}))
    names = [name.encode("utf-8", "surrogatepass") for name in single + multi + ignored]
    if len(names) > 63 or any(len(name) > 8 or set(name) & {QUOTE, ESCAPE} or min(name) < 32 or max(name) > 126 for name in names):
        return None
    kinds = [*range(len(single)), *(LIST - k for k in range(len(multi))), *(IGNORED for _ in ignored)]
    return Slots(np.array([int.from_bytes(name, "big") for name in names], np.uint64), np.array(kinds, np.int64))


def padded(data: bytes) -> tuple[np.ndarray, int]:
    """The bytes as the loops take them, a line's end and room to look ahead after them; and the place of that end."""
    return np.frombuffer(b"".join((data, b"\n", PADDING)), np.uint8), len(data)


def bounds(data: np.ndarray) -> tuple[int, int]:
    """Of padded bytes: how many dictionaries there can be, and one that is cut off at its start; and how many values in lists."""
    dicts, lists, commas = (int(np.count_nonzero(data == byte)) for byte in (OPEN, OPEN_LIST, COMMA))
    return dicts + 1, lists + commas


def _space(data, at):
    while data[at] == 32 or data[at] == 9 or data[at] == 13:
        at += 1
    return at


def _mark(data, at, byte):
    """Past the byte that must come next, and the space around it; -1: it does not come. A place of -1 stays one."""
    if at < 0:
        return -1
    at = _space(data, at)
    return _space(data, at + 1) if data[at] == byte else -1


def _null(data, at):
    """Past a null; -1: there is none."""
    if at < 0 or data[at] != 110 or data[at + 1] != 117 or data[at + 2] != 108 or data[at + 3] != 108:
        return -1
    return at + 4


def _whole(data, at):
    """A number from 0 to 10**18 - 1 without a sign, and the place past it; -1 where there is none."""
    if at < 0:
        return np.int64(-1), -1
    begin, value = at, np.int64(0)
    while 48 <= data[at] <= 57:
        value = value * 10 + np.int64(data[at]) - 48
        at += 1
    if at == begin or at - begin > MAX_DIGITS or (data[begin] == ZERO and at - begin > 1):
        return np.int64(-1), -1
    return value, at


def _value(data, at, cold, slot):
    """A feature's value, and the place past it; nulls and strings are 0."""
    if data[at] == NULL:
        return np.int64(0), _null(data, at)
    if data[at] != QUOTE:
        return _whole(data, at)
    at += 1
    while data[at] != QUOTE:
        if data[at] < 32 or data[at] > 126 or data[at] == ESCAPE:
            return np.int64(-1), -1
        at += 1
    cold[slot] += 1
    return np.int64(0), at + 1


def _slot(data, at, codes, guess):
    """The slot of the name that begins at `at`, and the place past its quote; -1: not known. Tried from `guess` on: names keep an order."""
    code, begin = np.uint64(0), at
    while data[at] != QUOTE:
        if data[at] < 32 or data[at] > 126 or data[at] == ESCAPE:
            return -1, -1
        code = code << np.uint64(8) | np.uint64(data[at])
        at += 1
    if at - begin > 8:
        return -1, -1
    for tried in range(len(codes)):
        slot = guess + tried
        if slot >= len(codes):
            slot -= len(codes)
        if codes[slot] == code:
            return slot, at + 1
    return -1, -1


def _list(data, at, slot, kind, row, counts, values, filled, cold):
    """Past a list of values, which are put in place; -1: something else."""
    at = _space(data, at + 1)
    if data[at] == CLOSE_LIST:
        return at + 1
    while True:
        value, at = _value(data, at, cold, slot)
        if at < 0 or value > INT32_MAX:
            return -1
        if value and kind != IGNORED:
            values[LIST - kind, filled[LIST - kind]] = value
            filled[LIST - kind] += 1
            counts[LIST - kind, row] += 1
        at = _space(data, at)
        if data[at] == CLOSE_LIST:
            return at + 1
        at = _mark(data, at, COMMA)
        if at < 0:
            return -1


def _features(data, at, row, codes, kinds, single, counts, values, filled, cold):
    """Past a dictionary of features, which are put in row `row`; -1: something unusual, a name that comes twice included."""
    at = _mark(data, at, OPEN)
    if at < 0:
        return -1
    single[row] = 0
    counts[:, row] = 0
    if data[at] == CLOSE:
        return at + 1
    guess, seen = 0, 0
    while True:
        if data[at] != QUOTE:
            return -1
        slot, at = _slot(data, at + 1, codes, guess)
        if slot < 0 or seen >> slot & 1:
            return -1
        guess, seen, kind = slot + 1, seen | 1 << slot, kinds[slot]
        at = _mark(data, at, COLON)
        if at < 0:
            return -1
        if data[at] == OPEN_LIST and kind < 0:
            at = _list(data, at, slot, kind, row, counts, values, filled, cold)
        elif kind <= LIST:
            at = _null(data, at)
        else:
            value, at = _value(data, at, cold, slot)
            if value > INT32_MAX:
                return -1
            if kind >= 0:
                single[row, kind] = value
        if at < 0:
            return -1
        at = _space(data, at)
        if data[at] == CLOSE:
            return at + 1
        at = _mark(data, at, COMMA)
        if at < 0:
            return -1


def _lines(data, end, codes, kinds, single, counts, values, filled, cold, item_codes, item_kinds, item_single, item_counts, item_values,
           item_filled, item_cold, user_ids, lengths, item_ids, action_types, timestamps):  # fmt: skip
    """Lines of train's sequences in data[:end], each with one profile. Returns the number of events, or -1: something unusual."""
    at, user, event = 0, 0, 0
    while at < end:
        at = _mark(data, at, OPEN_LIST)
        first, profiles, owner = event, 0, np.int64(-1)
        while True:
            name, at = _whole(data, _mark(data, at, OPEN_LIST))
            at = _mark(data, at, COMMA)
            if at < 0 or (owner >= 0 and name != owner):
                return -1
            owner = name
            if data[at] == NULL:
                profiles += 1
                if profiles > 1:
                    return -1
                at = _mark(data, _null(data, at), COMMA)
                if at < 0:
                    return -1
                at = _features(data, at, user, codes, kinds, single, counts, values, filled, cold)
                at = _mark(data, _null(data, _mark(data, at, COMMA)), COMMA)
                at = _mark(data, _null(data, at), COMMA)
                if at < 0:
                    return -1
                if data[at] == NULL:
                    at = _null(data, at)
                else:
                    _, at = _whole(data, at)
            else:
                item_ids[event], at = _whole(data, at)
                at = _mark(data, _null(data, _mark(data, at, COMMA)), COMMA)
                if at < 0:
                    return -1
                at = _features(data, at, event, item_codes, item_kinds, item_single, item_counts, item_values, item_filled, item_cold)
                action_types[event], at = _whole(data, _mark(data, at, COMMA))
                timestamps[event], at = _whole(data, _mark(data, at, COMMA))
                event += 1
            at = _mark(data, at, CLOSE_LIST)
            if at < 0:
                return -1
            if data[at] == CLOSE_LIST:
                break
            if data[at] != COMMA:
                return -1
            at = _space(data, at + 1)
        at = _space(data, at + 1)
        if profiles != 1 or data[at] != NEWLINE:
            return -1
        user_ids[user], lengths[user] = owner, event - first
        user, at = user + 1, at + 1
    return event


def _items(data, end, highest, codes, kinds, single, counts, values, filled, cold, ids):
    """The items in data[:end], one object without line ends. Returns how many, or -1: something unusual, as an id outside 1..highest is."""
    at, row = _mark(data, 0, OPEN), 0
    if at < 0 or data[at] == CLOSE:
        return -1
    while True:
        if data[at] != QUOTE:
            return -1
        item, at = _whole(data, at + 1)
        if at < 0 or data[at] != QUOTE or not 1 <= item <= highest:
            return -1
        ids[row] = item
        at = _mark(data, at + 1, COLON)
        if at < 0:
            return -1
        at = _features(data, at, row, codes, kinds, single, counts, values, filled, cold)
        if at < 0:
            return -1
        row, at = row + 1, _space(data, at)
        if data[at] == CLOSE:
            break
        at = _mark(data, at, COMMA)
        if at < 0:
            return -1
    return row if at + 1 == end else -1


def _load() -> None:
    global _loops
    numba = usable_numba()
    if numba is None:
        return
    for inner in (_space, _mark, _null, _whole, _value, _slot, _list, _features):
        numba.extending.register_jitable(inner)
    read, i8, u8 = (numba.types.Array(t, 1, "C", readonly=True) for t in (numba.uint8, numba.int64, numba.uint64))
    side = (u8, i8, numba.int32[:, ::1], numba.int64[:, ::1], numba.int32[:, ::1], numba.int64[::1], numba.int64[::1])
    out = numba.int64[::1]
    arguments = {_lines: (read, numba.int64, *side, *side, *[out] * 5), _items: (read, numba.int64, numba.int64, *side, out)}
    found = []
    for function, types in arguments.items():
        try:
            found.append(numba.njit(types, nogil=True, cache=True)(function))
        except (RuntimeError, OSError):  # no folder that can be written, or a full disk: compiled again in each process
            found.append(numba.njit(types, nogil=True)(function))
    _loops = Loops(*found)
