"""Files that are written whole: beside their place, under a name that nobody else has."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from hlstm_src import files
from hlstm_src.errors import told
from hlstm_src.files import alone, possible, replacing


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a" / "b.json"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
        for part in (first, second):                               # one file system, so that one takes another's place
            assert part.parent == path.parent and part.name.startswith(".") and part.suffix == ".part"
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]     # it ended last


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    for write in (True, False):
        with pytest.raises(ZeroDivisionError), replacing(path) as part:
            if write:
                part.write_text("half")
            raise ZeroDivisionError
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError) as full, replacing(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told(full.value) == f"{tmp_path / 'a'}: no space left on device; name another place"


def test_whoever_may_read_a_new_file_may_read_this_one(tmp_path):
    """Also if a writer is less generous, as safetensors is."""
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "a") as part:
        part.write_text("a")
        part.chmod(0o600)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_one_process_at_a_time_works_at_a_path_and_none_holds_it_when_dead(tmp_path, root):
    path = tmp_path / "new" / "a.json"
    code = f"""from pathlib import Path; from hlstm_src.files import alone
with alone(Path({str(path)!r})):
    print(1, flush=True)
    input()"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BlockingIOError), alone(path):
            pytest.fail("two were inside")
        with alone(path.with_name("b.json")):                      # another path is free
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with alone(path):
            with pytest.raises(BlockingIOError), alone(path):
                pytest.fail("two were inside")
    assert list(path.parent.iterdir()) == []


def test_who_gets_the_lock_of_one_that_is_just_leaving_is_not_inside(tmp_path, monkeypatch):
    """The other unlinks its file behind our opening it: a third would lock a new one."""
    path, lock = tmp_path / "a", files.fcntl.flock
    monkeypatch.setattr(files.fcntl, "flock", lambda *how: (path.with_name(".a.lock").unlink(), lock(*how)))
    with pytest.raises(BlockingIOError), alone(path):
        pytest.fail("inside")


def test_a_place_for_a_file_is_tried_beforehand(tmp_path):
    assert possible(None) is None
    path = tmp_path / "new" / "a.json"
    assert possible(path) == path and list(path.parent.iterdir()) == []        # its folder, and nothing in it
    path.write_text("before")
    assert possible(path) == path and path.read_text() == "before"
    too_long = tmp_path / ("a" * 250)                              # by what `replacing` puts before and behind it
    for wrong, error in ((tmp_path, IsADirectoryError), (path / "b.json", FileExistsError), (too_long, OSError)):
        with pytest.raises(error):
            possible(wrong)
