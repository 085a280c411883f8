"""Threads that work at one compiled function together and wait for each other many times in a millisecond.

Each runs the function with a `part` of its own, of `parts`; `meet` lets nobody on until all have come. A thread that
waits spins, since waking it would take longer than the work between two meetings, and gives way to others only if it
has to wait for long.

The threads are those of PyTorch's own OpenMP library, libgomp: between two of PyTorch's operations they spin as well,
and threads of ours would fight with them for the same processors.
"""

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiled import compiled

MOST = 8                               # threads; the speed of more than two is unmeasured
LONG, PATIENCE = ir.IntType(64), 1000  # turns of spinning, some ten microseconds, before others may run
FREE = 2 ** 62                         # meetings to which nobody has to wait
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
give_way = types.ExternalFunction("sched_yield", types.int32())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The libgomp that PyTorch has loaded, or None: nothing is loaded here. None, too, where `_pause` is unknown."""
    if platform.machine() != "x86_64":
        return None
    for name in (*map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*")), "libgomp.so.1"):
        try:
            return ctypes.CDLL(name, os.RTLD_NOLOAD)
        except (AttributeError, OSError):                          # a system without such libraries; not loaded
            continue


def size() -> int:
    """How many threads can work together: as many as PyTorch uses, up to `MOST`; one, where there is no libgomp."""
    return min(torch.get_num_threads(), MOST) if library() else 1


def together(*works: Callable[[np.ndarray, int, int], None]) -> None:
    """Calls work(counter, part, parts) in up to `size()` threads, this one among them, and returns when all have; one
    work after the other, but no thread waits between them for others.

    Raises what a part raised; the others then no longer wait for each other.
    """
    counters, failed, wanted = np.zeros((len(works), 1), np.int64), [], size()

    def run(part: int, parts: int) -> None:
        try:
            for work, counter in zip(works, counters):
                work(counter, part, parts)
        except BaseException as error:
            failed.append(error)
            counters[:] = FREE

    @WORK
    def share(_):                                                  # of threads there may be fewer than wanted
        run(library().omp_get_thread_num(), library().omp_get_num_threads())
    if wanted == 1:
        run(0, 1)
    else:
        library().GOMP_parallel(share, None, wanted, 0)
    if failed:
        raise failed[0]


@intrinsic
def _arrive(typing, address):
    """Adds one to the int64 there, for all threads to see, with whatever was written before."""
    def emit(context, b, signature, args):
        b.atomic_rmw("add", b.inttoptr(args[0], LONG.as_pointer()), ir.Constant(LONG, 1), "seq_cst")
        return context.get_dummy_value()
    return types.void(types.uintp), emit


@intrinsic
def _arrived(typing, address):
    """The int64 there, and whatever was written before it."""
    def emit(context, b, signature, args):
        return b.load_atomic(b.inttoptr(args[0], LONG.as_pointer()), "seq_cst", 8)
    return types.int64(types.uintp), emit


@intrinsic
def _pause(typing):
    def emit(context, b, signature, args):
        b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()
    return types.void(), emit


@compiled
def meet(counter, parts, met):
    """Waits until all parts are here; met: the meetings before. counter: that of `together`. Returns the meetings up to
    now."""
    met += 1
    if parts > 1:
        place, turns = counter.ctypes.data, 0
        _arrive(place)
        while _arrived(place) < met * parts:
            _pause()
            turns += 1
            if turns > PATIENCE:
                give_way()
    return met
