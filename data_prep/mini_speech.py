"""Generate the mini speech corpus: spelled names, numbers and commands of AN4's kind, by synthetic voices.

The corpus in `data_prep/mini/speech` was made by this program and is shipped, so that the book runs with no
network and no speech engine. Whoever wants to make it anew needs two small programs, espeak-ng and flite:

    python -m data_prep.mini_speech --out DIR [--seed 0]

The voices of the three splits are disjoint, and so are the names they spell. The same seed and the same
versions of the engines, of numpy, soxr and libsndfile give the same bytes: each utterance has a random
generator of its own, made from the seed, the split and its number.
"""

import hashlib
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import typer

from data_prep import command
from data_prep.corpus import SAMPLE_RATE, SPLITS, DataError, Row, new_folder, write_atomic, write_corpus
from hlstm_src.errors import told

PER_VOICE = {"train": 18, "valid": 12, "test": 12}
PAUSE = 0.12  # seconds of quiet kept at either end
FLOOR = 10 ** (-42 / 20)  # quieter than this share of the peak is silence
STEP = 32 / 32768  # samples are rounded to 11 bits, which makes the files a third smaller

LETTERS = tuple("ABCFILMNOQRSTU")
DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
TENS = ("TWENTY", "THIRTY", "FORTY")
COMMANDS = ("YES", "NO", "GO", "HELP", "START", "STOP", "REPEAT")
NAMES = {
    "train": tuple(
        "ANNA BILL CARLA ROSA SAM TOM NORA LOU MARIO FINN ALMA BRUNO OTTO LUCA MIA SAUL TINA LISA MONA SIMON"
        " COLIN BORIS FIONA RUFUS BASIL QUINN FRANCO CUBA SCOTT BLUM COB LUFT TRACI ROMAN NUNO MILO IAN STAN"
        " CURT RUBOUT".split()
    ),
    "valid": tuple("NINA TIM CLARA RITA AMOS BRIT FOSCO LINUS QUITO".split()),
    "test": tuple("LILA CORA NILS TOBIAS ALFA BURT MAC OLIN SUTRO QUITA FLO RUBIN".split()),
}


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker: the engine that speaks and the name it knows the voice by."""

    engine: str
    name: str

    @property
    def speaker(self) -> str:
        """How the manifest calls the speaker."""
        return f"{self.engine}-{self.name}".replace("+", "-").lower()


def _voices(**names: str) -> tuple[Voice, ...]:
    return tuple(Voice(engine, name) for engine in names for name in names[engine].split())


VOICES = {
    "train": _voices(
        espeak="en-us+m1 en-us+m3 en-us+m7 en-us+m8 en-us+f3 en-us+f4 en-us+f5 en-us+max en-us+klatt"
        " en-us+edward en-us+steph en-us+Hugo en-gb+m4",
        flite="slt rms",
    ),
    "valid": _voices(espeak="en-us+m6 en-us+f1 en-us+paul"),
    "test": _voices(espeak="en-us+m2 en-us+f2 en-us+rob en-us+Alex"),
}
ENGINES = {"espeak": "espeak-ng", "flite": "flite"}


def draw_text(rng: np.random.Generator, split: str, turn: int) -> str:
    """Draw a transcript: a spelled name or code, a number, or a command, in capital letters.

    The kinds, and the commands of one word, take turns so that a few hundred utterances hold enough of each.
    """

    def some(words: tuple[str, ...], low: int, high: int) -> str:
        return " ".join(rng.choice(words, size=rng.integers(low, high + 1)))

    kinds = (
        lambda: " ".join(rng.choice(NAMES[split])),
        lambda: some(DIGITS, 2, 3),
        lambda: COMMANDS[turn // len(kinds) % len(COMMANDS)],
        lambda: some(LETTERS, 3, 5),
        lambda: f"{some(TENS, 1, 1)} {some(DIGITS[1:], 1, 1)}",
        lambda: f"ENTER {some(DIGITS, 1, 2)}",
        lambda: " ".join(rng.choice(NAMES[split])),
        lambda: some(DIGITS, 2, 3),
        lambda: f"ERASE {some(LETTERS, 2, 3)} {some(DIGITS, 1, 1)}",
        lambda: COMMANDS[(turn // len(kinds) + 3) % len(COMMANDS)],
        lambda: some(LETTERS, 3, 5),
        lambda: f"{some(TENS, 1, 1)} {some(DIGITS[1:], 1, 1)}",
        lambda: f"RUBOUT {some(LETTERS, 1, 2)} {some(DIGITS, 1, 1)}",
    )
    return kinds[turn % len(kinds)]()


def _program(engine: str) -> str:
    program = shutil.which(ENGINES[engine])
    if program is None:
        raise DataError(
            f"{ENGINES[engine]}: this speech engine is not installed; install it (Debian: apt-get install"
            " espeak-ng flite), or use the corpus that is shipped in data_prep/mini/speech"
        )
    return program


def engine_version(engine: str) -> str:
    """Version of a speech engine, such as '1.51'; raises DataError if it is not installed."""
    said = subprocess.run([_program(engine), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(?:speech|version:\s*flite)\D*(\d+(?:\.\d+)+)", said)
    return found[1] if found else "unknown"


@cache
def known_voices(engine: str) -> frozenset[str]:
    """Names of the voices, languages and variants an engine has; raises DataError if it is not installed."""
    questions = {"espeak": (["--voices=en"], ["--voices=variant"]), "flite": (["-lv"],)}[engine]
    program = _program(engine)
    said = [subprocess.run([program, *ask], capture_output=True, text=True).stdout for ask in questions]
    return frozenset(word.removeprefix("!v/") for words in said for word in words.split())


def speak(voice: Voice, transcript: str, *, rate: float = 1.0, pitch: float = 1.0) -> tuple[np.ndarray, int]:
    """Let an engine say a transcript; letters that stand alone are said by their names.

    Args:
        rate, pitch: 1.0 is the voice's own; 1.1 speaks a tenth faster or (where the voice allows it) higher.

    Returns:
        samples in [-1, 1], shape (samples,), and the engine's own sampling rate in Hz.

    Raises:
        DataError: the engine is missing, has no such voice or failed.
    """
    # Both engines would speak with another voice rather than say that they lack the one asked for.
    for part in voice.name.split("+"):
        if part not in known_voices(voice.engine):
            raise DataError(
                f"{ENGINES[voice.engine]}: has no voice {voice.name!r}; install the engine with its voices"
            )
    # Words go in lower case, because capitals may be read as an abbreviation.
    words = transcript.replace("RUBOUT", "rub out").split()
    words = [word if len(word) == 1 else word.lower() for word in words]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "said.wav")
        if voice.engine == "espeak":
            # A lone "A" would be the article, so it is given by its phoneme. The gap is 30 ms between words.
            text = " ".join("[['eI]]" if word == "A" else word for word in words)
            speed, height = str(round(145 * rate)), str(round(50 * pitch))
            said = ["-v", voice.name, "-s", speed, "-p", height, "-g", "3", "-w", path, text]
        else:
            said = ["-voice", voice.name, "--setf", f"duration_stretch={1.1 / rate:.3f}"]
            said += ["--setf", f"f0_shift={pitch:.3f}", "-o", path, "-t", " ".join(words)]
        done = subprocess.run([_program(voice.engine), *said], capture_output=True, text=True)
        try:
            return soundfile.read(path, dtype="float64")
        except (OSError, soundfile.LibsndfileError):
            reason = done.stderr.strip().splitlines() or ["no audio came out"]
            raise DataError(
                f"{ENGINES[voice.engine]}: could not say {transcript!r} with voice {voice.name!r}"
                f" ({reason[-1]}); install the engine with its voices again"
            ) from None


def trim(audio: np.ndarray) -> np.ndarray:
    """Cut the silence at both ends and put `PAUSE` seconds of it back; shape (samples,) in and out."""
    loud = np.flatnonzero(np.abs(audio) > FLOOR * np.abs(audio).max())
    if loud.size == 0:
        raise DataError("a speech engine gave silence; install the engine with its voices again")
    return np.pad(audio[loud[0] : loud[-1] + 1], round(PAUSE * SAMPLE_RATE))


def utterance(seed: int, split: str, number: int) -> tuple[Voice, str, np.ndarray]:
    """Make one utterance: voice, transcript and audio at 16 kHz, shape (samples,), in [-1, 1].

    Voices take turns. Rate, pitch, size of the vocal tract (by resampling), level and noise are drawn.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    voice = VOICES[split][number % len(VOICES[split])]
    text = draw_text(rng, split, number)
    rate, pitch, size = rng.uniform([0.9, 0.85, 0.95], [1.15, 1.15, 1.05])
    peak_db, noise_db = rng.uniform([-16, -46], [-8, -36])
    audio, said_at = speak(voice, text, rate=rate, pitch=pitch)
    audio = trim(soxr.resample(audio, said_at * size, SAMPLE_RATE))
    # The noise is low, as a room's; the dither makes rounding a soft hiss instead of gaps in that noise.
    noise = np.convolve(rng.standard_normal(audio.size + 63), 0.9 ** np.arange(64), "valid")
    audio = audio / np.sqrt(np.mean(audio**2)) + noise / noise.std() * 10 ** (noise_db / 20)
    audio *= 10 ** (peak_db / 20) / np.abs(audio).max()
    dither = rng.triangular(-1, 0, 1, audio.size)
    return voice, text, np.round(audio / STEP + dither) * STEP


