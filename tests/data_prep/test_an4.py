"""AN4 from small archives of the same layout, whole and spoilt; marked `real`, from the true one."""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from data_prep import an4
from data_prep.an4 import parse_transcript, prepare, read_sphere, validation_speakers
from data_prep.corpus import DataError, sha256_of, verify_corpus


@pytest.fixture
def archive(small_an4, tmp_path):
    return small_an4.pack(tmp_path / "an4.tar.gz", small_an4.files)


@pytest.fixture
def make(small_an4):
    """`prepare` for the small archive, without the warning of an unknown digest."""
    return partial(prepare, source=small_an4.source, say=lambda line: None)


def rows_of(out):
    with open(out / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_archive_becomes_a_corpus(make, archive, small_an4, tmp_path):
    out = tmp_path / "made" / "an4"
    info, built = make(out, archive)
    assert built and info == verify_corpus(out) and names_in(tmp_path / "made") == ["an4"]
    rows = rows_of(out)
    assert [info["splits"][split]["utterances"] for split in ("train", "valid", "test")] == [6, 6, 2]
    by_id = {row["id"]: row["transcript"] for row in rows}
    assert [by_id[f"an{n}-fann-b"] for n in range(3)] == ["YES", "GO", "ENTER SIX"]
    assert by_id["an0-feve-b"] == "O'HARA T W O"
    for row in rows:
        assert sha256_of(out / row["path"]) == row["sha256"] and float(row["seconds"]) == 0.5
    sound, rate = soundfile.read(out / "wav/fann/an1-fann-b.wav", dtype="int16")
    assert rate == 16_000
    assert sound.tobytes() == small_an4.files["an4/wav/an4_clstk/fann/an1-fann-b.sph"][1024:]
    assert (out / "LICENSE").read_bytes() == small_an4.files["an4/LICENSE"]
    assert info["archive_sha256"] == sha256_of(archive)
    assert "AN4 has no validation set" in info["note"]


def test_speakers_of_the_three_splits_are_disjoint_and_of_both_kinds(make, archive, tmp_path):
    make(tmp_path / "an4", archive)
    rows = rows_of(tmp_path / "an4")
    speakers = {split: set() for split in ("train", "valid", "test")}
    for row in rows:
        speakers[row["split"]].add(row["speaker"])
    assert speakers["test"] == {"feve", "mfox"}
    assert sorted(speakers["train"] | speakers["valid"]) == ["fann", "fbea", "mcal", "mdan"]
    assert not speakers["train"] & speakers["valid"]
    assert sorted(name[0] for name in speakers["valid"]) == ["f", "m"]


def test_the_same_archive_gives_the_same_bytes(make, archive, tmp_path):
    make(tmp_path / "one", archive)
    make(tmp_path / "two", archive)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", max_size=5)


@given(women=st.sets(names, min_size=4), men=st.sets(names, min_size=4), each=st.integers(0, 3))
def test_validation_speakers_follow_the_rule_in_any_order(women, men, each):
    speakers = [f"f{name}" for name in women] + [f"m{name}" for name in men]
    chosen = validation_speakers(speakers, each)
    assert chosen == validation_speakers(sorted(speakers, reverse=True), each)
    for kind in "fm":
        digests = [hashlib.sha256(name.encode()).hexdigest() for name in speakers if name[0] == kind]
        mine = [hashlib.sha256(name.encode()).hexdigest() for name in chosen if name[0] == kind]
        assert sorted(mine) == sorted(digests)[:each]


def test_somebody_of_each_kind_is_left_to_train_on():
    assert validation_speakers(["fann", "fbea", "mcal", "mdan"], 1)
    with pytest.raises(DataError, match="only 1 speakers whose name begins with m"):
        validation_speakers(["fann", "fbea", "mcal"], 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("<s> YES </s> (an251-fash-b)", "YES"),
        ("YES (an251-fash-b)", "YES"),
        ("  <s> o'hara  T W </s>\t(an251-fash-b) ", "O'HARA T W"),
        ("<S> GO <sil> GO </S> (an251-fash-b)", "GO GO"),
    ],
)
def test_transcripts_parse_with_and_without_marks(line, words):
    assert parse_transcript(line) == ("an251-fash-b", words)


