"""Products of a few rows with a packed matrix, by the processor's own instructions, to be called from compiled code.

In bfloat16 on the tile units of newer Intel CPUs (AMX), summed in float32; in float32 by vectors of 16 (AVX-512) or 8
(AVX2). numba hands the instructions on. `available` says what this processor has, `fits` what can be cut into pieces.
"""

import ctypes
import functools
import platform

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor, bfloat16, dtype, float32, uint16

from .compiled import compiled

HAS = llvmlite.binding.get_host_cpu_features().get
ROWS = 16                              # of a tile; it is 64 bytes wide: 16 numbers in float32, 32 in bfloat16
LANES = 16 if HAS("avx512f") else 8    # numbers of a vector in float32
HEIGHT = LANES // 2                    # rows that a panel of two vectors meets at once: their sums fill the registers
PANEL = 2 * LANES
BYTE, INT, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
CONFIG = np.zeros(64, np.uint8)        # what the processor wants to know: palette 1, eight tiles of 16 rows, 64 bytes
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, ROWS


@functools.cache
def available(kind: dtype) -> bool:
    """Whether this processor has the instructions for products of this kind, and the system lets us use them."""
    if platform.machine() != "x86_64":
        return False
    if kind == float32:
        return bool(HAS("avx512f") or HAS("avx2") and HAS("fma"))
    if kind != bfloat16 or platform.system() != "Linux" or not (HAS("amx-tile") and HAS("amx-bf16")):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18               # Linux gives a process the tiles when it asks
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def fits(weights: tuple[Tensor, ...], groups: tuple[int, ...]) -> bool:
    """Whether matrices (rows, K), each in so many blocks of rows, and their transposes can be cut into pieces."""
    return all(w.shape[1] % 32 == 0 and w.shape[0] % (32 * n) == 0 for w, n in zip(weights, groups))


