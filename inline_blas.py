"""What numba's loops call that is no Python: OpenBLAS's product, for rows that stay in a core's cache, prefetches, sums of rows.

Knows no models. Where numpy brings no OpenBLAS, or numba is missing, `address()` is 0 and callers take torch's operations. Any of
OpenBLAS's kernels will do: what a loop saves is passes over memory.
"""

from __future__ import annotations

import ctypes

import blas
import kernels
from kernels import made_once

PLAIN, TURNED = 111, 112  # cblas.h: kinds of an operand, as it lies or transposed
_ROW_MAJOR, _CACHE_LINE = 101, 64
_BLOCKS = (16, 2), (8, 1), (1, 1)  # (lanes of a vector, vectors) of the columns that are summed at a time: the first, then what is left

gemm = prefetch = sum_rows = sum_weighted_rows = None  # set by `prepare`: what compiled loops call


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
    """Define what compiled loops call, before they are compiled; False without numba.

    gemm(address, a_kind, b_kind, rows, columns, inner, a, a_row, b, b_row, add, out, out_row): out = a b + add * out, float32. Operands
    begin where the arrays a, b, out do; their rows are a_row, b_row, out_row entries apart; add is a float32.
    The address is an argument, so that the compiled loop can be kept on disk.
    prefetch(array, row): the first 128 bytes of array[row] begin to move to the core's cache.
    sum_rows(out, row, matrix, index, begin, end): out[row] = the sum of the rows index[begin:end] (int32) of matrix, float32. numba's own
    loop over columns looks at each row anew whether it overlaps the sum: 1.35 ms instead of .79 for 335,000 rows of 32 columns.
    sum_weighted_rows(out, row, matrix, index, begin, end, shares): each row times shares[begin:end], float32.
    """
    global gemm, prefetch, sum_rows, sum_weighted_rows
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

    @numba.extending.intrinsic
    def fetch(_, array, row):
        def build(context, builder, signature, values):
            size, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
            kinds = [ir.IntType(32)] * 3
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *kinds]))
            found = context.make_array(signature.args[0])(context, builder, values[0])
            place = builder.add(builder.ptrtoint(found.data, size), builder.mul(builder.extract_value(found.strides, 0), values[1]))
            for line in (0, _CACHE_LINE):
                to_read_soon = [ir.Constant(kind, number) for kind, number in zip(kinds, (0, 3, 1))]  # into all caches; data, no code
                builder.call(function, [builder.inttoptr(builder.add(place, ir.Constant(size, line)), pointer), *to_read_soon])
            return context.get_dummy_value()

        return numba.types.void(array, numba.types.int64), build

    @numba.extending.intrinsic
    def sums(_, out, row, matrix, index, begin, end):
        size = numba.types.int64
        return numba.types.void(out, size, matrix, index, size, size), _build_sum

    @numba.extending.intrinsic
    def weighted_sums(_, out, row, matrix, index, begin, end, shares):
        size = numba.types.int64
        return numba.types.void(out, size, matrix, index, size, size, shares), _build_sum

    gemm, prefetch, sum_rows, sum_weighted_rows = call, fetch, sums, weighted_sums
    return True


def _build_sum(context, builder, signature, values):
    """The code of `sum_rows`, and, with a seventh argument, of `sum_weighted_rows`."""
    from llvmlite import ir

    size, number = ir.IntType(64), ir.FloatType()
    out, matrix, index, *shares = (
        context.make_array(signature.args[n])(context, builder, values[n]) for n in (0, 2, 3, 6) if n < len(values)
    )
    begin, end, width = *values[4:6], builder.extract_value(matrix.shape, 1)
    target = builder.gep(out.data, [builder.mul(values[1], width)])
    first: ir.Value = ir.Constant(size, 0)  # column that is not summed yet
    for lanes, count in _BLOCKS:
        vector, step = ir.VectorType(number, lanes), ir.Constant(size, lanes * count)
        zero = ir.Constant(vector, [0.0] * lanes)

        def places(start: ir.Value, column: ir.Value, lanes: int = lanes, count: int = count, vector: ir.Type = vector) -> list:
            offsets = [builder.add(column, ir.Constant(size, lanes * n)) for n in range(count)]
            return [builder.bitcast(builder.gep(start, [offset]), vector.as_pointer()) for offset in offsets]

        before = builder.basic_block
        columns, block, uses, done, after = (builder.append_basic_block(name) for name in ("columns", "block", "uses", "done", "after"))
        builder.branch(columns)
        builder.position_at_end(columns)
        column = builder.phi(size)
        column.add_incoming(first, before)
        next_column = builder.add(column, step)
        builder.cbranch(builder.icmp_signed("<=", next_column, width), block, after)
        builder.position_at_end(block)
        some = builder.icmp_signed("<", begin, end)
        builder.cbranch(some, uses, done)

        builder.position_at_end(uses)
        use, sums = builder.phi(size), [builder.phi(vector) for _ in range(count)]
        row = builder.gep(matrix.data, [builder.mul(builder.sext(builder.load(builder.gep(index.data, [use])), size), width)])
        terms = [builder.load(place, align=4) for place in places(row, column)]
        if shares:
            share = builder.insert_element(zero, builder.load(builder.gep(shares[0].data, [use])), ir.Constant(ir.IntType(32), 0))
            share = builder.shuffle_vector(share, zero, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
            terms = [builder.fmul(term, share) for term in terms]
        added = [builder.fadd(total, term) for total, term in zip(sums, terms)]
        next_use = builder.add(use, ir.Constant(size, 1))
        for phi, start, following in zip((use, *sums), (begin, *[zero] * count), (next_use, *added)):
            phi.add_incoming(start, block)
            phi.add_incoming(following, uses)
        builder.cbranch(builder.icmp_signed("<", next_use, end), uses, done)

        builder.position_at_end(done)
        totals = [builder.phi(vector) for _ in range(count)]
        for total, of_uses in zip(totals, added):
            total.add_incoming(zero, block)
            total.add_incoming(of_uses, uses)
        for total, place in zip(totals, places(target, column)):
            builder.store(total, place, align=4)
        column.add_incoming(next_column, done)
        builder.branch(columns)
        builder.position_at_end(after)
        first = column
    return context.get_dummy_value()
