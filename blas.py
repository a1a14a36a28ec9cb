"""Matrix products on CPU: torch's, or loops of our own where torch leaves half of the processor unused. Knows no models.

torch's MKL takes AVX2 kernels on processors that are not Intel's, whatever these can do. On AMD's with AVX-512 products go to
machine_code.product: the same up to rounding, each by one core, where torch's operations have one: in steps of up to 7 threads
(parallel.cores).

Measured, one core of a Zen 5, torch's product and this one, GFLOP/s, of some 4,000 rows: 32 columns 87 and 183, 128 100 and 237; the
gradient of a weight of 256 x 64 86 and 164; of a softmax's 128 tokens and 3,072 candidates of width 64 100 and 155 (logits), 97 and 220,
74 and 193 (gradients). Rejected: numpy's OpenBLAS by ctypes (121 to 219), whose kernels are those that OPENBLAS_CORETYPE names; oneDNN
through torch.ops.mkldnn (171 to 243), which compiles a kernel for every number of rows it has not met: .3 ms each time, and every step of
training has other numbers.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels
import machine_code
from machine_code import address, product

ENABLED = True  # False: torch's products everywhere, for tests
_PANEL = 32  # columns of the right matrix that are copied side by side: apart, as in a wide one, they crowd each other out of cache
_WIDE = 512  # columns from which they are


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (N, I) @ b (I, O) in out (N, O), or, with add, added to what it holds, as torch.mm and addmm_.

    a and b may be views of any strides. out: None = a new tensor, else none of a's or b's memory. Where a gradient is wanted torch's
    products are taken.
    """
    matrices = (a, b) if out is None else (a, b, out)
    fits = a.shape[-1] == b.shape[0] and (out is None or (out.shape == (len(a), b.shape[1]) and _rows_apart(out)))
    if (
        not fits
        or not all(map(len, matrices))
        or not _usable(*matrices)
        or (torch.is_grad_enabled() and any(m.requires_grad for m in matrices))
    ):
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    out = torch.empty(len(a), b.shape[1]) if out is None else out
    b = b if _rows_apart(b) else b.contiguous()
    (rows, inner), columns = a.shape, b.shape[1]
    _multiply()(a.data_ptr(), *a.stride(), b.data_ptr(), b.stride(0), rows, columns, inner, add, out.data_ptr(), out.stride(0))
    return out


def plain_rows(matrix: Tensor) -> Tensor:
    """The matrix as `mm` wants its second one, for who takes it there many times: a transposed one is copied where our loop takes it."""
    return matrix.contiguous() if _usable(matrix) else matrix


def _usable(*tensors: Tensor) -> bool:
    """Whether our loop takes these: matrices of float32 with memory of their own (no shadows of footprint.py), where it gains."""
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
        and ENABLED
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.dim() == 2 and t.device.type == "cpu" for t in tensors)
        and torch.get_num_threads() == 1  # with more, torch splits a product between them
        and _multiply() is not None
    )


def _rows_apart(matrix: Tensor) -> bool:
    """Whether each row lies without gaps, and no two overlap."""
    rows, columns = matrix.shape
    return (columns == 1 or matrix.stride(1) == 1) and (rows == 1 or matrix.stride(0) >= columns)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (N, I), weight (O, I), bias (O,) -> (N, O). By `mm` in training; ranking stays torch's."""
    if torch.is_grad_enabled() and _usable(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's layer, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return mm(x, weight.T)
        return mm(x, weight.T, out=bias.repeat(len(x), 1), add=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            mm(grad, weight) if need_x else None,
            mm(grad.T, x) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def library() -> str:
    """Whose products a step of few threads takes: torch's, but for blocks of compiled loops where there is numba, or all our own.

    With numba's version: another one may order the sums of compiled loops otherwise.
    """
    if not machine_code.available():
        return "torch"
    compiler = f"numba {kernels.usable_numba().__version__}"
    return f"torch, own in blocks, {compiler}" if _multiply() is None else f"own, {compiler}"


def _multiply() -> Callable | None:
    """The compiled loop, where it is faster than torch's product."""
    return _compiled() if _torch_lacks_avx512() and machine_code.available() else None


@cache
def _torch_lacks_avx512() -> bool:
    """Whether the processor has it, and torch's MKL does not use it."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    except OSError:  # no Linux
        return False


def _product(a, a_row, a_column, b, b_row, rows, columns, inner, add, out, out_row):
    """machine_code.product, for wide matrices too."""
    if columns < _WIDE or rows < _PANEL:
        product(a, a_row, a_column, b, b_row, rows, columns, inner, add, out, out_row)
        return
    panel = np.empty((inner, _PANEL), np.float32)
    for begin in range(0, columns, _PANEL):
        num = min(_PANEL, columns - begin)
        machine_code.copy_rows(address(panel), _PANEL, b + 4 * begin, b_row, inner, num)
        product(a, a_row, a_column, address(panel), _PANEL, rows, num, inner, add, out + 4 * begin, out_row)


@kernels.made_once
def _compiled() -> Callable:
    return kernels.compile_loop(kernels.usable_numba(), _product, "i8 i8 i8 i8 i8 i8 i8 i8 b i8 i8", fast=True)
