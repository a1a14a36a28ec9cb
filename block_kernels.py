"""Compiled loops of a Transformer block's training on CPU, forward and backward, over tiles of tokens that stay in a core's cache.

Know no modules and no settings: see fused_block.py.

Legend: N tokens, W width, H heads, I inner width, F matrices of the first layer of the feed-forward (2: swiglu), n tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import kernels
import machine_code
import row_code
from kernels import mix
from machine_code import address, exp_of_minus, product, transposed

RELU, GELU, SWIGLU = 0, 1, 2
TILE_ENTRIES = 1 << 14  # of n x W: 64 KiB, of which a tile has several
ROWS = 16  # queries whose scores are made at once


class BlockKernels(NamedTuple):
    """The compiled functions; arrays contiguous, of exactly the types in `_SIGNATURES`."""

    to_attention: Callable
    attention: Callable
    from_attention: Callable
    from_attention_back: Callable
    attention_back: Callable
    to_attention_back: Callable


def compiled() -> BlockKernels | None:
    """The kernels, compiled or read from disk at the first call; None without numba."""
    return _load() if machine_code.available() else None


# ---- parts of the loops, each over a tile's rows ------------------------------------------------------------------------------


def _normalise(x, num, rms, eps, normed, scale):
    """normed (n, W), scale (n,): x less its mean (not with rms) over its standard deviation, and one over that."""
    width = x.shape[1]
    for i in range(num):
        row, out = x[i], normed[i]
        mean = np.float32(0.0)
        if not rms:
            for d in range(width):
                mean += row[d]
            mean /= np.float32(width)
        square = np.float32(0.0)
        for d in range(width):
            square += (row[d] - mean) * (row[d] - mean)
        factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
        scale[i] = factor
        for d in range(width):
            out[d] = (row[d] - mean) * factor


def _affine(normed, num, gain, shift, out):
    for i in range(num):
        row, to = normed[i], out[i]
        for d in range(len(gain)):
            to[d] = row[d] * gain[d] + shift[d]


def _normalise_back(grad, num, rms, normed, scale, gain, grad_gain, grad_shift, out, add):
    """From the gradient of normed * gain + shift, (n, W), to that of x, set in out or added to it; the gradients of gain and shift grow."""
    width = len(gain)
    for i in range(num):
        g, x, to, factor = grad[i], normed[i], out[i], scale[i]
        mean, along = np.float32(0.0), np.float32(0.0)
        for d in range(width):
            of_x = g[d] * gain[d]
            mean += of_x
            along += of_x * x[d]
            grad_gain[d] += g[d] * x[d]
            grad_shift[d] += g[d]
        mean = np.float32(0.0) if rms else mean / np.float32(width)
        along /= np.float32(width)
        if add:
            for d in range(width):
                to[d] += (g[d] * gain[d] - mean - x[d] * along) * factor
        else:
            for d in range(width):
                to[d] = (g[d] * gain[d] - mean - x[d] * along) * factor


def _drop(tile, num, first, state, cut, scale):
    """What machine_code.masked does with rows first to first + n of an (N, W) array, in place; first: a multiple of 4."""
    if cut == 0:
        return
    flat, size, start, none = tile.reshape(-1), num * tile.shape[1], first * tile.shape[1] // 4, np.float32(0.0)
    mask, _16, _32, _48 = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48)
    for block in range(size // 4):
        bits, place = mix(state, np.uint64(start + block)), 4 * block
        flat[place] *= scale if bits & mask >= cut else none
        flat[place + 1] *= scale if bits >> _16 & mask >= cut else none
        flat[place + 2] *= scale if bits >> _32 & mask >= cut else none
        flat[place + 3] *= scale if bits >> _48 >= cut else none
    bits = mix(state, np.uint64(start + size // 4))
    for place in range(size // 4 * 4, size):
        flat[place] *= scale if bits & mask >= cut else none
        bits >>= _16


def _normal(x):
    """Distribution and density of a standard normal at x, to 3e-7. Source: Abramowitz and Stegun 7.1.26."""
    density = exp_of_minus(np.float32(0.5) * x * x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911 * 0.70710678) * abs(x))
    tail = np.float32(1.061405429)
    tail = tail * t - np.float32(1.453152027)
    tail = tail * t + np.float32(1.421413741)
    tail = tail * t - np.float32(0.284496736)
    tail = (tail * t + np.float32(0.254829592)) * t * density * np.float32(0.5)
    return np.float32(1.0) - tail if x >= 0 else tail, density * np.float32(0.39894228)


def _sigmoid(x):
    small = exp_of_minus(abs(x))
    return (np.float32(1.0) if x >= 0 else small) / (np.float32(1.0) + small)


def _activate(hidden, num, bias, kind, out):
    """layers.activate of hidden (n, F I) + bias: out (n, I)."""
    inner = out.shape[1]
    for i in range(num):
        row, to = hidden[i], out[i]
        if kind == RELU:
            for d in range(inner):
                to[d] = max(row[d] + bias[d], np.float32(0.0))
        elif kind == GELU:
            for d in range(inner):
                x = row[d] + bias[d]
                to[d] = x * _normal(x)[0]
        else:
            for d in range(inner):
                gate = row[inner + d] + bias[inner + d]
                to[d] = (row[d] + bias[d]) * gate * _sigmoid(gate)


def _activate_back(hidden, num, bias, kind, grad, out):
    """grad: (n, I) of the result; out: (n, F I) of hidden."""
    inner = grad.shape[1]
    for i in range(num):
        row, g, to = hidden[i], grad[i], out[i]
        if kind == RELU:
            for d in range(inner):
                to[d] = g[d] if row[d] + bias[d] > 0 else np.float32(0.0)
        elif kind == GELU:
            for d in range(inner):
                x = row[d] + bias[d]
                below, density = _normal(x)
                to[d] = g[d] * (below + x * density)
        else:
            for d in range(inner):
                gate = row[inner + d] + bias[inner + d]
                sigmoid = _sigmoid(gate)
                to[d] = g[d] * gate * sigmoid
                to[inner + d] = g[d] * (row[d] + bias[d]) * sigmoid * (np.float32(1.0) + gate * (np.float32(1.0) - sigmoid))


def _add_columns(tile, num, sums):
    """sums (W,) += the sum of the rows."""
    for i in range(num):
        row = tile[i]
        for d in range(len(sums)):
            sums[d] += row[d]


def _add_row(tile, num, row):
    """Each row += row (W,)."""
    for i in range(num):
        to = tile[i]
        for d in range(len(row)):
            to[d] += row[d]


def _add(a, b, num, out):
    """out = a + b, (n, W)."""
    for i in range(num):
        x, y, to = a[i], b[i], out[i]
        for d in range(len(x)):
            to[d] = x[d] + y[d]


def _turn(source, row, length, width, out):
    """The transpose of (length, width) entries, whose rows are `row` apart: out (width, length), both flat."""
    step = row_code.LANES
    whole = width // step * step
    for i in range(0, length, step):
        for d in range(0, whole, step):
            to = address(out) + 4 * (d * length + i)
            row_code.turn_block(address(source) + 4 * (i * row + d), row, to, length, min(step, length - i))
    for i in range(length):
        for d in range(whole, width):
            out[d * length + i] = source[i * row + d]


def _rotate(row, heads, cos, sin, back):
    """layers.rotate of each head of a row (W,), in place; back: by the opposite angle."""
    half = len(cos)
    for head in range(heads):
        first = 2 * half * head
        for d in range(half):
            x, y = row[first + d], row[first + half + d]
            s = -sin[d] if back else sin[d]
            row[first + d] = x * cos[d] - y * s
            row[first + half + d] = y * cos[d] + x * s


# ---- loops ---------------------------------------------------------------------------------------------------------------------


def _to_attention(tile, x, norm_first, rms, eps, gain, shift, weight, bias, heads, cos, sin, positions, normed, scale, qkv):
    """From x (N, W) to queries, keys and values side by side, qkv (N, 3 W).

    weight: (3 W, W), bias (3 W,). gain, shift: (W,) of the norm before, whose normed (N, W) and scale (N,) are set with norm_first.
    cos, sin: (T, W / heads / 2), T = 0 without rotary positions. positions: (N,).
    """
    num, width = x.shape
    hidden, turned = np.empty((tile if norm_first else 0, width), np.float32), transposed(weight)
    for begin in range(0, num, tile):
        n = min(tile, num - begin)
        source, out = x[begin:], qkv[begin:]
        if norm_first:
            _normalise(source, n, rms, eps, normed[begin:], scale[begin:])
            _affine(normed[begin:], n, gain, shift, hidden)
            source = hidden
        product(address(source), width, 1, address(turned), 3 * width, n, 3 * width, width, False, address(out), 3 * width)
        _add_row(out, n, bias)
        for i in range(n if len(cos) else 0):
            at = positions[begin + i]
            _rotate(out[i, : 2 * width], 2 * heads, cos[at], sin[at], False)


def _to_attention_back(
    tile, grad_qkv, x, norm_first, rms, gain, shift, weight, heads, cos, sin, positions, normed, scale,
    grad_x, grad_weight, grad_bias, grad_gain, grad_shift,
):  # fmt: skip
    """From the gradient of qkv, overwritten with rotary positions: that of x is added to grad_x (N, W), the others are set."""
    num, width = x.shape
    back = np.empty((tile, width), np.float32)
    hidden = np.empty((tile if norm_first else 0, width), np.float32)
    grad_bias[:], grad_gain[:], grad_shift[:] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for begin in range(0, num, tile):
        n = min(tile, num - begin)
        grad, source, to = grad_qkv[begin:], x[begin:], grad_x[begin:]
        for i in range(n if len(cos) else 0):
            at = positions[begin + i]
            _rotate(grad[i, : 2 * width], 2 * heads, cos[at], sin[at], True)
        _add_columns(grad, n, grad_bias)
        if norm_first:
            _affine(normed[begin:], n, gain, shift, hidden)
            source = hidden
        product(address(grad), 1, 3 * width, address(source), width, 3 * width, width, n, begin > 0, address(grad_weight), width)
        if norm_first:
            product(address(grad), 3 * width, 1, address(weight), width, n, width, 3 * width, False, address(back), width)
            _normalise_back(back, n, rms, normed[begin:], scale[begin:], gain, grad_gain, grad_shift, to, True)
        else:
            product(address(grad), 3 * width, 1, address(weight), width, n, width, 3 * width, True, address(to), width)


def _attention(qkv, starts, heads, mixed, log_sum):
    """Causal softmax attention of each user's tokens starts[u] to starts[u + 1]: mixed (N, W), log_sum (N, H) of the scores' exponentials.

    Scores of ROWS queries at a time, and of the keys up to the last of these only: half of the products of a square.
    """
    width, longest = mixed.shape[1], 0
    for user in range(len(starts) - 1):
        longest = max(longest, starts[user + 1] - starts[user])
    flat, out, head_width, one = qkv.reshape(-1), mixed.reshape(-1), width // heads, np.float32(1.0)
    turned, scores = np.empty(head_width * longest, np.float32), np.empty(ROWS * longest, np.float32)
    factor, totals = one / np.sqrt(np.float32(head_width)), np.empty(ROWS, np.float32)
    for user in range(len(starts) - 1):
        first, length = starts[user], starts[user + 1] - starts[user]
        for head in range(heads):
            at = first * 3 * width + head * head_width
            _turn(flat[at + width :], 3 * width, length, head_width, turned)
            for begin in range(0, length, ROWS):
                n, end = min(ROWS, length - begin), min(begin + ROWS, length)
                rows, to = flat[at + begin * 3 * width :], out[(first + begin) * width + head * head_width :]
                product(address(rows), 3 * width, 1, address(turned), length, n, end, head_width, False, address(scores), end)
                for i in range(n):
                    top, total = row_code.softmax_row(address(scores) + 4 * i * end, begin + i + 1, end, factor)
                    totals[i] = one / total
                    log_sum[first + begin + i, head] = top * factor + np.log(total)
                product(address(scores), end, 1, address(flat[at + 2 * width :]), 3 * width, n, head_width, end, False, address(to), width)
                for i in range(n):
                    for d in range(head_width):
                        to[i * width + d] *= totals[i]


def _attention_back(grad, qkv, starts, heads, mixed, log_sum, grad_qkv):
    """From the gradient of mixed (N, W) to that of qkv. The weights are made again from log_sum."""
    width, longest = mixed.shape[1], 0
    for user in range(len(starts) - 1):
        longest = max(longest, starts[user + 1] - starts[user])
    flat, to, head_width, zero, one = qkv.reshape(-1), grad_qkv.reshape(-1), width // heads, np.float32(0.0), np.float32(1.0)
    turned, turned_value = np.empty(head_width * longest, np.float32), np.empty(head_width * longest, np.float32)
    scores, of_scores = np.empty(ROWS * longest, np.float32), np.empty(ROWS * longest, np.float32)
    factor, flat_grad = one / np.sqrt(np.float32(head_width)), grad.reshape(-1)
    for user in range(len(starts) - 1):
        first, length = starts[user], starts[user + 1] - starts[user]
        for head in range(heads):
            at, column = first * 3 * width + head * head_width, head * head_width
            _turn(flat[at + width :], 3 * width, length, head_width, turned)
            _turn(flat[at + 2 * width :], 3 * width, length, head_width, turned_value)
            more = False  # the last rows come first: they set the gradients of all keys and values, the others add to these
            for begin in range((length - 1) // ROWS * ROWS, -1, -ROWS):
                n, end = min(ROWS, length - begin), min(begin + ROWS, length)
                rows, of_rows = flat[at + begin * 3 * width :], flat_grad[(first + begin) * width + column :]
                product(address(rows), 3 * width, 1, address(turned), length, n, end, head_width, False, address(scores), end)
                product(address(of_rows), width, 1, address(turned_value), length, n, end, head_width, False, address(of_scores), end)
                for i in range(n):
                    token, along = first + begin + i, zero
                    for d in range(head_width):
                        along += grad[token, column + d] * mixed[token, column + d]
                    row, of_row = address(scores) + 4 * i * end, address(of_scores) + 4 * i * end
                    row_code.softmax_row_back(row, of_row, begin + i + 1, end, log_sum[token, head], along, factor)
                key, value, wide = to[at + width :], to[at + 2 * width :], 3 * width
                product(
                    address(of_scores),
                    end,
                    1,
                    address(flat[at + width :]),
                    wide,
                    n,
                    head_width,
                    end,
                    False,
                    address(to[at + begin * wide :]),
                    wide,
                )
                product(address(of_scores), 1, end, address(rows), wide, end, head_width, n, more, address(key), wide)
                product(address(scores), 1, end, address(of_rows), width, end, head_width, n, more, address(value), wide)
                more = True


def _from_attention(
    tile, x, mixed, norm_first, rms, eps, kind, states, cut, keep, cut_inner, keep_inner,
    out_weight, out_bias, gain1, shift1, inner_weight, inner_bias, last_weight, last_bias, gain2, shift2,
    normed1, scale1, normed2, scale2, hidden, result,
):  # fmt: skip
    """From attention's result, mixed (N, W), to the block's, (N, W): projection, residual, feed-forward, residual, norms.

    Post-norm: gain1 and normed1 are those of the norm after attention, gain2's after the feed-forward. norm_first: gain2's is the norm
    before the feed-forward, and of the first nothing is set. hidden: (N, F I), set to the first layer's result less its bias. states: (3,)
    of the dropouts after attention, in the feed-forward, and after it; cut 0 = none.
    """
    num, width = x.shape
    inner = last_weight.shape[1]
    fused = inner_weight.shape[0]
    rows, stream = np.empty((tile, width), np.float32), np.empty((tile, width), np.float32)
    source, active = np.empty((tile, width), np.float32), np.empty((tile, inner), np.float32)
    out_turned, inner_turned, last_turned = transposed(out_weight), transposed(inner_weight), transposed(last_weight)
    for begin in range(0, num, tile):
        n = min(tile, num - begin)
        product(address(mixed[begin:]), width, 1, address(out_turned), width, n, width, width, False, address(stream), width)
        _add_row(stream, n, out_bias)
        _drop(stream, n, begin, states[0], cut, keep)
        _add(stream, x[begin:], n, stream)
        if norm_first:
            _normalise(stream, n, rms, eps, normed2[begin:], scale2[begin:])
            _affine(normed2[begin:], n, gain2, shift2, source)
        else:
            _normalise(stream, n, rms, eps, normed1[begin:], scale1[begin:])
            _affine(normed1[begin:], n, gain1, shift1, source)
        product(address(source), width, 1, address(inner_turned), fused, n, fused, width, False, address(hidden[begin:]), fused)
        _activate(hidden[begin:], n, inner_bias, kind, active)
        _drop(active, n, begin, states[1], cut_inner, keep_inner)
        product(address(active), inner, 1, address(last_turned), width, n, width, inner, False, address(rows), width)
        _add_row(rows, n, last_bias)
        _drop(rows, n, begin, states[2], cut, keep)
        _add(stream if norm_first else source, rows, n, result[begin:])
        if not norm_first:
            _normalise(result[begin:], n, rms, eps, normed2[begin:], scale2[begin:])
            _affine(normed2[begin:], n, gain2, shift2, result[begin:])


def _from_attention_back(
    tile, grad, mixed, norm_first, rms, kind, states, cut, keep, cut_inner, keep_inner,
    out_weight, gain1, shift1, inner_weight, inner_bias, last_weight, gain2, shift2, normed1, scale1, normed2, scale2, hidden,
    grad_x, grad_mixed, grad_out_weight, grad_out_bias, grad_gain1, grad_shift1,
    grad_inner_weight, grad_inner_bias, grad_last_weight, grad_last_bias, grad_gain2, grad_shift2,
):  # fmt: skip
    """The gradients of what `_from_attention` is given, from its result's (N, W): those of x and mixed (N, W) and of weights are set."""
    num, width = grad.shape
    inner = last_weight.shape[1]
    fused = inner_weight.shape[0]
    rows, stream, source = (np.empty((tile, width), np.float32), np.empty((tile, width), np.float32), np.empty((tile, width), np.float32))
    active, grad_active = np.empty((tile, inner), np.float32), np.empty((tile, inner), np.float32)
    grad_hidden, zero = np.empty((tile, fused), np.float32), np.float32(0.0)
    for sums in (grad_out_bias, grad_gain1, grad_shift1, grad_inner_bias, grad_last_bias, grad_gain2, grad_shift2):
        sums[:] = zero
    for begin in range(0, num, tile):
        n = min(tile, num - begin)
        if norm_first:
            stream[:n] = grad[begin : begin + n]
            _affine(normed2[begin:], n, gain2, shift2, source)
        else:
            _normalise_back(grad[begin:], n, rms, normed2[begin:], scale2[begin:], gain2, grad_gain2, grad_shift2, stream, False)
            _affine(normed1[begin:], n, gain1, shift1, source)
        rows[:n] = stream[:n]
        _drop(rows, n, begin, states[2], cut, keep)
        _add_columns(rows, n, grad_last_bias)
        _activate(hidden[begin:], n, inner_bias, kind, active)
        _drop(active, n, begin, states[1], cut_inner, keep_inner)
        product(address(rows), 1, width, address(active), inner, width, inner, n, begin > 0, address(grad_last_weight), inner)
        product(address(rows), width, 1, address(last_weight), inner, n, inner, width, False, address(grad_active), inner)
        _drop(grad_active, n, begin, states[1], cut_inner, keep_inner)
        _activate_back(hidden[begin:], n, inner_bias, kind, grad_active, grad_hidden)
        _add_columns(grad_hidden, n, grad_inner_bias)
        product(address(grad_hidden), 1, fused, address(source), width, fused, width, n, begin > 0, address(grad_inner_weight), width)
        if norm_first:
            product(address(grad_hidden), fused, 1, address(inner_weight), width, n, width, fused, False, address(rows), width)
            _normalise_back(rows, n, rms, normed2[begin:], scale2[begin:], gain2, grad_gain2, grad_shift2, stream, True)
        else:
            product(address(grad_hidden), fused, 1, address(inner_weight), width, n, width, fused, True, address(stream), width)
            _normalise_back(stream, n, rms, normed1[begin:], scale1[begin:], gain1, grad_gain1, grad_shift1, stream, False)
        grad_x[begin : begin + n] = stream[:n]
        _drop(stream, n, begin, states[0], cut, keep)
        _add_columns(stream, n, grad_out_bias)
        product(address(stream), 1, width, address(mixed[begin:]), width, width, width, n, begin > 0, address(grad_out_weight), width)
        product(address(stream), width, 1, address(out_weight), width, n, width, width, False, address(grad_mixed[begin:]), width)


