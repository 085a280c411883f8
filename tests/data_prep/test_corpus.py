"""The corpus folder: what is written reads back, and what was changed since is noticed."""

import hashlib
import json

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from data_prep import corpus
from data_prep.corpus import DataError, Row, new_folder, read_corpus, verify_corpus, write_corpus, write_wave

ABOUT = {"name": "tiny", "title": "Tiny", "licence": "CC0", "source": "this test"}


def make(folder, *, order=1, **changes):
    """A valid corpus of four utterances; `changes` maps an id to fields to change in its row."""
    rows = []
    for at, (name, speaker, split) in enumerate(
        [("a10", "ann", "train"), ("a9", "ann", "train"), ("b1", "bob", "valid"), ("c1", "cyd", "test")]
    ):
        path = f"wav/{speaker}/{name}.wav"
        write_wave(folder / path, np.full(1600 * (at + 1), at, np.int16))
        digest = corpus.sha256_of(folder / path)
        row = dict(id=name, speaker=speaker, split=split, path=path, seconds=0.1 * (at + 1), sha256=digest)
        rows.append(row | {"transcript": "O'HARA SIX"} | changes.get(name, {}))
    return write_corpus(folder, rows=rows[::order], **ABOUT)


def test_what_is_written_reads_back_in_order(tmp_path):
    info = make(tmp_path, order=-1)
    read, rows = read_corpus(tmp_path)
    assert read == info == verify_corpus(tmp_path)
    assert [row.id for row in rows] == ["a10", "a9", "b1", "c1"]
    assert rows[0] == Row("a10", "ann", "train", "wav/ann/a10.wav", 0.1, "O'HARA SIX", rows[0].sha256)
    assert info["splits"]["train"] == {"utterances": 2, "speakers": 1, "seconds": 0.3}
    assert info["archive_sha256"] is None and info["sample_rate"] == 16_000 and info["kind"] == "speech"
    lines = (tmp_path / "manifest.csv").read_bytes().decode().split("\n")
    assert lines[0] == "id,speaker,split,path,seconds,transcript,sha256" and ",0.1000," in lines[1]


def test_the_same_utterances_give_the_same_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert make(one) == make(two, order=-1)
    assert (one / "manifest.csv").read_bytes() == (two / "manifest.csv").read_bytes()
    assert (one / "corpus.json").read_bytes() == (two / "corpus.json").read_bytes()


@given(samples=st.lists(st.integers(-(2**15), 2**15 - 1), max_size=50))
def test_a_wave_holds_the_samples(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("wave") / "a.wav"
    write_wave(path, np.array(samples, np.int16))
    back, rate = soundfile.read(path, dtype="int16")
    assert rate == 16_000 and back.tolist() == samples and path.stat().st_size == 44 + 2 * len(samples)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": "a10"}, "'a10': this id stands there twice"),
        ({"path": "wav/ann/a10.wav"}, "path 'wav/ann/a10.wav' stands there twice"),
        ({"speaker": "cyd"}, "speaker cyd is in the test set and outside it"),
        ({"speaker": ""}, "id or speaker is empty"),
        ({"split": "dev"}, "split is 'dev'"),
        ({"path": "../a9.wav"}, "not a plain relative path"),
        ({"path": "/a9.wav"}, "not a plain relative path"),
        ({"path": "wav/gone.wav"}, "wav/gone.wav: the audio of 'a9' is not there"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"transcript": "two words"}, "transcript 'two words'"),
        ({"transcript": "TWO  SPACES"}, "transcript 'TWO  SPACES'"),
        ({"transcript": ""}, "transcript ''"),
        ({"sha256": "abc"}, "sha256 'abc'"),
    ],
)
def test_a_bad_row_is_refused_and_nothing_written(tmp_path, change, why):
    with pytest.raises(DataError, match=why):
        make(tmp_path, a9=change)
    assert not (tmp_path / "manifest.csv").exists() and not (tmp_path / "corpus.json").exists()


