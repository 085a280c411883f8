"""Reading corpora: what is damaged is refused with file, line and remedy; batches are of similar length."""

import hashlib
import json
from itertools import combinations

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hlstm_src.audio import ALPHABET
from hlstm_src.corpora import CaptionCorpus, CorpusError, SpeechCorpus, collate, encode, length_batches
from hlstm_src.profiles import MINI_SCENES, MINI_SPEECH, ROOT
from tests.speech import SIZES, make_corpus


@pytest.fixture
def folder(tmp_path):
    return make_corpus(tmp_path / "tones")


def test_a_corpus_of_the_other_kind_is_told_as_one():
    with pytest.raises(CorpusError, match="corpus.json: a corpus of pictures; name one of speech, such as data/an4"):
        SpeechCorpus(ROOT / MINI_SCENES)
    with pytest.raises(CorpusError, match="this is no caption corpus; .* or name another, such as data/ucm"):
        CaptionCorpus(ROOT / MINI_SPEECH)


def rewrite(folder, change, agree=True):
    """Changes the manifest's text, and corpus.json with it unless they are to disagree."""
    manifest, about = folder / "manifest.csv", folder / "corpus.json"
    manifest.write_text(change(manifest.read_text()), newline="\n")
    if agree:
        info = json.loads(about.read_text()) | {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
        about.write_text(json.dumps(info))


def in_line(number, column, value):
    """A change of one field of the manifest; lines count from 1, the header."""
    def change(text):
        lines = [line.split(",") for line in text.splitlines()]
        lines[number - 1][column] = value
        return "\n".join(map(",".join, lines)) + "\n"
    return change


def test_a_corpus_gives_what_was_written(folder):
    corpus = SpeechCorpus(folder)
    assert {name: len(corpus.split(name)) for name in SIZES} == SIZES
    assert len(corpus.split("train", "valid")) == SIZES["train"] + SIZES["valid"]
    assert [u.id for u in corpus.split("train", limit=2)] == ["train-00", "train-01"]
    assert corpus.sha256 == json.loads((folder / "corpus.json").read_text())["manifest_sha256"]
    for u in corpus.utterances:
        samples = corpus.audio(u)
        assert samples.dtype == torch.float32 and samples.abs().max() <= 1
        assert len(samples) / 16_000 == pytest.approx(u.seconds, abs=1e-4)
        np.testing.assert_array_equal(samples, soundfile.read(u.path, dtype="float32")[0])


def test_flac_is_read_as_wave_is(folder):
    corpus = SpeechCorpus(folder)
    u = corpus.utterances[0]
    flac = folder / "wav/train/00.flac"
    soundfile.write(flac, soundfile.read(u.path, dtype="int16")[0], 16_000)
    rewrite(folder, in_line(2, 3, "wav/train/00.flac"))
    rewrite(folder, in_line(2, 6, hashlib.sha256(flac.read_bytes()).hexdigest()))
    again = SpeechCorpus(folder)
    assert torch.equal(again.audio(again.utterances[0]), corpus.audio(u))


@pytest.mark.parametrize("spoil, where, what", [
    (lambda f: (f / "corpus.json").unlink(), "corpus.json", "no such file"),
    (lambda f: (f / "manifest.csv").unlink(), "manifest.csv", "no such file"),
    (lambda f: (f / "corpus.json").write_text("{"), "corpus.json", "not JSON"),
    (lambda f: (f / "corpus.json").write_bytes(b"\xff\xfe"), "corpus.json", "not JSON"),
    (lambda f: (f / "corpus.json").write_text("[]"), "manifest.csv", "does not match"),
    (lambda f: rewrite(f, lambda text: text + "\n", agree=False), "manifest.csv", "does not match"),
    (lambda f: rewrite(f, in_line(4, 5, "a b")), "manifest.csv, line 4", "'a b' is empty or has signs"),
    (lambda f: rewrite(f, in_line(4, 5, "A_B")), "manifest.csv, line 4", "signs outside"),
    (lambda f: rewrite(f, in_line(3, 5, "")), "manifest.csv, line 3", "is empty"),
    (lambda f: rewrite(f, in_line(3, 5, " ")), "manifest.csv, line 3", "is empty"),
    (lambda f: rewrite(f, in_line(5, 4, "long")), "manifest.csv, line 5", "'long'"),
    (lambda f: rewrite(f, in_line(6, 2, "dev")), "manifest.csv, line 6", "none of train, valid, test"),
    (lambda f: rewrite(f, in_line(1, 0, "name")), "manifest.csv, line 2", "'id'"),
    (lambda f: rewrite(f, lambda text: text + "x,y,test,z,1.0\n"), "manifest.csv, line 23", "column is missing"),
])
def test_a_damaged_corpus_is_refused(folder, spoil, where, what):
    spoil(folder)
    with pytest.raises(CorpusError) as error:
        SpeechCorpus(folder)
    message = str(error.value)
    assert f"{folder}/{where}: " in message and what in message
    assert "prepare the corpus" in message and "\n" not in message


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path):
    (tmp_path / "file").write_text("no corpus")
    for name in ("nothing", "file"):
        with pytest.raises(CorpusError, match=rf"{name}/corpus.json: .*prepare the corpus first.*data_prep.an4"):
            SpeechCorpus(tmp_path / name)


