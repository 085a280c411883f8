"""How everything here is compiled: by numba, kept on disk, without the GIL."""

import contextlib
from pathlib import Path

from numba import njit

FILES = tuple(Path(__file__).parent / f"{name}.py" for name in (
    "compiled", "gates", "vectors", "tiles", "products", "team", "large", "steps", "compact/kernels", "compact/layouts",
    "compact/cells", "compact/captioner", "compact/recogniser"))


def stamp(function) -> tuple[int, ...]:
    """When the function's own file and all of `FILES` changed last."""
    return tuple(file.stat().st_mtime_ns for file in (Path(function.__code__.co_filename), *FILES))


def compiled(function=None, **options):
    """A decorator, with or without options of `numba.njit`.

    numba keeps compiled code until the function's own file changes; but that code holds what it calls, from other
    files. Ours is kept until that file or any of `FILES` changes.
    """
    if function is None:
        return lambda f: compiled(f, **options)
    options |= {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:                                           # no folder to keep it in can be written to
        made = njit(**options)(function)
    with contextlib.suppress(AttributeError):                      # numba's private name; without it, as numba does
        made._cache._cache_file._source_stamp = stamp(function)
    return made
