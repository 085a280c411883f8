"""Corpora as `data_prep` wrote them: reading, checking, and batches of similar length."""

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import soundfile
import torch
from torch import Tensor

from .audio import ALPHABET, SAMPLE_RATE
from .errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("train", "valid", "test")
LABELS = {letter: k for k, letter in enumerate(ALPHABET)}


class CorpusError(UserError):
    """A corpus cannot be used; the message names file, line and remedy."""


class UndecodablePicture(CorpusError):
    """A picture's file is the one of the manifest, but it does not decode."""


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
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{about}: not JSON ({error}); prepare the corpus again") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        if isinstance(self.info, dict) and self.info.get("kind") == "captions":
            raise CorpusError(f"{about}: a corpus of pictures; name one of speech, such as data/an4")
        if not isinstance(self.info, dict) or self.info.get("manifest_sha256") != self.sha256:
            raise CorpusError(f"{manifest}: does not match corpus.json; prepare the corpus again")
        self.name = self.info.get("name", "?")
        try:
            self.utterances = [self._row(line, row) for line, row in
                               enumerate(csv.DictReader(io.StringIO(data.decode("utf-8"))), start=2)]
        except csv.Error as error:
            raise CorpusError(f"{manifest}: no table ({error}); prepare the corpus again") from None

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
        return _of_splits(self.folder, "utterance", self.utterances, names)[:limit]

    def audio(self, u: Utterance) -> Tensor:
        """Samples in [-1, 1] at 16 kHz, (N). The file must have the hash that the manifest names."""
        try:
            samples, rate = soundfile.read(io.BytesIO(_checked(u)), dtype="float32")
        except soundfile.LibsndfileError as error:
            raise CorpusError(f"{u.path}: {error}; prepare the corpus again") from None
        if rate != SAMPLE_RATE or samples.ndim != 1:
            raise CorpusError(f"{u.path}: {rate} Hz, {samples.ndim} dimensions; expected mono at {SAMPLE_RATE} Hz; "
                              "prepare the corpus again")
        return torch.from_numpy(np.ascontiguousarray(samples))


def _of_splits(folder: Path, kind: str, items: list, names: Sequence[str]) -> list:
    """Utterances or pictures of these splits. Raises CorpusError where there is none."""
    found = [item for item in items if item.split in names]
    if not found:
        raise CorpusError(f"{folder / 'manifest.csv'}: no {kind} in {' or '.join(names)}; there are: "
                          + ", ".join(sorted({item.split for item in items})))
    return found


def _checked(item: "Utterance | Picture") -> bytes:
    """The file of an utterance or picture, which must have the hash that the manifest names."""
    try:
        data = item.path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{item.path}: {error.strerror.lower()}, so {item.id!r} is missing; {PREPARE}") from None
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise CorpusError(f"{item.path}: SHA-256 differs from the manifest; {PREPARE}")
    return data


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

    def twice(self) -> "Batch":
        """All utterances, and once more behind them."""
        return Batch(*(torch.cat([t, t]) for t in (self.waves, self.lengths, self.targets, self.target_lengths)))


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


END = 0                                            # where a caption begins and where it ends, as in NeuralTalk2
UNKNOWN = 1                                        # id of the word that stands for all that are not in the vocabulary
SIDE = 64                                          # pixels a side of what the encoder `tiny` sees
TABLES = ("manifest.csv", "captions.csv", "vocabulary.txt")
PREPARE = "prepare the corpus again"


class Vocabulary:
    """The words of a captioner. Ids: 0 begins and ends a caption, 1 is the unknown word, then the most frequent word.

    `words[k - 1]` is the word with id k; `len` counts the ids, 0 included. Captions are cut after `longest` words.
    """

    def __init__(self, words: Sequence[str], longest: int = 16):
        self.words, self.longest = tuple(words), longest
        self._ids = {word: k for k, word in enumerate(self.words, start=1)}

    def __len__(self) -> int:
        return len(self.words) + 1

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Ids of the first `longest` words, without the marks of begin and end."""
        return [self._ids.get(token, UNKNOWN) for token in tuple(tokens)[:self.longest]]

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to the first END, joined by spaces."""
        words = []
        for k in ids:
            if int(k) == END:
                break
            words.append(self.words[int(k) - 1])
        return " ".join(words)


