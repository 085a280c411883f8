"""Where a sparse matrix's weights lie in memory, so that a CPU can multiply by them quickly.

All layouts but "csr" treat 16 rows at a time, as many float32 values as an AVX-512 register holds; lane r of a slot
belongs to row r of the block. A block's slots stand one behind the other and are read once, from front to back.

    dense     a slot for each column: 16 weights, to be multiplied by one x
    block16   the same, but only columns in which one of the 16 rows has a live connection
    gather    a slot holds at most one live connection of each row, all within a window of 32 columns; the window of
              x lies in two registers, and one instruction (vpermi2ps) fetches each row's x from it
    csr       the textbook's: for each row its live columns and their weights; for any CPU, and quick on none

The windows of "gather" start wherever the earliest connection still waiting stands, which fills the lanes better than
windows at fixed places: with random masks of 95 % sparsity 56 % of them against 40 %.
"""

from dataclasses import dataclass

import numpy as np

from .kernels import CSR, GATHER, SLOTS, aligned, cpu_features, pack_slots, pack_windows

LANES, WINDOW = 16, 32
KINDS = ("dense", "block16", "gather", "csr")
VALUES = {"fp32": 0, "bf16": 1, "int8": 2}


@dataclass(frozen=True)
class Layout:
    """A packed matrix of `shape` (R, C). `arrays`: starts, places (a column or the start of a window), indices (of
    "gather": where in its window), values, scales (a factor a row, of int8). `packed` is what the kernels take."""
    kind: str
    shape: tuple[int, int]
    values: str
    arrays: dict[str, np.ndarray]
    why: str = "as asked"

    @property
    def packed(self) -> tuple:
        code = {"csr": CSR, "gather": GATHER}.get(self.kind, SLOTS)
        a = self.arrays
        return (np.int64(code), np.int64(VALUES[self.values]), np.int64(self.shape[0]), a["starts"], a["places"],
                a["indices"], a["values"].view(np.uint8).reshape(-1), a["scales"])

    @property
    def slots(self) -> int:
        """Vector operations of one product; of "csr", weights."""
        return int(self.arrays["starts"][-1])

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads, x and y apart."""
        return sum(a.nbytes for a in self.arrays.values())

    def to_dense(self) -> np.ndarray:
        """The matrix again, (R, C) float32: exactly, unless its values were rounded."""
        rows, columns = self.shape
        a, dense = self.arrays, np.zeros((-(-rows // LANES) * LANES, columns), np.float32)
        values = _widened(a["values"], self.values)
        counts = np.diff(a["starts"])
        if self.kind == "csr":
            dense[np.repeat(np.arange(rows), counts), a["places"]] = values
        else:
            row = (np.repeat(np.arange(len(counts)), counts) * LANES)[:, None] + np.arange(LANES)
            column = a["places"][:, None] + (a["indices"].reshape(-1, LANES) if self.kind == "gather" else 0)
            np.add.at(dense, (row, np.broadcast_to(column, row.shape)), values.reshape(-1, LANES))
        dense = dense[:rows]
        return dense * a["scales"][:rows, None] if self.values == "int8" else dense


def pack(W: np.ndarray, mask: np.ndarray | None = None, kind: str | None = None, values: str = "fp32",
         region: np.ndarray | None = None, columns: int = 1) -> Layout:
    """Packs W (R, C) where `mask` (bool, R, C; None: everywhere) is true; `kind=None` leaves the choice to `choose`.

    values: "fp32", "bf16" (rounded to nearest) or "int8" (a scale a row). region (bool, R, C; None: everywhere): where
    the dense matrix has weights at all, which is what "dense" stores. columns: of x, in most products. Raises
    ValueError for an unknown name or a mask of another shape.
    """
    if kind not in (None, *KINDS) or values not in VALUES:
        raise ValueError(f"kind {kind!r}, values {values!r}: choose of {', '.join(KINDS)} and {', '.join(VALUES)}")
    W = np.ascontiguousarray(W, np.float32)
    mask = np.ones(W.shape, bool) if mask is None else np.ascontiguousarray(mask, bool)
    if W.ndim != 2 or mask.shape != W.shape:
        raise ValueError(f"W {W.shape} and mask {mask.shape} must be two-dimensional and alike")
    region = np.ones_like(mask) if region is None else region
    kind, why = (kind, "as asked") if kind else choose(mask, region, columns)
    rows = W.shape[0]
    W = np.where(mask, W, np.float32(0))
    scales = np.ones(-(-rows // LANES) * LANES, np.float32)
    if values == "int8":
        most = np.abs(W).max(1, initial=0)
        scales[:rows] = np.where(most > 0, most / 127, 1)
        W = np.rint(W / scales[:rows, None])
    empty = np.zeros(0, np.uint8)
    if kind == "csr":                                              # in float32 always, rounded or not
        W, values, scales = _rounded(W, values) * scales[:rows, None], "fp32", np.ones_like(scales)
        starts = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.uint32)
        places, indices, kept = np.nonzero(mask)[1].astype(np.uint32), empty, W[mask]
    elif kind == "gather":
        starts, places, indices, kept = pack_windows(W, mask)
    else:
        starts, places, kept = pack_slots(W, region if kind == "dense" else mask)
        indices = empty
    arrays = {"starts": starts, "places": places, "indices": indices.reshape(-1), "values": _narrowed(kept, values),
              "scales": scales}
    for name, a in arrays.items():
        arrays[name] = aligned(a.shape, a.dtype)
        arrays[name][...] = a
    return Layout(kind, W.shape, values, arrays, why)


# Cycles of a slot of each kind, for one column of x and for each of several, and bytes a cycle from the cache behind
# L2: measured on an AMD EPYC (Zen 4). They decide speed only; where they are wrong, a slower layout is taken.
CYCLES = {"dense": (2.8, 1.1), "block16": (2.8, 1.1), "gather": (4.4, 2.8), "csr": (1.9, 1.9)}
L2, FAR_BYTES = 1 << 20, 24


def choose(mask: np.ndarray, region: np.ndarray | None = None, columns: int = 1) -> tuple[str, str]:
    """(the layout that should be quickest on this CPU, why): a product's cycles by slots, or by bytes if those weigh
    more. A CPU without AVX-512 has no "gather"."""
    slots = {"csr": int(mask.sum()), "block16": _filled(mask), "dense": _filled(np.ones_like(mask) if region is None
                                                                                else region)}
    if cpu_features():
        slots["gather"] = int(pack_windows(np.zeros(mask.shape, np.float32), mask)[0][-1])
    size = {"csr": 8, "gather": 5 * LANES + 4, "block16": 4 * LANES + 4, "dense": 4 * LANES + 4}
    cycles = {}
    for kind, n in slots.items():
        far = n * size[kind] / FAR_BYTES if n * size[kind] > L2 else 0
        cycles[kind] = max(n * CYCLES[kind][0], far) if columns == 1 else n * CYCLES[kind][1]
    order = sorted(cycles, key=lambda kind: (cycles[kind], KINDS.index(kind)))
    told = ", ".join(f"{kind} {cycles[kind] / 1000:.1f}" for kind in order)
    weights = mask.size if region is None else int(region.sum())
    return order[0], f"{mask.sum() / max(weights, 1):.1%} of {weights:,} live; {told} kilocycles"


def _filled(mask: np.ndarray) -> int:
    """Columns of blocks of 16 rows that hold anything."""
    blocks = -(-mask.shape[0] // LANES)
    whole = np.zeros((blocks * LANES, mask.shape[1]), bool)
    whole[:mask.shape[0]] = mask
    return int(whole.reshape(blocks, LANES, -1).any(1).sum())


def _narrowed(kept: np.ndarray, values: str) -> np.ndarray:
    if values == "int8":
        return kept.astype(np.int8)
    if values == "bf16":                                           # round to nearest, ties to even
        bits = kept.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return kept


def _rounded(kept: np.ndarray, values: str) -> np.ndarray:
    return _widened(_narrowed(np.ascontiguousarray(kept), values), values)


def _widened(kept: np.ndarray, values: str) -> np.ndarray:
    if values == "bf16":
        return (kept.astype(np.uint32) << 16).view(np.float32)
    return kept.astype(np.float32)
