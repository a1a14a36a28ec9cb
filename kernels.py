"""Compiled loops of the loader's thread: sorting of bounded keys, a side's bags, tokens and negatives of a batch.

Owns no data and knows no store.

Numba compiles them, once a machine, and keeps the code on disk. Where it cannot be imported, `compiled()` is None and the callers take
their numpy way, with bit-identical results. The loops run without the interpreter's lock, so the training thread goes on beside them.

Legend: Z keys, R unique rows, M things (items or users), F fields, C columns, B users of a batch, N tokens, K negatives a token.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np

FAST = frozenset(("reassoc", "contract", "nsz"))  # sums of floats in any order, so that they run in vectors
ENABLED = True  # False: callers take the numpy way, for tests; NUMBA_DISABLE_JIT=1 does it for a process
LIST, ID = -2, -1  # in place of a column's number: the field is filled elsewhere; the field's value is the id

_PLACE = 0xFFFFFFFF
_FILTER = 1 << 12  # entries of a user's filter of seen items
_COUNTED = 1 << 14  # keys below are counted in a table, which stays in a core's cache; others are sorted by radix
_BLOCK = 256  # things whose values are read at once: field by field, while they are near
_TURNED = 64  # things whose keys are turned from field by field to thing by thing at once
_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)  # beside uint64, numba turns a plain integer into a float


class Kernels(NamedTuple):
    """The compiled functions; each takes contiguous arrays of exactly the types in `_SIGNATURES`."""

    distinct: Callable
    field_rows: Callable
    side_inputs: Callable
    window_tokens: Callable
    draw_negatives: Callable


def compiled(wait: bool = False) -> Kernels | None:
    """The kernels, or None: there is no numba, or they are not ready.

    The first call starts a thread that imports numba and reads the compiled code (0.5 s together, 20 MB), or makes it (6 s, once a
    machine). Meanwhile callers take the numpy way, so no batch waits. wait: return when it is done, for tests and measurements.
    """
    global _thread
    if not ENABLED:
        return None
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_load, name="kernels")  # no daemon: a process that ends inside LLVM may crash
            _thread.start()
    if wait:
        _thread.join()
    return _kernels


def contiguous(array: np.ndarray, dtype: type) -> np.ndarray:
    """The array as kernels take it: itself, where it or its memory map is in order and of that type."""
    return np.ascontiguousarray(array, dtype)


def scratch(name: str, num: int, dtype: type) -> np.ndarray:
    """(num,) of any content; the same memory at each call with that name in this thread, up to 16 MB.

    New memory costs a page fault every 4 KB: 1.8 ms of a batch's 1.4 MB of keys, which are filled in 0.7 ms.
    """
    kept = getattr(_scratch, name, None)
    if kept is None or len(kept) < num:
        kept = np.empty(num + num // 4, dtype)
        if kept.nbytes <= 16 << 20:
            setattr(_scratch, name, kept)
    return kept[:num]


# ---- loops: plain Python that numba compiles ------------------------------------------------------------------------------


def _sorted_pairs(keys, size, pairs, other):
    """Stable radix sort of keys (Z,) int32 in [0, size): key << 32 | place, ascending, in one of the two (>= Z,) int64 scratch arrays."""
    num, last, ascending = len(keys), 0, True
    for place in range(num):
        key = np.int64(keys[place])
        pairs[place] = key << 32 | place
        ascending &= key >= last
        last = key
    if ascending:  # a batch's item ids are
        return pairs
    bits, widest = 1, 5
    while size - 1 >> bits:
        bits += 1
    while num >> widest and widest < 13:  # few keys: a small histogram, so that 128 users do not pay for 2**13 counts
        widest += 1
    passes = -(-bits // widest)
    digit = -(-bits // passes)
    ends = np.empty(1 << digit, np.int32)
    for shift in range(32, 32 + bits, digit):
        ends[:] = 0
        for i in range(num):
            ends[pairs[i] >> shift & (1 << digit) - 1] += 1
        total = 0
        for d in range(len(ends)):
            total, ends[d] = total + ends[d], total
        for i in range(num):
            d = pairs[i] >> shift & (1 << digit) - 1
            other[ends[d]] = pairs[i]
            ends[d] += 1
        pairs, other = other, pairs
    return pairs


def _distinct(keys, size):
    """columns.distinct: unique keys but 0 (R,) int32, starts (R,) int64, places (Z',) int64, rank (Z,) int32."""
    num = len(keys)
    pairs = _sorted_pairs(keys, size, np.empty(num, np.int64), np.empty(num, np.int64))
    unique, starts = np.empty(num, np.int32), np.empty(num, np.int64)
    places, rank = np.empty(num, np.int64), np.empty(num, np.int32)
    found, uses, last = 0, 0, 0
    for i in range(num):
        key, place = pairs[i] >> 32, pairs[i] & _PLACE
        if key != last:
            unique[found], starts[found], last = key, uses, key
            found += 1
        rank[place] = found
        if key:
            places[uses] = place
            uses += 1
    return unique[:found].copy(), starts[:found].copy(), places[:uses], rank


def mix(state, word):
    """One word more of dataset.counter_hash, all uint64."""
    state = (state ^ word) + _GOLDEN
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


def _field_rows(single, ids, columns, limits, sizes, hashes, begin, keys):
    """Fills keys[begin[f] : begin[f] + M] with field f's rows of M things, 0 where the value is not in 1..limits[f]; skips lists.

    single: (M, C) int32, ids: (M,) int64. columns (F,): of `single`, or ID, or LIST. hashes (F,) uint64: state of the field's hash
    function, 0 = its rows are its values.
    """
    for block in range(0, len(ids), _BLOCK):
        things = range(block, min(block + _BLOCK, len(ids)))
        for f in range(len(columns)):
            column, limit, to = columns[f], limits[f], keys[begin[f] : begin[f + 1]]
            if column == LIST:
                continue
            for i in things:  # a product, no branch: which values are missing cannot be foretold, and a wrong guess costs 5 ns
                value = ids[i] if column == ID else np.int64(single[i, column])
                to[i] = value * ((value >= 1) & (value <= limit))
            if hashes[f]:
                for i in things:
                    if to[i]:
                        value = ids[i] if column == ID else np.int64(single[i, column])
                        to[i] = 1 + np.int64(mix(hashes[f], np.uint64(value)) % np.uint64(sizes[f]))


def _side_inputs(keys, begin, sizes, offsets, counts, num, transposed, scratch):
    """Unique rows and bags of M = num things (features.SideInputs).

    keys: (Z,) int32 rows 1..sizes[f] or 0 of field f at begin[f]:begin[f + 1], thing by thing; overwritten. offsets (F,): before each
    field's first row. counts: (F, M) int32 keys of each thing, or (0, M) where each has one of each field. scratch: (>= 4 Z + 4,) int64.
    Returns rows (R,) int64, bounds (F + 1,) int64, index (Z,) int32, bags (M + 1,) int32, weights (Z,) float32, things (Z',) int32,
    starts (R + 1,) int32, thing_weights (Z',) float32; weights are empty without counts, the last three are unless transposed.
    """
    num_fields, lists, longest = len(sizes), len(counts) > 0, 0
    for f in range(num_fields):
        longest = max(longest, begin[f + 1] - begin[f])
    pairs = scratch[: 2 * longest]
    rows, starts = scratch[2 * longest :][: len(keys) + 2], scratch[2 * longest + len(keys) + 2 :]  # used as far as there are rows
    bounds, owner = np.empty(num_fields + 1, np.int64), np.empty(longest if lists else 0, np.int32)
    things = np.empty(len(keys) if transposed else 0, np.int32)
    thing_weights = np.empty(len(keys) if transposed and lists else 0, np.float32)
    rows[0], bounds[0], found = 0, 1, 1
    starts[:2] = 0
    for f in range(num_fields):
        of_field, first = keys[begin[f] : begin[f + 1]], starts[bounds[f]]
        if sizes[f] < _COUNTED and sizes[f] <= len(of_field):
            found = _count(of_field, sizes[f], bounds[f], rows, starts, things)
        else:
            found = _sort(of_field, sizes[f], bounds[f], rows, starts, things, pairs)
        rows[bounds[f] : found] += offsets[f]
        bounds[f + 1] = found
        if lists and transposed:
            _owners(counts[f], owner)
            for use in range(first, starts[found]):
                things[use] = owner[things[use]]
                thing_weights[use] = 1.0 / counts[f, things[use]]
    uses, ends = starts[found], starts[: found + 1].astype(np.int32)
    index, bags, weights = _by_thing(keys, begin, counts, num)
    return rows[:found].copy(), bounds, index, bags, weights, things[:uses], ends, thing_weights[:uses]


def _count(keys, size, found, rows, starts, things):
    """One field of `_side_inputs` by counting: keys become their rows' numbers, from `found` on; rows, starts, places follow."""
    ends, number = np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int32)
    for z in range(len(keys)):
        ends[keys[z]] += 1
    for key in range(1, size + 1):
        if ends[key]:
            rows[found], number[key], starts[found + 1] = key, found, starts[found] + ends[key]
            ends[key] = starts[found]
            found += 1
    for z in range(len(keys)):
        key = keys[z]
        keys[z] = number[key]
        if key and len(things):
            things[ends[key]] = z
            ends[key] += 1
    return found


