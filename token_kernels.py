"""Compiled loops that make a sequence's first vectors in training on CPU: items, users and small tables summed, norm, dropout; and back.

Know no modules and no settings: see fused_tokens.py.

Legend: N packed tokens, D width, M unique items, B users, F fields of the small tables, R rows of all these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import kernels
import machine_code
from machine_code import masked

POSITION, ACTION, GAP, PERIOD = range(4)  # kinds of a field
AHEAD = 16  # rows of items that are on their way to the core's cache
_TILE = 64  # tokens: 16 KB at width 64


class TokenKernels(NamedTuple):
    """The compiled functions; arrays contiguous, of exactly the types in `_SIGNATURES`."""

    table_rows: Callable
    embed: Callable
    embed_back: Callable
    by_source: Callable
    sum_tokens: Callable


def compiled() -> TokenKernels | None:
    """The kernels, compiled or read from disk at the first call; None without numba."""
    return _load() if kernels.ENABLED else None


def _table_rows(positions, actions, times, fields, begin, end, rows):
    """rows[begin:end] (N, F) is set to each token's row of each field's table; row 0, zeros, where it has none.

    fields: (F, 4) of each its kind, seconds of a unit (PERIOD), rows, and the first of them. Token begin is a user token. Returns whether
    all rows are there.
    """
    fits = True
    for f in range(len(fields)):
        kind, unit, size, first = fields[f]
        for n in range(begin, end):
            if kind == POSITION:
                row = positions[n]
            elif kind == ACTION:
                row = actions[n]
            elif positions[n] == 0:
                rows[n, f] = 0
                continue
            elif kind == PERIOD:
                row = times[n] // unit % size
            else:  # log2 of a float64, its exponent: exact below 2 ** 53, and the last row is for all from 2 ** (size - 1) on
                gap = min(max(times[n] - times[n - 1], 0), 1 << 52) if positions[n] > 1 else 0
                row = min((np.float64(gap + 1).view(np.int64) >> 52) - 1023, size - 1)
            fits &= 0 <= row < size
            rows[n, f] = first + row
    return fits


def _embed(history, users, items, owner, positions, tables, rows, gain, shift, eps, state, cut, scale, begin, end, normed, scales, out):
    """Tokens begin:end of out (N, D): the item's or user's vector plus its rows of tables (R, D), normalised, with dropout.

    gain: (D,), or (0,) without norm; else normed (N, D) and scales (N,) are set too: before gain and shift, 1 / standard deviation.
    cut: 0 = no dropout.
    """
    width, fields, flat = out.shape[1], rows.shape[1], rows.reshape(-1)
    tile = np.empty((_TILE, width), np.float32)
    for first in range(begin, end, _TILE):
        num = min(_TILE, end - first)
        for i in range(num):
            n, to = first + i, tile[i]
            machine_code.prefetch(history, items[min(n + AHEAD, end - 1)])
            machine_code.sum_rows(tile, i, tables, flat, n * fields, (n + 1) * fields)
            row = history[items[n]] if positions[n] else users[owner[n]]
            for d in range(width):
                to[d] += row[d]
        if len(gain):
            for i in range(num):
                to, kept, middle, square = tile[i], normed[first + i], np.float32(0.0), np.float32(0.0)
                for d in range(width):
                    middle += to[d]
                middle /= np.float32(width)
                for d in range(width):
                    square += (to[d] - middle) * (to[d] - middle)
                scale_of = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
                scales[first + i] = scale_of
                for d in range(width):
                    kept[d] = (to[d] - middle) * scale_of
                for d in range(width):
                    to[d] = kept[d] * gain[d] + shift[d]
        # From the tile to another array, not in place: there the compiled loop runs in vectors, .1 ms of 12,800 x 32, not .3.
        masked(tile.reshape(-1), out[first:].reshape(-1), num * width, (first - begin) * width // 4, state, cut, scale)


def _embed_back(grad, rows, gain, normed, scales, state, cut, scale, begin, end, to, of_tables, of_gain, of_shift):
    """From the gradient of `_embed`'s out (N, D): to[begin:end], that of the tokens' sums, and these tokens' shares of the tables' (R, D)
    and of gain's and shift's are set."""
    width, none = grad.shape[1], np.float32(0.0)
    of_tables[:] = none
    of_gain[:] = none
    of_shift[:] = none
    for first in range(begin, end, _TILE):
        last = min(first + _TILE, end)
        source, entries, start = grad[first:].reshape(-1), (last - first) * width, (first - begin) * width // 4
        masked(source, to[first:].reshape(-1), entries, start, state, cut, scale)
        if len(gain):
            for n in range(first, last):
                of_row, row, total, along = to[n], normed[n], none, none
                for d in range(width):
                    of_gain[d] += of_row[d] * row[d]
                    of_shift[d] += of_row[d]
                    of_row[d] *= gain[d]
                    total += of_row[d]
                    along += of_row[d] * row[d]
                total, along = total / np.float32(width), along / np.float32(width)
                for d in range(width):
                    of_row[d] = (of_row[d] - total - row[d] * along) * scales[n]
        for n in range(first, last):
            of_row = to[n]
            for f in range(rows.shape[1]):
                table = of_tables[rows[n, f]]
                for d in range(width):
                    table[d] += of_row[d]


def _by_source(items, owner, positions, num_items, starts, tokens):
    """The tokens (N,) int32 by what they stand for, items first, then users: source s's are tokens[starts[s] : starts[s + 1]], ascending.

    starts: (M + B + 2,) int64 zeros. Both are set.
    """
    for n in range(len(items)):
        starts[(items[n] if positions[n] else num_items + owner[n]) + 2] += 1
    for source in range(2, len(starts)):
        starts[source] += starts[source - 1]
    for n in range(len(items)):
        source = (items[n] if positions[n] else num_items + owner[n]) + 1
        tokens[starts[source]] = n
        starts[source] += 1


def _sum_tokens(grad, tokens, starts, before, begin, end, out):
    """out[begin:end] is set to the sums of the rows of grad (N, D) over the tokens of sources before + begin to before + end."""
    for source in range(begin, end):
        machine_code.sum_rows(out, source, grad, tokens, starts[before + source], starts[before + source + 1])


_SIGNATURES = {
    _table_rows: "i8[:] i8[:] i8[:] i8[:,:] i8 i8 I4[:,:]",
    _embed: "f4[:,:] f4[:,:] i8[:] i8[:] i8[:] f4[:,:] i4[:,:] f4[:] f4[:] f4 u8 u8 f4 i8 i8 F4[:,:] F4[:] F4[:,:]",
    _embed_back: "f4[:,:] i4[:,:] f4[:] f4[:,:] f4[:] u8 u8 f4 i8 i8 F4[:,:] F4[:,:] F4[:] F4[:]",
    _by_source: "i8[:] i8[:] i8[:] i8 I8[:] I4[:]",
    _sum_tokens: "f4[:,:] i4[:] i8[:] i8 i8 i8 F4[:,:]",
}


@kernels.made_once
def _load() -> TokenKernels | None:
    return machine_code.load(TokenKernels, _SIGNATURES)
