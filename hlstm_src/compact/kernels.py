"""The engine's inner loops, compiled by numba: products of packed matrices, and the packing itself.

numba has no vector type, so the loops over slots are written in LLVM's own language, through llvmlite: a register is
<16 x float> there, and LLVM turns it into whatever the CPU has (one AVX-512 register, two of AVX2, four of NEON).
Only the fetching instruction of "gather" is AVX-512's own.
"""

import functools

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..compiled import compiled
from ..gates import exp

CSR, GATHER, SLOTS = 0, 1, 2
LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
V = ir.VectorType(F32, LANES)


@functools.cache
def cpu_features() -> bool:
    """Whether the CPU that numba compiles for has the instruction of "gather" (AVX-512)."""
    told = numba.config.CPU_FEATURES                               # from the environment: to compile for an older CPU
    return "+avx512f" in told if told is not None else bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


def aligned(shape, dtype=np.float32) -> np.ndarray:
    """Zeros at the start of a cache line: a load that straddles two lines costs twice."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
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


def _product(kind: int, gather: bool, columns: int, unroll: int = 2):
    """An intrinsic: y += matrix @ x for so many columns of x at once, block by block.

    (blocks, starts, places, indices, values, scales, x, x_step, y, y_step): the first are of a layout; column k of x
    begins x_step floats behind column k - 1, of y y_step floats. Arrays come as addresses (integers).
    """
    @intrinsic
    def multiply(typing, blocks, starts, places, indices, values, scales, x, x_step, y, y_step):
        def emit(context, b, signature, args):
            blocks, *addresses, x, x_step, y, y_step = args
            starts, places, indices, values, scales, x, y = (b.inttoptr(a, I8.as_pointer())
                                                             for a in (*addresses, x, y))
            fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(V, [V] * 3), f"llvm.fma.v{LANES}f32")
            fetch = gather and cpu_features() and cgutils.get_or_insert_function(
                b.module, ir.FunctionType(V, [V, ir.VectorType(I32, LANES), V]), "llvm.x86.avx512.vpermi2var.ps.512")
            xs = [_at(b, x, b.mul(x_step, I64(k)), 4) for k in range(columns)]
            sums = [[cgutils.alloca_once(b, V) for _ in xs] for _ in range(unroll)]

            def slot(n, into):
                place = b.zext(_load(b, _at(b, places, n, 4), I32, 4), I64)
                w = _weights(b, values, n, kind)
                if gather:
                    where = b.zext(_load(b, _at(b, indices, n, LANES), ir.VectorType(I8, LANES), 1),
                                   ir.VectorType(I32, LANES))
                for start, total in zip(xs, into):
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
                first, last = (b.zext(_load(b, _at(b, starts, n, 4), I32, 4), I64)
                               for n in (block, b.add(block, I64(1))))
                rounds = b.udiv(b.sub(last, first), I64(unroll))
                with cgutils.for_range(b, rounds) as inner:
                    for u in range(unroll):
                        slot(b.add(first, b.add(b.mul(inner.index, I64(unroll)), I64(u))), sums[u])
                rest = b.add(first, b.mul(rounds, I64(unroll)))
                with cgutils.for_range_slice(b, rest, last, I64(1), intp=I64) as (n, _):
                    slot(n, sums[0])
                for k in range(columns):
                    total = b.load(sums[0][k])
                    for u in range(1, unroll):
                        total = b.fadd(total, b.load(sums[u][k]))
                    if kind == 2:
                        total = b.fmul(total, _load(b, _at(b, scales, block, 4 * LANES), V, 4))
                    target = _at(b, _at(b, y, b.mul(y_step, I64(k)), 4), block, 4 * LANES)
                    store = b.store(b.fadd(total, _load(b, target, V, 4)), b.bitcast(target, V.as_pointer()))
                    store.align = 4
            return context.get_dummy_value()
        return types.void(*[types.intp] * 10), emit
    return multiply


(_g0, _g0x4), (_g1, _g1x4), (_g2, _g2x4) = [[_product(kind, True, k) for k in (1, 4)] for kind in range(3)]
(_s0, _s0x4), (_s1, _s1x4), (_s2, _s2x4) = [[_product(kind, False, k) for k in (1, 4)] for kind in range(3)]


@compiled
def product(matrix, x, x_step, y, y_step, columns):
    """y += matrix @ x for so many columns; x and y are addresses of float32, the steps between columns in floats.

    x must be readable for 32 floats behind its last column. `matrix` is a layout's `packed`.
    """
    code, kind, rows, starts, places, indices, values, scales = matrix
    if code == CSR:
        return _csr(rows, starts, places, values.view(np.float32), x, x_step, y, y_step, columns)
    n, s, p, i = (rows + LANES - 1) // LANES, starts.ctypes.data, places.ctypes.data, indices.ctypes.data
    v, f = values.ctypes.data, scales.ctypes.data
    while columns > 0:                                             # four columns at a time: the weights are read once
        four = columns >= 4
        if code == GATHER:
            if kind == 0:
                _g0x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _g0(n, s, p, i, v, f, x, x_step, y, y_step)
            elif kind == 1:
                _g1x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _g1(n, s, p, i, v, f, x, x_step, y, y_step)
            else:
                _g2x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _g2(n, s, p, i, v, f, x, x_step, y, y_step)
        elif kind == 0:
            _s0x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _s0(n, s, p, i, v, f, x, x_step, y, y_step)
        elif kind == 1:
            _s1x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _s1(n, s, p, i, v, f, x, x_step, y, y_step)
        else:
            _s2x4(n, s, p, i, v, f, x, x_step, y, y_step) if four else _s2(n, s, p, i, v, f, x, x_step, y, y_step)
        done = 4 if four else 1
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
def _csr(rows, starts, columns_of, values, x, x_step, y, y_step, columns):
    for row in range(rows):
        for k in range(columns):
            total = np.float32(0)
            for n in range(starts[row], starts[row + 1]):
                total += values[n] * _float_at(x + 4 * (k * x_step + np.int64(columns_of[n])))
            _add_at(y + 4 * (k * y_step + row), total)


@compiled
def aligned_rows(n, width):
    """Zeros (n, width), each row at the start of a cache line if width is a multiple of 16."""
    room = np.zeros(n * width + 16, np.float32)
    start = (-room.ctypes.data) % 64 // 4
    return room[start:start + n * width].reshape(n, width)


@compiled
def sigmoid_(y, n):
    """The first n entries of y through the sigmoid, in place."""
    for j in range(n):
        y[j] = np.float32(1) / (np.float32(1) + exp(-y[j]))


@compiled
def tanh_(y, n):
    for j in range(n):
        y[j] = np.float32(1) - np.float32(2) / (np.float32(1) + exp(y[j] + y[j]))


@compiled
def elu_(y, n):
    for j in range(n):
        y[j] = y[j] if y[j] > 0 else exp(y[j]) - np.float32(1)


@compiled
def pack_windows(W, mask):
    """W, mask (R, C) -> (starts, places, indices (slots, 16), values (slots, 16)) of the layout "gather", whose windows
    start at multiples of 8, so that half a register never straddles two cache lines."""
    rows, columns = W.shape
    blocks = (rows + LANES - 1) // LANES
    starts = np.zeros(blocks + 1, np.uint32)
    room = 1024
    places, indices = np.zeros(room, np.uint32), np.zeros((room, LANES), np.uint8)
    values = np.zeros((room, LANES), W.dtype)
    at, following = np.zeros(LANES, np.int64), 0
    for block in range(blocks):
        lanes = min(LANES, rows - block * LANES)
        for r in range(lanes):
            at[r] = _next(mask[block * LANES + r], 0)
        while True:
            first = columns
            for r in range(lanes):
                first = min(first, at[r])
            if first == columns:
                break
            first -= first % 8
            if following == room:
                room *= 2
                places, indices, values = _longer(places), _longer(indices), _longer(values)
            places[following] = first
            for r in range(lanes):
                if at[r] < min(first + 32, columns):
                    row = block * LANES + r
                    indices[following, r], values[following, r] = at[r] - first, W[row, at[r]]
                    at[r] = _next(mask[row], at[r] + 1)
            following += 1
        starts[block + 1] = following
    return starts, places[:following].copy(), indices[:following].copy(), values[:following].copy()


@compiled
def pack_slots(W, mask):
    """W, mask (R, C) -> (starts, places, values (slots, 16)) of the layouts "block16" and "dense"."""
    rows, columns = W.shape
    blocks = (rows + LANES - 1) // LANES
    starts = np.zeros(blocks + 1, np.uint32)
    for block in range(blocks):
        count = 0
        for c in range(columns):
            count += mask[block * LANES:(block + 1) * LANES, c].any()
        starts[block + 1] = starts[block] + count
    places, values = np.zeros(starts[-1], np.uint32), np.zeros((starts[-1], LANES), W.dtype)
    following = 0
    for block in range(blocks):
        for c in range(columns):
            if mask[block * LANES:(block + 1) * LANES, c].any():
                places[following] = c
                for r in range(min(LANES, rows - block * LANES)):
                    values[following, r] = W[block * LANES + r, c]
                following += 1
    return starts, places, values


@compiled
def _next(row, c):
    while c < len(row) and not row[c]:
        c += 1
    return c


@compiled
def _longer(a):
    b = np.zeros((2 * len(a),) + a.shape[1:], a.dtype)
    b[:len(a)] = a
    return b
