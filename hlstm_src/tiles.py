"""The tile units of newer Intel CPUs (AMX): a tile of 16 rows by 32 numbers of bfloat16, times another, in 16 cycles.

There are eight tiles of 1 KB, and a block of one tile of rows by two of columns takes five. Two by two would take all
eight and load less for each product. But on a rented processor that was four times slower for seconds or minutes on
end, as if no tile were left to be loaded while another is read; a neighbour on the same core, we suppose. Five tiles
were half as fast in these times, and nearly as fast as eight in others. numba hands the instructions on.
"""

import ctypes
import platform

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import compiled
from .vectors import BYTE, HAS

ROWS, TILE = 16, 1024                  # rows of a tile, and its bytes: a row has 64, as 16 float32 or 32 bfloat16
CONFIG = np.zeros(64, np.uint8)        # what the processor wants to know: palette 1, eight tiles of 16 rows, 64 bytes
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, ROWS


def _tiles() -> bool:
    """Whether there are tile units for bfloat16, and the system lets us use them."""
    if platform.system() != "Linux" or not (HAS("amx-tile") and HAS("amx-bf16")):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18               # Linux gives a process the tiles when it asks
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


TILES = _tiles()


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


@compiled
def block(x, wide, ahead, panel, depth, out, far, more):
    """x (16 rows, depth tiles) times a panel of two tiles' columns -> out, or with `more` added to what is there. Only
    between `configure` and `release`.

    x, panel, out: addresses. wide, far: bytes from row to row of x and of out; ahead: bytes from tile to tile of x. The
    tiles of the panel lie one behind the other, column by column.
    """
    beside = panel + TILE * depth
    if more:
        load(0, out, far)
        load(1, out + 64, far)
    else:
        zero(0)
        zero(1)
    for k in range(depth):
        load(2, x + ahead * k, wide)
        load(3, panel + TILE * k, 64)
        load(4, beside + TILE * k, 64)
        dot(0, 2, 3)
        dot(1, 2, 4)
    store(0, out, far)
    store(1, out + 64, far)