def _sort(keys, size, found, rows, starts, things, pairs):
    """`_count` where a table of all possible keys would be too large."""
    ordered = _sorted_pairs(keys, size + 1, pairs[: len(keys)], pairs[len(keys) :])
    found, last, use = found - 1, 0, starts[found]
    for i in range(len(keys)):
        key, place = ordered[i] >> 32, ordered[i] & _PLACE
        if not key:
            keys[place] = 0
            continue
        found += key != last  # no branch: whether a key is new cannot be foretold either
        last, rows[found], keys[place] = key, key, found
        if len(things):
            things[use] = place
        use += 1
        starts[found + 1] = use
    return found + 1


def _owners(counts, owner):
    """owner[z]: the thing of a field's key z, for counts (M,)."""
    z = 0
    for thing in range(len(counts)):
        for _ in range(counts[thing]):
            owner[z] = thing
            z += 1


def _by_thing(keys, begin, counts, num):
    """Keys of one field after another, thing by thing: index (Z,) int32, bags (M + 1,) int32, weights (Z,) or (0,) float32."""
    num_fields, lists = len(begin) - 1, len(counts) > 0
    index, bags, weights = np.empty(len(keys), np.int32), np.empty(num + 1, np.int32), np.empty(len(keys) if lists else 0, np.float32)
    if not lists:  # in blocks, field by field: 343,000 keys in .13 ms; thing by thing .24
        for block in range(0, num, _TURNED):
            end = min(block + _TURNED, num)
            for f in range(num_fields):
                of_block = keys[begin[f] + block : begin[f] + end]
                for i in range(end - block):
                    index[(block + i) * num_fields + f] = of_block[i]
        for thing in range(num + 1):
            bags[thing] = thing * num_fields
        return index, bags, weights
    at, ahead = 0, begin.copy()
    bags[0] = 0
    for thing in range(num):
        for f in range(num_fields):
            for _ in range(counts[f, thing]):
                index[at], weights[at] = keys[ahead[f]], 1.0 / counts[f, thing]
                ahead[f] += 1
                at += 1
        bags[thing + 1] = at
    return index, bags, weights


