"""What numba's loops call: matrix products, sums of rows and prefetches, as LLVM code of our own; an exponential that runs in vectors.

Knows no models. Without numba `available()` is False and callers take torch's operations.

The product keeps a block of the result in registers: 8 rows by 2 vectors of 16 lanes with AVX-512, else 4 by 2 of 8. Each entry is
summed in order of the inner index by fused multiply-adds, whatever the block, so results are the same on all processors that have these.

Measured, one core of a Zen 5 in cache, GFLOP/s of this, of numpy's OpenBLAS with its AVX-512 and its Haswell kernels: 512 x 32 by 32 x 128
240, 150, 106; its transpose (a weight's gradient) 246, 173, 101; 256 x 64 by 64 x 256 230, 210, 111; 32 x 32 by 32 x 91 178, 183, 89.
With 8 lanes: 80 to 110. Rejected: OpenBLAS called from the loops, by its address: it takes the kernels that OPENBLAS_CORETYPE names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

import kernels
from kernels import made_once, mix

_CACHE_LINE = 64
_BLOCKS = (16, 2), (8, 1), (1, 1)  # (lanes of a vector, vectors) of the columns that are summed at a time: the first, then what is left
EXP_LARGEST, LOG2_E, LN_2, LN_2_REST = 87.0, 1.44269504, 0.693359375, 2.12194440e-4  # of exp_of_minus: x, and what reduces it
EXP_SERIES = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
_LANES = _TALL = 0  # of a product: entries of a vector; rows of a block, but for the last rows. `prepare` sets them

_address = copy = prefetch = sum_rows = sum_weighted_rows = None  # set by `prepare`: what compiled loops call
_tall = _four = _two = _one = None  # and product's blocks of rows


def available() -> bool:
    """Whether there is a numba that compiles."""
    return kernels.ENABLED and prepare()


def address(array):
    """Of the array's first entry."""
    return _address(array)


def product(a, a_row, a_column, b, b_row, rows, columns, inner, add, out, out_row):
    """out (rows, columns) = a (rows, inner) @ b (inner, columns), or, with add, added to what it holds; float32.

    a, b, out: addresses, see `address`. Entry (i, k) of a lies at a + i a_row + k a_column entries, so that a may be transposed; rows of b
    and of out are b_row and out_row entries apart. inner: at least 1.
    """
    j = 0
    while j < columns:
        left, i, of_b, to = columns - j, 0, b + 4 * j, out + 4 * j
        while i + _TALL <= rows:
            _tall(a + 4 * i * a_row, a_row, a_column, of_b, b_row, inner, add, to + 4 * i * out_row, out_row, left)
            i += _TALL
        if i + 4 <= rows:
            _four(a + 4 * i * a_row, a_row, a_column, of_b, b_row, inner, add, to + 4 * i * out_row, out_row, left)
            i += 4
        if i + 2 <= rows:
            _two(a + 4 * i * a_row, a_row, a_column, of_b, b_row, inner, add, to + 4 * i * out_row, out_row, left)
            i += 2
        if i < rows:
            _one(a + 4 * i * a_row, a_row, a_column, of_b, b_row, inner, add, to + 4 * i * out_row, out_row, left)
        j += 2 * _LANES if left >= 2 * _LANES else _LANES


def transposed(weight):
    """The transpose of weight (O, I), (I, O), as `product` wants its second matrix."""
    out = np.empty((weight.shape[1], weight.shape[0]), np.float32)
    for i in range(weight.shape[0]):
        for d in range(weight.shape[1]):
            out[d, i] = weight[i, d]
    return out


def load(kind: type, signatures: dict[Callable, str], parts: Iterable[Callable] = ()):
    """A module's compiled loops, `kind` (one for each of signatures, in their order); None without numba. parts: what its loops call."""
    if not prepare():
        return None
    numba = kernels.usable_numba()
    for part in parts:
        numba.extending.register_jitable(fastmath=set(kernels.FAST))(part)
    return kind(*(kernels.compile_loop(numba, function, text, fast=True) for function, text in signatures.items()))


def copy_rows(out, out_row, source, row, num, columns):
    """num rows of so many float32 from address to address; rows are out_row and row entries apart."""
    for i in range(num):
        copy(out + 4 * i * out_row, source + 4 * i * row, 4 * columns)


def exp_of_minus(x):
    """exp(-x) for x >= 0, to 1e-7 (2 + x) of it; in vectors, as math.exp is not."""
    x = min(x, np.float32(EXP_LARGEST))
    whole = np.int32(x * np.float32(LOG2_E) + np.float32(0.5))
    rest = np.float32(whole) * np.float32(LN_2) - x - np.float32(whole) * np.float32(LN_2_REST)
    power = np.float32(EXP_SERIES[0])
    power = power * rest + np.float32(EXP_SERIES[1])
    power = power * rest + np.float32(EXP_SERIES[2])
    power = power * rest + np.float32(EXP_SERIES[3])
    power = power * rest + np.float32(EXP_SERIES[4])
    power = power * rest + np.float32(EXP_SERIES[5])
    power = power * rest * rest + rest + np.float32(1.0)
    return power * np.int32((np.int32(127) - whole) << np.int32(23)).view(np.float32)