_NORM = "f4[:] f4[:]"
_SIGNATURES = {
    _to_attention: f"i8 f4[:,:] b b f4 {_NORM} f4[:,:] f4[:] i8 f4[:,:] f4[:,:] i8[:] F4[:,:] F4[:] F4[:,:]",
    _attention: "f4[:,:] i8[:] i8 F4[:,:] F4[:,:]",
    _from_attention: f"i8 f4[:,:] f4[:,:] b b f4 i8 u8[:] u8 f4 u8 f4 f4[:,:] f4[:] {_NORM} f4[:,:] f4[:] f4[:,:] f4[:] {_NORM} "
    "F4[:,:] F4[:] F4[:,:] F4[:] F4[:,:] F4[:,:]",
    _from_attention_back: f"i8 f4[:,:] f4[:,:] b b i8 u8[:] u8 f4 u8 f4 f4[:,:] {_NORM} f4[:,:] f4[:] f4[:,:] {_NORM} "
    "f4[:,:] f4[:] f4[:,:] f4[:] f4[:,:] F4[:,:] F4[:,:] F4[:,:] F4[:] F4[:] F4[:] F4[:,:] F4[:] F4[:,:] F4[:] F4[:] F4[:]",
    _attention_back: "f4[:,:] f4[:,:] i8[:] i8 f4[:,:] f4[:,:] F4[:,:]",
    _to_attention_back: f"i8 F4[:,:] f4[:,:] b b {_NORM} f4[:,:] i8 f4[:,:] f4[:,:] i8[:] f4[:,:] f4[:] F4[:,:] F4[:,:] F4[:] F4[:] F4[:]",
}
_PARTS = (
    _normal, _sigmoid, _normalise, _affine, _normalise_back, _drop, _activate, _activate_back, _add_columns, _add_row, _add,
    _turn, _rotate,
)  # fmt: skip


@kernels.made_once
def _load() -> BlockKernels | None:
    return machine_code.load(BlockKernels, _SIGNATURES, _PARTS) if row_code.prepare() else None
