"""Products of a few rows with a packed matrix, by the processor's own instructions, to be called from compiled code; or
with one as it lies, which is cut into pieces as it is used, where a packed one would cost more memory than it is worth.

In bfloat16, summed in float32, on tile units (AMX: tiles.py) or else by vectors (AVX512-BF16); in float32 by vectors
(vectors.py). numba hands the instructions on. `available` says what this processor has, `fits` what can be
cut into pieces.
"""

import functools
import platform

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor, bfloat16, dtype, float32, uint16

from . import team
from .compiled import compiled
from .gates import share
from .library import as_array
from .tiles import CONFIG, ROWS, TILE, TILES, block, configure, release
from .vectors import HAS, HEIGHT, LANES, LINE, PANEL, SIZE, pairs_of_vector, strip, strip_of_pairs, take_vector, turn

# With so many rows or more, and fewer steps, a matrix is cut anew at each step of the way back, in float32. A product
# then takes a seventh longer than with a packed one, but no room: packed ones, of so few steps, are much of all memory.
CUT = 64, 32
TOGETHER = 4                           # panels that are cut together: lines side by side come quicker than one by one


@functools.cache
def available(kind: dtype) -> bool:
    """Whether this processor has the instructions for products of this kind, and the system lets us use them."""
    if platform.machine() != "x86_64":
        return False
    if kind == float32:
        return bool(HAS("avx512f") or HAS("avx2") and HAS("fma"))
    return kind == bfloat16 and (TILES or bool(HAS("avx512bf16")))


def fits(weights: tuple[Tensor, ...], groups: tuple[int, ...]) -> bool:
    """Whether matrices (rows, K), each in so many blocks of rows, and their transposes can be cut into pieces."""
    return all(w.shape[1] % 32 == 0 and w.shape[0] % (32 * n) == 0 for w, n in zip(weights, groups))


