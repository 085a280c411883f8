"""What the tests of the engine share: a packed matrix, unpacked again."""

import numpy as np

from hlstm_src.compact.cells import padded, rows_of
from hlstm_src.compact.kernels import aligned, product


def dense(layout) -> np.ndarray:
    """The matrix (R, C) of a layout: what it makes of each unit vector."""
    rows, columns = layout.shape
    x, y = rows_of(np.eye(columns, dtype=np.float32)), aligned((columns, padded(rows)))
    product(layout.packed, x.ctypes.data, x.shape[1], y.ctypes.data, y.shape[1], columns)
    return y[:, :rows].T
