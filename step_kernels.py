"""Compiled loops of the training step on CPU: dropout, BCE, gathers, the table's rows from look-up to update. One pass over memory each.

Must not know models or settings. Numba compiles them as in kernels.py; where it is missing, `compiled()` is None and the callers take
torch's operations, which give the same up to rounding (dropout: other masks). Unlike the loader's loops, whose results are the same bit
for bit, these are waited for: a run must not change its arithmetic on the way.

Measured, one core of a Zen 3 beside other work, torch's operations against these: update of some 69,600 rows of width 32 10.5 ms, 5.3; a
dropout of 102,400 entries .31 ms, .08 (experiments/2026-11-25-pieces.md). One core of a Zen 5 beside other work, processor time within
steps of the baseline's setting (24,677 items, 69,594 rows of width 32, 12,070 tokens; products then by OpenBLAS), before and with TILE,
AHEAD and sums in registers: look-up 1.5 ms, 1.0; projection and sums 3.6, 1.8; backward 5.9, 2.7; update 1.8, 1.6; BCE, one loop
with a call of exp and log1p a logit before, 3.5, 1.6. Rejected:
look-up and projection in one loop (as fast as two); tiles of 128 and 512 rows (a tenth slower); no copies of the rows, looked up again
backward (the projection .1 ms faster, the backward pass .4 slower); huge pages for the table (no faster).

Legend: N tokens, D width, M items, K negatives a token, Q rows of a part of the table, E their width, F fields, Z entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import kernels
import machine_code
from machine_code import address, exp_of_minus, masked, product

TILE = 256  # rows between two products: 32 KB at width 32, so that what one loop leaves is in the core's cache for the next
AHEAD = 64  # rows of the table that are on their way from memory at a time
TOPS = 64  # entries of a row of logits whose largest are sought side by side
LOW = np.float32(-1e30)  # a logit whose exponential does not count
USES_AHEAD = 112  # rows of sums that are: forward 1.6 ms, .8 (42: 1.1); backward they lie near anyway
_1, _2, _HALF, _LOG2_E, _LN_2, _MOST = (np.float32(x) for x in (1.0, 2.0, 0.5, 1 / math.log(2), math.log(2), 87.0))
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))  # of exp's series
_L3, _L5, _L7, _L9, _L11, _L13, _L15 = (np.float32(1 / n) for n in range(3, 16, 2))  # of artanh's


class StepKernels(NamedTuple):
    """The compiled functions; arrays contiguous, of exactly the types in `_SIGNATURES`."""

    dropout: Callable
    bce: Callable
    logits_by_item: Callable
    bce_items: Callable
    softmax: Callable
    gather: Callable
    scatter: Callable
    take_rows: Callable
    sum_bags: Callable
    project: Callable
    project_back: Callable
    rowwise: Callable


def compiled() -> StepKernels | None:
    """The kernels, compiled or read from disk at the first call; None without numba."""
    return _load() if kernels.ENABLED else None


def _dropout(x, out, state, cut, scale):
    """out = x times scale where 16 bits of hash(state, place) are at least cut, else 0; both (Z,)."""
    masked(x, out, len(x), 0, state, cut, scale)


def _bce(query, items, pos_index, neg_index, begin, end, pos_share, neg_share, with_grad, grad_query, factors):
    """losses.bce_loss of tokens begin:end, each logit times its share.

    Set for these tokens: grad_query (N, D), and factors (N (1 + K),), the gradients of the logits, each token's positive's first.
    """
    loss, width, columns = 0.0, query.shape[1], 1 + neg_index.shape[1]
    tile = max(1, TILE // columns)  # tokens
    index, wrong, exps, powers, softplus, sigmoid = (
        np.empty(tile * columns, np.int32),
        np.empty(tile * columns, np.float32),  # logits, with the sign that says "wrong": the positive's turned round
        np.empty(tile * columns, np.float32),
        np.empty(tile * columns, np.int32),
        np.empty(tile * columns, np.float32),
        np.empty(tile * columns, np.float32),
    )
    for first in range(begin, end, tile):
        num = min(tile, end - first)
        for n in range(num):
            index[n * columns] = pos_index[first + n]
            for k in range(1, columns):
                index[n * columns + k] = neg_index[first + n, k - 1]
        for entry in range(num * columns):
            machine_code.prefetch(items, index[entry])
        for n in range(num):
            q = query[first + n]
            for k in range(columns):
                v, logit = items[index[n * columns + k]], np.float32(0.0)
                for d in range(width):
                    logit += q[d] * v[d]
                wrong[n * columns + k] = logit if k else -logit
        # exp(-|x|) = 2 ** -whole * exp(rest), |rest| <= ln(2) / 2, in float32 and without calls, so that it runs in vectors
        for entry in range(num * columns):
            size = abs(wrong[entry])
            size = _MOST if size > _MOST else size  # so that no power is subnormal; a NaN stays one
            whole = np.floor(size * _LOG2_E + _HALF)
            r = whole * _LN_2 - size
            exps[entry] = _1 + r * (_1 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * (_E6 + r * _E7))))))
            powers[entry] = (np.int32(127) - np.int32(whole)) << 23  # bits of the float32 2 ** -whole
        scales = powers.view(np.float32)
        for entry in range(num * columns):
            x, small = wrong[entry], exps[entry] * scales[entry]
            z = small / (_2 + small)  # log1p(small) = 2 artanh(z), 0 < z <= 1 / 3
            y = z * z
            log1p = _2 * z * (_1 + y * (_L3 + y * (_L5 + y * (_L7 + y * (_L9 + y * (_L11 + y * (_L13 + y * _L15)))))))
            softplus[entry] = log1p if x <= 0 else x + log1p
            sigmoid[entry] = (small if x <= 0 else _1) / (_1 + small)
        for n in range(num):
            entry = n * columns
            loss += pos_share * softplus[entry]
            for k in range(1, columns):
                loss += neg_share * softplus[entry + k]
            if with_grad:
                of_token = factors[first * columns + entry : first * columns + entry + columns]
                of_token[0] = -pos_share * sigmoid[entry]
                for k in range(1, columns):
                    of_token[k] = neg_share * sigmoid[entry + k]
        if with_grad:
            of_tile = factors[first * columns : (first + num) * columns]
            for n in range(num):
                machine_code.sum_weighted_rows(grad_query, first + n, items, index, n * columns, (n + 1) * columns, of_tile)
    return loss


def _logits_by_item(pos_index, neg_index, starts, entries):
    """The logits (N (1 + K)), each token's positive's first, item by item: item m's are entries[starts[m] : starts[m + 1]], ascending.

    starts: (M + 2,) int64 zeros; entries: (N (1 + K),) int32. Both are set.
    """
    columns = 1 + neg_index.shape[1]
    for token in range(len(pos_index)):
        starts[pos_index[token] + 2] += 1
        for k in range(columns - 1):
            starts[neg_index[token, k] + 2] += 1
    for item in range(2, len(starts)):
        starts[item] += starts[item - 1]
    for token in range(len(pos_index)):
        for k in range(columns):
            item = neg_index[token, k - 1] if k else pos_index[token]
            entries[starts[item + 1]] = token * columns + k
            starts[item + 1] += 1


def _bce_items(query, columns, factors, starts, entries, begin, end, grad_items):
    """Rows begin:end of grad_items (M, D) are set to the sums of factor times query over the logits with that item, token by token."""
    base, num = starts[begin], starts[end] - starts[begin]
    tokens, shares = np.empty(num, np.int32), np.empty(num, np.float32)
    for place in range(num):
        entry = entries[base + place]
        tokens[place], shares[place] = entry // columns, factors[entry]
    for item in range(begin, end):
        machine_code.sum_weighted_rows(grad_items, item, query, tokens, starts[item] - base, starts[item + 1] - base, shares)


def _softmax(logits, log_q, own, own_place, top, total):
    """Rows of logits (n, C), less log_q (C,) where there is one, become exp(logit - top); top (n,), the largest, and total (n,) are set.

    own: (n,) logit of each row's target, which counts in top and total. own_place: (n,) which of the candidates it is, whose entry then
    becomes 0; -1 = none of them. (0,): it is one of them and stays; own is not read.
    """
    columns, beside = logits.shape[1], len(own_place) > 0
    whole = columns // TOPS * TOPS
    tops = np.empty(TOPS, np.float32)
    for i in range(len(logits)):
        row = logits[i]
        if len(log_q):
            for j in range(columns):
                row[j] -= log_q[j]
        if beside and own_place[i] >= 0:
            row[own_place[i]] = LOW
        highest = own[i] if beside else row[0]
        if whole:  # by TOPS at a time: for one number, not to lose a NaN, entries would go one by one
            for k in range(TOPS):
                tops[k] = row[k]
            for block in range(TOPS, whole, TOPS):
                for k in range(TOPS):
                    tops[k] = max(tops[k], row[block + k])
            for k in range(TOPS):
                highest = max(highest, tops[k])
        for j in range(whole, columns):
            highest = max(highest, row[j])
        among = np.float32(0.0)
        for j in range(columns):
            row[j] = exp_of_minus(highest - row[j])
            among += row[j]
        if beside:
            if own_place[i] >= 0:
                row[own_place[i]] = np.float32(0.0)
            among += exp_of_minus(highest - own[i])
        top[i], total[i] = highest, among


def _gather(first, second, index, begin, end, out):
    """out[begin:end] = rows index[begin:end] of first (M, D) and second (B, D), one below the other."""
    num, width = len(first), first.shape[1]
    for n in range(begin, end):
        place, to = index[n], out[n]
        row = first[place] if place < num else second[place - num]
        for d in range(width):
            to[d] = row[d]


def _scatter(grad, index, begin, end, first, out):
    """Rows begin:end of out (M, D) are set to the sums of the rows n of grad (N, D) with index[n] - first in that range, in order."""
    out[begin:end] = np.float32(0.0)
    width = grad.shape[1]
    for n in range(len(index)):
        place = index[n] - first
        if begin <= place < end:
            row, to = grad[n], out[place]
            for d in range(width):
                to[d] += row[d]


def _take_rows(table, rows, out, begin, end):
    """out[begin:end] = table[rows[begin:end]]."""
    width = table.shape[1]
    for i in range(begin, end):
        machine_code.prefetch(table, rows[min(i + AHEAD, end - 1)])
        v, to = table[rows[i]], out[i]
        for d in range(width):
            to[d] = v[d]


def _sum_bags(vectors, index, starts, weights, out, begin, end):
    """out[m] = the sum of the rows index[starts[m] : starts[m + 1]] of vectors, times weights if there are any, for m in begin:end."""
    last = len(index) - 1
    for m in range(begin, end):
        for use in range(starts[m], starts[m + 1]):
            machine_code.prefetch(vectors, index[min(use + USES_AHEAD, last)])
        if len(weights):
            machine_code.sum_weighted_rows(out, m, vectors, index, starts[m], starts[m + 1], weights)
        else:
            machine_code.sum_rows(out, m, vectors, index, starts[m], starts[m + 1])


def _project(rows, weights, field, first, out, begin, end):
    """out[first + i] = rows[i] (Q, E) @ weights[field] (F, E, D), for i in begin:end"""
    weight = weights[field]
    width, out_width = weight.shape
    for row in range(begin, end, TILE):
        num = min(TILE, end - row)
        tile, to = address(rows[row:]), address(out[first + row :])
        product(tile, width, 1, address(weight), out_width, num, out_width, width, False, to, out_width)


def _project_back(grad, things, starts, shares, rows, turned, field, first, grad_rows, grad_weight, begin, end):
    """From the gradient of the things' sums of projected rows, grad (M, D), to those of rows[begin:end] and of their field's weight.

    Row i of rows (Q, E) went into things[starts[first + i] : starts[first + i + 1]], times shares where these are not empty. turned:
    (F, D, E) transposed weights. Set are grad_rows[begin:end] (Q, E) and grad_weight (E, D).
    """
    weight = turned[field]
    out_width, width = weight.shape
    sums = np.empty((TILE, out_width), np.float32)  # gradients of projected rows
    for start in range(begin, end, TILE):
        num = min(TILE, end - start)
        for i in range(num):
            machine_code.prefetch(rows, start + i)  # for the second product, which reads down its columns
            use, last = starts[first + start + i], starts[first + start + i + 1]
            if len(shares):
                machine_code.sum_weighted_rows(sums, i, grad, things, use, last, shares)
            else:
                machine_code.sum_rows(sums, i, grad, things, use, last)
        tile, to = address(rows[start:]), address(grad_rows[start:])
        product(address(sums), out_width, 1, address(weight), width, num, width, out_width, False, to, width)
        product(
            tile,
            1,
            width,
            address(sums),
            out_width,
            width,
            out_width,
            num,
            start > begin,
            address(grad_weight),
            out_width,
        )


def _rowwise(weight, second, rows, grad, begin, end, lr, scale, beta2, eps, l2_emb, shrink, adagrad):
    """optim.TableOptimizer's row-wise update of touched rows begin:end: weight (rows of a part, E) and second (rows,) are changed.

    The rows themselves are read, not the step's copies, which are equal: their lines must come to the core anyway.
    """
    width = grad.shape[1]
    for i in range(begin, end):
        ahead = rows[min(i + AHEAD, end - 1)]
        machine_code.prefetch(weight, ahead)
        machine_code.prefetch(second, ahead)
        row, g = rows[i], grad[i]
        v = weight[row]
        square = np.float32(0.0)
        for d in range(width):
            entry = g[d] * scale + l2_emb * v[d]
            square += entry * entry
        square /= np.float32(width)
        moment = second[row]
        if adagrad:
            moment += square
        elif moment == 0:
            moment = square
        else:
            moment = beta2 * moment + (np.float32(1.0) - beta2) * square
        second[row] = moment
        factor = lr / (np.sqrt(moment) + eps)
        for d in range(width):
            v[d] = v[d] * shrink - factor * (g[d] * scale + l2_emb * v[d])


_SIGNATURES = {
    _dropout: "f4[:] F4[:] u8 u8 f4",
    _bce: "f4[:,:] f4[:,:] i8[:] i8[:,:] i8 i8 f8 f8 b F4[:,:] F4[:]",
    _logits_by_item: "i8[:] i8[:,:] I8[:] I4[:]",
    _bce_items: "f4[:,:] i4 f4[:] i8[:] i4[:] i8 i8 F4[:,:]",
    _softmax: "F4[:,:] f4[:] f4[:] i8[:] F4[:] F4[:]",
    _gather: "f4[:,:] f4[:,:] i8[:] i8 i8 F4[:,:]",
    _scatter: "f4[:,:] i8[:] i8 i8 i8 F4[:,:]",
    _take_rows: "f4[:,:] i8[:] F4[:,:] i8 i8",
    _sum_bags: "f4[:,:] i4[:] i4[:] f4[:] F4[:,:] i8 i8",
    _project: "f4[:,:] f4[:,:,:] i8 i8 F4[:,:] i8 i8",
    _project_back: "f4[:,:] i4[:] i4[:] f4[:] f4[:,:] f4[:,:,:] i8 i8 F4[:,:] F4[:,:] i8 i8",
    _rowwise: "F4[:,:] F4[:] i8[:] f4[:,:] i8 i8 f4 f4 f4 f4 f4 f4 b",
}


@kernels.made_once
def _load() -> StepKernels | None:
    return machine_code.load(StepKernels, _SIGNATURES)