def encode(audio: np.ndarray) -> bytes:
    """FLAC of mono audio at 16 kHz, as small as FLAC gets."""
    file = io.BytesIO()
    soundfile.write(file, audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def make_rows(folder: Path, seed: int) -> Iterator[Row]:
    """Write the audio of every utterance below `folder` and yield its row of the manifest."""
    for split in SPLITS:
        for number in range(PER_VOICE[split] * len(VOICES[split])):
            voice, text, audio = utterance(seed, split, number)
            data, path = encode(audio), f"wav/{split}/{number:03d}.flac"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            yield Row(
                id=f"{split}-{number:03d}",
                speaker=voice.speaker,
                split=split,
                path=path,
                seconds=audio.size / SAMPLE_RATE,
                transcript=text,
                sha256=hashlib.sha256(data).hexdigest(),
            )


def licence_text(versions: dict[str, str]) -> str:
    """What LICENCE.txt says: why the audio is free to ship."""
    return f"""The mini speech corpus: licence

The recordings, transcripts and tables in this folder are released under CC0 1.0 (public domain dedication,
https://creativecommons.org/publicdomain/zero/1.0/). Where that cannot apply, the project's MIT licence does.

No person was recorded for it. data_prep/mini_speech.py drew the sentences, had two speech engines say them,
and then resampled the audio, set its level and added noise:

  espeak-ng {versions["espeak"]}   GPL-3.0-or-later     https://github.com/espeak-ng/espeak-ng
  flite {versions["flite"]}        CMU's own, as below  http://cmuflite.org

These are the licences of the engines: of their programs and of their voice data. They stay with the engines.
No part of an engine is included here, and none is needed to use this corpus.

Why the audio is free to ship. espeak-ng shapes its vowels by rule from formant tables and adds short
consonant sounds of its own; what it says is output, not a copy of the program or of its voice files, and the
GPL covers output only where the output is itself a work based on the program. The licence of flite, under
which its voices (slt, rms) are distributed too, permits use without restriction; its conditions (keep the
notice, mark changes, keep the authors' names, do not advertise with them) concern copies of the software, not
what it says.
"""


def generate(out: Path, seed: int = 0) -> dict:
    """Make the whole corpus in `out` and return its `corpus.json`.

    The work is done in a folder beside `out`, which takes its place only when it is complete.

    Raises:
        DataError: an engine is missing or failed, or `out` holds something that is no mini speech corpus.
    """
    versions = {engine: engine_version(engine) for engine in ENGINES}
    with new_folder(out, "mini_speech") as new:
        write_atomic(new / "LICENCE.txt", licence_text(versions).encode())
        info = write_corpus(
            new,
            name="mini_speech",
            title="Mini speech corpus: spelled names, numbers and commands by synthetic voices",
            rows=list(make_rows(new, seed)),
            licence="CC0-1.0 (see LICENCE.txt)",
            source=f"generated by data_prep/mini_speech.py with seed {seed}, espeak-ng {versions['espeak']}"
            f" and flite {versions['flite']}",
            note="Synthetic speech. The voices of the splits are disjoint, and so are the names they spell."
            " All voices of valid and test are espeak-ng's; flite's are for training alone.",
        )
    return info


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; an older mini speech corpus is replaced.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws sentences, rates, pitches, levels and noise.")] = 0,
) -> None:
    """Generate the mini speech corpus with espeak-ng and flite."""
    try:
        info = generate(out.resolve(), seed)
    except (DataError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    for split, total in info["splits"].items():
        seconds = f"{total['seconds']:.1f} s"
        typer.echo(f"{split}: {total['utterances']} utterances, {total['speakers']} voices, {seconds}")
    typer.echo(f"{out}: {info['manifest_sha256']}")


if __name__ == "__main__":
    command.run(main)