def _window_tokens(begin, end, most, item_ids, action_types, timestamps):
    """Tokens of B users: of each the last `most` events of begin:end as targets, each predicted from the event before it.

    Returns lengths (B,), and (N,) each: owner, positions, items, targets, actions, times (dataset.Batch; items are ids), all int64.
    """
    lengths = np.minimum(end - begin, most)
    num = lengths.sum()
    owner, positions, items = np.empty(num, np.int64), np.empty(num, np.int64), np.zeros(num, np.int64)
    targets, actions, times = np.empty(num, np.int64), np.zeros(num, np.int64), np.zeros(num, np.int64)
    token = 0
    for user in range(len(begin)):
        first = end[user] - lengths[user]
        for event in range(first, end[user]):
            owner[token], positions[token], targets[token] = user, event - first, item_ids[event]
            if event > first:  # else it is the user token
                items[token], actions[token], times[token] = item_ids[event - 1], action_types[event - 1] + 1, timestamps[event - 1]
            token += 1
    return lengths, owner, positions, items, targets, actions, times


def _draw_negatives(item_ids, begin, end, owner, positions, samples, num_negatives, num_items, state, max_draws):
    """dataset.uniform_negatives: (N, K) int64. state: uint64 hash of (seed, epoch). A user's events are item_ids[begin:end], in any order.

    They are looked through only where a filter of their lowest bits, made once for a user's tokens, has the item: no sorting, no search.
    """
    drawn, filled = np.empty((len(owner), num_negatives), np.int64), np.zeros(_FILTER, np.bool_)
    user = -1
    for token in range(len(owner)):
        if owner[token] != user:
            user = owner[token]
            history = item_ids[begin[user] : end[user]]
            filled[:] = False
            for item in history:
                filled[item & _FILTER - 1] = True
        of_token = mix(mix(state, np.uint64(samples[user])), np.uint64(positions[token]))
        for k in range(num_negatives):
            of_negative = mix(of_token, np.uint64(k))
            for draw in range(max_draws):
                item = 1 + np.int64(mix(of_negative, np.uint64(draw)) % np.uint64(num_items))
                if not (filled[item & _FILTER - 1] and np.any(history == item)):
                    break
            drawn[token, k] = item
    return drawn


