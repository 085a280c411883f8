"""Sound without torch: any file gives the samples that training would see, and what is no sound is refused by name."""

import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import audio, deepspeech2
from hlstm_src.audio import SAMPLE_RATE, AudioError

MEGABYTE = 1 << 20


def tones(seconds: float = 0.5, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Two tones below 4 kHz, which every rate from 8 kHz on can hold: (N) float64."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.4 * np.sin(2 * np.pi * 300 * t) + 0.3 * np.sin(2 * np.pi * 1900 * t + 1)


def peak(call) -> tuple[object, int]:
    """What `call` returns, or the AudioError that it raises, and the bytes that it had at most at a time."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    except AudioError as error:
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path) -> str:
    """The one line that refuses a file: it begins with the file's name."""
    with pytest.raises(AudioError) as caught:
        audio.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text, text
    return text


# The spectrogram --------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6000), st.floats(-5, 0), st.booleans(), st.integers(0, 99))
def test_a_spectrogram_is_the_one_of_training(size, loudness, tone, seed):
    wave = 10 ** loudness * np.random.default_rng(seed).normal(size=size)
    wave = (wave + tone * np.resize(tones(), size)).astype(np.float32)
    spec, length = deepspeech2.spectrogram(torch.from_numpy(wave)[None], torch.tensor([size]))
    ours = audio.spectrogram(wave)
    assert ours.shape == (int(length), audio.BINS)
    # Rounding beside a loud tone, in both; or of the mean, where all is as loud as that and divided by next to nothing.
    np.testing.assert_allclose(ours, spec[0].T, rtol=1e-4, atol=4e-3 if tone else 1e-3)


def test_silence_has_a_spectrogram_of_zeros():
    for size in (1, 319, 320, 5000):
        assert not audio.spectrogram(np.zeros(size, np.float32)).any()


# Files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending, subtype, exact", [
    ("wav", "PCM_U8", 8e-3), ("wav", "PCM_16", 4e-5), ("wav", "PCM_24", 3e-7), ("wav", "FLOAT", 1e-7),
    ("wav", "DOUBLE", 1e-7), ("wav", "ULAW", 0.02), ("flac", "PCM_16", 4e-5), ("aiff", "PCM_16", 4e-5),
    ("ogg", "VORBIS", 0.1)])
def test_every_kind_of_file_gives_the_same_sound(tmp_path, ending, subtype, exact):
    path, wave = tmp_path / f"a.{ending}", tones()
    soundfile.write(path, wave, SAMPLE_RATE, subtype)
    for name in (path, str(path)):
        read = audio.read(name)
        assert read.dtype == np.float32 and read.shape == wave.shape
        np.testing.assert_allclose(read, wave, atol=exact)


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_rate_and_any_number_of_channels_becomes_one_channel_at_16_kHz(tmp_path, rate, channels):
    path, share = tmp_path / "a.wav", np.arange(1, channels + 1) / sum(range(1, channels + 1))
    soundfile.write(path, tones(0.5, rate)[:, None] * share, rate, "FLOAT")
    read, want = audio.read(path), tones() / channels
    assert abs(len(read) - len(want)) <= 1
    inner = slice(400, len(want) - 400)                            # a filter has to begin and to end somewhere
    np.testing.assert_allclose(read[inner], want[inner], atol=2e-3)


def test_what_is_above_the_new_rate_is_taken_away_rather_than_folded_back(tmp_path):
    t = np.arange(48_000) / 48_000
    soundfile.write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 12_000 * t), 48_000)
    assert np.abs(audio.read(tmp_path / "high.wav")[400:-400]).max() < 1e-3


def test_channels_are_averaged(tmp_path):
    wave = tones()
    soundfile.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), SAMPLE_RATE, "FLOAT")
    assert not audio.read(tmp_path / "a.wav").any()


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_samples_in_memory_are_heard_as_the_file_is(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([tones(0.5, rate), 0.5 * tones(0.5, rate)], 1), rate)
    heard = audio.read(path)
    for kind in ("float32", "float64", "int16", "int32"):          # whole numbers mean shares of their type's range
        np.testing.assert_allclose(audio.convert(soundfile.read(path, dtype=kind)[0], rate), heard, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.sampled_from([8000, 44_100, 192_000]))
def test_the_shortest_sound_is_sound(size, rate):
    spec = audio.spectrogram(audio.convert(np.full(size, 0.1, np.float32), rate))
    assert spec.shape == (1, audio.BINS) and np.isfinite(spec).all()


# What is no sound -------------------------------------------------------------------------------------------

