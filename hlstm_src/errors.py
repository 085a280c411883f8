"""Errors that a user can mend: the command line shows their message, not a traceback."""

from pathlib import Path


class UserError(Exception):
    """The message names what is wrong, where, and what to do."""
    exit_code = 1


def told(error: Exception) -> str:
    """The message of an error; of one that the operating system raised, the file, what is wrong and the remedy.

    What is written under a hidden name first (see files.py) is told by its folder.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str | Path):
        return str(error)
    path = Path(error.filename2 or error.filename)
    path = path.parent if path.name.startswith(".") else path
    if isinstance(error, IsADirectoryError):
        return f"{path}: a folder; name a file"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{path}: a file stands where a folder is needed; name another place"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied; change its permissions, or name another place"
    return f"{path}: {(error.strerror or str(error)).lower()}; name another place"