def masked(source, to, num, start, state, cut, scale):
    """Dropout of num entries, the first of which is the 4 * start'th of its array: to = source times scale where 16 bits of hash(state,
    place) are at least cut, else 0. cut 0: a copy. Not in place, where the loop would not run in vectors."""
    if cut == 0:
        for place in range(num):
            to[place] = source[place]
        return
    mask, _16, _32, _48, none = np.uint64(0xFFFF), np.uint64(16), np.uint64(32), np.uint64(48), np.float32(0.0)
    whole = num // 4
    for block in range(whole):
        bits, place = mix(state, np.uint64(start + block)), 4 * block
        to[place] = source[place] * (scale if bits & mask >= cut else none)
        to[place + 1] = source[place + 1] * (scale if bits >> _16 & mask >= cut else none)
        to[place + 2] = source[place + 2] * (scale if bits >> _32 & mask >= cut else none)
        to[place + 3] = source[place + 3] * (scale if bits >> _48 >= cut else none)
    bits = mix(state, np.uint64(start + whole))
    for place in range(4 * whole, num):
        to[place] = source[place] * (scale if bits & mask >= cut else none)
        bits >>= _16


@made_once
def prepare() -> bool:
    """Define what compiled loops call, before they are compiled; False without numba.

    copy(out, source, size): so many bytes, between addresses.
    prefetch(array, row): the first 128 bytes of array[row] begin to move to the core's cache.
    sum_rows(out, row, matrix, index, begin, end): out[row] = the sum of the rows index[begin:end] (int32) of matrix, float32. numba's own
    loop over columns looks at each row anew whether it overlaps the sum: 1.35 ms instead of .79 for 335,000 rows of 32 columns.
    sum_weighted_rows(out, row, matrix, index, begin, end, shares): each row times shares[begin:end], float32.
    """
    global _address, copy, prefetch, sum_rows, sum_weighted_rows, _LANES, _TALL
    global _tall, _four, _two, _one
    numba = kernels.usable_numba()
    if numba is None:
        return False
    from llvmlite import ir

    _LANES, _TALL = _block_shape()

    @numba.extending.intrinsic
    def first(_, array):
        def build(context, builder, signature, values):
            return builder.ptrtoint(context.make_array(signature.args[0])(context, builder, values[0]).data, ir.IntType(64))

        return numba.types.int64(array), build

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

    @numba.extending.intrinsic
    def move(_, out, source, size):
        def build(context, builder, signature, values):
            bytes_at = ir.IntType(8).as_pointer()
            arguments = [bytes_at, bytes_at, ir.IntType(64), ir.IntType(1)]
            function = external(builder.module, "llvm.memcpy.p0.p0.i64", ir.VoidType(), arguments)
            to, of = (builder.inttoptr(value, bytes_at) for value in values[:2])
            builder.call(function, [to, of, values[2], ir.Constant(ir.IntType(1), 0)])
            return context.get_dummy_value()

        number = numba.types.int64
        return numba.types.void(number, number, number), build

    def block(rows: int):
        @numba.extending.intrinsic
        def of_product(_, a, a_row, a_column, b, b_row, inner, add, out, out_row, left):
            size = numba.types.int64
            signature = numba.types.void(size, size, size, size, size, size, numba.types.boolean, size, size, size)

            def build(context, builder, signature, values):
                two, one = (_product_block(builder.module, rows, vectors) for vectors in (2, 1))
                with builder.if_else(builder.icmp_signed(">=", values[-1], ir.Constant(ir.IntType(64), 2 * _LANES))) as (wide, narrow):
                    with wide:
                        builder.call(two, values)
                    with narrow:
                        builder.call(one, values)
                return context.get_dummy_value()

            return signature, build

        return of_product

    _address, copy, prefetch, sum_rows, sum_weighted_rows = first, move, fetch, sums, weighted_sums
    _tall, _four, _two, _one = map(block, (_TALL, 4, 2, 1))
    for function in (address, product, transposed, copy_rows, masked):
        numba.extending.register_jitable(function)
    numba.extending.register_jitable(fastmath=set(kernels.FAST))(exp_of_minus)
    return True


def _block_shape() -> tuple[int, int]:
    """_LANES and _TALL for the registers of this processor."""
    from llvmlite import binding

    return (16, 8) if binding.get_host_cpu_features().get("avx512f") else (8, 4)


