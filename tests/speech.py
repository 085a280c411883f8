"""A speech corpus of seconds for the tests: every letter is a tone of its own, so that a network can learn it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.corpus import write_corpus, write_wave
from hlstm_src import profiles

TONES = {"A": 500, "B": 1200, "C": 2600}
SIZES = {"train": 12, "valid": 4, "test": 5}


def sound(text: str, rng: np.random.Generator) -> np.ndarray:
    """Samples (N) of a text: 0.12 s a letter, tones and silence, with a little noise."""
    t = np.arange(1920) / 16_000
    parts = [np.sin(2 * np.pi * TONES[letter] * t) * (t < 0.09) if letter in TONES else 0 * t for letter in text]
    samples = np.concatenate([0 * t[:800], *parts])
    return (8000 * samples + rng.normal(0, 100, len(samples))).astype(np.int16)


def make_corpus(folder: Path, sizes: dict[str, int] = SIZES, seed: int = 0) -> Path:
    """A corpus folder as data_prep writes them, with so many utterances in each split; returns the folder."""
    rng, rows = np.random.default_rng(seed), []
    for split, count in sizes.items():
        for k in range(count):
            text = " ".join("".join(rng.choice(list(TONES), rng.integers(1, 3))) for _ in range(rng.integers(1, 4)))
            samples, path = sound(text, rng), f"wav/{split}/{k:02}.wav"
            write_wave(folder / path, samples)
            rows.append({"id": f"{split}-{k:02}", "speaker": split, "split": split, "path": path,
                         "seconds": len(samples) / 16_000, "transcript": text,
                         "sha256": hashlib.sha256((folder / path).read_bytes()).hexdigest()})
    write_corpus(folder, name="tones", title="Tones", rows=rows, licence="CC0-1.0", source="made for a test")
    return folder


def use_corpus(folder: Path, name: str = "smoke", kept: bool = False, **changes) -> None:
    """Lets a profile have the sizes of smoke, apart from `changes`, and take its sounds from `folder`."""
    speech = replace(profiles.PROFILES["smoke"].speech, corpus=str(folder), **changes)
    profiles.PROFILES[name] = profiles.Profile(name, speech, kept)
