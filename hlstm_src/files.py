"""Files that are written whole or not at all."""

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:                                                # Windows has no such locks
    fcntl = None


@contextmanager
def of_file(path: str | Path) -> Iterator[None]:
    """Lets an OSError of the block say which file it was: a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file to write to, beside `path`, whose folder is made; it takes the place of `path` when the block ends.

    So no reader sees a half, and after an error, or Ctrl-C, what was there before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with of_file(path):
            part.touch()
            mode = part.stat().st_mode
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(part, mode)                                   # safetensors would let nobody else read
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def possible(path: Path | None) -> Path | None:
    """The path again, None for none, once it is known that a file can be written there. Whoever measures for an hour
    asks first. Makes its folder; raises OSError."""
    if path is not None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part").close()  # as long a name
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps a block to one process at a time for each `path`, whose folder is made.

    Raises BlockingIOError at once where another is inside. The lock dies with its holder, however that ends; its file,
    hidden beside `path`, may then stay. On a system without such locks nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "a") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                raise BlockingIOError(errno.EAGAIN, "whoever was inside is just leaving", str(path))
        try:
            yield
        finally:
            if fcntl:
                lock.unlink(missing_ok=True)


def missing(path: str | Path) -> str:
    """What to say of a path at which there is no file: nothing is there, or a folder."""
    return f"{path}: a folder; name a file" if Path(path).is_dir() else f"{path}: no such file"
