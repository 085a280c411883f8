"""Products of a few rows with a packed matrix, by the processor's own instructions, to be called from compiled code.

In bfloat16, summed in float32, on the tile units of newer Intel CPUs (AMX) or else by vectors (AVX512-BF16); in float32
by vectors (vectors.py). numba hands the instructions on. `available` says what this processor has, `fits` what can be
cut into pieces.
"""

import ctypes
import functools
import platform

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor, bfloat16, dtype, float32, uint16

from .compiled import compiled
from .vectors import BYTE, HAS, HEIGHT, PANEL, room, strip, strip_of_pairs

ROWS = 16                              # of a tile; it is 64 bytes wide: 16 numbers in float32, 32 in bfloat16
CONFIG = np.zeros(64, np.uint8)        # what the processor wants to know: palette 1, eight tiles of 16 rows, 64 bytes
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, ROWS


@functools.cache
def available(kind: dtype) -> bool:
    """Whether this processor has the instructions for products of this kind, and the system lets us use them."""
    if platform.machine() != "x86_64":
        return False
    if kind == float32:
        return bool(HAS("avx512f") or HAS("avx2") and HAS("fma"))
    return kind == bfloat16 and (TILES or bool(HAS("avx512bf16")))


def _tiles() -> bool:
    """Whether there are tile units for bfloat16, and the system lets us use them."""
    if platform.system() != "Linux" or not (HAS("amx-tile") and HAS("amx-bf16")):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18               # Linux gives a process the tiles when it asks
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


TILES = _tiles()


def fits(weights: tuple[Tensor, ...], groups: tuple[int, ...]) -> bool:
    """Whether matrices (rows, K), each in so many blocks of rows, and their transposes can be cut into pieces."""
    return all(w.shape[1] % 32 == 0 and w.shape[0] % (32 * n) == 0 for w, n in zip(weights, groups))


def pack(weight: Tensor) -> np.ndarray:
    """A matrix (rows, K), cut. In bfloat16: tiles (rows/16, K/32, 16, 16, 2), neighbours in K beside each other in
    pairs; in float32: panels of so many rows as two vectors hold, (rows/PANEL, K, PANEL)."""
    rows, K = weight.shape
    if weight.dtype == float32:
        return weight.reshape(rows // PANEL, PANEL, K).mT.contiguous().numpy()
    return _cut(weight.contiguous().view(uint16).numpy(), room((rows // 16, K // 32, 16, 16, 2), np.uint16))


def pack_back(weight: Tensor, groups: int) -> np.ndarray:
    """The way back of `pack`: each of the blocks of rows transposed."""
    rows, K = weight.shape
    if weight.dtype == float32:                                    # (groups * K/PANEL, rows/groups, PANEL)
        blocks = weight.reshape(groups, rows // groups, K // PANEL, PANEL)
        return blocks.transpose(1, 2).reshape(-1, rows // groups, PANEL).contiguous().numpy()
    out = room((groups * K // 16, rows // groups // 32, 16, 16, 2), np.uint16)
    return _cut_back(weight.contiguous().view(uint16).numpy(), groups, out)


@compiled
def _cut(weight, out):
    rows, K = weight.shape
    for n in range(rows // 16):
        for k in range(K // 32):
            tile = out[n, k]
            for pair in range(16):
                for row in range(16):
                    for one in range(2):
                        tile[pair, row, one] = weight[16 * n + row, 32 * k + 2 * pair + one]
    return out


@compiled
def _cut_back(weight, groups, out):
    rows, K = weight.shape
    size = rows // groups
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
        for p in range(rows[0], rows[1], HEIGHT):                  # while the panel is in the nearest caches
            strip(a + p * wide, wide, 4, b, depth, to + p * far, far)


@compiled
def by_pairs(x, packed, groups, out, rows, part, parts):
    """`product` in bfloat16 by vectors: a tile is a panel of one vector, and two neighbours are taken at once."""
    tiles, depth = packed.shape[0] // groups, np.int64(16 * packed.shape[1])           # depth in pairs
    wide, far = np.int64(2 * x.shape[1]), np.int64(4 * out.shape[1])
    for n in range(2 * part, len(packed), 2 * parts):
        b, to = np.int64(packed.ctypes.data) + 64 * depth * n, np.int64(out.ctypes.data) + 64 * n
        a = np.int64(x.ctypes.data) + 4 * depth * (n // tiles)
        for p in range(rows[0], rows[1], HEIGHT):
            strip_of_pairs(a + p * wide, wide, 4, b, depth, to + p * far, far)


def product(x, packed, groups, out, rows, part=0, parts=1):
    """out (P, R) = x (P, groups*K), block by block times the transpose of the packed matrix's blocks; P is a multiple
    of 16. x is float32, or bfloat16 as uint16, out float32. Only between `begin` and `end`.

    Made are the rows from rows[0] to before rows[1], and of several threads each makes the columns of its `part` of
    `parts`."""


@overload(product)
def _product(x, packed, groups, out, rows, part=0, parts=1):
    if x.dtype == types.uint16 and TILES:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_tiles(x, packed, groups, out, rows, part, parts)
    if x.dtype == types.uint16:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_pairs(x, packed, groups, out, rows, part, parts)
    return lambda x, packed, groups, out, rows, part=0, parts=1: by_vectors(x, packed, groups, out, rows, part, parts)


def shares(x, batch, part, parts):
    """What a thread makes in each product with x (P, ...), of which the first `batch` rows count: its rows, and its
    columns' part and parts.

    With vectors all columns of rows of its own, if the batch can be shared so: then no thread waits for another, though
    each reads all weights. Otherwise all rows of columns of its own, whose weights stay in its own cache."""


@overload(shares)
def _shares(x, batch, part, parts):
    if x.dtype == types.uint16 and TILES:
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
    return (lambda x: configure(CONFIG.ctypes.data)) if x.dtype == types.uint16 and TILES else lambda x: None


@overload(end)
def _end(x):
    return (lambda x: release()) if x.dtype == types.uint16 and TILES else lambda x: None