# ---- compilation ------------------------------------------------------------------------------------------------------------

# Given, so that reading the compiled code is all that a process does. I: an array that is written to; the others are read-only there.
_SIGNATURES = {
    _distinct: "i4[:] i8",
    _field_rows: "i4[:,:] i8[:] i8[:] i8[:] i8[:] u8[:] i8[:] I4[:]",
    _side_inputs: "I4[:] i8[:] i8[:] i8[:] i4[:,:] i8 b I8[:]",
    _window_tokens: "i8[:] i8[:] i8 i4[:] i1[:] i8[:]",
    _draw_negatives: "i4[:] i8[:] i8[:] i8[:] i8[:] i8[:] i8 i8 u8 i8",
}
_lock = threading.Lock()
_scratch = threading.local()
_thread: threading.Thread | None = None
_kernels: Kernels | None = None


def _load() -> None:
    global _kernels
    numba = usable_numba()
    if numba is None:
        return
    for inner in (_sorted_pairs, _count, _sort, _owners, _by_thing):
        numba.extending.register_jitable(inner)
    _kernels = Kernels(*(compile_loop(numba, function, text) for function, text in _SIGNATURES.items()))


def made_once(function: Callable) -> Callable:
    """A function without arguments that is called once, by the first thread that asks; others wait for its result."""
    lock, cached = threading.Lock(), cache(function)

    @wraps(function)
    def result():
        with lock:
            return cached()

    return result


@made_once
def usable_numba():
    """The module, or None where it is not installed, is older than the numpy here, or is told not to compile.

    One thread at a time: the loops of the loader, of the readers and of the step ask for it from threads of their own. Where two import
    numba at once, Python may hand one of them half a module to break a deadlock; that would pass for "not installed", and the run would
    silently draw other dropout masks.
    """
    try:
        import numba
        import numba.extending
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:  # the loops as they stand would take minutes a batch
        return None
    numba.extending.register_jitable(mix)
    return numba


@cache
def _sources() -> str:
    """Of the modules whose functions loops of other modules call: numba looks for changes in the loop's own file alone."""
    files = [Path(__file__).with_name(name).read_bytes() for name in ("kernels.py", "machine_code.py", "row_code.py")]
    return hashlib.sha256(b"".join(files)).hexdigest()[:12]


def compile_loop(numba, function: Callable, text: str, fast: bool = False) -> Callable:
    """The compiled function, kept on disk. text: types of its arguments. fast: with FAST."""
    types = {
        "i1": numba.int8,
        "i4": numba.int32,
        "i8": numba.int64,
        "u8": numba.uint64,
        "f4": numba.float32,
        "f8": numba.float64,
        "b": numba.boolean,
    }
    arguments = []
    for word in text.split():
        dtype, brackets, axes = word.partition("[")
        of_type = types[dtype.lower()]
        arguments.append(numba.types.Array(of_type, axes.count(":"), "C", readonly=dtype.islower()) if brackets else of_type)
    function.__qualname__ = f"{function.__name__}_{_sources()}"  # names the file that keeps the code
    options = {"nogil": True, "error_model": "numpy", "fastmath": set(FAST) if fast else False}
    try:
        return numba.njit(tuple(arguments), cache=True, **options)(function)
    except (RuntimeError, OSError):  # no folder that can be written, or a full disk: compiled again in each process
        return numba.njit(tuple(arguments), **options)(function)
