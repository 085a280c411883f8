"""Sound as the recogniser takes it, without torch: its format, its letters, and how to read any sound file."""

from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path

import numpy as np

from .errors import UserError

SAMPLE_RATE = 16_000
WINDOW, HOP = 320, 160                 # 20 ms and 10 ms
BINS = WINDOW // 2 + 1                 # 161
HANN = np.sin(np.pi * np.arange(WINDOW) / WINDOW).astype(np.float32) ** 2
# A window's Fourier transform as two products, of its samples 1 to 160 plus or minus those as far from the end: cosines
# are the same for both, sines opposite. The sample in the middle meets itself.
ANGLES = np.outer(np.arange(1, HOP + 1), np.arange(BINS)) % WINDOW * (2 * np.pi / WINDOW)
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)         # (160, 161)
COS[-1] /= 2
BLANK = 0
ALPHABET = "_'ABCDEFGHIJKLMNOPQRSTUVWXYZ "     # position = label; "_" stands for CTC's blank


def convolutions(stride: int = 2) -> tuple[tuple[int, int, int, int], ...]:
    """The recogniser's two convolutions: kernel and step, in frequency and time, (kF, kT, sF, sT).

    stride: windows for each frame that they leave, 2 (the paper's, unverified) or 4. Raises ValueError for another.
    """
    if stride not in (2, 4):
        raise ValueError(f"stride {stride!r}: choose 2 or 4")
    return (41, 11, 2, 2), (21, 11, 2, stride // 2)


class AudioError(UserError):
    """A sound file cannot be read; the message names the file and the reason."""


def read(path: str | Path) -> np.ndarray:
    """Samples (N) at 16 kHz of any sound file that libsndfile knows: channels averaged, rate converted.

    Read block by block, so that memory goes with the seconds of sound and not with what a header promises. Raises
    AudioError for a file that is missing, is no sound, holds no sample, or holds values that are no sound.
    """
    import soundfile

    def blocks(file) -> Iterator[np.ndarray]:
        while len(block := file.read(1 << 16, "float32", always_2d=True)):
            yield block
    try:
        with soundfile.SoundFile(path) as file:
            return _joined(blocks(file), file.samplerate, str(path))
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, RuntimeError) as error:
        reason = "no such file" if not Path(path).exists() else f"no sound file ({error})"
        raise AudioError(f"{path}: {' '.join(reason.split())}") from None


def convert(samples: np.ndarray, rate: float) -> np.ndarray:
    """samples (N) or (N, channels) at any rate -> (N') at 16 kHz. Raises AudioError, as `read`.

    Whole numbers, as files of 16 bits hold them, are taken as shares of their type's range; those of 64 bits, which no
    file holds but a list becomes, are refused.
    """
    samples = np.asarray(samples)
    if samples.dtype.kind == "i" and samples.dtype.itemsize > 4:
        raise AudioError("samples: whole numbers of 64 bits have no known range; give int16, or floats in [-1, 1]")
    if samples.dtype.kind not in "if" or samples.ndim not in (1, 2):
        raise AudioError(f"samples: {samples.dtype} of {samples.ndim} dimensions; expected numbers, (samples) or "
                         "(samples, channels)")
    if not samples.size:
        raise AudioError("samples: no samples in it")
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1) if samples.dtype.kind == "i" else 1.0
    return _joined([(samples / scale).astype(np.float32).reshape(len(samples), -1)], rate, "samples")


def _joined(blocks: Iterable[np.ndarray], rate: float, name: str) -> np.ndarray:
    """Blocks (n, channels) at `rate`, one behind the other -> (N) at 16 kHz."""
    if not isinstance(rate, Real) or not 1000 <= rate <= 1_000_000:
        raise AudioError(f"{name}: a rate of {rate} samples a second is no sound's")
    stream, parts = None, []
    if rate != SAMPLE_RATE:
        import soxr
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block in blocks:
        if block.shape[1] > 64 or not (np.abs(block) < 1e6).all():
            raise AudioError(f"{name}: {block.shape[1]} channels are no sound" if block.shape[1] > 64 else
                             f"{name}: holds values that are no sound")
        mono = block.mean(1) if block.shape[1] > 1 else block[:, 0]
        if len(mono):
            parts.append(stream.resample_chunk(mono) if stream else mono)
    if not parts:
        raise AudioError(f"{name}: no samples in it")
    if stream:
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    whole = np.concatenate(parts)
    return whole if len(whole) else np.zeros(1, np.float32)        # a sample or two can resample to none


def pieces(samples: np.ndarray, longest: float = 20.0) -> Iterator[np.ndarray]:
    """Cuts long sound into pieces of at most so many seconds, each time where its last third is quietest.

    The recogniser hears a whole piece before it writes, and needs memory for it.
    """
    size, step = int(longest * SAMPLE_RATE), SAMPLE_RATE // 10
    while len(samples) > size:
        late = samples[size * 2 // 3:size]
        loudness = np.square(late[:len(late) // step * step].reshape(-1, step)).mean(1)
        cut = size * 2 // 3 + int(loudness.argmin()) * step + step // 2
        yield samples[:cut]
        samples = samples[cut:]
    yield samples


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """samples (N) -> log magnitudes (T, 161), mean 0 and variance 1: `deepspeech2.spectrogram`, transposed.

    In place as far as it goes, since fresh memory takes longer than the sums; and a library's fast Fourier transform
    takes longer for windows so short than products do.
    """
    if len(samples) < WINDOW:
        samples = np.pad(samples, (0, WINDOW - len(samples)))
    half = samples[:len(samples) // HOP * HOP].reshape(-1, HOP)    # windows overlap by half of their length
    first, second = half[:-1] * HANN[:HOP], half[1:] * HANN[HOP:]  # (T, 160); the window's sample 0 is always 0
    forth, back = np.concatenate([first[:, 1:], second[:, :1]], axis=1), second[:, ::-1]
    loud, other = (forth + back) @ COS, (forth - back) @ SIN
    loud *= loud
    other *= other
    loud += other
    np.sqrt(loud, out=loud)
    loud *= np.float32(1000)
    whole = np.add(loud, 1, out=other)                             # log1p, but by np.log, which numpy has vectorised;
    loud -= whole - 1                                              # with what the sum was rounded by
    loud /= whole
    loud += np.log(whole, out=whole)
    loud -= loud.mean()
    loud /= np.sqrt(np.vdot(loud, loud) / loud.size + np.float32(1e-8))
    return loud
