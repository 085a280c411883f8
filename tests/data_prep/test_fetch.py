"""Downloads from a server of our own on 127.0.0.1, and archives that try to do harm."""

import errno
import gzip
import hashlib
import io
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep.corpus import DataError
from data_prep.fetch import Progress, download, unpack
from hlstm_src.errors import told
from hlstm_src.files import alone

BODY = bytes(range(256)) * 1200  # several chunks of the reader
DIGEST = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cuts[path]` says after how many bytes each reply in turn hangs up."""

    def do_GET(self):
        name, server = self.path, self.server
        asked = self.headers.get("Range")
        server.seen.append((name, asked))
        if name not in server.files:
            return self.send_error(404)
        body, start = server.files[name], 0
        condition = self.headers.get("If-Range")
        stale = condition is not None and condition != server.versions.get(name, ("", ""))[1]
        if asked and name not in server.rangeless and not stale:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            told = server.misplaced.get(name, start)
            self.send_header("Content-Range", f"bytes {told}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if name in server.versions:
            self.send_header(*server.versions[name])
        if name not in server.lengthless:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cuts = server.cuts.get(name)
        end = start + cuts.pop(0) if cuts else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Ask 127.0.0.1 itself, whatever proxy the machine uses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.cuts, server.seen = {"/a.tar.gz": BODY}, {}, []
        server.rangeless, server.lengthless, server.misplaced, server.versions = set(), set(), {}, {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, target, names=("/a.tar.gz",), accepted=(DIGEST,), **options):
    return download([server.url + name for name in names], target, accepted, pause=0, **options)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_arrives_whole_under_its_name_alone(server, tmp_path):
    assert fetch(server, tmp_path / "new" / "a.tar.gz") == DIGEST
    assert (tmp_path / "new" / "a.tar.gz").read_bytes() == BODY
    assert names_in(tmp_path / "new") == ["a.tar.gz"]


def test_a_file_that_is_there_and_accepted_is_not_asked_for(server, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(BODY)
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST
    assert server.seen == []


def test_an_interrupted_download_asks_only_for_the_rest(server, tmp_path):
    server.cuts["/a.tar.gz"] = [100_000, 50_000]
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST
    assert (tmp_path / "a.tar.gz").read_bytes() == BODY
    assert [asked for _, asked in server.seen] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_where_the_first_one_stopped(server, tmp_path):
    server.cuts["/a.tar.gz"] = [100_000]
    with pytest.raises(DataError, match="stopped after 100,000 of 307,200 bytes.*run the command again"):
        fetch(server, tmp_path / "a.tar.gz", tries=1)
    assert names_in(tmp_path) == ["a.tar.gz.part"]
    assert fetch(server, tmp_path / "a.tar.gz", tries=1) == DIGEST
    assert server.seen[-1][1] == "bytes=100000-"


@pytest.mark.parametrize("version", [("ETag", '"one"'), ("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")])
def test_a_download_without_a_known_digest_goes_on_too(server, tmp_path, version):
    """A large archive is not fetched twice because nobody knows its digest yet."""
    server.cuts["/a.tar.gz"], server.versions["/a.tar.gz"] = [100_000], version
    for said in ("run the command again", f"--sha256 {DIGEST}", f"an earlier run brought .*--sha256 {DIGEST}"):
        with pytest.raises(DataError, match=said):
            fetch(server, tmp_path / "a.tar.gz", accepted=(), tries=1)
    assert [asked for _, asked in server.seen] == [None, "bytes=100000-"]
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST and len(server.seen) == 2
    assert names_in(tmp_path) == ["a.tar.gz"]


@pytest.mark.parametrize("before, after", [(("ETag", '"one"'), ("ETag", '"two"')), (("ETag", 'W/"one"'), None),
                                           (None, None)])
def test_without_a_known_digest_two_versions_are_never_put_together(server, tmp_path, before, after):
    """Else the user would be asked to trust bytes that no server ever had."""
    server.cuts["/a.tar.gz"], newer = [100_000], BODY[::-1]
    server.versions |= {"/a.tar.gz": before} if before else {}
    with pytest.raises(DataError, match="run the command again"):
        fetch(server, tmp_path / "a.tar.gz", accepted=(), tries=1)
    server.files["/a.tar.gz"] = newer
    server.versions |= {"/a.tar.gz": after} if after else {}
    with pytest.raises(DataError, match=f"--sha256 {hashlib.sha256(newer).hexdigest()}"):
        fetch(server, tmp_path / "a.tar.gz", accepted=(), tries=1)


def test_of_two_downloads_of_one_file_the_second_is_refused(server, tmp_path):
    with alone(tmp_path / "a.tar.gz"), pytest.raises(DataError, match="another process is downloading it"):
        fetch(server, tmp_path / "a.tar.gz")
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST


def test_a_server_that_ignores_range_is_read_from_the_first_byte(server, tmp_path):
    server.rangeless.add("/a.tar.gz")
    server.cuts["/a.tar.gz"] = [100_000]
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST
    assert (tmp_path / "a.tar.gz").read_bytes() == BODY


def test_a_server_that_sends_another_part_is_asked_for_the_whole(server, tmp_path):
    server.misplaced["/a.tar.gz"] = 7
    (tmp_path / "a.tar.gz.part").write_bytes(BODY[:1000])
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST
    assert [asked for _, asked in server.seen] == ["bytes=1000-", None]


def test_a_server_that_tells_no_length_is_believed_by_digest(server, tmp_path):
    server.lengthless.add("/a.tar.gz")
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST


@pytest.mark.parametrize("left", [BODY[:5000][::-1], BODY, BODY + b"more"])
def test_what_an_earlier_transfer_left_never_spoils_the_file(server, tmp_path, left):
    (tmp_path / "a.tar.gz.part").write_bytes(left)
    assert fetch(server, tmp_path / "a.tar.gz") == DIGEST
    assert (tmp_path / "a.tar.gz").read_bytes() == BODY
    assert names_in(tmp_path) == ["a.tar.gz"]


def test_an_unknown_digest_is_refused_and_can_then_be_trusted(server, tmp_path):
    with pytest.raises(DataError, match=f"--sha256 {DIGEST} or --archive .*a.tar.gz.unlisted"):
        fetch(server, tmp_path / "a.tar.gz", accepted=["0" * 64])
    assert names_in(tmp_path) == ["a.tar.gz.unlisted"]
    asked = len(server.seen)
    assert fetch(server, tmp_path / "a.tar.gz", accepted=["0" * 64, DIGEST]) == DIGEST
    assert names_in(tmp_path) == ["a.tar.gz"] and len(server.seen) == asked


def test_the_next_mirror_is_tried_when_one_is_gone_wrong_or_cut_short(server, tmp_path):
    server.files |= {"/wrong": b"<html>moved</html>", "/short": BODY[::-1]}
    server.cuts["/short"] = [10, 10]
    names = ["/gone", "/wrong", "/short", "/a.tar.gz"]
    assert fetch(server, tmp_path / "a.tar.gz", names, tries=2) == DIGEST
    assert (tmp_path / "a.tar.gz").read_bytes() == BODY
    assert names_in(tmp_path) == ["a.tar.gz"]
    assert [name for name, _ in server.seen].count("/gone") == 1  # a 404 is final
    assert [name for name, _ in server.seen].count("/short") == 2


def test_when_every_mirror_fails_the_message_names_each(server, tmp_path):
    with pytest.raises(DataError, match="/gone.*404.*/away.*404.*--archive PATH"):
        fetch(server, tmp_path / "a.tar.gz", ["/gone", "/away"])
    assert names_in(tmp_path) == []


def test_a_server_that_is_not_there_is_a_clear_error(server, tmp_path):
    with pytest.raises(DataError, match="could not be downloaded from http://127.0.0.1:9/a"):
        download(["http://127.0.0.1:9/a"], tmp_path / "a", [DIGEST], tries=2, pause=0)


@pytest.mark.parametrize("told", [True, False])
def test_a_file_longer_than_the_limit_is_not_kept(server, tmp_path, told):
    if not told:
        server.lengthless.add("/a.tar.gz")
    with pytest.raises(DataError, match="more than the 100,000"):
        fetch(server, tmp_path / "a.tar.gz", max_bytes=100_000)
    assert names_in(tmp_path) == [] and len(server.seen) == 1


def test_progress_off_a_terminal_is_four_plain_lines(capsys):
    with Progress("work", 10) as progress:
        for _ in range(10):
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[-1] == "work: 10 of 10 files"


def archive_of(path, *members):
    """A .tar.gz of (name, content) or (name, content, fields of TarInfo)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (fields[0] if fields else {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_unpack_writes_files_and_folders(tmp_path):
    folder = ("top", b"", {"type": tarfile.DIRTYPE})
    path = archive_of(tmp_path / "a.tar.gz", folder, ("top/sub/file", b"text"))
    unpack(path, tmp_path / "out")
    assert (tmp_path / "out/top/sub/file").read_bytes() == b"text"
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["top", "sub", "file"]


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("/evil", {}, "absolute path"),
        ("\\evil", {}, "absolute path"),
        ("C:/evil", {}, "absolute path"),
        ("../evil", {}, "leads out"),
        ("good/../../evil", {}, "leads out"),
        ("good\\..\\..\\evil", {}, "leads out"),
        ("evil", {"type": tarfile.SYMTYPE, "linkname": "/etc"}, "is a link"),
        ("evil", {"type": tarfile.LNKTYPE, "linkname": "good"}, "is a link"),
        ("evil", {"type": tarfile.CHRTYPE}, "neither a file nor a folder"),
        ("evil", {"type": tarfile.BLKTYPE}, "neither a file nor a folder"),
        ("evil", {"type": tarfile.FIFOTYPE}, "neither a file nor a folder"),
        ("good", {}, "is there twice"),
        ("good/below", {}, "is there twice"),
    ],
)
def test_unpack_refuses_what_could_do_harm(tmp_path, name, fields, why):
    path = archive_of(tmp_path / "a.tar.gz", ("good", b"good"), (name, b"", fields))
    with pytest.raises(DataError, match=f"a.tar.gz: member .*{why}") as caught:
        unpack(path, tmp_path / "deep/out")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar.gz", "deep", "good", "out"]
    assert (tmp_path / "deep/out/good").read_bytes() == b"good"


def test_unpack_stops_at_the_limits(tmp_path):
    path = archive_of(tmp_path / "a.tar.gz", ("one", bytes(600)), ("two", bytes(600)))
    unpack(path, tmp_path / "fits", max_bytes=20_000, max_members=2)
    with pytest.raises(DataError, match="'two' goes past the limit"):
        unpack(path, tmp_path / "bytes", max_bytes=1000)
    with pytest.raises(DataError, match="'two' goes past the limit"):
        unpack(path, tmp_path / "members", max_members=1)
    padded = tmp_path / "padded.tar.gz"
    padded.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(1 << 20)))
    with pytest.raises(DataError, match="padded.tar.gz: goes past the limit"):
        unpack(padded, tmp_path / "padded", max_bytes=100_000)


def test_what_stands_between_members_has_a_limit_and_a_form(tmp_path):
    """Long names and the like, which tarfile reads whole; and what it cannot read at all."""
    path, header = tmp_path / "a.tar.gz", tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 4 << 20
    path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + b"a" * header.size))
    with pytest.raises(DataError, match="a.tar.gz: a member has a header of more than 1,048,576 bytes"):
        unpack(path, tmp_path / "long")
    archive_of(path, ("large", bytes(5 << 20)), ("small", b"x"))   # as much between headers is none of theirs
    unpack(path, tmp_path / "fits")
    spoilt = tarfile.TarInfo("a")
    spoilt.pax_headers = {"GNU.sparse.map": "a,b"}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(spoilt)
    with pytest.raises(DataError, match="a.tar.gz: truncated or damaged"):
        unpack(path, tmp_path / "spoilt")


def test_a_truncated_or_damaged_archive_is_a_clear_error_wherever_it_ends(tmp_path):
    whole = archive_of(tmp_path / "a.tar.gz", ("one", BODY[:999]), ("two", DIGEST.encode())).read_bytes()
    broken = tmp_path / "broken.tar.gz"
    wrong_checksum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    not_a_tar = gzip.compress(b"neither fish nor flesh" * 100)
    truncated = [whole[:length] for length in range(0, len(whole), 7)]
    for number, content in enumerate([*truncated, wrong_checksum, not_a_tar]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match="broken.tar.gz: truncated or damaged .*fetch the archive again"):
            unpack(broken, tmp_path / str(number))


def test_an_archive_that_ends_early_or_has_a_bad_header_behind_a_good_one_is_damaged(tmp_path):
    """What tarfile takes for the end."""
    whole = bytearray(gzip.decompress(archive_of(tmp_path / "a.tar.gz", ("one", b"1"), ("two", b"2")).read_bytes()))
    spoilt, negative = whole.copy(), tarfile.TarInfo("two")
    spoilt[1024 + 148:1024 + 154] = b"000000"                           # the checksum of the second header
    negative.size = -256
    path = tmp_path / "broken.tar.gz"
    for content in (whole[:1024], whole[:2048], spoilt, whole[:1024] + negative.tobuf() + bytes(1024)):
        path.write_bytes(gzip.compress(bytes(content)))
        with pytest.raises(DataError, match="broken.tar.gz: truncated or damaged"):
            unpack(path, tmp_path / str(len(list(tmp_path.iterdir()))))


def test_long_and_deep_names_are_the_archives_fault(tmp_path):
    path, header = tmp_path / "a.tar.gz", tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes(gzip.compress((header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 400))
    with pytest.raises(DataError, match="a.tar.gz: truncated or damaged"):
        unpack(path, tmp_path / "chain")
    for name, why in (("a" * 300, "too long"), ("a/" * 60 + "b", "more than 50 folders deep"),
                      (".", "is a file without a name")):
        archive_of(path, (name, b"x"))
        with pytest.raises(DataError, match=f"a.tar.gz: .*{why}"):
            unpack(path, tmp_path / "named")
    assert not (tmp_path / "named").is_file()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError) as caught:
        unpack(archive_of(tmp_path / "a.tar.gz", ("one", b"1")), tmp_path / "out")
    assert told(caught.value) == f"{tmp_path}/out/one: no space left on device; name another place"


def test_an_archive_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="a.tar.gz: no such file"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
