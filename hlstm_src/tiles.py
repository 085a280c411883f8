"""Products in bfloat16 on the tile units of newer Intel CPUs (AMX), and all steps of an H-LSTM around them.

A step multiplies a few rows by some hundred thousand weights and does little else, twice. Called from Python, either
product takes longer to begin than to do. Here the steps of a whole stretch are one compiled call: products by the
processor's own instructions, which numba hands on, and between them the element-wise work of gates.py.

`scan` uses this where `available` says so and the sizes fit; it says the same as the product of a matrix library, but
sums in float32 to the end. Sizes: B batch, R rows (B times directions), H hidden, N units of all hidden layers,
M = 4H times directions; gates in PyTorch's order i, f, g, o.
"""

import ctypes
import functools
import platform

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, uint16

from . import gates
from .gates import OPTIONS

ROWS = 16                              # of a tile; it is 64 bytes wide: 16 numbers in float32, 32 in bfloat16
BYTE, LONG = ir.IntType(8), ir.IntType(64)
CONFIG = np.zeros(64, np.uint8)        # what the processor wants to know: palette 1, eight tiles of 16 rows, 64 bytes
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, ROWS


@functools.cache
def available() -> bool:
    """Whether this processor has tiles for bfloat16, and the system lets this process use them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    if not all(llvmlite.binding.get_host_cpu_features().get(name) for name in ("amx-tile", "amx-bf16", "avx512f")):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18               # Linux gives a process the tiles when it asks
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def fits(weights: tuple[Tensor, ...], groups: tuple[int, ...]) -> bool:
    """Whether matrices (rows, K), each in so many blocks of rows, and their transposes can be cut into tiles."""
    return all(w.shape[1] % 32 == 0 and w.shape[0] % (32 * n) == 0 for w, n in zip(weights, groups))


def pack(weight: Tensor) -> np.ndarray:
    """A bfloat16 matrix (rows, K) as tiles (rows/16, K/32, 16, 16, 2): pairs of neighbours in K beside each other."""
    return _cut(weight.contiguous().view(uint16).numpy())


def pack_back(weight: Tensor, groups: int) -> np.ndarray:
    """The way back of `pack`: each of the blocks of rows transposed, (groups * K/16, rows/groups/32, 16, 16, 2)."""
    return _cut_back(weight.contiguous().view(uint16).numpy(), groups)


@njit(**OPTIONS)
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


@njit(**OPTIONS)
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


# Products -------------------------------------------------------------------------------------------------------------

@njit(**OPTIONS)
def product(x, packed, groups, out):
    """out (P, rows) = x (P, groups*K), block by block times the transpose of the packed matrix's blocks; P is a
    multiple of 16. x is bfloat16 as uint16, out float32. Only between `configure` and `release`."""
    P, columns, depth = x.shape[0], packed.shape[0] // groups, packed.shape[1]           # in tiles
    wide, far = 2 * x.shape[1], 4 * out.shape[1]                   # bytes from row to row
    for p in range(0, P, 2 * ROWS):
        for g in range(groups):
            a = x.ctypes.data + p * wide + 64 * depth * g
            for n in range(g * columns, (g + 1) * columns, 2):
                b, to = packed.ctypes.data + 1024 * depth * n, out.ctypes.data + p * far + 64 * n
                zero(0)
                zero(1)
                if p + ROWS < P:                                   # two tiles of rows by two of columns
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


# Steps ----------------------------------------------------------------------------------------------------------------

@njit(**OPTIONS)
def forward(first, projected, h, c, recur, behind, bias, stacks, activation, hidden, all_gates, cs, hs):
    """The steps from `first` on for which there is something projected: (steps, B, N), as uint16.

    h, c (R, H): before the very first step. recur, behind: packed matrices of h and of the layer behind the hidden one.
    bias (M) of the gates, or empty. Fills in hidden (T, B, N) as uint16, gates (T, R, 4, H), cs and hs (T, R, H).
    """
    (steps, B, N), (R, H) = projected.shape, h.shape
    P, D = -(-B // ROWS) * ROWS, R // B
    low, a = np.zeros((P, D * H), np.uint16), np.zeros((P, N), np.uint16)
    sums, z = np.empty((P, N), np.float32), np.empty((P, 4 * D * H), np.float32)
    rows, z_rows = low.reshape(P * D, H), z.reshape(P * D, 4, H)
    configure(CONFIG.ctypes.data)
    for t in range(first, first + steps):
        gates.rounded(h if t == 0 else hs[t - 1], rows)
        product(low, recur, D, sums)
        gates.hidden(sums, projected[t - first], a[:B], activation)
        hidden[t] = a[:B]
        product(a, behind, stacks, z)
        if len(bias):
            for b in range(B):
                for k in range(len(bias)):
                    z[b, k] += bias[k]
        gates.forward(z_rows[:R], t, c, all_gates, cs, hs)
    release()


@njit(**OPTIONS)
def backward(first, dhs, dcs, dh, dc, c, recur, behind, stacks, activation, hidden, all_gates, cs, dhidden, dgates):
    """The way back of `forward`, through as many steps as dhidden (steps, B, N) and dgates (steps, B, M) have room for,
    both as uint16. dhs, dcs: (T, R, H) or empty. dh, dc (R, H): running; in the end those before the step `first`.
    recur, behind: packed by `pack_back`."""
    (steps, B, N), (R, H) = dhidden.shape, dh.shape
    P, D = -(-B // ROWS) * ROWS, R // B
    d, e = np.zeros((P, 4 * D * H), np.uint16), np.zeros((P, N), np.uint16)
    da, before = np.empty((P, N), np.float32), np.empty((P, D * H), np.float32)
    d_rows, before_rows = d.reshape(P * D, 4, H), before.reshape(P * D, H)
    configure(CONFIG.ctypes.data)
    for t in range(first + steps - 1, first - 1, -1):
        if len(dhs):
            dh += dhs[t]
        if len(dcs):
            dc += dcs[t]
        gates.backward(dh, dc, t, c, all_gates, cs, d_rows[:R])
        product(d, behind, stacks, da)
        gates.hidden_backward(da, hidden[t], e[:B], activation)
        product(e, recur, D, before)
        dh[:] = before_rows[:R]
        dgates[t - first], dhidden[t - first] = d[:B], e[:B]
    release()
