"""Products of many rows in float32, for what waits for no other step: projections and the gradients of weights and x.

The matrix library's own are as quick where it knows the processor, and half as quick where it does not use vectors of
16 numbers though they are there. These are called as those in scan.py are, and make the same bits with any number of
threads.
"""

from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from . import products, team
from .compiled import compiled
from .gates import share
from .vectors import HEIGHT, LANES, PANEL, strip, strip_more

WORTH_IT = LANES == 16                 # with vectors of 8 the library is no slower


def product(weight: Tensor, groups: int, bias: Tensor | None = None) -> Callable:
    """`scan.product`, for rows of weight in panels: R a multiple of 32 in each block."""
    packed = products.pack(weight)

    def multiply(x: Tensor) -> Tensor:
        whole = _whole(x)
        y = whole.new_empty(len(whole), len(weight))
        arrays = whole.numpy(), packed, groups, y.numpy()
        team.together(lambda _, part, parts: _product(*arrays, part, parts))
        return y[:len(x)] if bias is None else y[:len(x)].add_(bias)
    return multiply


def back(weight: Tensor, groups: int) -> Callable:
    """`scan.back`, for any number of columns of weight. No copy of the weight is made."""
    w = weight.numpy()

    def multiply(d: Tensor) -> Tensor:
        whole = _whole(d)
        x = whole.new_empty(len(whole), groups * w.shape[1])
        arrays = whole.numpy(), w, groups, x.numpy()
        team.together(lambda _, part, parts: _back(*arrays, part, parts))
        return x[:len(d)]
    return multiply


def add_outer(total: Tensor, d: Tensor, a: Tensor, groups: int) -> None:
    """`scan.add_outer`, for rows of total in strips: R a multiple of 32 in each block."""
    arrays = total.numpy(), d.flatten(0, 1).numpy(), a.contiguous().flatten(0, 1).numpy()
    team.together(lambda _, part, parts: _add_outer(*arrays, groups, part, parts))


def _whole(x: Tensor) -> Tensor:
    """x (rows, K) with rows of zeros behind it up to a multiple of HEIGHT."""
    return F.pad(x, (0, 0, 0, -len(x) % HEIGHT)) if len(x) % HEIGHT else x.contiguous()


@compiled
def _product(x, packed, groups, out, part, parts):
    products.product(x, packed, groups, out, (0, len(x)), part, parts)


@compiled
def _cut(matrix, first, panel):
    """Columns of a matrix (K, N) from the first one on -> panel (K, PANEL), zeros where there are none."""
    columns = min(PANEL, matrix.shape[1] - first)
    if columns == PANEL:                                           # a length that is known is a copy of two vectors
        for k in range(len(matrix)):
            row = matrix[k, first:]
            for j in range(PANEL):
                panel[k, j] = row[j]
    else:
        panel[:] = 0
        panel[:, :columns] = matrix[:, first:]


@compiled
def _back(d, weight, groups, out, part, parts):
    """d (rows, R), weight (R, K) in blocks of rows -> out (rows, groups*K). A thread makes panels of its own."""
    (R, K), wide = weight.shape, np.int64(4 * d.shape[1])
    size, panel, edge = R // groups, np.empty((R // groups, PANEL), np.float32), np.empty((HEIGHT, PANEL), np.float32)
    panels = -(-K // PANEL)
    for n in range(part, groups * panels, parts):
        g, first = n // panels, n % panels * PANEL
        columns = min(PANEL, K - first)
        _cut(weight[g * size:(g + 1) * size], first, panel)
        for p in range(0, len(d), HEIGHT):
            rows = out[p:p + HEIGHT, g * K + first:g * K + first + columns]
            to = rows if columns == PANEL else edge
            strip(d.ctypes.data + p * wide + 4 * size * g, wide, 4, panel.ctypes.data, size, to.ctypes.data,
                  to.strides[0])
            if columns < PANEL:
                rows[:] = edge[:, :columns]


@compiled
def _add_outer(total, d, a, groups, part, parts):
    """Adds to total (R, K), block by block, the transpose of d (rows, R) times a (rows, groups*K). A thread makes rows
    of its own."""
    (R, K), rows = total.shape, len(d)
    size, panels = R // groups, -(-K // PANEL)
    cut, strips = np.empty((panels, rows, PANEL), np.float32), np.empty((rows, HEIGHT), np.float32)
    edge = np.empty((HEIGHT, PANEL), np.float32)
    for g in range(groups):
        for n in range(panels):
            _cut(a[:, g * K:(g + 1) * K], n * PANEL, cut[n])
        for m in share(size // HEIGHT, part, parts):
            first = g * size + m * HEIGHT
            for k in range(rows):
                row = d[k, first:]
                for j in range(HEIGHT):
                    strips[k, j] = row[j]
            for n in range(panels):
                own = total[first:first + HEIGHT, n * PANEL:(n + 1) * PANEL]
                to = own if own.shape[1] == PANEL else edge
                if own.shape[1] < PANEL:
                    edge[:, :own.shape[1]] = own
                strip_more(strips.ctypes.data, 4, 4 * HEIGHT, cut[n].ctypes.data, rows, to.ctypes.data, to.strides[0])
                if own.shape[1] < PANEL:
                    own[:] = edge[:, :own.shape[1]]
