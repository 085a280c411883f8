"""Products of many rows, for what waits for no other step: projections and the gradients of weights and x.

The matrix library's own are as quick where it knows the processor, and half as quick where it does not use vectors of
16 numbers though they are there, or, at times, with tiles (tiles.py). These are called as those in library.py are, for
weights in float32 or bfloat16, and make the same bits with any number of threads; sums are float32.

All there is, is a strip (vectors.py) or a block (tiles.py) times a panel. Both lie deep in a matrix, a row of it after
the other, or in bfloat16 two rows after two: then what lies one above the other becomes a pair, the 32 bits of a
uint32.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numba import types
from numba.extending import overload
from torch import Tensor

from . import products, team
from .compiled import compiled
from .gates import _float32, share
from .library import as_array
from .team import meet
from .tiles import CONFIG, ROWS, TILE, TILES, block, configure, release
from .vectors import (
    HEIGHT,
    LANES,
    LINE,
    PANEL,
    WIDTH,
    pairs_of_strip,
    pairs_of_vector,
    room,
    strip,
    strip_more,
    strip_more_of_pairs,
    strip_of_pairs,
    take_strip,
    take_vector,
    turn,
)

# Whether they are quicker than the library's, by the type of the weights.
WORTH_IT = {torch.float32: LANES == 16, torch.bfloat16: bool(products.HAS("avx512bf16")) or TILES}
# Depth of a piece of a panel that stays in the nearest cache, with what it meets there: of vectors, and of tiles.
DEEP = 384, 256
TAKEN = 32                             # columns of d that are taken at once: of fewer, lines of the cache come in vain


def product(weight: Tensor, groups: int, bias: Tensor | None = None) -> Callable:
    """`library.product`, for rows of weight in panels: R a multiple of 32 in each block."""
    packed = products.pack(_filled(weight, 1))

    def multiply(x: Tensor) -> Tensor:
        whole = _filled(x, groups, products.ROWS)
        y = torch.empty(len(whole), len(weight))
        arrays = as_array(whole), packed, groups, y.numpy()
        team.together(lambda _, part, parts: _product(*arrays, part, parts))
        return y[:len(x)] if bias is None else y[:len(x)].add_(bias)
    return multiply


class Later:
    """The products of a way back: asked for one by one, made by `now`, so that threads come together once for all.
    Room for panels is kept until the next ones, since fresh memory is slow. Sums (R, ...) are float32, R a multiple of
    32 in each block."""

    def __init__(self):
        self.room, self.works, self.after = {}, [], []

    def back(self, weight: Tensor, groups: int) -> Callable:
        """`library.AtOnce.back`. Neither weight nor result are copied if K is a multiple of 32 and there are eights of
        rows, in float32."""
        K, w = weight.shape[1], _filled(weight, 1)
        panel, tiled = _room(1, weight, len(w) // groups, len(w))[0, 0], TILES and weight.dtype == torch.bfloat16
        back = _back_by_tiles if tiled else _back

        def multiply(d: Tensor, out: Tensor) -> None:
            whole = _filled(d.flatten(0, 1), groups, ROWS if tiled else HEIGHT)
            size = len(whole) * groups * w.shape[1]
            fits = out.dtype == torch.float32 and out.is_contiguous() and out.numel() == size
            x = out if fits else torch.empty(len(whole), groups, w.shape[1])
            arrays = as_array(whole), as_array(w), groups, x.view(len(whole), -1).numpy(), panel
            self.works.append(lambda _, part, parts: back(*arrays, part, parts))
            if not fits:
                rows = d.shape[0] * d.shape[1]
                self.after.append(lambda: out.copy_(x[:rows, :, :K].reshape(out.shape)))
        return multiply

    def add_outer(self, total: Tensor, d: Tensor, a: Tensor, groups: int, more: bool) -> None:
        """`library.add_outer`."""
        K, d, a = total.shape[1], _filled(d.flatten(0, 1), groups, 2), _filled(a.to(d.dtype).flatten(0, 1), groups, 2)
        whole, tiled = _filled(total, 1), TILES and d.dtype == torch.bfloat16
        if (key := (whole.shape[1], len(d))) not in self.room:     # a work ends when all threads have left its panels
            self.room[key] = _room(whole.shape[1] // PANEL, d, len(d), DEEP[tiled])
        arrays = whole.numpy(), as_array(d), as_array(a), groups, more, self.room[key]
        add = _add_outer_by_tiles if tiled else _add_outer
        self.works.append(lambda *parts: add(*arrays, *parts))
        if whole is not total:
            self.after.append(lambda: total.copy_(whole[:, :K]))

    def add_rows(self, total: Tensor, d: Tensor) -> None:
        """`library.add_rows`."""
        arrays = total.numpy(), as_array(d.flatten(0, 1))
        self.works.append(lambda _, part, parts: _add_rows(*arrays, part, parts))

    def now(self) -> None:
        team.together(*self.works)
        for copy in self.after:
            copy()
        self.works, self.after = [], []


def _filled(x: Tensor, groups: int, rows: int = 1) -> Tensor:
    """x (n, groups*K) with zeros behind the columns of each block up to a multiple of PANEL, and behind the rows."""
    blocks = x.reshape(len(x), groups, -1)
    more = -blocks.shape[2] % PANEL, -len(x) % rows
    return F.pad(blocks, (0, more[0], 0, 0, 0, more[1])).flatten(1) if any(more) else x.contiguous()


def _room(count: int, like: Tensor, rows: int, deep: int) -> np.ndarray:
    """So many panels for so many rows of a matrix of that type, in pieces of equal depth, at most so deep: (count,
    pieces, depth, PANEL), or in pairs (count, pieces, WIDTH, depth, LANES)."""
    single = like.dtype == torch.float32
    depth = rows if single else -(-rows // 2)
    pieces = -(-depth // deep)
    depth = -(-depth // pieces)
    depth += -depth % 16 if TILES and not single else 0            # whole tiles
    return room((count, pieces, depth, PANEL) if single else (count, pieces, WIDTH, depth, LANES),
                np.float32 if single else np.uint32)


# From here on compiled; x_at is the address of x ----------------------------------------------------------------------

@compiled
def _zeros(like):
    """Room of that size and type; a thread's own."""
    return products.zeros(like.size, like).reshape(like.shape)


