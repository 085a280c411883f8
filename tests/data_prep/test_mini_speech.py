"""The shipped mini speech corpus is whole and fit for learning; its generator gives the same bytes twice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from data_prep import mini_speech
from data_prep.corpus import SAMPLE_RATE, SPLITS, DataError, read_corpus, verify_corpus
from data_prep.mini_speech import DIGITS, LETTERS, NAMES, VOICES, Voice

SHIPPED = Path(mini_speech.__file__).parent / "mini" / "speech"
VOCABULARY = {*LETTERS, *DIGITS, *mini_speech.TENS, *mini_speech.COMMANDS, "ENTER", "ERASE", "RUBOUT"}
needs_engines = pytest.mark.skipif(
    not all(map(shutil.which, mini_speech.ENGINES.values())), reason="espeak-ng and flite are not installed"
)


@pytest.fixture(scope="module")
def rows():
    return read_corpus(SHIPPED)[1]


@pytest.fixture(scope="module")
def audio(rows):
    return {row.id: soundfile.read(SHIPPED / row.path) for row in rows}


def app():
    import typer

    app = typer.Typer()
    app.command()(mini_speech.main)
    return app


def test_shipped_corpus_verifies():
    info = verify_corpus(SHIPPED)
    assert info["name"] == "mini_speech" and info["archive_sha256"] is None
    assert "espeak-ng 1." in info["source"] and "flite 2." in info["source"]
    assert "CC0" in info["licence"] and "CC0" in (SHIPPED / "LICENCE.txt").read_text()


def test_nothing_is_shipped_that_the_manifest_does_not_name(rows):
    files = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*") if path.is_file()}
    assert files == {row.path for row in rows} | {"corpus.json", "manifest.csv", "LICENCE.txt"}


def test_shipped_corpus_is_small():
    sizes = [path.stat().st_size for path in SHIPPED.rglob("*.flac")]
    assert sum(sizes) < 5_000_000 and max(sizes) < 40_000


def test_voices_and_spelled_names_of_the_splits_are_disjoint(rows):
    for part in ({s: {v.speaker for v in VOICES[s]} for s in SPLITS}, {s: set(NAMES[s]) for s in SPLITS}):
        assert not part["train"] & part["valid"] and not (part["train"] | part["valid"]) & part["test"]
    for row in rows:
        assert row.speaker in {voice.speaker for voice in VOICES[row.split]}


def test_every_training_word_is_heard_often_and_no_other_word_is_said(rows):
    said = [word for row in rows if row.split == "train" for word in row.transcript.split()]
    assert {word for row in rows for word in row.transcript.split()} <= VOCABULARY
    assert min(map(said.count, VOCABULARY)) >= 5


def test_names_are_spelled_with_letters_of_the_vocabulary():
    assert set("".join(name for split in SPLITS for name in NAMES[split])) <= set(LETTERS)


def test_audio_is_mono_16_khz_not_clipped_not_empty_and_as_long_as_stated(rows, audio):
    for row in rows:
        samples, rate = audio[row.id]
        assert rate == SAMPLE_RATE and samples.ndim == 1
        assert samples.size / rate == pytest.approx(row.seconds, abs=1e-4)
        assert 0.4 <= row.seconds <= 2.6
        assert 0.1 < np.abs(samples).max() < 0.9


def test_quiet_at_both_ends_is_short_and_quiet(rows, audio):
    pad = round(mini_speech.PAUSE * SAMPLE_RATE)
    for row in rows:
        samples, _ = audio[row.id]
        ends, inside = np.r_[samples[:pad], samples[-pad:]], samples[pad:-pad]
        assert np.sqrt(np.mean(ends**2)) < 0.1 * np.sqrt(np.mean(inside**2))


def test_longer_transcripts_take_longer(rows):
    syllables = [len(row.transcript.replace(" ", "")) + row.transcript.count(" ") for row in rows]
    assert np.corrcoef(syllables, [row.seconds for row in rows])[0, 1] > 0.5


@pytest.mark.parametrize("split", SPLITS)
def test_text_is_drawn_from_the_vocabulary_and_repeats_with_the_seed(split):
    texts, again = (
        [mini_speech.draw_text(np.random.default_rng(seed), split, seed) for seed in range(400)] for _ in "ab"
    )
    assert texts == again
    assert {word for text in texts for word in text.split()} == VOCABULARY


def test_trim_keeps_the_sound_and_a_short_pause():
    sound = np.zeros(SAMPLE_RATE)
    sound[5000:9000] = 0.5
    out = mini_speech.trim(sound)
    pad = round(mini_speech.PAUSE * SAMPLE_RATE)
    assert out.size == 4000 + 2 * pad and not out[:pad].any() and out[pad:-pad].min() == 0.5


def test_trim_refuses_silence():
    with pytest.raises(DataError, match="silence"):
        mini_speech.trim(np.zeros(100))


def test_flac_gives_the_samples_back(tmp_path):
    audio = np.round(np.random.default_rng(0).uniform(-0.5, 0.5, 2000) / mini_speech.STEP) * mini_speech.STEP
    (tmp_path / "a.flac").write_bytes(mini_speech.encode(audio))
    assert np.array_equal(soundfile.read(tmp_path / "a.flac")[0], audio)


def test_missing_engine_is_one_clear_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_speech.shutil, "which", lambda name: None)
    result = CliRunner().invoke(app(), ["--out", str(tmp_path / "new" / "corpus")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: espeak-ng: ") and "apt-get install" in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_speech, "engine_version", lambda engine: "0")
    (tmp_path / "corpus.json").write_text(json.dumps({"name": "an4"}))
    with pytest.raises(DataError, match="no corpus called mini_speech; remove it or choose another folder"):
        mini_speech.generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_a_file_in_the_way_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_speech, "engine_version", lambda engine: "0")
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app(), ["--out", str(tmp_path / "file/below")])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "a file stands where a folder is needed" in result.stderr


def test_failure_half_way_keeps_the_corpus_that_was_there(tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    out.mkdir()
    (out / "corpus.json").write_text(json.dumps({"name": "mini_speech"}))
    monkeypatch.setattr(mini_speech, "engine_version", lambda engine: "0")

    def fail(folder, seed):
        (folder / "half").write_text("")
        raise DataError("espeak-ng: failed")

    monkeypatch.setattr(mini_speech, "make_rows", fail)
    with pytest.raises(DataError, match="failed"):
        mini_speech.generate(out)
    assert list(tmp_path.iterdir()) == [out] and [path.name for path in out.iterdir()] == ["corpus.json"]


@needs_engines
@pytest.mark.parametrize("split, number", [("train", 0), ("test", 3)])
def test_an_utterance_made_twice_has_the_same_bytes(split, number):
    voice, text, audio = mini_speech.utterance(0, split, number)
    again = mini_speech.utterance(0, split, number)
    assert (voice, text) == again[:2] and mini_speech.encode(audio) == mini_speech.encode(again[2])
    assert not np.array_equal(audio, mini_speech.utterance(1, split, number)[2])


@needs_engines
def test_the_shipped_transcripts_are_the_ones_the_generator_draws(rows, monkeypatch):
    monkeypatch.setattr(mini_speech, "speak", lambda *_, **__: (np.ones(4000), SAMPLE_RATE))
    for split in SPLITS:
        drawn = [mini_speech.utterance(0, split, number)[:2] for number in range(20)]
        shipped = [(row.speaker, row.transcript) for row in rows if row.split == split]
        assert [(voice.speaker, text) for voice, text in drawn] == shipped[:20]


@needs_engines
def test_a_small_corpus_replaces_an_older_one_and_verifies(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_speech, "PER_VOICE", dict.fromkeys(SPLITS, 1))
    monkeypatch.setattr(mini_speech, "VOICES", {split: VOICES[split][-1:] for split in SPLITS})
    for _ in range(2):
        result = CliRunner().invoke(app(), ["--out", str(tmp_path / "corpus")])
        assert result.exit_code == 0, result.output
    info = verify_corpus(tmp_path / "corpus")
    assert [info["splits"][split]["utterances"] for split in SPLITS] == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@needs_engines
@pytest.mark.parametrize("voice", [Voice("espeak", "en-us+nobody"), Voice("flite", "nobody")])
def test_an_unknown_voice_is_a_clear_error_and_not_another_voice(voice):
    with pytest.raises(DataError, match="nobody"):
        mini_speech.speak(voice, "YES")


@needs_engines
def test_no_two_voices_sound_the_same():
    said = [mini_speech.speak(voice, "SEVEN")[0].tobytes() for split in SPLITS for voice in VOICES[split]]
    assert len(set(said)) == len(said)
