"""The engine's inner loops, compiled by numba: products of packed matrices, and activations.

numba has no vector type, so the loops over slots are written in LLVM's own language, through llvmlite: a register is
<16 x float> there, and LLVM turns it into whatever the CPU has (one AVX-512 register, two of AVX2, four of NEON).
Only the fetching instruction of "gather" is AVX-512's own.
"""

import functools
import math

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled import compiled
from ..gates import exp

CSR, GATHER, SLOTS, SLICED = 0, 1, 2, 3
VALUES = {"fp32": 0, "bf16": 1, "int8": 2}
LANES, SLICE, WIDE = 16, 8, 32         # rows of a block, and of "sliced"; columns that this takes side by side
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
V = ir.VectorType(F32, LANES)


@functools.cache
def cpu_features() -> bool:
    """Whether the CPU that numba compiles for has the instruction of "gather" (AVX-512)."""
    told = numba.config.CPU_FEATURES                               # from the environment: to compile for an older CPU
    return "+avx512f" in told if told is not None else bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


MOST = 8 if cpu_features() else 4      # columns of x for which a weight is read once: their sums are in registers


def aligned(shape: int | tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """Zeros at the start of a cache line: a load that straddles two lines costs twice."""
    size = (shape if isinstance(shape, int) else math.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start:start + size].view(dtype).reshape(shape)


def _load(b, pointer, type_, align):
    load = b.load(b.bitcast(pointer, type_.as_pointer()))
    load.align = align
    return load


def _at(b, base, index, size):
    """Address of element `index` (i64) of `size` bytes behind the byte pointer `base`."""
    return b.gep(base, [b.mul(index, I64(size))] if size != 1 else [index])


def _weights(b, base, slot, kind):
    """The 16 weights of a slot as <16 x float>, whatever they are stored as."""
    if kind == 0:
        return _load(b, _at(b, base, slot, 4 * LANES), V, 4)
    if kind == 1:                                                  # bfloat16: the upper half of a float32
        half = _load(b, _at(b, base, slot, 2 * LANES), ir.VectorType(I16, LANES), 2)
        wide = b.zext(half, ir.VectorType(I32, LANES))
        return b.bitcast(b.shl(wide, ir.Constant(ir.VectorType(I32, LANES), [16] * LANES)), V)
    return b.sitofp(_load(b, _at(b, base, slot, LANES), ir.VectorType(I8, LANES), 1), V)


def _splat(b, value):
    one = b.insert_element(ir.Constant(V, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(V, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def _picked(b, start, where):
    """What the fetching instruction does, a value at a time: LLVM has no such operation for CPUs without AVX-512."""
    part = ir.Constant(V, ir.Undefined)
    for lane in range(LANES):
        index = b.zext(b.extract_element(where, I32(lane)), I64)
        part = b.insert_element(part, _load(b, _at(b, start, index, 4), F32, 4), I32(lane))
    return part


def _fma(b, kind=V):
    """A product and a sum of vectors, rounded once."""
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{kind.count}f32")


def _in_turn(b, first, last, turns, body):
    """body(n, turn) for n from `first` to before `last`; sums that take turns need not wait for one another."""
    rounds = b.udiv(b.sub(last, first), I64(turns))
    with cgutils.for_range(b, rounds) as loop:
        for turn in range(turns):
            body(b.add(first, b.add(b.mul(loop.index, I64(turns)), I64(turn))), turn)
    with cgutils.for_range_slice(b, b.add(first, b.mul(rounds, I64(turns))), last, I64(1), intp=I64) as (n, _):
        body(n, 0)


def _products(gather: bool):
    """An intrinsic: y += matrix @ x for 1, 4 or `MOST` columns of x at once, block by block.

    (kind, columns, blocks, starts, places, indices, values, scales, x, x_step, y, y_step): kind of the values, and
    arrays of a layout; column k of x begins x_step floats behind column k - 1, of y y_step floats. Arrays come as
    addresses (integers).
    """
    @intrinsic
    def multiply(typing, kind, columns, blocks, starts, places, indices, values, scales, x, x_step, y, y_step):
        def emit(context, b, signature, args):
            kind, columns, *others = args
            for code in VALUES.values():
                for count in sorted({1, 4, 4 if gather else MOST}):
                    chosen = b.and_(b.icmp_unsigned("==", kind, I64(code)), b.icmp_unsigned("==", columns, I64(count)))
                    with b.if_then(chosen):
                        _blocks(b, code, gather, count, *others)
            return context.get_dummy_value()
        return types.void(*[types.intp] * 12), emit
    return multiply


def _blocks(b, kind, gather, columns, blocks, *args):
    """What `_products` says, for values of one kind and one number of columns."""
    *addresses, x, x_step, y, y_step = args
    starts, places, indices, values, scales, x, y = (b.inttoptr(a, I8.as_pointer()) for a in (*addresses, x, y))
    fma = _fma(b)
    fetch = gather and cpu_features() and cgutils.get_or_insert_function(
        b.module, ir.FunctionType(V, [V, ir.VectorType(I32, LANES), V]), "llvm.x86.avx512.vpermi2var.ps.512")
    xs = [_at(b, x, b.mul(x_step, I64(k)), 4) for k in range(columns)]
    turns = 2 if columns < MOST or gather and cpu_features() else 1            # many columns fill the registers
    sums = [[cgutils.alloca_once(b, V) for _ in xs] for _ in range(turns)]

    def slot(n, turn):
        place = b.zext(_load(b, _at(b, places, n, 4), I32, 4), I64)
        w = _weights(b, values, n, kind)
        if gather:
            where = b.zext(_load(b, _at(b, indices, n, LANES), ir.VectorType(I8, LANES), 1), ir.VectorType(I32, LANES))
        for start, total in zip(xs, sums[turn]):
            start = _at(b, start, place, 4)
            if gather and not fetch:
                part = _picked(b, start, where)
            elif gather:
                low, high = _load(b, start, V, 4), _load(b, _at(b, start, I64(LANES), 4), V, 4)
                part = b.call(fetch, [low, where, high])
            else:
                part = _splat(b, _load(b, start, F32, 4))
            b.store(b.call(fma, [w, part, b.load(total)]), total)
    with cgutils.for_range(b, blocks) as loop:
        block = loop.index
        for total in (t for part in sums for t in part):
            b.store(ir.Constant(V, [0.0] * LANES), total)
        first, last = (b.zext(_load(b, _at(b, starts, n, 4), I32, 4), I64) for n in (block, b.add(block, I64(1))))
        _in_turn(b, first, last, turns, slot)
        for k in range(columns):
            total = b.load(sums[0][k])
            for turn in range(1, turns):
                total = b.fadd(total, b.load(sums[turn][k]))
            if kind == 2:
                total = b.fmul(total, _load(b, _at(b, scales, block, 4 * LANES), V, 4))
            target = _at(b, _at(b, y, b.mul(y_step, I64(k)), 4), block, 4 * LANES)
            b.store(b.fadd(total, _load(b, target, V, 4)), b.bitcast(target, V.as_pointer())).align = 4


_gathered, _slotted = _products(True), _products(False)


@compiled
def product(matrix, x, x_step, y, y_step, columns):
    """y += matrix @ x for so many columns; x and y are addresses of float32, the steps between columns in floats.

    x must be readable for 32 floats behind its last column. `matrix` is a layout's `packed`.
    """
    code, kind, rows, starts, places, indices, values, scales = matrix
    if code == CSR:
        return _csr(rows, starts, places, values.view(np.float32), x, x_step, y, y_step, columns)
    if code == SLICED:
        order = indices.view(np.uint32)
        return _sliced(rows, starts, places, order, values.view(np.float32), x, x_step, y, y_step, columns)
    n, s, p, i = (rows + LANES - 1) // LANES, starts.ctypes.data, places.ctypes.data, indices.ctypes.data
    v, f, most = values.ctypes.data, scales.ctypes.data, 4 if code == GATHER else MOST
    while columns > 0:                                             # many at a time: the weights are read once
        done = most if columns >= most else 4 if columns >= 4 else 1
        if code == GATHER:
            _gathered(kind, done, n, s, p, i, v, f, x, x_step, y, y_step)
        else:
            _slotted(kind, done, n, s, p, i, v, f, x, x_step, y, y_step)
        x, y, columns = x + 4 * done * x_step, y + 4 * done * y_step, columns - done


@intrinsic
def _float_at(typing, address):
    def emit(context, b, signature, args):
        return _load(b, b.inttoptr(args[0], I8.as_pointer()), F32, 4)
    return types.float32(types.intp), emit


@intrinsic
def _add_at(typing, address, value):
    def emit(context, b, signature, args):
        pointer = b.inttoptr(args[0], F32.as_pointer())
        store = b.store(b.fadd(_load(b, pointer, F32, 4), args[1]), pointer)
        store.align = 4
        return context.get_dummy_value()
    return types.void(types.intp, types.float32), emit


@compiled
def aligned_rows(n, width):
    """Zeros (n, width), each row at the start of a cache line if width is a multiple of 16."""
    room = np.zeros(n * width + 16, np.float32)
    start = (-room.ctypes.data) % 64 // 4
    return room[start:start + n * width].reshape(n, width)


@intrinsic
def _slices(typing, count, starts, places, order, values, x, y):
    """y += a "sliced" matrix times one column of x. Eight rows share a register of sums and an end of the loop: rows
    of their own would each make the processor guess where they end."""
    def emit(context, b, signature, args):
        count, *addresses = args
        starts, places, order, values, x, y = (b.inttoptr(a, I8.as_pointer()) for a in addresses)
        eight = ir.VectorType(F32, SLICE)
        fma = _fma(b, eight)
        sums = cgutils.alloca_once(b, eight)
        with cgutils.for_range(b, count) as loop:
            b.store(ir.Constant(eight, None), sums)
            first, last = (b.zext(_load(b, _at(b, starts, n, 4), I32, 4), I64)
                           for n in (loop.index, b.add(loop.index, I64(1))))
            with cgutils.for_range_slice(b, first, last, I64(1), intp=I64) as (n, _):
                part, place = ir.Constant(eight, ir.Undefined), _at(b, places, n, 4 * SLICE)
                for k in range(SLICE):
                    column = b.zext(_load(b, _at(b, place, I64(k), 4), I32, 4), I64)
                    part = b.insert_element(part, _load(b, _at(b, x, column, 4), F32, 4), I32(k))
                b.store(b.call(fma, [_load(b, _at(b, values, n, 4 * SLICE), eight, 4), part, b.load(sums)]), sums)
            for k in range(SLICE):
                row = b.zext(_load(b, _at(b, _at(b, order, loop.index, 4 * SLICE), I64(k), 4), I32, 4), I64)
                target = _at(b, y, row, 4)
                total = b.fadd(_load(b, target, F32, 4), b.extract_element(b.load(sums), I32(k)))
                b.store(total, b.bitcast(target, F32.as_pointer())).align = 4
        return context.get_dummy_value()
    return types.void(*[types.intp] * 7), emit


@intrinsic
def _lane(typing, first, last, places, values, x, sums):
    """sums (32) = one row of a "sliced" matrix, from its slot `first` to before `last`, times x (C, 32)."""
    def emit(context, b, signature, args):
        first, last, *addresses = args
        places, values, x, sums = (b.inttoptr(a, I8.as_pointer()) for a in addresses)
        fma = _fma(b)
        offsets = range(0, WIDE, LANES)
        totals = [[cgutils.alloca_once(b, V) for _ in offsets] for _ in range(2)]
        for total in (t for turn in totals for t in turn):
            b.store(ir.Constant(V, None), total)

        def weigh(n, turn):
            column = b.zext(_load(b, _at(b, places, n, 4 * SLICE), I32, 4), I64)
            w, row = _splat(b, _load(b, _at(b, values, n, 4 * SLICE), F32, 4)), _at(b, x, column, 4 * WIDE)
            for k, total in zip(offsets, totals[turn]):
                b.store(b.call(fma, [w, _load(b, _at(b, row, I64(k), 4), V, 4), b.load(total)]), total)
        _in_turn(b, first, last, 2, weigh)
        for k, two in zip(offsets, zip(*totals)):
            b.store(b.fadd(*map(b.load, two)), b.bitcast(_at(b, sums, I64(k), 4), V.as_pointer())).align = 4
        return context.get_dummy_value()
    return types.void(*[types.intp] * 6), emit


@compiled
def _sliced(rows, starts, places, order, values, x, x_step, y, y_step, columns):
    if columns >= 4:
        return _sliced_of_many(rows, starts, places, order, values, x, x_step, y, y_step, columns)
    s, p, o, v = starts.ctypes.data, places.ctypes.data, order.ctypes.data, values.ctypes.data
    for k in range(columns):
        _slices(len(starts) - 1, s, p, o, v, x + 4 * k * x_step, y + 4 * k * y_step)


@compiled
def _sliced_of_many(rows, starts, places, order, values, x, x_step, y, y_step, columns):
    """Columns side by side: each weight is then multiplied by as many numbers that lie in a row."""
    used = 0
    for place in places:
        used = max(used, np.int64(place) + 1)
    across, sums = aligned_rows(used, WIDE), aligned_rows(SLICE, WIDE)
    for start in range(0, columns, WIDE):
        n = min(WIDE, columns - start)
        for k in range(n):
            for c in range(used):
                across[c, k] = _float_at(x + 4 * ((start + k) * x_step + c))
        for block in range(len(starts) - 1):
            lanes = min(SLICE, rows - block * SLICE)
            for r in range(lanes):
                _lane(np.int64(starts[block]), np.int64(starts[block + 1]), places.ctypes.data + 4 * r,
                      values.ctypes.data + 4 * r, across.ctypes.data, sums[r].ctypes.data)
            for k in range(n):
                for r in range(lanes):
                    _add_at(y + 4 * ((start + k) * y_step + np.int64(order[block * SLICE + r])), sums[r, k])


@compiled
def _csr(rows, starts, columns_of, values, x, x_step, y, y_step, columns):
    for row in range(rows):
        for k in range(columns):
            total = np.float32(0)
            for n in range(starts[row], starts[row + 1]):
                total += values[n] * _float_at(x + 4 * (k * x_step + np.int64(columns_of[n])))
            _add_at(y + 4 * (k * y_step + row), total)


def _exp(b, x):
    """`gates.exp` of 16 values."""
    def of(value):
        return ir.Constant(V, [value] * LANES)

    def add(factor, other, addend):                                # rounds once
        return b.call(_fma(b), [factor, other, addend])
    W = ir.VectorType(I32, LANES)
    x = b.select(b.fcmp_ordered("<", x, of(-87.0)), of(-87.0), x)   # so written, NaN stays NaN
    x = b.select(b.fcmp_ordered(">", x, of(87.0)), of(87.0), x)
    shifted = add(x, of(1.44269504), of(12582912.0))
    n = b.fsub(shifted, of(12582912.0))
    r = add(n, of(-1.42860677e-6), add(n, of(-0.693145752), x))
    p = of(1 / 5040)
    for k in (720, 120, 24, 6, 2, 1, 1):
        p = add(p, r, of(1 / k))
    power = b.add(b.shl(b.bitcast(shifted, W), ir.Constant(W, [23] * LANES)), ir.Constant(W, [1065353216] * LANES))
    return b.fmul(p, b.bitcast(power, V))


def _sigmoid(b, x):
    one = ir.Constant(V, [1.0] * LANES)
    return b.fdiv(one, b.fadd(one, _exp(b, b.fneg(x))))


def _tanh(b, x):
    one, two = (ir.Constant(V, [n] * LANES) for n in (1.0, 2.0))
    return b.fsub(one, b.fdiv(two, b.fadd(one, _exp(b, b.fadd(x, x)))))


def _bent(function):
    """An intrinsic: so many vectors of 16 at an address through a function of one, in place."""
    @intrinsic
    def bend(typing, y, count):
        def emit(context, b, signature, args):
            with cgutils.for_range(b, args[1]) as loop:
                place = _at(b, b.inttoptr(args[0], I8.as_pointer()), loop.index, 4 * LANES)
                b.store(function(b, _load(b, place, V, 4)), b.bitcast(place, V.as_pointer())).align = 4
            return context.get_dummy_value()
        return types.void(types.intp, types.intp), emit
    return bend


_sigmoids, _tanhs = _bent(_sigmoid), _bent(_tanh)


@compiled
def sigmoid_(y, n):
    """The first n entries of y through the sigmoid, in place; what fills no vector goes one by one."""
    _sigmoids(y.ctypes.data, n // LANES)
    for j in range(n // LANES * LANES, n):
        y[j] = np.float32(1) / (np.float32(1) + exp(-y[j]))


@compiled
def tanh_(y, n):
    _tanhs(y.ctypes.data, n // LANES)
    for j in range(n // LANES * LANES, n):
        y[j] = np.float32(1) - np.float32(2) / (np.float32(1) + exp(y[j] + y[j]))


@compiled(fastmath={"contract"})       # a product and a sum in one instruction, which rounds once instead of twice
def elu_(y, n):
    for j in range(n):
        y[j] = y[j] if y[j] > 0 else exp(y[j]) - np.float32(1)