def _product_block(module, rows: int, vectors: int):
    """The function of `product`'s block of so many rows and vectors of columns, of (a, a_row, a_column, b, b_row, inner, add, out, out_row,
    left).

    A block of one vector reads and writes but `left` columns of it, where there are fewer.
    """
    from llvmlite import ir

    name = f"product_block_{rows}_{vectors}"
    if name in module.globals:
        return module.globals[name]
    size, number, flag = ir.IntType(64), ir.FloatType(), ir.IntType(1)
    vector, entries = ir.VectorType(number, _LANES), number.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [size] * 6 + [flag] + [size] * 3), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    a, a_row, a_column, b, b_row, inner, add, out, out_row, left = function.args
    entry, loop, done, to_add, to_set = (function.append_basic_block(part) for part in ("entry", "loop", "done", "add", "set"))
    builder = ir.IRBuilder(entry)
    zero, alignment = ir.Constant(vector, [0.0] * _LANES), ir.Constant(ir.IntType(32), 4)
    few = first_lanes(builder, left, _LANES) if vectors == 1 else None
    place, (fused, masked_load, masked_store) = vector.as_pointer(), vector_functions(module, _LANES)

    def places(start):
        return [builder.bitcast(builder.gep(start, [ir.Constant(size, _LANES * n)]), place) for n in range(vectors)]

    def load(start) -> list:
        return [builder.load(p, align=4) if few is None else builder.call(masked_load, [p, alignment, few, zero]) for p in places(start)]

    def store(values: list, start) -> None:
        for value, p in zip(values, places(start)):
            if few is None:
                builder.store(value, p, align=4)
            else:
                builder.call(masked_store, [value, p, alignment, few])

    row_offsets = [builder.mul(a_row, ir.Constant(size, row)) for row in range(rows)]
    starts = [builder.inttoptr(pointer, entries) for pointer in (a, b, out)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k, of_a, of_b = builder.phi(size), builder.phi(entries), builder.phi(entries)
    sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    terms, added = load(of_b), []
    for offset, row in zip(row_offsets, sums):
        factor = repeated(builder, builder.load(builder.gep(of_a, [offset]), align=4), vector)
        added.append([builder.call(fused, [factor, term, total]) for term, total in zip(terms, row)])
    following = builder.add(k, ir.Constant(size, 1)), builder.gep(of_a, [a_column]), builder.gep(of_b, [b_row])
    for phi, first, second in zip((k, of_a, of_b), (ir.Constant(size, 0), *starts[:2]), following):
        phi.add_incoming(first, entry)
        phi.add_incoming(second, loop)
    for row, of_row in zip(sums, added):
        for phi, second in zip(row, of_row):
            phi.add_incoming(zero, entry)
            phi.add_incoming(second, loop)
    builder.cbranch(builder.icmp_signed("<", following[0], inner), loop, done)
    builder.position_at_end(done)
    builder.cbranch(add, to_add, to_set)
    for ending in (to_add, to_set):
        builder.position_at_end(ending)
        target = starts[2]
        for row in added:
            store([builder.fadd(x, y) for x, y in zip(load(target), row)] if ending is to_add else row, target)
            target = builder.gep(target, [out_row])
        builder.ret_void()
    return function


def repeated(builder, value, vector):
    """The value in every lane of that type of vector."""
    from llvmlite import ir

    place = ir.IntType(32)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(place, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(place, vector.count), [0] * vector.count))


def external(module, name: str, result, arguments: list):
    """A function that LLVM brings."""
    from llvmlite import ir

    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def vector_functions(module, lanes: int) -> tuple:
    """Of vectors of float32: a * b + c, load(pointer, alignment, mask, what stands elsewhere), store(vector, pointer, alignment, mask)."""
    from llvmlite import ir

    vector, alignment, mask = ir.VectorType(ir.FloatType(), lanes), ir.IntType(32), ir.VectorType(ir.IntType(1), lanes)
    suffix, place = f"v{lanes}f32", vector.as_pointer()
    # Fused where the processor has it; llvm.fma would call a library, entry by entry, where it has not.
    fused = external(module, f"llvm.fmuladd.{suffix}", vector, [vector] * 3)
    load = external(module, f"llvm.masked.load.{suffix}.p0", vector, [place, alignment, mask, vector])
    return fused, load, external(module, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), [vector, place, alignment, mask])


def first_lanes(builder, num, lanes: int):
    """The mask of the first num (an int64) lanes."""
    from llvmlite import ir

    places = ir.VectorType(ir.IntType(64), lanes)
    return builder.icmp_signed("<", ir.Constant(places, list(range(lanes))), repeated(builder, num, places))


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
            share = repeated(builder, builder.load(builder.gep(shares[0].data, [use])), vector)
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
