"""Corpora as `data_prep` wrote them: reading, checking, and batches of similar length."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from .audio import ALPHABET, SAMPLE_RATE
from .errors import UserError

SPLITS = ("train", "valid", "test")
LABELS = {letter: k for k, letter in enumerate(ALPHABET)}


class CorpusError(UserError):
    """A corpus cannot be used; the message names file, line and remedy."""


@dataclass(frozen=True)
class Utterance:
    id: str
    speaker: str
    split: str
    path: Path
    seconds: float
    transcript: str
    sha256: str


class SpeechCorpus:
    """A folder with `corpus.json`, `manifest.csv` and sound files. Raises CorpusError if it is missing or damaged.

    `sha256` (of the manifest, which holds the hash of every sound file) identifies the corpus in records.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        about, manifest = self.folder / "corpus.json", self.folder / "manifest.csv"
        try:
            self.info, data = json.loads(about.read_text(encoding="utf-8")), manifest.read_bytes()
        except OSError as error:
            raise CorpusError(f"{error.filename}: {error.strerror.lower()}; prepare the corpus first, AN4 with "
                              f"`python -m data_prep.an4 --out FOLDER` (mini corpora come with the code)") from None
        except ValueError as error:
            raise CorpusError(f"{about}: not JSON ({error}); prepare the corpus again") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        if not isinstance(self.info, dict) or self.info.get("manifest_sha256") != self.sha256:
            raise CorpusError(f"{manifest}: does not match corpus.json; prepare the corpus again")
        self.name = self.info.get("name", "?")
        self.utterances = [self._row(line, row) for line, row in
                           enumerate(csv.DictReader(io.StringIO(data.decode("utf-8"))), start=2)]

    def _row(self, line: int, row: dict) -> Utterance:
        try:
            if None in row.values():
                raise ValueError("a column is missing")
            u = Utterance(row["id"], row["speaker"], row["split"], self.folder / row["path"], float(row["seconds"]),
                          row["transcript"], row["sha256"])
            if u.split not in SPLITS:
                raise ValueError(f"split {u.split!r} is none of {', '.join(SPLITS)}")
            if not u.transcript.strip() or set(u.transcript) - set(ALPHABET[1:]):
                raise ValueError(f"transcript {u.transcript!r} is empty or has signs outside A-Z, ' and space")
        except (KeyError, ValueError) as error:
            raise CorpusError(f"{self.folder / 'manifest.csv'}, line {line}: cannot be read ({error}); "
                              "prepare the corpus again") from None
        return u

    def split(self, *names: str, limit: int | None = None) -> list[Utterance]:
        """The utterances of one or more splits, in the manifest's order; with `limit`, the first so many."""
        found = [u for u in self.utterances if u.split in names]
        if not found:
            raise CorpusError(f"{self.folder / 'manifest.csv'}: no utterance in {' or '.join(names)}; there are: "
                              + ", ".join(sorted({u.split for u in self.utterances})))
        return found[:limit]

    def audio(self, u: Utterance) -> Tensor:
        """Samples in [-1, 1] at 16 kHz, (N). The file must have the hash that the manifest names."""
        try:
            data = u.path.read_bytes()
        except OSError as error:
            raise CorpusError(f"{u.path}: {error.strerror.lower()}; prepare the corpus again") from None
        if hashlib.sha256(data).hexdigest() != u.sha256:
            raise CorpusError(f"{u.path}: SHA-256 differs from the manifest; prepare the corpus again")
        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise CorpusError(f"{u.path}: {error}; prepare the corpus again") from None
        if rate != SAMPLE_RATE or samples.ndim != 1:
            raise CorpusError(f"{u.path}: {rate} Hz, {samples.ndim} dimensions; expected mono at {SAMPLE_RATE} Hz; "
                              "prepare the corpus again")
        return torch.from_numpy(np.ascontiguousarray(samples))


def encode(transcript: str) -> Tensor:
    """Letters -> labels (L)."""
    return torch.tensor([LABELS[letter] for letter in transcript])


@dataclass
class Batch:
    """waves (B, N) padded with zeros, lengths (B) in samples; targets (sum of target_lengths), target_lengths (B)."""
    waves: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def to(self, device) -> "Batch":
        return Batch(*(t.to(device) for t in (self.waves, self.lengths, self.targets, self.target_lengths)))


def collate(waves: list[Tensor], transcripts: list[str]) -> Batch:
    """Pads and joins utterances into one batch."""
    targets = [encode(text) for text in transcripts]
    return Batch(torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves]),
                 torch.cat(targets), torch.tensor([len(t) for t in targets]))


def length_batches(seconds: list[float], size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices in batches of similar length. With a generator the neighbours and the order of batches are shuffled."""
    if generator is None:
        order = np.argsort(seconds, kind="stable")
    else:  # a little noise, so that an utterance meets different neighbours in each epoch
        noise = 1 + 0.2 * (torch.rand(len(seconds), generator=generator, dtype=torch.float64).numpy() - 0.5)
        order = np.argsort(np.asarray(seconds) * noise, kind="stable")
    batches = [order[k:k + size].tolist() for k in range(0, len(order), size)]
    if generator is not None:
        batches = [batches[k] for k in torch.randperm(len(batches), generator=generator)]
    return batches
