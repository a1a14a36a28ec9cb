"""Matrix products on CPU: torch's, or OpenBLAS's where torch leaves half of the processor unused. Knows no models.

torch's MKL takes AVX2 kernels on processors that are not Intel's, whatever these can do. On AMD's with AVX-512 products go to the
OpenBLAS (0.3.31 or later) that numpy's wheel brings, where that has chosen its AVX-512 kernels (OPENBLAS_CORETYPE, where set, says
which): the same up to rounding, each by one core, where torch's operations have one: in steps of up to 7 threads (parallel.cores). From
the first such product on, numpy's own linear algebra has one thread too, in the whole process.

Measured, one core of a Zen 5, torch's product and this one, GFLOP/s, of some 4,000 rows: 32 columns 90 and 166, 64 97 and 191, 128 104
and 219; transposed (the gradient of a weight) 87 and 123, 96 and 170, 100 and 197 (experiments/2026-11-30-products.md). Rejected: oneDNN
through torch.ops.mkldnn, 171 to 243, which compiles a kernel for every number of rows it has not met: .3 ms each time, and every step of
training has other numbers.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ENABLED = True  # False: torch's products everywhere, for tests
AVX512_CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS's names for its kernels
OLDEST = 0, 3, 31  # of OpenBLAS: the one that was tried
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # cblas.h


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (N, I) @ b (I, O) in out (N, O), or, with add, added to what it holds, as torch.mm and addmm_.

    a and b may be transposed views. out: None = a new tensor, else none of a's or b's memory. Where a gradient is wanted torch's products
    are taken.
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
    (rows, inner), columns = a.shape, b.shape[1]
    (a, a_kind, a_row), (b, b_kind, b_row) = _layout(a), _layout(b)
    places = a.data_ptr(), a_row, b.data_ptr(), b_row
    _sgemm()(_ROW_MAJOR, a_kind, b_kind, rows, columns, inner, 1.0, *places, float(add), out.data_ptr(), max(out.stride(0), columns))
    return out


def _usable(*tensors: Tensor) -> bool:
    """Whether OpenBLAS takes these: matrices of float32 with memory of their own (no shadows of footprint.py), where it gains."""
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
        and ENABLED
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.dim() == 2 and t.device.type == "cpu" for t in tensors)
        and torch.get_num_threads() == 1  # with more, torch splits a product between them
        and _sgemm() is not None
    )


def _layout(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix as BLAS can read it (a copy where its entries lie otherwise), its kind, and how far its rows (or columns) are apart."""
    rows, columns = matrix.shape
    if _rows_apart(matrix):
        return matrix, _PLAIN, max(matrix.stride(0), columns)
    if _rows_apart(matrix.T):
        return matrix, _TRANSPOSED, max(matrix.stride(1), rows)
    return matrix.contiguous(), _PLAIN, columns


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
    """Whose products a step of few threads takes: "torch", or OpenBLAS's version and core."""
    found = _better()
    return "torch" if found is None else found.name


def _sgemm() -> Callable | None:
    found = _better()
    return None if found is None else found.sgemm


@cache
def _better() -> OpenBLAS | None:
    """`openblas` where its kernels are better than torch's."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    except OSError:
        return None
    found = openblas() if amd else None
    return found if found is not None and found.core in AVX512_CORES else None


class OpenBLAS(NamedTuple):
    version: str
    core: str  # whose kernels it has chosen
    sgemm: Callable  # cblas_sgemm, one thread a call

    @property
    def name(self) -> str:
        return f"OpenBLAS {self.version} {self.core}"


@cache
def openblas() -> OpenBLAS | None:
    """numpy's, with one thread from now on; None where it brings none that was tried."""
    try:
        (path,) = (Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64_*.so")
        loaded = ctypes.CDLL(str(path))
        get_core, get_config = loaded.scipy_openblas_get_corename64_, loaded.scipy_openblas_get_config64_
        get_core.restype = get_config.restype = ctypes.c_char_p
        core, version = get_core().decode(), ".".join(re.findall(r"\d+", get_config().decode())[:3])
        if tuple(map(int, version.split("."))) < OLDEST:
            return None
        sgemm, set_num_threads = loaded.scipy_cblas_sgemm64_, loaded.scipy_openblas_set_num_threads64_
    except (OSError, AttributeError, ValueError):  # no Linux; numpy brings another BLAS, or another build of this one
        return None
    set_num_threads(1)
    size, pointer, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    sgemm.argtypes = [kind] * 3 + [size] * 3 + [ctypes.c_float, pointer, size, pointer, size, ctypes.c_float, pointer, size]
    sgemm.restype = None
    return OpenBLAS(version, core, sgemm)