def test_what_is_no_sound_is_refused_by_name(tmp_path):
    assert "no such file" in refused(tmp_path / "none.wav")
    refused(tmp_path)
    for ending in ("wav", "flac", "ogg", "raw", "txt"):
        for content in (b"", b"RIFF", b"a letter, and no sound at all\n" * 20):
            (tmp_path / f"text.{ending}").write_bytes(content)
            assert "no sound file" in refused(tmp_path / f"text.{ending}")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), SAMPLE_RATE)
    assert "no samples" in refused(tmp_path / "empty.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_values_that_are_no_sound_are_refused(tmp_path, value):
    wave = tones().astype(np.float32)
    wave[100] = value
    soundfile.write(tmp_path / "a.wav", wave, SAMPLE_RATE, "FLOAT")
    refused(tmp_path / "a.wav")


@pytest.mark.parametrize("samples, rate", [
    (np.zeros((0, 2)), 16_000), (np.zeros((2, 2, 2)), 16_000), (np.float32(1), 16_000), (np.zeros(99), 0),
    (np.zeros(99), -8000), (np.zeros(99), np.nan), (np.zeros(99), 1e12), (np.zeros(99), 1), (None, 16_000),
    (np.zeros(99), None), (np.zeros(99), "16000"),
    (np.zeros(99, complex), 16_000), (np.zeros((2, 16_000)), 16_000), ([1, 2, 3], 16_000)])
# Of the last two, channels come second; and a list of whole numbers is one of 64 bits.
def test_samples_that_are_no_sound_are_refused(samples, rate):
    with pytest.raises(AudioError, match="^samples: "):
        audio.convert(samples, rate)


def test_a_header_that_promises_more_than_the_file_holds_costs_nothing(tmp_path):
    """FLAC's header has room for 2^36 - 1 samples, a quarter of a terabyte."""
    soundfile.write(tmp_path / "a.flac", tones(), SAMPLE_RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[18:26] = (int.from_bytes(data[18:26]) | (1 << 36) - 1).to_bytes(8)
    (tmp_path / "a.flac").write_bytes(data)
    result, most = peak(lambda: audio.read(tmp_path / "a.flac"))
    assert most < 16 * MEGABYTE
    assert isinstance(result, AudioError) or len(result) == len(tones())


def test_memory_goes_with_the_seconds_and_not_with_rate_and_channels(tmp_path):
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 96_000, 4, "PCM_16") as file:
        for _ in range(120):                                       # two minutes: 184 MB as float32
            file.write(np.zeros((96_000, 4), np.int16))
    read, most = peak(lambda: audio.read(tmp_path / "long.flac"))
    assert len(read) == 120 * SAMPLE_RATE and most < 4 * read.nbytes


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a sound as files of three kinds."""
    path = tmp_path_factory.mktemp("good")
    for ending, subtype in (("wav", "PCM_16"), ("flac", "PCM_16"), ("aiff", "FLOAT")):
        soundfile.write(path / f"a.{ending}", tones(0.1), 22_050, subtype)
    return path


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_gives_numbers_but_never_anything_else(good, data):
    ending = data.draw(st.sampled_from(["wav", "flac", "aiff"]))
    content = bytearray((good / f"a.{ending}").read_bytes())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=6)):
        content[place] = value
    path = good / "damaged"
    path.write_bytes(content[:data.draw(st.none() | st.integers(0, len(content)))])
    result, most = peak(lambda: audio.read(path))
    assert most < 32 * MEGABYTE
    if isinstance(result, AudioError):
        assert str(result).startswith(f"{path}: ")
    else:
        assert result.dtype == np.float32 and result.ndim == 1 and np.isfinite(result).all()


# Long sound -------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400_000), st.floats(1, 9), st.integers(0, 99))
def test_pieces_are_the_whole_and_none_is_too_long(size, longest, seed):
    samples = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    parts = list(audio.pieces(samples, longest))
    np.testing.assert_array_equal(np.concatenate(parts), samples)
    assert all(0 < len(part) <= longest * SAMPLE_RATE for part in parts)
    assert all(len(part) >= longest * SAMPLE_RATE * 0.6 for part in parts[:-1])


@settings(max_examples=30, deadline=None)
@given(st.floats(6.8, 9.7), st.integers(0, 99))
def test_long_sound_is_cut_where_nobody_speaks(pause, seed):
    samples = np.random.default_rng(seed).normal(0, 0.1, 15 * SAMPLE_RATE).astype(np.float32)
    start = int(pause * SAMPLE_RATE)
    samples[start:start + SAMPLE_RATE // 4] *= 0.01                # a quarter of a second
    first = next(iter(audio.pieces(samples, 10)))
    assert start <= len(first) <= start + SAMPLE_RATE // 4