@pytest.mark.parametrize("line", ["YES", "(a)", "<s> </s> (a)", "YES (a b)", "YES ()", "6 (a)", "A-B (a)",
                                  "STRA\u00dfE (a)"])
def test_other_lines_are_no_transcripts(line):
    with pytest.raises(ValueError):
        parse_transcript(line)


def test_a_good_folder_survives_a_bad_archive(make, archive, small_an4, tmp_path):
    out = tmp_path / "made" / "an4"
    before, _ = make(out, archive)
    files = dict(small_an4.files)
    files.pop("an4/wav/an4_clstk/mcal/an0-mcal-b.sph")
    bad = small_an4.pack(tmp_path / "bad.tar.gz", files)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-5000])
    for path in (bad, cut):
        with pytest.raises(DataError, match=path.name):
            make(out, path, force=True)
    assert verify_corpus(out) == before and names_in(out.parent) == ["an4"]


def test_an_up_to_date_folder_is_left_alone_unless_forced(make, archive, tmp_path):
    out = tmp_path / "an4"
    assert make(out, archive)[1]
    stamp = os.stat(out).st_ino
    assert not make(out, archive)[1] and os.stat(out).st_ino == stamp
    assert make(out, archive, force=True)[1] and os.stat(out).st_ino != stamp


def test_a_damaged_folder_or_another_archive_is_made_anew(make, archive, small_an4, tmp_path):
    out = tmp_path / "an4"
    make(out, archive)
    (out / "wav/fann/an0-fann-b.wav").unlink()
    assert make(out, archive)[1] and verify_corpus(out)
    other = small_an4.pack(tmp_path / "other.tar.gz", small_an4.files | {"an4/README": b"more"})
    info, built = make(out, other)
    assert built and info["archive_sha256"] == sha256_of(other) and (out / "README").read_bytes() == b"more"


def test_an_archive_of_unknown_digest_is_warned_of_in_one_line(archive, small_an4, tmp_path):
    lines = []
    prepare(tmp_path / "one", archive, source=small_an4.source, say=lines.append)
    assert len(lines) == 1 and sha256_of(archive) in lines[0] and str(archive) in lines[0]
    known = replace(small_an4.source, known={sha256_of(archive): "the small one"})
    prepare(tmp_path / "two", archive, source=known, say=lines.append)
    prepare(
        tmp_path / "three",
        archive,
        source=small_an4.source,
        sha256=sha256_of(archive).upper(),
        say=lines.append,
    )
    assert len(lines) == 1


def test_without_an_archive_the_published_one_is_downloaded_once(make, small_an4, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    (tmp_path / "web").mkdir()
    digest = sha256_of(small_an4.pack(tmp_path / "web/small.tar.gz", small_an4.files))
    out = tmp_path / "data/an4"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "web")) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/small.tar.gz"
        source = replace(small_an4.source, urls=(url,), known={})
        try:
            with pytest.raises(DataError, match=f"pass --sha256 {digest}"):
                make(out, source=source)
            assert make(out, source=source, sha256=digest)[1]
            assert not make(out, source=source, sha256=digest)[1]
        finally:
            server.shutdown()
            thread.join()
    assert asked == ["/small.tar.gz"] and verify_corpus(out)["source"] == url
    assert sorted(path.name for path in out.parent.iterdir()) == ["an4", "small.tar.gz"]


