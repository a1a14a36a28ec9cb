"""Compiled loops that end the item tower in training on CPU: multimodal vectors projected and added, bias, activation, normalisation.

Know no modules and no settings: see fused_tower.py.

Legend: M items, D width, K entries of a multimodal vector, n items of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import kernels
import machine_code
from machine_code import address, product, transposed

TILE = 256  # items


class TowerKernels(NamedTuple):
    """The compiled functions; arrays contiguous, of exactly the types in `_SIGNATURES`."""

    add_dense: Callable
    add_dense_back: Callable
    finish: Callable
    finish_back: Callable


def compiled() -> TowerKernels | None:
    """The kernels, compiled or read from disk at the first call; None without numba."""
    return _load() if machine_code.available() else None


def _scaled(values, present, begin, num, tile):
    """tile (n, K + 2): values over their root mean square, then whether there are any, and whether there are none."""
    width = values.shape[1]
    for i in range(num):
        row, to = values[begin + i], tile[i]
        square = np.float32(0.0)
        for k in range(width):
            square += row[k] * row[k]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + np.float32(1e-6))
        for k in range(width):
            to[k] = row[k] * scale
        to[width] = np.float32(1.0) if present[begin + i] else np.float32(0.0)
        to[width + 1] = np.float32(1.0) - to[width]


def _add_dense(values, present, weight, out):
    """out (M, D) += the projection of values (M, K) by weight (D, K + 2), whose last columns are the bias and the missing vector."""
    num, width, inner = len(out), out.shape[1], weight.shape[1]
    tile, turned = np.empty((TILE, inner), np.float32), transposed(weight)
    for begin in range(0, num, TILE):
        n = min(TILE, num - begin)
        _scaled(values, present, begin, n, tile)
        product(address(tile), inner, 1, address(turned), width, n, width, inner, True, address(out[begin:]), width)


def _add_dense_back(values, present, grad, grad_weight):
    """grad_weight (D, K + 2) is set, from the gradient of out (M, D)."""
    num, width, inner = len(grad), grad.shape[1], grad_weight.shape[1]
    tile = np.empty((TILE, inner), np.float32)
    grad_weight[:] = np.float32(0.0)
    for begin in range(0, num, TILE):
        n = min(TILE, num - begin)
        _scaled(values, present, begin, n, tile)
        product(address(grad[begin:]), 1, width, address(tile), inner, width, inner, n, True, address(grad_weight), inner)


def _finish(out, bias, relu, smallest, candidate, norms):
    """out (M, D), in place: plus bias, then ReLU where asked for. candidate (M, D), norms (M,): out over its norm, and that; or (0, D)."""
    width = out.shape[1]
    for i in range(len(out)):
        row = out[i]
        for d in range(width):
            row[d] += bias[d]
        if relu:
            for d in range(width):
                row[d] = row[d] if row[d] > 0 or row[d] != row[d] else np.float32(0.0)
        if len(candidate):
            square, to = np.float32(0.0), candidate[i]
            for d in range(width):
                square += row[d] * row[d]
            norms[i] = max(np.sqrt(square), smallest)
            for d in range(width):
                to[d] = row[d] / norms[i]


def _finish_back(out, relu, candidate, norms, smallest, grad_history, grad_candidate, grad, grad_bias):
    """grad (M, D) of out as it came, and grad_bias (D,), are set. grad_candidate: (0, D) where there is none."""
    width, none = out.shape[1], np.float32(0.0)
    grad_bias[:] = none
    for i in range(len(out)):
        of_row, to = grad_history[i], grad[i]
        for d in range(width):
            to[d] = of_row[d]
        if len(grad_candidate):
            vector, of_vector, along = candidate[i], grad_candidate[i], none
            if norms[i] > smallest:  # else the norm is a constant
                for d in range(width):
                    along += vector[d] * of_vector[d]
            factor = np.float32(1.0) / norms[i]
            for d in range(width):
                to[d] += (of_vector[d] - vector[d] * along) * factor
        if relu:
            row = out[i]
            for d in range(width):
                to[d] = to[d] if row[d] > 0 else none
        for d in range(width):
            grad_bias[d] += to[d]


_SIGNATURES = {
    _add_dense: "f4[:,:] b[:] f4[:,:] F4[:,:]",
    _add_dense_back: "f4[:,:] b[:] f4[:,:] F4[:,:]",
    _finish: "F4[:,:] f4[:] b f4 F4[:,:] F4[:]",
    _finish_back: "f4[:,:] b f4[:,:] f4[:] f4 f4[:,:] f4[:,:] F4[:,:] F4[:]",
}


@kernels.made_once
def _load() -> TowerKernels | None:
    return machine_code.load(TowerKernels, _SIGNATURES, [_scaled])
