"""A few rows times a narrow panel of a matrix, by vectors of 16 numbers (AVX-512) or 8 (AVX2): what all compiled
products are made of. The sums stay in the registers until the panel has been read once.

In float32, or from pairs of bfloat16 (AVX512-BF16) with sums in float32. numba hands the instructions on.
"""

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HAS = llvmlite.binding.get_host_cpu_features().get
LANES = 16 if HAS("avx512f") else 8    # numbers of a vector in float32
WIDTH = 2                              # vectors of a panel
PANEL = WIDTH * LANES                  # its columns
HEIGHT = LANES // 2                    # rows that a panel meets at once: their sums fill the registers
SIZE, LINE = 4 * LANES, 64             # bytes of a vector; bytes that a cache holds together
TYPES = {np.dtype(name): getattr(torch, name) for name in ("float32", "uint32", "uint16")}
BYTE, INT, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


FLOATS, WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(INT, LANES)
PAIRS = ir.VectorType(BFloat(), 2 * LANES)


def room(shape: tuple[int, ...], kind=np.float32) -> np.ndarray:
    """Zeros that begin where a line of the cache does, as PyTorch's do: a vector across two lines takes twice the
    time."""
    return torch.zeros(shape, dtype=TYPES[np.dtype(kind)]).numpy()


def _strip(pairs: bool, more: bool):
    """x (HEIGHT, depth) times a panel (depth, PANEL) -> out (HEIGHT, PANEL), or with `more` added to what is there.

    x, panel, out: addresses. wide, far: bytes from row to row of x and of out; ahead: bytes of x from one number in
    depth to the next. Of `pairs` of bfloat16, `depth` counts the pairs, and the panel's vectors stand one behind the
    other, (WIDTH, depth, LANES); those of float32 side by side, (depth, WIDTH, LANES). Meanwhile the panel behind it is
    fetched, since a large matrix waits in the furthest cache.
    """
    def emit(context, b, signature, args):
        x, wide, ahead, panel, depth, out, far = args
        name, kind = (("x86.avx512bf16.dpbf16ps.512", PAIRS) if pairs else (f"fma.v{LANES}f32", FLOATS))
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(FLOATS, [FLOATS, kind, kind] if pairs
                                                                            else [FLOATS] * 3), f"llvm.{name}")
        fetch = b.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], ir.FunctionType(
            ir.VoidType(), [BYTE.as_pointer()] + 3 * [INT]))

        def after(start, step, count):                             # an address so many steps on
            return b.add(start, b.mul(step, LONG(count)) if isinstance(count, int) else b.mul(step, count))

        def add(total, one, other):
            return b.call(function, [total, one, other] if pairs else [one, other, total])
        places = [after(after(out, far, m), LONG(SIZE), n) for m in range(HEIGHT) for n in range(WIDTH)]
        begun = [_load(b, place, FLOATS) if more else ir.Constant(FLOATS, [0.0] * LANES) for place in places]
        apart = b.mul(depth, LONG(SIZE)) if pairs else LONG(SIZE)  # from vector to vector of the panel
        step, behind = LONG(SIZE if pairs else SIZE * WIDTH), after(panel, LONG(SIZE * WIDTH), depth)
        rows, before = [after(x, wide, m) for m in range(HEIGHT)], b.block
        loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        k, *sums = b.phi(LONG), *(b.phi(FLOATS) for _ in places)
        next_k = b.add(k, LONG(1))
        for n in range(0, WIDTH, LINE // SIZE):
            later = after(after(behind, step, k), apart, n)
            b.call(fetch, [b.inttoptr(later, BYTE.as_pointer()), INT(0), INT(2), INT(1)])      # to read, into L2, data
        weights = [b.bitcast(_load(b, after(after(panel, step, k), apart, n), WORDS), kind) for n in range(WIDTH)]
        new = []
        for row in rows:
            one = b.insert_element(ir.Constant(WORDS, ir.Undefined), _load(b, after(row, ahead, k), INT), INT(0))
            each = b.bitcast(b.shuffle_vector(one, one, ir.Constant(WORDS, [0] * LANES)), kind)
            new += [add(sums[len(new) + n], each, w) for n, w in enumerate(weights)]
        k.add_incoming(LONG(0), before)
        k.add_incoming(next_k, loop)
        for total, first, later in zip(sums, begun, new):
            total.add_incoming(first, before)
            total.add_incoming(later, loop)
        b.cbranch(b.icmp_signed("<", next_k, depth), loop, done)
        b.position_at_end(done)
        for value, place in zip(new, places):
            b.store(value, b.inttoptr(place, FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    @intrinsic
    def strip(typing, x, wide, ahead, panel, depth, out, far):
        return types.void(*[types.int64] * 7), emit
    return strip


def _taken(pairs: bool, count: int):
    """So many numbers of a matrix beside each other, and of `pairs` of bfloat16 those below them, too, each in the
    upper half of 32 bits -> out. row, out: addresses; wide: bytes from row to row."""
    def emit(context, b, signature, args):
        row, wide, out = args
        full = ir.VectorType(INT, count)
        if pairs:
            half = ir.VectorType(ir.IntType(16), count)
            low, high = (b.zext(_load(b, place, half, 2), full) for place in (row, b.add(row, wide)))
            value = b.or_(low, b.shl(high, ir.Constant(full, [16] * count)))
        else:
            value = _load(b, row, full)
        b.store(value, b.inttoptr(out, full.as_pointer())).align = 4
        return context.get_dummy_value()

    @intrinsic
    def taken(typing, row, wide, out):
        return types.void(types.int64, types.int64, types.int64), emit
    return taken


@intrinsic
def turn(typing, x, wide, out, far):
    """LANES rows of LANES numbers of 32 bits each, turned: what was a row becomes a column.

    x, out: addresses; wide, far: bytes from row to row. A number's row and column trade one bit of theirs at a time."""
    def emit(context, b, signature, args):
        x, wide, out, far = args
        rows = [_load(b, b.add(x, b.mul(wide, LONG(k))), WORDS) for k in range(LANES)]
        for bit in (1 << n for n in range(LANES.bit_length() - 1)):
            first = [k & ~bit if not k & bit else LANES + (k & ~bit) for k in range(LANES)]
            second = [index + bit for index in first]
            for k in range(LANES):
                if not k & bit:
                    both = rows[k], rows[k | bit]
                    rows[k], rows[k | bit] = (b.shuffle_vector(*both, ir.Constant(WORDS, choice))
                                              for choice in (first, second))
        for k, row in enumerate(rows):
            b.store(row, b.inttoptr(b.add(out, b.mul(far, LONG(k))), WORDS.as_pointer())).align = 4
        return context.get_dummy_value()
    return types.void(*[types.int64] * 4), emit


def _load(b, address, kind, align=4):
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


strip, strip_more, strip_of_pairs, strip_more_of_pairs = (_strip(pairs, more) for pairs in (False, True)
                                                          for more in (False, True))
take_vector, take_strip, pairs_of_vector, pairs_of_strip = (_taken(pairs, count) for pairs in (False, True)
                                                            for count in (LANES, HEIGHT))
