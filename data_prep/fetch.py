"""Download an archive so that it can be resumed and trusted, and unpack it so that it can do no harm.

`download` keeps what has arrived in `<name>.part`, asks only for the rest after an interruption, goes on to
the next mirror when one fails, and gives the file its name only when its SHA-256 is one of the accepted ones. Where
none is known, it asks for the rest only of the version that it has begun, as the server names it.
`unpack` writes plain files and folders below one folder and refuses everything else an archive can hold.
"""

import errno
import gzip
import http.client
import lzma
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from tqdm import tqdm

from data_prep.corpus import DataError, sha256_of
from hlstm_src.files import alone, of_file

CHUNK = 1 << 16
DEEPEST = 50                           # folders that may lie in each other
SLACK = 1 << 20                        # bytes that may stand between two members of an archive
HEADERS = {"User-Agent": "hlstm-data-prep/1"}


class Progress:
    """A progress bar on a terminal; elsewhere one plain line at every quarter of the way."""

    def __init__(self, title: str, total: int | None, unit: str = "files", done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.plain = not sys.stderr.isatty()
        look = {"unit": unit, "unit_scale": unit == "bytes", "disable": self.plain}
        self.bar = tqdm(desc=title, total=total, initial=done, **look)

    def update(self, count: int = 1) -> None:
        """Report that `count` more units are done."""
        before, self.done = self.done, self.done + count
        self.bar.update(count)
        if self.plain and self.total and before * 4 // self.total < self.done * 4 // self.total:
            print(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class _Broken(Exception):
    """A transfer that stopped early; what arrived is kept and another try may go on from there."""


class _Refused(_Broken):
    """A transfer that another try would not mend."""


def _version(reply) -> str:
    """What a server calls the version of a file that it sends, as `If-Range` may ask for it, or nothing."""
    tag = reply.headers.get("ETag", "")
    return tag if tag.startswith('"') else reply.headers.get("Last-Modified", "")


def _transfer(url: str, part: Path, known: bool, timeout: float, max_bytes: int) -> bool:
    """Bring `part` to its full length from `url`; True if bytes of an earlier transfer are in it.

    known: a digest will tell whether the file is right. Else only the rest of the same version is asked for.
    """
    note = part.with_name(part.name + ".version")
    begun = note.read_text() if note.exists() else ""
    start = part.stat().st_size if part.exists() and (known or begun) else 0
    headers = HEADERS | ({"Range": f"bytes={start}-"} if start else {})
    headers |= {"If-Range": begun} if start and not known else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
            if reply.status != 206:  # a server that ignores Range sends the whole file from its first byte
                start = 0
            elif not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                raise _Broken("the server sent another part of the file than was asked for")
            length = reply.headers.get("Content-Length")
            total = start + int(length) if length is not None else None
            if total is not None and total > max_bytes:
                raise _Refused(f"{total:,} bytes, more than the {max_bytes:,} expected at most")
            mode = "ab" if start else "wb"
            if not start:
                note.unlink(missing_ok=True)
                if version := _version(reply):
                    note.write_text(version)
            with open(part, mode) as file, Progress("download", total, "bytes", start) as bar:
                while block := reply.read(CHUNK):
                    file.write(block)
                    bar.update(len(block))
                    if bar.done > max_bytes:
                        part.unlink()
                        raise _Refused(f"more than the {max_bytes:,} bytes expected at most")
            if total is not None and bar.done != total:
                raise _Broken(f"the transfer stopped after {bar.done:,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is left to ask for: the file may be complete
            return True
        kind = _Refused if 400 <= error.code < 500 else _Broken
        raise kind(f"HTTP status {error.code} {error.reason}") from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise _Broken(str(getattr(error, "reason", "") or error) or type(error).__name__) from None
    return start > 0


def _fetch_one(url: str, part: Path, accepted: Collection[str], tries: int, pause: float, **limits) -> str:
    """Download one address into `part`, in up to `tries` goes; returns the SHA-256 of the complete file."""
    for attempt in range(1, tries + 1):
        try:
            resumed = _transfer(url, part, bool(accepted), **limits)
            digest = sha256_of(part)
            if accepted and digest not in accepted and resumed:
                # The earlier bytes may come from another mirror or another version: once more, from nothing.
                part.unlink()
                _transfer(url, part, True, **limits)
                digest = sha256_of(part)
            return digest
        except _Broken as error:
            if isinstance(error, _Refused) or attempt == tries:
                raise
            time.sleep(pause * 2 ** (attempt - 1))
    raise ValueError("tries must be at least 1")


def download(
    urls: Sequence[str],
    target: str | os.PathLike,
    accepted: Collection[str],
    *,
    tries: int = 3,
    pause: float = 1.0,
    timeout: float = 30.0,
    max_bytes: int = 1 << 30,
    by_hand: str | None = "--archive",
) -> str:
    """Download `target` from the first address that delivers an accepted file.

    Args:
        urls: the addresses, best first; the others are mirrors.
        target: the file to make; left alone if it is there with an accepted digest.
        accepted: SHA-256 digests, hexadecimal, any of which will do.
        tries, pause: attempts at each address and the seconds between the first two, doubled each time.
        timeout: seconds a server may stay silent.
        max_bytes: the longest file that will be taken.
        by_hand: the option, if there is one, that takes a file at hand; messages name it.

    Returns:
        The SHA-256 of the file.

    Raises:
        DataError: no address delivered, or what came has a digest that is not accepted. Such a file is kept
            beside the target as `<name>.unlisted`, so that one who trusts it need not download it again.
    """
    target = Path(target)
    try:
        with alone(target):
            return _download(urls, target, accepted, by_hand, tries=tries, pause=pause, timeout=timeout,
                             max_bytes=max_bytes)
    except BlockingIOError:
        raise DataError(f"{target}: another process is downloading it; wait for it, or stop it") from None


def _download(urls: Sequence[str], target: Path, accepted: Collection[str], by_hand: str | None, **limits) -> str:
    """`download`, by one process at a time."""
    note = Path(f"{target}.part.version")
    part, unlisted = (target.with_name(target.name + end) for end in (".part", ".unlisted"))
    for file in (target, part, unlisted):
        if file.is_file() and (digest := sha256_of(file)) in accepted:
            os.replace(file, target)
            note.unlink(missing_ok=True)
            return digest
    said, found = [], None
    if not accepted and unlisted.is_file():
        urls, found = (), ("an earlier run", sha256_of(unlisted))
    for url in urls:
        try:
            digest = _fetch_one(url, part, accepted, **limits)
        except _Broken as error:
            said.append(f"{url} ({error})")
            continue
        note.unlink(missing_ok=True)
        if digest in accepted:
            os.replace(part, target)
            unlisted.unlink(missing_ok=True)
            return digest
        os.replace(part, unlisted)
        found = url, digest
    if found:
        url, digest = found
        raise DataError(
            f"{unlisted}: {url} brought a file with the SHA-256 {digest}, which is not a known one; "
            f"remove it or, if you trust it, pass --sha256 {digest}"
            + (f" or {by_hand} {unlisted}" if by_hand else "")
        )
    raise DataError(
        f"{target}: could not be downloaded from {', '.join(said)}; run the command again to go on where it "
        f"stopped, or fetch the archive by other means and "
        + (f"pass {by_hand} PATH" if by_hand else "put it there")
    )


def _bad_path(name: str) -> str | None:
    """Why a member of this name must not be unpacked, or None."""
    name = name.replace("\\", "/")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return "has an absolute path"
    parts = PurePosixPath(name).parts
    if ".." in parts or "\0" in name:
        return "has a path that leads out of the folder"
    if len(parts) > DEEPEST:
        return f"lies more than {DEEPEST} folders deep"
    return None


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member of an archive must not be unpacked, or None."""
    if problem := _bad_path(member.name):
        return problem
    if member.issym() or member.islnk():
        return "is a link"
    if not (member.isfile() or member.isdir()):
        return "is neither a file nor a folder"
    if member.isfile() and not PurePosixPath(member.name).parts:
        return "is a file without a name"
    return None


class _Member(tarfile.TarInfo):
    """A member with a whole header: tarfile takes a bad one, or the end of the file, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:                             # zeros: the end, as it should be
            raise
        except tarfile.HeaderError as error:
            raise ValueError(str(error) or "it ends without an end") from None
        if member.size < 0:
            raise ValueError(f"a member of {member.size} bytes")
        return member


class _Bounded:
    """A stream that gives at most `left` bytes: what stands before a member, tarfile reads whole, however long."""

    def __init__(self, stream, archive: Path, remedy: str) -> None:
        self.stream, self.archive, self.remedy, self.left = stream, archive, remedy, SLACK

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise DataError(f"{self.archive}: a member has a header of more than {SLACK:,} bytes; {self.remedy}")
        return block


def unpack(
    archive: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    max_bytes: int = 1 << 30,
    max_members: int = 100_000,
) -> None:
    """Unpack a `.tar.gz` into `folder`: plain files and folders, nothing outside it, no more than the limits.

    The archive is read to its last byte, so that its checksum is checked as well.

    Raises:
        DataError: the archive is missing, truncated, damaged or too large, or holds an absolute path, a path
            with `..`, a link, a device or the same file twice.
    """
    archive, folder = Path(archive), Path(folder)
    remedy = "fetch the archive again, from a source you trust"
    size = 0
    try:
        with gzip.open(archive) as stream:
            bounded = _Bounded(stream, archive, remedy)
            with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_Member) as tar:
                for count, member in enumerate(tar, start=1):
                    size += member.size
                    bounded.left = member.size + SLACK
                    problem = _refusal(member)
                    if size > max_bytes or count > max_members:
                        problem = f"goes past the limit of {max_bytes:,} bytes or {max_members:,} members"
                    if problem:
                        raise DataError(f"{archive}: member {member.name!r} {problem}; {remedy}")
                    _write_member(tar, member, folder / member.name)
            while block := stream.read(CHUNK):
                size += len(block)
                if size > max_bytes:
                    raise DataError(f"{archive}: goes past the limit of {max_bytes:,} bytes; {remedy}")
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file; give the path of the archive with --archive") from None
    except FileExistsError as error:
        raise DataError(f"{archive}: member {error} is there twice; {remedy}") from None
    except (EOFError, ValueError, RecursionError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive}: truncated or damaged ({error}); {remedy}") from None


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one plain file or folder.

    Raises:
        FileExistsError: a file of that name is there; its text is the name of the member.
    """
    try:
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with of_file(path), open(path, "xb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(repr(member.name)) from None
    except OSError as error:
        _blame_name(error, member.name)
        raise


def _blame_name(error: OSError, name: str) -> None:
    """Raise ValueError where no file can be called so: that is the archive's fault, not the disk's."""
    if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
        raise ValueError(f"member {name!r}: {error.strerror.lower()}") from None


def unpack_zip(
    archive: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    max_bytes: int = 1 << 35,
    max_members: int = 500_000,
) -> None:
    """Unpack a `.zip` into `folder`, as `unpack` does a `.tar.gz`, except that it can go on where it was stopped.

    A file that is there in its full length is left alone: it was written under another name, and its CRC checked,
    before it got this one.

    Raises:
        DataError: the archive is missing, damaged or too large, or holds a path out of the folder, a link, an
            encrypted member or the same file twice.
    """
    archive, folder = Path(archive), Path(folder)
    remedy = "fetch the archive again, from a source you trust"
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            names = set()
            for member in members:
                problem, parts = _bad_path(member.filename), PurePosixPath(member.filename).parts
                if not parts:
                    problem = "is a file without a name"
                if stat.S_ISLNK(member.external_attr >> 16):
                    problem = "is a link"
                if member.flag_bits & 1:
                    problem = "is encrypted"
                if parts in names:
                    problem = "is there twice"
                if problem:
                    raise DataError(f"{archive}: member {member.filename!r} {problem}; {remedy}")
                names.add(parts)
            if sum(member.file_size for member in members) > max_bytes or len(members) > max_members:
                limits = f"the limit of {max_bytes:,} bytes or {max_members:,} members"
                raise DataError(f"{archive}: goes past {limits}; {remedy}")
            with Progress(f"unpack {archive.name}", len(members)) as bar:
                for member in members:
                    path = folder / member.filename
                    if not (path.is_file() and path.stat().st_size == member.file_size):
                        _unpack_member(file, member, path)
                    bar.update()
    except FileNotFoundError:
        raise DataError(f"{archive}: no such file; run the command again to download it") from None
    except OSError as error:
        if error.errno != errno.EINVAL:                            # a place in the file that cannot be
            raise
        raise DataError(f"{archive}: truncated or damaged ({error}); {remedy}") from None
    except (EOFError, IndexError, NotImplementedError, ValueError, RecursionError, lzma.LZMAError, zipfile.BadZipFile,
            zlib.error) as error:
        raise DataError(f"{archive}: truncated or damaged ({error}); {remedy}") from None


def _unpack_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one file, first under a hidden name. Raises ValueError where its name, or a folder's, cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.unpacked")
        with of_file(path), file.open(member) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(part, path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"member {member.filename!r}: a file and a folder of one name") from None
    except OSError as error:
        _blame_name(error, member.filename)
        raise