def test_a_folder_of_another_kind_is_refused_before_anything_is_downloaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(an4, "download", lambda *_: pytest.fail("downloaded"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is no corpus called an4"):
        make(tmp_path, force=True)
    assert names_in(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("order", ["01", "10"])
def test_sphere_of_either_byte_order_is_read(order, small_an4, tmp_path):
    samples = np.array([1, -2, 300, -32768, 32767], np.int16)
    data = small_an4.sphere(samples)
    if order == "10":
        data = data[:1024].replace(b"-s2 01", b"-s2 10") + samples.astype(">i2").tobytes()
    (tmp_path / "a.sph").write_bytes(data)
    assert read_sphere(tmp_path / "a.sph", "a.sph").tolist() == samples.tolist()


app = Typer()
app.command()(an4.main)
run = CliRunner().invoke


def test_the_command_line_builds_checks_and_reports(archive, small_an4, tmp_path, monkeypatch):
    monkeypatch.setattr(an4, "prepare", partial(prepare, source=small_an4.source))
    out = tmp_path / "an4"
    first, again, check = (
        run(app, ["--out", str(out), *more]) for more in (["--archive", str(archive)],) * 2 + (["--check"],)
    )
    assert (first.exit_code, again.exit_code, check.exit_code) == (0, 0, 0)
    assert "is ready" in first.stdout and "warning:" in first.stderr
    assert "is up to date" in again.stdout and "is valid" in check.stdout
    assert verify_corpus(out)["manifest_sha256"] in check.stdout
    (out / "wav/fann/an0-fann-b.wav").write_bytes(b"")
    spoilt = run(app, ["--out", str(out), "--check"])
    assert spoilt.exit_code == 1
    assert re.fullmatch(r"error: .*an0-fann-b.wav: differs .*python -m data_prep.an4 .*\n", spoilt.stderr)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--archive", "nowhere.tar.gz"], "nowhere.tar.gz: no such file"),
        (["--archive", "folder"], "folder: a folder; name a file"),
        (["--check", "--out", "folder"], "folder: is the corpus mini; name the folder of an4 with --out"),
        (["--archive", "notes.txt"], "notes.txt: truncated or damaged"),
        (["--sha256", "12"], "--sha256 12: is not 64"),
        (["--check"], "corpus.json: No such file"),
    ],
)
def test_errors_on_the_command_line_are_one_line_and_exit_code_1(arguments, why, tmp_path):
    (tmp_path / "notes.txt").write_text("not an archive")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/corpus.json").write_text('{"name": "mini"}')
    command = [sys.executable, "-m", "data_prep.an4", "--out", "out", *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(an4.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert done.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: ") and why in errors[0]
    assert names_in(tmp_path) == ["folder", "notes.txt"]


@pytest.mark.real
@pytest.mark.skipif("HLSTM_REAL_DATA" not in os.environ, reason="HLSTM_REAL_DATA is not set")
def test_the_real_archive(tmp_path):
    archive = Path(os.environ["HLSTM_REAL_DATA"]) / "an4_sphere.tar.gz"
    info, built = prepare(tmp_path / "an4", archive)
    splits = info["splits"]
    assert built and verify_corpus(tmp_path / "an4") == info
    assert splits["train"]["utterances"] + splits["valid"]["utterances"] == 948
    assert splits["train"]["speakers"] + splits["valid"]["speakers"] == 74
    assert splits["test"]["utterances"] == 130 and splits["test"]["speakers"] == 10
    assert splits["valid"]["speakers"] == 8
    assert round(sum(total["seconds"] for total in splits.values()) / 60, 1) == 48.4
    rows = rows_of(tmp_path / "an4")
    assert len({row["id"] for row in rows}) == 1078
    by_split = [{row["speaker"] for row in rows if row["split"] == split} for split in splits]
    assert len(set.union(*by_split)) == sum(map(len, by_split)) == 84


def test_force_makes_a_corpus_anew_without_an_archive_too(small_an4, tmp_path, monkeypatch):
    archive = small_an4.pack(tmp_path / "an4.tar.gz", small_an4.files)
    known = replace(small_an4.source, known={sha256_of(archive): "small"}, urls=("http://x/a.tar.gz",))
    monkeypatch.setattr(an4, "download", lambda urls, target, accepted: shutil.copy(archive, target) and
                        sha256_of(archive))
    (tmp_path / "made").mkdir()
    out, options = tmp_path / "made" / "an4", {"source": known, "say": lambda line: None}
    assert prepare(out, **options)[1] and not prepare(out, **options)[1]
    assert prepare(out, force=True, **options)[1]
