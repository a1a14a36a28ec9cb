"""OpenBLAS's matrix product for numba's loops: a loop takes a tile of rows through products and all else while it is in a core's cache.

Knows no models. Where numpy brings no OpenBLAS, or numba is missing, `address()` is 0 and callers take torch's operations. Any of
OpenBLAS's kernels will do: what a loop saves is passes over memory.
"""

from __future__ import annotations

import ctypes

import blas
import kernels
from kernels import made_once

PLAIN, TURNED = 111, 112  # cblas.h: kinds of an operand, as it lies or transposed
_ROW_MAJOR = 101

gemm = None  # set by `prepare`: what compiled loops call


def address() -> int:
    """Of cblas_sgemm; 0 = there is none to call."""
    return _address() if blas.ENABLED and kernels.ENABLED else 0


def library() -> str:
    """Whose products a step of few threads takes, in loops and elsewhere."""
    found = blas.library()
    return f"torch, in loops {blas.openblas().name}" if found == "torch" and address() else found


@made_once
def _address() -> int:
    found = blas.openblas() if prepare() else None
    return 0 if found is None else ctypes.cast(found.sgemm, ctypes.c_void_p).value


@made_once
def prepare() -> bool:
    """Define `gemm`, before loops that call it are compiled; False without numba.

    gemm(address, a_kind, b_kind, rows, columns, inner, a, a_row, b, b_row, add, out, out_row): out = a b + add * out, float32. Operands
    begin where the arrays a, b, out do; their rows are a_row, b_row, out_row entries apart; add is a float32.
    The address is an argument, so that the compiled loop can be kept on disk.
    """
    global gemm
    numba = kernels.usable_numba()
    if numba is None:
        return False
    from llvmlite import ir

    @numba.extending.intrinsic
    def call(_, pointer, a_kind, b_kind, rows, columns, inner, a, a_row, b, b_row, add, out, out_row):
        size, number = numba.types.int64, numba.types.float32
        signature = numba.types.void(size, size, size, size, size, size, a, size, b, size, number, out, size)

        def build(context, builder, signature, values):
            kind, size, number = ir.IntType(32), ir.IntType(64), ir.FloatType()
            entries = number.as_pointer()
            function = ir.FunctionType(
                ir.VoidType(), [kind] * 3 + [size] * 3 + [number, entries, size, entries, size, number, entries, size]
            ).as_pointer()

            def first(place: int):
                return builder.bitcast(context.make_array(signature.args[place])(context, builder, values[place]).data, entries)

            kinds = [ir.Constant(kind, _ROW_MAJOR), builder.trunc(values[1], kind), builder.trunc(values[2], kind)]
            operands = [first(6), values[7], first(8), values[9], values[10], first(11), values[12]]
            builder.call(builder.inttoptr(values[0], function), [*kinds, *values[3:6], ir.Constant(number, 1.0), *operands])
            return context.get_dummy_value()

        return signature, build

    gemm = call
    return True
