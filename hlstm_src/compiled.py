"""How everything here is compiled: by numba, kept on disk, without the GIL."""

import contextlib
from pathlib import Path

from numba import njit

FILES = tuple(Path(__file__).parent / f"{name}.py" for name in (
    "compiled", "gates", "products", "team", "steps", "compact/kernels", "compact/cells", "compact/captioner"))
STAMP = tuple(file.stat().st_mtime_ns for file in FILES)


def compiled(function=None, **options):
    """A decorator, with or without options of `numba.njit`.

    numba keeps compiled code until the function's own file changes; but that code holds what it calls, from other
    files. Ours is kept until any of these `FILES` changes.
    """
    if function is None:
        return lambda f: compiled(f, **options)
    made = njit(cache=True, nogil=True, error_model="numpy", boundscheck=False, **options)(function)
    with contextlib.suppress(AttributeError):                      # numba's private name; without it, as numba does
        made._cache._cache_file._source_stamp = STAMP
    return made
