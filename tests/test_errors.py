"""Errors of the operating system as users read them."""

import errno

import pytest

from hlstm_src.errors import UserError, told


@pytest.mark.parametrize("error, text", [
    (UserError("a.json, line 3: no number"), "a.json, line 3: no number"),
    (FileNotFoundError("b: no such file"), "b: no such file"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "data"), "data: a folder; name a file"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "data/.x.part", None, "data/x"),
     "data/x: a folder; name a file"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.wav/x"),
     "a.wav/x: a file stands where a folder is needed; name another place"),
    (PermissionError(errno.EACCES, "Permission denied", "out/.x.12ab.part"),
     "out: permission denied; change its permissions, or name another place"),
    (OSError(errno.EROFS, "Read-only file system", "out/x"), "out/x: read-only file system; name another place"),
    (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
])
def test_what_the_system_says_names_the_file_and_a_remedy(error, text):
    assert told(error) == text