def rehash(folder, old, new):
    """Change the manifest and the hash that corpus.json holds of it."""
    data = (folder / "manifest.csv").read_bytes().replace(old, new)
    (folder / "manifest.csv").write_bytes(data)
    info = json.loads((folder / "corpus.json").read_text())
    info["manifest_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "corpus.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / "corpus.json").unlink(), "corpus.json: No such file"),
        (lambda f: (f / "manifest.csv").unlink(), "manifest.csv: No such file"),
        (lambda f: (f / "corpus.json").write_text("{"), "corpus.json: not valid JSON"),
        (lambda f: (f / "corpus.json").write_text("{}"), "corpus.json: key 'schema'"),
        (lambda f: (f / "manifest.csv").write_text("id\n"), "manifest.csv: differs"),
        (lambda f: rehash(f, b"0.1000", b"0.2000"), "corpus.json: key 'splits' does not add up"),
        (lambda f: rehash(f, b"0.1000", b"long"), "manifest.csv:2: not a row"),
        (lambda f: rehash(f, b",O'HARA SIX", b""), "manifest.csv:2: not a row"),
        (lambda f: rehash(f, b"id,", b"name,"), "manifest.csv:2: not a row"),
        (lambda f: rehash(f, b"bob", b"cyd"), "speaker cyd is in the test set"),
        (lambda f: rehash(f, b"wav/ann/a9", b"../a9"), "not a plain relative path"),
        (lambda f: (f / "wav/bob/b1.wav").unlink(), "b1.wav: the audio of 'b1' is missing"),
        (lambda f: (f / "wav/bob/b1.wav").write_bytes(b"RIFF"), "b1.wav: differs from the audio"),
    ],
)
def test_what_was_changed_since_is_noticed(tmp_path, spoil, why):
    make(tmp_path)
    verify_corpus(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=f"{why}.*; do this") as caught:
        verify_corpus(tmp_path, "do this")
    assert "\n" not in str(caught.value)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_takes_the_place_of_the_old_one_only_when_complete(tmp_path):
    out = tmp_path / "tiny"
    with new_folder(out, "tiny") as folder:
        make(folder)
        assert not out.exists()
    before = (out / "manifest.csv").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with new_folder(out, "tiny") as folder:
            make(folder, a9={"transcript": "OTHER"})
            raise KeyboardInterrupt
    assert (out / "manifest.csv").read_bytes() == before and names_in(tmp_path) == ["tiny"]
    with new_folder(out, "tiny") as folder:
        make(folder, a9={"transcript": "OTHER"})
    assert (out / "manifest.csv").read_bytes() != before and names_in(tmp_path) == ["tiny"]


def test_what_appeared_in_its_place_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "tiny"
    with pytest.raises(DataError, match="tiny: is there and is no corpus called tiny"):
        with new_folder(out, "tiny") as folder:
            make(folder)
            out.mkdir()
            (out / "thesis.txt").write_text("mine")
    assert names_in(tmp_path) == ["tiny"] and (out / "thesis.txt").read_text() == "mine"


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_put_in_place(tmp_path, monkeypatch):
    out = tmp_path / "tiny"
    out.mkdir()
    make(out)
    real = corpus.os.replace

    def failing(source, target):
        if str(source).endswith("new"):
            raise PermissionError("no")
        real(source, target)

    with pytest.raises(PermissionError):
        with new_folder(out, "tiny") as folder:
            make(folder)
            monkeypatch.setattr(corpus.os, "replace", failing)
    monkeypatch.undo()
    verify_corpus(out)
    assert names_in(tmp_path) == ["tiny"]


def test_a_link_to_another_place_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "tiny").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "tiny", "tiny") as folder:
        make(folder)
    assert (tmp_path / "tiny").is_symlink()
    assert verify_corpus(tmp_path / "disk")["name"] == "tiny"


@pytest.mark.parametrize(
    ("name", "text"), [("notes.txt", "mine"), ("corpus.json", '{"name": "other"}'), ("corpus.json", "?")]
)
def test_what_is_not_this_corpus_is_never_replaced(tmp_path, name, text):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(DataError, match="mine: is there and is no corpus called tiny; remove it or choose"):
        with new_folder(out, "tiny"):
            raise AssertionError("the block must not run")
    assert names_in(out) == [name] and (out / name).read_text() == text


def test_seconds_of_a_split_keep_four_places():
    rows = [Row(str(k), "s", "train", f"{k}.wav", 1.0001, "A", "0" * 64) for k in range(3)]
    assert corpus.totals(rows)["train"]["seconds"] == 3.0003
