"""Compiled loops of the training step on CPU: dropout, BCE with its gradients, gathers, row-wise updates. One pass over memory each.

Must not know models or settings. Numba compiles them as in kernels.py; where it is missing, `compiled()` is None and the callers take
torch's operations, which give the same up to rounding (dropout: other masks). Unlike the loader's loops, whose results are the same bit
for bit, these are waited for: a run must not change its arithmetic on the way.

Measured, one core of a Zen 3 beside other work, torch's operations against these: update of some 69,600 rows of width 32 10.5 ms, 5.3; a
dropout of 102,400 entries .31 ms, .08; BCE of 12,800 tokens of width 32 4.8 ms, 4.7 (experiments/2026-11-25-pieces.md).

Legend: N tokens, D width, M items, K negatives a token, R touched rows, E table width, Z entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import kernels
from kernels import mix


class StepKernels(NamedTuple):
    """The compiled functions; arrays contiguous, of exactly the types in `_SIGNATURES`."""

    dropout: Callable
    bce: Callable
    bce_items: Callable
    gather: Callable
    scatter: Callable
    rowwise: Callable


def compiled() -> StepKernels | None:
    """The kernels, compiled or read from disk at the first call; None without numba."""
    return _load() if kernels.ENABLED else None


def _dropout(x, out, state, cut, scale):
    """out = x times scale where 16 bits of hash(state, place) are at least cut, else 0; both (Z,)."""
    mask = np.uint64(0xFFFF)
    _16, _32, _48, none = np.uint64(16), np.uint64(32), np.uint64(48), np.float32(0.0)
    num, whole = len(x), len(x) // 4
    for block in range(whole):
        bits, place = mix(state, np.uint64(block)), 4 * block
        out[place] = x[place] * (scale if bits & mask >= cut else none)
        out[place + 1] = x[place + 1] * (scale if bits >> _16 & mask >= cut else none)
        out[place + 2] = x[place + 2] * (scale if bits >> _32 & mask >= cut else none)
        out[place + 3] = x[place + 3] * (scale if bits >> _48 >= cut else none)
    bits = mix(state, np.uint64(whole))
    for place in range(4 * whole, num):
        out[place] = x[place] * (scale if bits & mask >= cut else none)
        bits >>= _16


def _bce(query, items, pos_index, neg_index, begin, end, pos_share, neg_share, with_grad, grad_query, factors):
    """losses.bce_loss of tokens begin:end, each logit times its share.

    Set for these tokens: grad_query (N, D), and factors (N, 1 + K), the gradients of the logits, the positive's first.
    """
    loss, width = 0.0, query.shape[1]
    for token in range(begin, end):
        q = query[token]
        for column in range(-1, neg_index.shape[1]):
            v = items[pos_index[token] if column < 0 else neg_index[token, column]]
            logit = np.float32(0.0)
            for d in range(width):
                logit += q[d] * v[d]
            # softplus of the logit whose sign says "wrong": of -logit for the positive
            wrong = -logit if column < 0 else logit
            share = pos_share if column < 0 else neg_share
            small = math.exp(-abs(wrong))
            loss += share * (max(wrong, np.float32(0.0)) + math.log1p(small))
            if with_grad:
                sigmoid = 1.0 / (1.0 + small) if wrong >= 0 else small / (1.0 + small)
                factor = np.float32(-share * sigmoid if column < 0 else share * sigmoid)
                factors[token, column + 1] = factor
                grad = grad_query[token]
                if column < 0:
                    for d in range(width):
                        grad[d] = factor * v[d]
                else:
                    for d in range(width):
                        grad[d] += factor * v[d]
    return loss


def _bce_items(query, pos_index, neg_index, factors, begin, end, grad_items):
    """Rows begin:end of grad_items (M, D) are set to the sums of factor times query over the logits with that item, token by token."""
    grad_items[begin:end] = np.float32(0.0)
    width = query.shape[1]
    for token in range(len(query)):
        for column in range(-1, neg_index.shape[1]):
            index = pos_index[token] if column < 0 else neg_index[token, column]
            if begin <= index < end:
                q, grad, factor = query[token], grad_items[index], factors[token, column + 1]
                for d in range(width):
                    grad[d] += factor * q[d]


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


def _rowwise(weight, second, rows, grad, values, begin, end, lr, scale, beta2, eps, l2_emb, shrink, adagrad):
    """optim.TableOptimizer's row-wise update of touched rows begin:end: weight (rows of a part, E) and second (rows,) are changed."""
    width = grad.shape[1]
    for i in range(begin, end):
        row, g, v = rows[i], grad[i], values[i]
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
        target = weight[row]
        for d in range(width):
            target[d] = v[d] * shrink - factor * (g[d] * scale + l2_emb * v[d])


_SIGNATURES = {
    _dropout: "f4[:] F4[:] u8 u8 f4",
    _bce: "f4[:,:] f4[:,:] i8[:] i8[:,:] i8 i8 f8 f8 b F4[:,:] F4[:,:]",
    _bce_items: "f4[:,:] i8[:] i8[:,:] f4[:,:] i8 i8 F4[:,:]",
    _gather: "f4[:,:] f4[:,:] i8[:] i8 i8 F4[:,:]",
    _scatter: "f4[:,:] i8[:] i8 i8 i8 F4[:,:]",
    _rowwise: "F4[:,:] F4[:] i8[:] f4[:,:] f4[:,:] i8 i8 f4 f4 f4 f4 f4 f4 b",
}


@kernels.made_once
def _load() -> StepKernels | None:
    numba = kernels.usable_numba()
    if numba is None:
        return None
    return StepKernels(*(kernels.compile_loop(numba, function, text, fast=True) for function, text in _SIGNATURES.items()))