def pack(weight: Tensor) -> np.ndarray:
    """A matrix (rows, K), cut. In bfloat16: tiles (rows/16, K/32, 16, 16, 2), neighbours in K beside each other in
    pairs; in float32: panels of so many rows as two vectors hold, (rows/PANEL, K, PANEL)."""
    (rows, K), single = weight.shape, weight.dtype == float32
    out = torch.empty((rows // PANEL, K, PANEL) if single else (rows // 16, K // 32, 16, 16, 2),
                      dtype=float32 if single else uint16).numpy()
    given = as_array(weight.contiguous())
    cut = _cut_panels if single else _cut
    team.together(lambda _, part, parts: cut(given, out, part, parts))
    return out


def pack_back(weight: Tensor, groups: int) -> np.ndarray:
    """The way back of `pack`: each of the blocks of rows transposed."""
    rows, K = weight.shape
    if weight.dtype == float32:                                    # (groups * K/PANEL, rows/groups, PANEL)
        blocks = weight.reshape(groups, rows // groups, K // PANEL, PANEL)
        return blocks.transpose(1, 2).reshape(-1, rows // groups, PANEL).contiguous().numpy()
    out = torch.empty(groups * K // 16, rows // groups // 32, 16, 16, 2, dtype=uint16).numpy()
    given = as_array(weight.contiguous())
    team.together(lambda _, part, parts: _cut_back(given, groups, out, part, parts))
    return out


def prepared_back(weight: Tensor, groups: int, rows: int, steps: int) -> np.ndarray:
    """What `product` takes on the way back of so many steps of so many rows: a packed matrix, or the matrix as it is,
    whose panels are then cut as they are needed (`CUT`)."""
    if weight.dtype == float32 and rows >= CUT[0] and steps < CUT[1]:
        return weight.contiguous().numpy()
    return pack_back(weight, groups)


@compiled
def _cut_panels(weight, out, part, parts):
    wide = np.int64(4 * weight.shape[1])
    for n in share(len(out), part, parts):
        for half in range(0, PANEL, LANES):
            at, to = weight.ctypes.data + (n * PANEL + half) * wide, out[n].ctypes.data + 4 * half
            for k in range(0, weight.shape[1], LANES):
                turn(at + 4 * k, wide, to + 4 * PANEL * k, 4 * PANEL)


@compiled
def _cut(weight, out, part, parts):
    wide = np.int64(2 * weight.shape[1])
    for n in share(len(out), part, parts):
        at, to = weight.ctypes.data + 16 * n * wide, out[n].ctypes.data
        for k in range(out.shape[1]):
            turn(at + SIZE * k, wide, to + TILE * k, SIZE)


@compiled
def _cut_back(weight, groups, out, part, parts):
    tiles, wide = len(out) // groups, np.int64(2 * weight.shape[1])
    size = 16 * out.shape[1] * wide * 2                            # bytes of a block of rows
    for n in share(len(out), part, parts):
        at, to = weight.ctypes.data + n // tiles * size + SIZE // 2 * (n % tiles), out[n].ctypes.data
        for pair in range(16 * out.shape[1]):
            pairs_of_vector(at + 2 * pair * wide, wide, to + SIZE * pair)


# Products -------------------------------------------------------------------------------------------------------------

@compiled
def zeros(size, like):
    """So many, of an array's type, which begin where a line of the cache does; a thread's own."""
    room = np.zeros(size + LINE // like.itemsize, like.dtype)
    first = -np.int64(room.ctypes.data) % LINE // like.itemsize
    return room[first:first + size]


@compiled
def by_tiles(x, packed, groups, out, rows, part, parts):
    """`product` in bfloat16, x as uint16. Only between `configure` and `release`."""
    tiles, depth = packed.shape[0] // groups, np.int64(packed.shape[1])
    wide, far = np.int64(2 * x.shape[1]), np.int64(4 * out.shape[1])         # bytes from row to row
    for n in range(2 * part, len(packed), 2 * parts):              # two tiles of columns, while they are near
        b, to = np.int64(packed.ctypes.data) + TILE * depth * n, np.int64(out.ctypes.data) + 64 * n
        a = np.int64(x.ctypes.data) + 64 * depth * (n // tiles)
        for p in range(rows[0], rows[1], ROWS):
            block(a + p * wide, wide, 64, b, depth, to + p * far, far, False)


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
def by_cutting(x, weight, groups, out, rows, part, parts):
    """`product` in float32 with each block of a matrix (groups*depth, K) itself, not its transpose: x is (P,
    groups*depth), out (P, groups*K). A few panels at a time are cut and used up."""
    (R, K), wide, far = weight.shape, np.int64(4 * x.shape[1]), np.int64(4 * out.shape[1])
    depth, panels = R // groups, K // PANEL
    own = zeros(TOGETHER * depth * PANEL, weight)
    x_at, weight_at, own_at, out_at = x.ctypes.data, weight.ctypes.data, np.int64(own.ctypes.data), out.ctypes.data
    some = -(-panels // TOGETHER)                                  # as many as are cut together, and what is left
    for n in range(part, groups * some, parts):
        g, first = n // some, n % some * TOGETHER
        count, column = min(TOGETHER, panels - first), first * PANEL
        for k in range(depth):
            row = weight_at + 4 * ((g * depth + k) * K + column)
            for m in range(count):
                for half in range(0, PANEL, LANES):
                    take_vector(row + 4 * (m * PANEL + half), 0, own_at + 4 * ((m * depth + k) * PANEL + half))
        for m in range(count):
            for p in range(rows[0], rows[1], HEIGHT):
                strip(x_at + p * wide + 4 * g * depth, wide, 4, own_at + 4 * m * depth * PANEL, depth,
                      out_at + p * far + 4 * (g * K + column + m * PANEL), far)


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
    of 16. x is float32, or bfloat16 as uint16, out float32. Only between `begin` and `end`. A matrix that is not packed
    is for the way back (`by_cutting`).

    Made are the rows from rows[0] to before rows[1], and of several threads each makes the columns of its `part` of
    `parts`."""


@overload(product)
def _product(x, packed, groups, out, rows, part=0, parts=1):
    if packed.ndim == 2:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_cutting(x, packed, groups, out, rows, part,
                                                                                parts)
    if x.dtype == types.uint16 and TILES:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_tiles(x, packed, groups, out, rows, part, parts)
    if x.dtype == types.uint16:
        return lambda x, packed, groups, out, rows, part=0, parts=1: by_pairs(x, packed, groups, out, rows, part, parts)
    return lambda x, packed, groups, out, rows, part=0, parts=1: by_vectors(x, packed, groups, out, rows, part, parts)


@compiled
def whole(batch):
    """The rows that a product takes of a batch: a multiple of 16."""
    return -(-batch // ROWS) * ROWS


def shares(packed, batch, part, parts):
    """What a thread makes in each product with such a matrix, of whose rows the first `batch` count: its rows, and its
    columns' part and parts.

    With vectors all columns of rows of its own, if the batch can be shared so: then no thread waits for another, though
    each reads all weights. Otherwise all rows of columns of its own, whose weights stay in its own cache, and which
    nobody else cuts."""


@overload(shares)
def _shares(packed, batch, part, parts):
    if packed.ndim == 2 or packed.dtype == types.uint16 and TILES:
        return lambda packed, batch, part, parts: ((0, whole(batch)), part, parts)

    def by_rows(packed, batch, part, parts):
        if batch % (parts * HEIGHT) == 0:
            return (batch * part // parts, batch * (part + 1) // parts), 0, 1
        return (0, whole(batch)), part, parts
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
