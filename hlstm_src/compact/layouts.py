"""Where a sparse matrix's weights lie in memory, so that a CPU can multiply by them quickly.

The first three treat 16 rows at a time, as many float32 values as an AVX-512 register holds; lane r of a slot belongs
to row r of the block. A block's slots stand one behind the other and are read once, from front to back.

    dense     a slot for each column: 16 weights, to be multiplied by one x
    block16   the same, but only columns in which one of the 16 rows has a live connection
    gather    a slot holds at most one live connection of each row, all within a window of 32 columns; the window of
              x lies in two registers, and one instruction (vpermi2ps) fetches each row's x from it
    sliced    rows in the order of their numbers of live connections, eight at a time: a slot holds the next one of
              each, wherever it stands (Kreutzer et al., 2014), and eight values of x are fetched one by one; with
              many columns of x side by side, each weight is multiplied by 16 of them at once. For any CPU
    csr       the textbook's: for each row its live columns and their weights; for any CPU, and quick on none

The windows of "gather" start wherever the earliest connection still waiting stands, which fills the lanes better than
windows at fixed places: with random masks of 95 % sparsity 56 % of them against 40 %.
"""

from dataclasses import dataclass

import numpy as np

from ..compiled import compiled
from .kernels import CSR, GATHER, LANES, SLICE, SLICED, SLOTS, VALUES, aligned, cpu_features

WINDOW = 32
KINDS = ("dense", "block16", "gather", "sliced", "csr")


@dataclass(frozen=True)
class Layout:
    """A packed matrix of `shape` (R, C). `arrays`: starts, places (a column or the start of a window), indices (of
    "gather": where in its window; of "sliced": the row of each lane), values, scales (a factor a row, of int8).
    `packed` is what the kernels take."""
    kind: str
    shape: tuple[int, int]
    values: str
    arrays: dict[str, np.ndarray]
    why: str = "as asked"

    @property
    def packed(self) -> tuple:
        code = {"csr": CSR, "sliced": SLICED, "gather": GATHER}.get(self.kind, SLOTS)
        a = self.arrays
        return (np.int64(code), np.int64(VALUES[self.values]), np.int64(self.shape[0]), a["starts"], a["places"],
                a["indices"], a["values"].view(np.uint8).reshape(-1), a["scales"])

    @property
    def slots(self) -> int:
        """Vector operations of one product; of "sliced", eights of weights; of "csr", weights."""
        return int(self.arrays["starts"][-1])

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads, x and y apart."""
        return sum(a.nbytes for a in self.arrays.values())


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
    if kind in ("csr", "sliced"):                                  # in float32 always, rounded or not
        W, values, scales = _rounded(W, values) * scales[:rows, None], "fp32", np.ones_like(scales)
    if kind == "csr":
        starts = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.uint32)
        places, indices, kept = np.nonzero(mask)[1].astype(np.uint32), empty, W[mask]
    elif kind == "sliced":
        starts, places, order, kept = _pack_slices(W, mask)
        indices = order.view(np.uint8)
    elif kind == "gather":
        starts, places, indices, kept = _pack_windows(W, mask)
    else:
        starts, places, kept = _pack_slots(W, region if kind == "dense" else mask)
        indices = empty
    arrays = {"starts": starts, "places": places, "indices": indices.reshape(-1), "values": _narrowed(kept, values),
              "scales": scales}
    for name, a in arrays.items():
        arrays[name] = aligned(a.shape, a.dtype)
        arrays[name][...] = a
    return Layout(kind, W.shape, values, arrays, why)


@compiled
def _pack_slots(W, mask):
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
def _pack_windows(W, mask):
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


def _pack_slices(W, mask):
    """W, mask (R, C) -> (starts, places, order, values (slots, 8)) of the layout "sliced": row order[8 s + r] is lane r
    of slice s. Lanes of the last slice that no row is left for hold zeros for some other."""
    order, longest = _by_length(mask)
    W, mask = W[order], mask[order]
    rows, columns = np.nonzero(mask)
    counts, starts = mask.sum(1), np.concatenate([[0], longest.cumsum()]).astype(np.uint32)
    slots = starts[rows // SLICE] + np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    places, values = np.zeros((starts[-1], SLICE), np.uint32), np.zeros((starts[-1], SLICE), W.dtype)
    places[slots, rows % SLICE], values[slots, rows % SLICE] = columns, W[rows, columns]
    return starts, places.reshape(-1), np.resize(order, len(longest) * SLICE).astype(np.uint32), values


def _by_length(mask):
    """(rows by their live connections, fewest first; those of the fullest of each eight of them)."""
    counts = mask.sum(1)
    order = np.argsort(counts, kind="stable")
    return order, np.pad(counts[order], (0, -len(order) % SLICE)).reshape(-1, SLICE).max(1)


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


# Cycles of a slot of each kind, for one column of x and for each of many, with AVX-512 and without, and bytes a cycle
# from the cache behind L2. Measured on AMD EPYC processors, Zen 4 and Zen 3 (where without AVX-512, as "sliced" is).
# They decide speed only; where they are wrong, a slower layout is taken.
CYCLES = {True: {"dense": (2.8, 1.1), "block16": (2.8, 1.1), "gather": (4.4, 2.8), "sliced": (8, 2)},
          False: {"dense": (4, 1.15), "block16": (4, 1.15), "sliced": (8, 2)}}
L2, FAR_BYTES = 1 << 20, 24


def choose(mask: np.ndarray, region: np.ndarray | None = None, columns: int = 1) -> tuple[str, str]:
    """(the layout that should be quickest on this CPU, why): a product's cycles by slots, or by bytes if those weigh
    more. A CPU without AVX-512 has no "gather"."""
    costs, everywhere = CYCLES[cpu_features()], np.ones_like(mask) if region is None else region
    slots = {"sliced": int(_by_length(mask)[1].sum()), "block16": _filled(mask), "dense": _filled(everywhere)}
    if "gather" in costs:
        slots["gather"] = int(_pack_windows(np.zeros(mask.shape, np.float32), mask)[0][-1])
    size = {"sliced": 8 * SLICE, "gather": 5 * LANES + 4, "block16": 4 * LANES + 4, "dense": 4 * LANES + 4}
    cycles = {}
    for kind, n in slots.items():
        far = n * size[kind] / FAR_BYTES if n * size[kind] > L2 else 0
        cycles[kind] = max(n * costs[kind][0], far) if columns == 1 else n * costs[kind][1]
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
    """As `_narrowed` would hold them, in float32 again."""
    narrow = _narrowed(np.ascontiguousarray(kept), values)
    return (narrow.astype(np.uint32) << 16).view(np.float32) if values == "bf16" else narrow.astype(np.float32)