def test_changed_missing_and_unfit_sounds_are_refused(folder):
    corpus = SpeechCorpus(folder)
    changed, missing, *others = corpus.split("train")
    data = bytearray(changed.path.read_bytes())
    data[-1] ^= 1
    changed.path.write_bytes(data)
    missing.path.unlink()
    noise = np.zeros(100, np.int16)
    soundfile.write(others[0].path, noise, 8000)
    soundfile.write(others[1].path, np.stack([noise, noise], 1), 16_000)
    others[2].path.write_text("not a sound")
    for k, u in enumerate(others[:3]):
        rewrite(folder, in_line(4 + k, 6, hashlib.sha256(u.path.read_bytes()).hexdigest()))
    corpus = SpeechCorpus(folder)
    for u, what in zip(corpus.utterances, ("SHA-256 differs", "no such file", "8000 Hz", "2 dimensions", "")):
        with pytest.raises(CorpusError, match=f"{u.path.name}: .*{what}.*; prepare the corpus again"):
            corpus.audio(u)
    assert len(corpus.audio(corpus.utterances[5])) > 0


def test_a_split_that_holds_nothing_is_refused(folder):
    with pytest.raises(CorpusError, match="manifest.csv: no utterance in dev; there are: test, train, valid"):
        SpeechCorpus(folder).split("dev")


def test_letters_and_labels_fit(folder):
    text = "IT'S A Z"
    assert "".join(ALPHABET[k] for k in encode(text)) == text and len(set(ALPHABET)) == len(ALPHABET) == 29
    assert encode(text).min() > 0, "the blank is no letter"


def test_a_batch_pads_with_zeros_and_keeps_all_it_was_given():
    waves, texts = [torch.randn(5), torch.randn(9), torch.randn(2)], ["A", "B C", "IT'S"]
    batch = collate(waves, texts)
    assert batch.waves.shape == (3, 9) and batch.lengths.tolist() == [5, 9, 2]
    for row, wave in zip(batch.waves, waves):
        assert torch.equal(row[:len(wave)], wave) and (row[len(wave):] == 0).all()
    parts = batch.targets.split(batch.target_lengths.tolist())
    assert ["".join(ALPHABET[k] for k in part) for part in parts] == texts


SECONDS = st.lists(st.floats(0.1, 20), min_size=1, max_size=60)


@settings(deadline=None)
@given(SECONDS, st.integers(1, 9), st.integers(0, 1000))
@example([1.0625, 1.25, 2.0, 1.125], 2, 2)
def test_batches_are_a_permutation_of_similar_lengths_and_follow_the_generator(seconds, size, seed):
    def shuffled():
        return length_batches(seconds, size, torch.Generator().manual_seed(seed))
    for batches, slack in ((length_batches(seconds, size), 1), (shuffled(), 1.1 / 0.9)):
        assert sorted(k for batch in batches for k in batch) == list(range(len(seconds)))
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and len(batches[0]) <= size
        # Sorted by length, up to the noise: of any two batches one ends before the other begins.
        spans = [(min(map(seconds.__getitem__, b)), max(map(seconds.__getitem__, b))) for b in batches]
        assert all(min(a[1] / b[0], b[1] / a[0]) <= slack + 1e-9 for a, b in combinations(spans, 2))
    assert shuffled() == shuffled()


def test_without_a_generator_the_shortest_come_first_and_with_one_each_epoch_differs():
    seconds = [float(k % 37) + 1 for k in range(100)]
    in_order = [seconds[k] for batch in length_batches(seconds, 8) for k in batch]
    assert in_order == sorted(seconds)
    generator = torch.Generator().manual_seed(0)
    first, second = (length_batches(seconds, 8, generator) for _ in range(2))
    assert first != second and {frozenset(b) for b in first} != {frozenset(b) for b in second}


def test_lengths_that_are_near_meet_different_neighbours():
    met = {frozenset(map(frozenset, length_batches([1.0, 1.05, 1.1, 1.15], 2, torch.Generator().manual_seed(seed))))
           for seed in range(50)}
    assert len(met) == 3                                           # all ways to make two pairs of four
