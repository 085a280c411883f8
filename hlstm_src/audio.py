"""Sound as the recogniser takes it, without torch: its format, its letters, and how to read any sound file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import UserError

SAMPLE_RATE = 16_000
WINDOW, HOP = 320, 160                 # 20 ms and 10 ms
BINS = WINDOW // 2 + 1                 # 161
CONVOLUTIONS = ((41, 11, 2, 2), (21, 11, 2, 1))   # kernel and stride, in frequency and time: (kF, kT, sF, sT)
BLANK = 0
ALPHABET = "_'ABCDEFGHIJKLMNOPQRSTUVWXYZ "     # position = label; "_" stands for CTC's blank


class AudioError(UserError):
    """A sound file cannot be read; the message names the file and the reason."""


def read(path: str | Path) -> np.ndarray:
    """Samples (N) in [-1, 1] at 16 kHz of any sound file that libsndfile knows: channels averaged, rate converted.

    Raises AudioError for a file that is missing, is no sound, holds no sample, or holds values that are not numbers.
    """
    import soundfile
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        reason = "no such file" if not Path(path).is_file() else f"no sound file ({error})"
        raise AudioError(f"{path}: {reason}") from None
    return convert(samples, rate, str(path))


def convert(samples: np.ndarray, rate: int, name: str = "samples") -> np.ndarray:
    """samples (N) or (N, channels) at any rate -> (N') at 16 kHz. Raises AudioError, as `read`."""
    samples = np.asarray(samples, np.float32)
    if samples.ndim not in (1, 2) or not samples.size:
        raise AudioError(f"{name}: no samples in it" if not samples.size else
                         f"{name}: {samples.ndim} dimensions; expected (samples) or (samples, channels)")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds values that are not numbers")
    if not 0 < rate < 10_000_000:
        raise AudioError(f"{name}: a rate of {rate} samples a second")
    samples = samples.mean(1) if samples.ndim == 2 else samples
    if rate != SAMPLE_RATE:
        import soxr
        samples = soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)
    return samples


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
    """samples (N) -> log magnitudes (T, 161), mean 0 and variance 1: `deepspeech2.spectrogram`, transposed."""
    if len(samples) < WINDOW:
        samples = np.pad(samples, (0, WINDOW - len(samples)))
    hann = np.sin(np.pi * np.arange(WINDOW) / WINDOW).astype(np.float32) ** 2
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * hann
    spec = np.log1p(np.abs(np.fft.rfft(frames)) * 1000).astype(np.float32)
    return (spec - spec.mean(dtype=np.float64)) / np.sqrt(spec.var(dtype=np.float64) + 1e-8)