def pack(weight: Tensor) -> np.ndarray:
    """A matrix (rows, K), cut. In bfloat16: tiles (rows/16, K/32, 16, 16, 2), neighbours in K beside each other in
    pairs; in float32: panels of so many rows as two vectors hold, (rows/PANEL, K, PANEL)."""
    rows, K = weight.shape
    if weight.dtype == float32:
        return weight.view(rows // PANEL, PANEL, K).mT.contiguous().numpy()
    return _cut(weight.contiguous().view(uint16).numpy())


def pack_back(weight: Tensor, groups: int) -> np.ndarray:
    """The way back of `pack`: each of the blocks of rows transposed."""
    rows, K = weight.shape
    if weight.dtype == float32:                                    # (groups * K/PANEL, rows/groups, PANEL)
        blocks = weight.view(groups, rows // groups, K // PANEL, PANEL)
        return blocks.transpose(1, 2).reshape(-1, rows // groups, PANEL).contiguous().numpy()
    return _cut_back(weight.contiguous().view(uint16).numpy(), groups)


@compiled
def _cut(weight):
    rows, K = weight.shape
    out = np.empty((rows // 16, K // 32, 16, 16, 2), np.uint16)
    for n in range(rows // 16):
        for k in range(K // 32):
            tile = out[n, k]
            for pair in range(16):
                for row in range(16):
                    for one in range(2):
                        tile[pair, row, one] = weight[16 * n + row, 32 * k + 2 * pair + one]
    return out


@compiled
def _cut_back(weight, groups):
    rows, K = weight.shape
    size = rows // groups
    out = np.empty((groups * K // 16, size // 32, 16, 16, 2), np.uint16)
    for g in range(groups):
        for n in range(K // 16):
            for k in range(size // 32):
                tile = out[g * K // 16 + n, k]
                for pair in range(16):
                    for row in range(16):
                        for one in range(2):
                            tile[pair, row, one] = weight[g * size + 32 * k + 2 * pair + one, 16 * n + row]
    return out


# The instructions -----------------------------------------------------------------------------------------------------

def _instruction(name: str, numbers: int, address: bool):
    """A numba intrinsic for LLVM's `name`, which takes so many tile numbers and, if so, an address and a stride."""
    def emit(context, builder, signature, args):
        tiles = [ir.Constant(BYTE, each.literal_value) for each in signature.args[:numbers]]
        places = [builder.inttoptr(args[numbers], BYTE.as_pointer()), *args[numbers + 1:]] if address else []
        kinds = [each.type for each in tiles + places]
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds),
                                                  f"llvm.x86.{name}")
        builder.call(function, tiles + places)
        return context.get_dummy_value()
    return emit


@intrinsic(prefer_literal=True)
def configure(typing, address):
    return types.void(types.uintp), _instruction("ldtilecfg", 0, True)


@intrinsic(prefer_literal=True)
def release(typing):
    return types.void(), _instruction("tilerelease", 0, False)


@intrinsic(prefer_literal=True)
def zero(typing, tile):
    return types.void(tile), _instruction("tilezero", 1, False)


@intrinsic(prefer_literal=True)
def load(typing, tile, address, stride):
    return types.void(tile, types.uintp, types.int64), _instruction("tileloadd64", 1, True)


@intrinsic(prefer_literal=True)
def store(typing, tile, address, stride):
    return types.void(tile, types.uintp, types.int64), _instruction("tilestored64", 1, True)


@intrinsic(prefer_literal=True)
def dot(typing, total, a, b):
    """total += a (16 rows, 32 in K) times b (16 pairs in K, 16 columns)."""
    return types.void(total, a, b), _instruction("tdpbf16ps", 3, False)


@intrinsic
def strip(typing, x, wide, panel, depth, out, far):
    """A few rows times a panel: x (HEIGHT, depth), panel (depth, PANEL) -> out (HEIGHT, PANEL). wide, far: bytes from
    row to row. Meanwhile the panel behind it is fetched, since a large matrix waits in the furthest cache."""
    def emit(context, b, signature, args):
        x, wide, panel, depth, out, far = args
        vector, size, width = ir.VectorType(ir.FloatType(), LANES), 4 * LANES, 2
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32")
        fetch = b.module.declare_intrinsic("llvm.prefetch", [BYTE.as_pointer()], ir.FunctionType(
            ir.VoidType(), [BYTE.as_pointer()] + 3 * [INT]))
        nothing, before = ir.Constant(vector, ir.Undefined), b.block
        behind = b.add(panel, b.mul(depth, ir.Constant(LONG, size * width)))
        rows = [b.add(x, b.mul(wide, ir.Constant(LONG, m))) for m in range(HEIGHT)]
        loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(loop)
        b.position_at_end(loop)
        k, *sums = b.phi(LONG), *(b.phi(vector) for _ in range(HEIGHT * width))
        k.add_incoming(ir.Constant(LONG, 0), before)
        here, next_k = b.mul(k, ir.Constant(LONG, size * width)), b.add(k, ir.Constant(LONG, 1))
        at = b.add(panel, here)
        b.call(fetch, [b.inttoptr(b.add(behind, here), BYTE.as_pointer()), INT(0), INT(2), INT(1)])  # read, to L2, data
        weights = [_load(b, b.add(at, ir.Constant(LONG, size * n)), vector) for n in range(width)]
        new = []
        for row in rows:
            one = b.insert_element(nothing, _load(b, b.add(row, b.shl(k, ir.Constant(LONG, 2))), ir.FloatType()),
                                   INT(0))
            each = b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT, LANES), [0] * LANES))
            new += [b.call(fma, [each, w, sums[len(new) + n]]) for n, w in enumerate(weights)]
        k.add_incoming(next_k, loop)
        for total, later in zip(sums, new):
            total.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
            total.add_incoming(later, loop)
        b.cbranch(b.icmp_signed("<", next_k, depth), loop, done)
        b.position_at_end(done)
        for m in range(HEIGHT):
            for n in range(width):
                place = b.add(b.add(out, b.mul(far, ir.Constant(LONG, m))), ir.Constant(LONG, size * n))
                b.store(new[m * width + n], b.inttoptr(place, vector.as_pointer())).align = 4
        return context.get_dummy_value()
    return types.void(*[types.int64] * 6), emit


def _load(b, address, kind):
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = 4
    return value


# Products -------------------------------------------------------------------------------------------------------------

@compiled
def by_tiles(x, packed, groups, out, rows, part, parts):
    """`product` in bfloat16, x as uint16. Only between `configure` and `release`."""
    columns, depth = packed.shape[0] // groups, packed.shape[1]    # in tiles
    wide, far = 2 * x.shape[1], 4 * out.shape[1]                   # bytes from row to row
    for p in range(rows[0], rows[1], 2 * ROWS):
        for g in range(groups):
            a = x.ctypes.data + p * wide + 64 * depth * g
            for n in range(g * columns + 2 * part, (g + 1) * columns, 2 * parts):
                b, to = packed.ctypes.data + 1024 * depth * n, out.ctypes.data + p * far + 64 * n
                zero(0)
                zero(1)
                if p + ROWS < rows[1]:                                   # two tiles of rows by two of columns
                    zero(2)
                    zero(3)
                    for k in range(depth):
                        load(4, a + 64 * k, wide)
                        load(5, a + 64 * k + ROWS * wide, wide)
                        load(6, b + 1024 * k, 64)
                        dot(0, 4, 6)
                        dot(2, 5, 6)
                        load(7, b + 1024 * (depth + k), 64)
                        dot(1, 4, 7)
                        dot(3, 5, 7)
                    store(2, to + ROWS * far, far)
                    store(3, to + ROWS * far + 64, far)
                else:
                    for k in range(depth):
                        load(4, a + 64 * k, wide)
                        load(6, b + 1024 * k, 64)
                        dot(0, 4, 6)
                        load(7, b + 1024 * (depth + k), 64)
                        dot(1, 4, 7)
                store(0, to, far)
                store(1, to + 64, far)


@compiled
def by_vectors(x, packed, groups, out, rows, part, parts):
    """`product` in float32."""
    panels, depth = packed.shape[0] // groups, np.int64(packed.shape[1])
    wide, far = np.int64(4 * x.shape[1]), np.int64(4 * out.shape[1])         # bytes from row to row
    for n in range(part, len(packed), parts):
        b, to = np.int64(packed.ctypes.data) + 4 * PANEL * depth * n, np.int64(out.ctypes.data) + 4 * PANEL * n
        a = np.int64(x.ctypes.data) + 4 * depth * (n // panels)
        for p in range(rows[0], rows[1], HEIGHT):                     # while the panel is in the nearest cache
            strip(a + p * wide, wide, b, depth, to + p * far, far)


def product(x, packed, groups, out, rows, part=0, parts=1):
    """out (P, R) = x (P, groups*K), block by block times the transpose of the packed matrix's blocks; P is a multiple
    of 16. x is float32, or bfloat16 as uint16, out float32. Only between `begin` and `end`.

    Made are the rows from rows[0] to before rows[1], and of several threads each makes the columns of its `part` of
    `parts`."""


@overload(product)
def _product(x, packed, groups, out, rows, part=0, parts=1):
    if x.dtype == types.uint16:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_tiles(x, packed, groups, out, rows, part, parts)
    return lambda x, packed, groups, out, rows, part=0, parts=1: by_vectors(x, packed, groups, out, rows, part, parts)


def shares(x, batch, part, parts):
    """What a thread makes in each product with x (P, ...), of which the first `batch` rows count: its rows, and its
    columns' part and parts.

    In float32 all columns of rows of its own, if the batch can be shared so: then no thread waits for another, though
    each reads all weights. Otherwise all rows of columns of its own, whose weights stay in its own cache."""


@overload(shares)
def _shares(x, batch, part, parts):
    if x.dtype == types.uint16:
        return lambda x, batch, part, parts: ((0, x.shape[0]), part, parts)

    def by_rows(x, batch, part, parts):
        if batch % (parts * HEIGHT) == 0:
            return (batch * part // parts, batch * (part + 1) // parts), 0, 1
        return (0, x.shape[0]), part, parts
    return by_rows


def begin(x):
    """Before products of the kind of x: tiles have to be set up."""


def end(x):
    """After products of the kind of x."""


@overload(begin)
def _begin(x):
    return (lambda x: configure(CONFIG.ctypes.data)) if x.dtype == types.uint16 else lambda x: None


@overload(end)
def _end(x):
    return (lambda x: release()) if x.dtype == types.uint16 else lambda x: None