@compiled
def _product(x, packed, groups, out, part, parts):
    products.begin(x)
    products.product(x, packed, groups, out, (0, len(x)), part, parts)
    products.end(x)


def _panel(matrix, row, column, last, out):
    """A panel of a matrix from a row and a column on, up to before the last row -> out (depth, PANEL), or of pairs
    (WIDTH, depth, LANES)."""


@overload(_panel)
def _panel_of(matrix, row, column, last, out):
    def numbers(matrix, row, column, last, out):
        wide, at = matrix.strides[0], matrix.ctypes.data + row * matrix.strides[0] + 4 * column
        for k in range(min(last - row, len(out))):
            for n in range(WIDTH):
                take_vector(at + k * wide + 4 * LANES * n, wide, out.ctypes.data + 4 * LANES * (k * WIDTH + n))

    def pairs(matrix, row, column, last, out):
        wide, at = matrix.strides[0], matrix.ctypes.data + row * matrix.strides[0] + 2 * column
        for k in range(min((last - row) // 2, out.shape[1])):
            for n in range(WIDTH):
                pairs_of_vector(at + 2 * k * wide + 2 * LANES * n, wide,
                                out.ctypes.data + 4 * LANES * (n * out.shape[1] + k))
    return numbers if out.dtype == types.float32 else pairs


def _strips(matrix, column, out):
    """Columns of a matrix from one on, as many as the strips have -> out (strips, depth, HEIGHT)."""


@overload(_strips)
def _strips_of(matrix, column, out):
    def numbers(matrix, column, out):
        wide, at, size = matrix.strides[0], matrix.ctypes.data + 4 * column, 4 * HEIGHT
        for k in range(len(matrix)):
            for n in range(len(out)):
                take_strip(at + k * wide + size * n, wide, out.ctypes.data + size * (n * out.shape[1] + k))

    def pairs(matrix, column, out):
        wide, at, size = matrix.strides[0], matrix.ctypes.data + 2 * column, 4 * HEIGHT
        for k in range(len(matrix) // 2):
            for n in range(len(out)):
                pairs_of_strip(at + 2 * k * wide + size // 2 * n, wide,
                               out.ctypes.data + size * (n * out.shape[1] + k))
    return numbers if out.dtype == types.float32 else pairs


def _multiply(panels, x, wide, ahead, panel, depth, out, far, more):
    """A strip of x times one of the panels -> out, with `more` added to what is there; as in vectors.py, where the
    sizes are explained."""


@overload(_multiply)
def _multiply_of(panels, x, wide, ahead, panel, depth, out, far, more):
    first, added = (strip, strip_more) if panels.dtype == types.float32 else (strip_of_pairs, strip_more_of_pairs)

    def multiply(panels, x, wide, ahead, panel, depth, out, far, more):
        if more:
            added(x, wide, ahead, panel, depth, out, far)
        else:
            first(x, wide, ahead, panel, depth, out, far)
    return multiply


@compiled
def _back(d, weight, groups, out, panel, part, parts):
    """d (rows, R), weight (R, K) in blocks of rows -> out (rows, groups*K). A thread makes panels of its own."""
    (R, K), own, wide, far = weight.shape, _zeros(panel), d.strides[0], 4 * out.shape[1]
    size, panels, depth = R // groups, K // PANEL, panel.size // PANEL
    d_at, out_at = d.ctypes.data, out.ctypes.data
    for n in range(part, groups * panels, parts):
        g, first = n // panels, n % panels * PANEL
        _panel(weight, g * size, first, (g + 1) * size, own)
        for p in range(0, len(d), HEIGHT):
            _multiply(own, d_at + p * wide + g * size * d.itemsize, wide, 4, own.ctypes.data, depth,
                      out_at + p * far + 4 * (g * K + first), far, False)


@compiled
def _panels(a, first, deep, panels, part, parts):
    """Cuts a (rows, ...) from a column on into panels, each in pieces of `deep` rows; a thread cuts its part."""
    for n in range(part, len(panels), parts):
        for k in range(panels.shape[1]):
            _panel(a, k * deep, first + n * PANEL, len(a), panels[n, k])


@compiled
def _add_outer(total, d, a, groups, more, panels, counter, part, parts):
    """The transpose of d (rows, R) times a (rows, groups*K), block by block -> total (R, K), or with `more` added to
    it. Panels of a are cut by all threads together; then each makes rows of total of its own."""
    (R, K), (count, pieces), met = total.shape, panels.shape[:2], 0
    size, depth = R // groups, panels[0, 0].size // PANEL
    deep, step = depth * (4 // d.itemsize), 4 * depth * PANEL      # rows of a piece, and its bytes
    strips = np.zeros((TAKEN // HEIGHT, pieces * depth, HEIGHT), panels.dtype)
    total_at, strips_at, panels_at = total.ctypes.data, strips.ctypes.data, panels.ctypes.data
    for g in range(groups):
        _panels(a, g * K, deep, panels, part, parts)
        met = meet(counter, parts, met)
        for m in share(size // TAKEN, part, parts):
            first = g * size + m * TAKEN
            _strips(d, first, strips)
            for n in range(count):
                for k in range(pieces):                            # meanwhile a piece stays in the nearest cache
                    for s in range(len(strips)):
                        _multiply(panels, strips_at + 4 * HEIGHT * depth * (s * pieces + k), 4, 4 * HEIGHT,
                                  panels_at + step * (n * pieces + k), depth,
                                  total_at + 4 * ((first + s * HEIGHT) * K + n * PANEL), 4 * K, more or k > 0)
        met = meet(counter, parts, met)                            # before other panels take the place of these


@compiled
def _back_by_tiles(d, weight, groups, out, panel, part, parts):
    """`_back` on tile units."""
    (R, K), own, wide, far = weight.shape, _zeros(panel), np.int64(d.strides[0]), np.int64(4 * out.shape[1])
    size, panels, depth = R // groups, K // PANEL, np.int64(panel.shape[1] // 16)
    configure(CONFIG.ctypes.data)
    for n in range(part, groups * panels, parts):
        g, first = n // panels, n % panels * PANEL
        _panel(weight, g * size, first, (g + 1) * size, own)
        at, to = d.ctypes.data + 2 * g * size, out.ctypes.data + 4 * (g * K + first)
        for p in range(0, len(d), ROWS):
            block(at + p * wide, wide, 64, own.ctypes.data, depth, to + p * far, far, False)
    release()


@compiled
def _add_outer_by_tiles(total, d, a, groups, more, panels, counter, part, parts):
    """`_add_outer` on tile units, which want what lies below each other in d side by side."""
    (R, K), (count, pieces), met = total.shape, panels.shape[:2], 0
    size, pairs, far = R // groups, panels.shape[3], np.int64(4 * K)
    depth, deep = np.int64(pairs // 16), 2 * pairs                 # tiles and rows of a piece
    own, x = _zeros(panels[0]), _zeros(panels[0, 0])
    x_at = np.int64(x.ctypes.data)
    configure(CONFIG.ctypes.data)
    for g in range(groups):
        _panels(a, g * K, deep, panels, part, parts)
        met = meet(counter, parts, met)
        for m in share(size // PANEL, part, parts):
            first = g * size + m * PANEL
            for k in range(pieces):
                _panel(d, k * deep, first, len(d), own[k])
                for tile in range(WIDTH * depth):
                    turn(own[k].ctypes.data + TILE * tile, LINE, x_at + TILE * tile, LINE)
                for n in range(count):
                    for half in range(WIDTH):
                        block(x_at + half * TILE * depth, LINE, TILE, panels[n, k].ctypes.data, depth,
                              total.ctypes.data + (first + half * ROWS) * far + 4 * n * PANEL, far,
                              more or k > 0)
        met = meet(counter, parts, met)                            # before other panels take the place of these
    release()


@compiled
def _add_rows(total, d, part, parts):
    """Adds to total (R) the sum of the rows of d (rows, R). A thread makes numbers of its own."""
    first, last = len(total) * part // parts, len(total) * (part + 1) // parts
    own = total[first:last]
    for r in range(len(d)):
        row = d[r, first:last]
        for k in range(len(own)):
            own[k] += _float32(row[k])