@dataclass(frozen=True)
class Picture:
    """`captions` are the tokens of each sentence, `raw` the sentences as they were written, in the same order."""
    id: str
    split: str
    path: Path
    captions: tuple[tuple[str, ...], ...]
    raw: tuple[str, ...]
    sha256: str


class CaptionCorpus:
    """A folder with `corpus.json`, `manifest.csv`, `captions.csv`, `vocabulary.txt` and pictures.

    `sha256` (of the three tables, which hold the hash of every picture) identifies the corpus in records. With an
    `encoder`, `feature` and `features` read what `python -m data_prep.features` stored for it. The encoder `tiny` is
    trained with the captioner, so its features are the pixels, (3, 64, 64) in [0, 1], and need no store.

    With `pixels`, the features of a large encoder are the pixels that it reads, (3, 224, 224), decoded at each call, so
    that it can be trained on; its store tells which weights it began with.

    Raises CorpusError if the corpus or its feature store is missing, damaged, or was made for another one.
    """

    def __init__(self, folder: str | Path, encoder: str | None = None, pixels: bool = False):
        self.folder, self.encoder, self.pixels = Path(folder), encoder, pixels and encoder not in (None, "tiny")
        about = self.folder / "corpus.json"
        try:
            self.info = json.loads(about.read_text(encoding="utf-8"))
            if not isinstance(self.info, dict) or self.info.get("kind") != "captions":
                raise CorpusError(f"{about}: key 'kind' is not 'captions', so this is no caption corpus; "
                                  f"{PREPARE}, or name another, such as data/ucm")
            parts = {name: (self.folder / name).read_bytes() for name in TABLES}
        except OSError as error:
            raise CorpusError(f"{error.filename}: {error.strerror.lower()}; prepare the corpus first, with `python -m "
                              "data_prep.karpathy` or `data_prep.coco` (mini corpora come with the code)") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{about}: not JSON ({error}); {PREPARE}") from None
        self.sha256 = hashlib.sha256(b"".join(parts.values())).hexdigest()
        self.manifest_sha256 = hashlib.sha256(parts["manifest.csv"]).hexdigest()
        if self.info.get("sha256") != self.sha256:
            raise CorpusError(f"{about}: key 'sha256' does not match {', '.join(parts)}; {PREPARE}")
        self.name = self.info.get("name", "?")
        self.vocabulary = Vocabulary(parts["vocabulary.txt"].decode("utf-8").splitlines(), self.info.get("longest", 16))
        self.pictures = self._pictures(parts)
        self._row = {p.id: k for k, p in enumerate(self.pictures)}
        self._features, self.encoder_info = self._store() if encoder else (None, {})
        self.skipped = frozenset(self.encoder_info.get("skipped", ()))   # ids of pictures that do not decode

    def _rows(self, name: str, data: bytes, *columns: str):
        """Place (for messages) and values of each row of a table."""
        rows, line = csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")), 2
        try:
            for line, row in enumerate(rows, start=2):
                place, values = f"{self.folder / name}, row {line}", [row.get(column) for column in columns]
                if None in values:
                    raise CorpusError(f"{place}: one of the columns {', '.join(columns)} is missing; {PREPARE}")
                yield place, values
        except csv.Error as error:
            raise CorpusError(f"{self.folder / name}, behind row {line}: no table ({error}); {PREPARE}") from None

    def _pictures(self, parts: dict[str, bytes]) -> list[Picture]:
        """Joins the two tables, row by row."""
        said, pictures, seen = defaultdict(list), [], set()
        for place, (name, tokens, raw) in self._rows("captions.csv", parts["captions.csv"], "id", "tokens", "raw"):
            if not tokens.strip():
                raise CorpusError(f"{place}: a caption of {name!r} is empty; {PREPARE}")
            said[name].append((tuple(tokens.split()), raw))
        columns = "id", "split", "path", "sha256"
        for place, (name, split, path, digest) in self._rows("manifest.csv", parts["manifest.csv"], *columns):
            if name in seen:
                raise CorpusError(f"{place}: the id {name!r} stands there twice; {PREPARE}")
            if split not in SPLITS:
                raise CorpusError(f"{place}: split {split!r} is none of {', '.join(SPLITS)}; {PREPARE}")
            if name not in said:
                raise CorpusError(f"{place}: the picture {name!r} has no caption; {PREPARE}")
            seen.add(name)
            pictures.append(Picture(name, split, self.folder / path, *zip(*said[name]), digest))
        return pictures

    def _store(self) -> tuple[Tensor | None, dict]:
        """The features of all pictures, (N, ...), and what the store says of itself: encoder, weights, corpus."""
        path = self.folder / "features" / f"{self.encoder}.safetensors"
        remedy = f"make it with `python -m data_prep.features --corpus {self.folder} --encoder {self.encoder}`"
        if self.encoder == "tiny" and not path.exists():
            return None, {"encoder": "tiny"}
        try:
            with safetensors.safe_open(path, "pt") as file:
                about, features = file.metadata() or {}, file.get_tensor("features")
            about["skipped"] = json.loads(about.get("skipped", "[]"))
        except FileNotFoundError:
            raise CorpusError(f"{path}: no such feature store; {remedy}") from None
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CorpusError(f"{path}: not a feature store ({error}); remove it and {remedy}") from None
        for key, wanted in (("encoder", self.encoder), ("manifest_sha256", self.manifest_sha256)):
            if about.get(key) != wanted:
                raise CorpusError(f"{path}: key {key!r} is {about.get(key)!r}, not {wanted!r}: features of another "
                                  f"{'encoder' if key == 'encoder' else 'corpus'}; remove it and {remedy}")
        if len(features) != len(self.pictures):
            raise CorpusError(f"{path}: {len(features)} features for {len(self.pictures)} pictures; remove it and "
                              f"{remedy}")
        return features, about

    def split(self, *names: str, limit: int | None = None) -> list[Picture]:
        """The pictures of one or more splits, in the manifest's order; with `limit`, the first so many.

        With an encoder, pictures that it skipped because they do not decode are left out.
        """
        there = [p for p in self.pictures if p.id not in self.skipped]
        return _of_splits(self.folder, "picture", there, names)[:limit]

    def image(self, picture: Picture) -> "Image":
        """The picture, decoded, in RGB. The file must have the hash that the manifest names."""
        from PIL import Image  # an extra: who trains on stored features needs no pictures

        from .compact.pictures import rgb
        data = _checked(picture)
        try:
            return rgb(Image.open(io.BytesIO(data)))
        except Exception as error:                                 # what a decoder raises, depends on the format
            why = str(error).partition(" <")[0]                    # without the address of what was read from
            raise UndecodablePicture(
                f"{picture.path}: the picture {picture.id!r} does not decode ({why}); replace the file and prepare the "
                f"corpus again, or leave it out with `python -m data_prep.features --corpus {self.folder} --encoder "
                f"{self.encoder or 'tiny'} --skip-broken`") from None

    def features(self, pictures: Iterable[Picture]) -> Tensor:
        """Features of pictures, float32, (N, D); of `tiny` (N, 3, 64, 64), with `pixels` (N, 3, 224, 224)."""
        if self.encoder is None:
            raise CorpusError(f"{self.folder}: opened without an encoder; say CaptionCorpus(folder, encoder)")
        if self._features is None:  # tiny: decoded once, then kept, 12 KB a picture
            self._features = torch.stack([pixels(self.image(p)) for p in self.pictures])
        pictures = list(pictures)
        for p in pictures:
            if p.id in self.skipped:
                raise CorpusError(f"{p.path}: the encoder {self.encoder} skipped this picture; leave it out")
        if self.pixels:
            from .encoders import PREPARE
            with ThreadPoolExecutor() as pool:
                return torch.stack(list(pool.map(lambda p: PREPARE[self.encoder](self.image(p)), pictures)))
        rows = self._features[[self._row[p.id] for p in pictures]].float()
        return rows / 255 if self._features.dtype == torch.uint8 else rows

    @property
    def width(self) -> int:
        """D, numbers in a stored feature."""
        return self._features.shape[1]

    def feature(self, picture: Picture) -> Tensor:
        """The feature of one picture, float32, (D); of the encoder `tiny` (3, 64, 64)."""
        return self.features([picture])[0]


def pixels(image: "Image") -> Tensor:
    """A picture as the encoder `tiny` sees it: squeezed to a square, uint8, (3, 64, 64)."""
    image = image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), 2)   # 2: bilinear
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
