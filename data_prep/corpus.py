"""The corpus folder: what the programs of `data_prep` write and the models read.

    corpus.json     name, licence, source, the SHA-256 of the manifest, and totals by split
    manifest.csv    one row an utterance: id, speaker, split, path, seconds, transcript, sha256
    wav/...         the audio itself, at the paths the manifest names

The manifest holds the SHA-256 of every audio file and `corpus.json` that of the manifest, so that
one number, `manifest_sha256`, stands for the whole corpus. Run records quote it.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import tempfile
import wave
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath

import numpy as np

from hlstm_src.files import of_file, replacing

SCHEMA = 1
SAMPLE_RATE = 16_000
REMEDY = "prepare the corpus again"
SPLITS = ("train", "valid", "test")
# Letters, apostrophes and single spaces: what a character model has to spell.
TRANSCRIPT = re.compile(r"[A-Z']+(?: [A-Z']+)*")


class DataError(Exception):
    """Something is wrong with a corpus; the one-line message names the file and the remedy."""


@dataclass(frozen=True)
class Row:
    """One utterance of the manifest; `path` is relative to the corpus folder and uses '/'."""

    id: str
    speaker: str
    split: str
    path: str
    seconds: float
    transcript: str
    sha256: str


COLUMNS = tuple(field.name for field in fields(Row))


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, never a part."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_wave(path: Path, samples: np.ndarray) -> None:
    """Write int16 samples (frames,) as 16 kHz PCM16 WAV; the same samples always give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with of_file(path), wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def _name(folder: Path) -> object:
    """What the corpus in a folder calls itself, or None."""
    try:
        return json.loads((folder / "corpus.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_name(folder: str | os.PathLike, name: str) -> None:
    """Raise DataError if the corpus in `folder` says that it is another one than `name`."""
    if (found := _name(Path(folder))) not in (None, name):
        raise DataError(f"{folder}: is the corpus {found}; name the folder of {name} with --out")


def check_replaceable(out: str | os.PathLike, name: str) -> None:
    """Raise DataError if `out` is there and is neither an empty folder nor a corpus called `name`."""
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if _name(out) != name:
        raise DataError(f"{out}: is there and is no corpus called {name}; remove it or choose another folder")


@contextmanager
def new_folder(out: str | os.PathLike, name: str) -> Iterator[Path]:
    """A folder to build a corpus in, which takes the place of `out` when the block ends well.

    If the block raises, what was built is removed and what stood at `out` stays as it was.

    Raises:
        DataError: `out` is there and is neither an empty folder nor a corpus called `name`; it is left alone.
    """
    check_replaceable(out, name)
    place = Path(os.path.realpath(out))  # a link to another disk stays a link
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        check_replaceable(out, name)                               # meanwhile something else may stand there
        try:
            if place.exists():
                os.replace(place, old)
            os.replace(new, place)
        except BaseException:                                      # also Ctrl-C between the two
            if old.exists() and not place.exists():
                os.replace(old, place)
            raise


def _problem(row: Row) -> str | None:
    """What is wrong with a row, or None."""
    parts = PurePosixPath(row.path)
    if not row.id or not row.speaker:
        return "id or speaker is empty"
    if row.split not in SPLITS:
        return f"split is {row.split!r}, not one of {', '.join(SPLITS)}"
    if not row.path or parts.is_absolute() or ".." in parts.parts or "\\" in row.path:
        return f"path {row.path!r} is not a plain relative path"
    if not (math.isfinite(row.seconds) and row.seconds > 0):
        return f"seconds is {row.seconds}, not a positive number"
    if not TRANSCRIPT.fullmatch(row.transcript):
        return f"transcript {row.transcript!r} is not capital letters, apostrophes and single spaces"
    if not re.fullmatch(r"[0-9a-f]{64}", row.sha256):
        return f"sha256 {row.sha256!r} is not 64 hexadecimal digits"
    return None


def check_rows(rows: list[Row], where: str, remedy: str) -> None:
    """Check that rows are well formed, ids and paths unique, and test speakers heard in the test set alone.

    Raises:
        DataError: one of these does not hold; `where` names the file and `remedy` says what to do about it.
    """
    ids: set[str] = set()
    paths: set[str] = set()
    for row in rows:
        problem = _problem(row)
        if not problem and row.id in ids:
            problem = "this id stands there twice"
        if not problem and row.path in paths:
            problem = f"the path {row.path!r} stands there twice"
        if problem:
            raise DataError(f"{where}: utterance {row.id!r}: {problem}; {remedy}")
        ids.add(row.id)
        paths.add(row.path)
    heard = {row.speaker for row in rows if row.split != "test"}
    shared = sorted(heard & {row.speaker for row in rows if row.split == "test"})
    if shared:
        raise DataError(f"{where}: speaker {shared[0]} is in the test set and outside it; {remedy}")


def totals(rows: Iterable[Row]) -> dict[str, dict]:
    """Utterances, speakers and seconds (rounded to 4 decimals) of each split."""
    rows = list(rows)
    out = {}
    for split in SPLITS:
        part = [row for row in rows if row.split == split]
        out[split] = {
            "utterances": len(part),
            "speakers": len({row.speaker for row in part}),
            "seconds": round(math.fsum(row.seconds for row in part), 4),
        }
    return out


def write_corpus(
    folder: str | os.PathLike,
    *,
    name: str,
    title: str,
    rows: Iterable[Row | Mapping],
    licence: str,
    source: str,
    archive_sha256: str | None = None,
    note: str = "",
) -> dict:
    """Write `manifest.csv` and then `corpus.json`; the audio must lie in the folder already.

    Args:
        folder: the corpus folder, which exists.
        name, title: short and readable name of the corpus.
        rows: utterances, as `Row` or as mappings with the columns of the manifest; any order.
        licence, source: where the audio comes from and under which terms it may be used.
        archive_sha256: digest of the archive the audio was taken from, if there was one.
        note: anything a reader should know, such as how the validation set was chosen.

    Returns:
        The content of `corpus.json`.

    Raises:
        DataError: a row is malformed or its audio file is not there.
    """
    folder = Path(folder)
    rows = [row if isinstance(row, Row) else Row(**row) for row in rows]
    rows = [replace(row, seconds=round(float(row.seconds), 4)) for row in rows]
    where, remedy = str(folder / "manifest.csv"), "correct the program that made this row"
    check_rows(rows, where, remedy)
    for row in rows:
        if not (folder / row.path).is_file():
            raise DataError(f"{folder / row.path}: the audio of {row.id!r} is not there; {remedy}")
    rows.sort(key=lambda row: (SPLITS.index(row.split), row.id))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row) | {"seconds": f"{row.seconds:.4f}"})
    manifest = text.getvalue().encode()
    info = {
        "schema": SCHEMA,
        "kind": "speech",
        "name": name,
        "title": title,
        "sample_rate": SAMPLE_RATE,
        "licence": licence,
        "source": source,
        "note": note,
        "archive_sha256": archive_sha256,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "splits": totals(rows),
    }
    write_atomic(folder / "manifest.csv", manifest)
    write_atomic(folder / "corpus.json", (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
    return info


def read_corpus(folder: str | os.PathLike, remedy: str = REMEDY) -> tuple[dict, list[Row]]:
    """Read `corpus.json` and `manifest.csv` and check that they belong together; the audio is not opened.

    Raises:
        DataError: a file is missing or malformed, or `corpus.json` was written for another manifest.
    """
    folder = Path(folder)
    about, manifest = folder / "corpus.json", folder / "manifest.csv"
    try:
        info = json.loads(about.read_bytes())
        data = manifest.read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{about}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(info, dict) or info.get("schema") != SCHEMA:
        raise DataError(f"{about}: key 'schema' is not {SCHEMA}; {remedy}")
    if info.get("manifest_sha256") != hashlib.sha256(data).hexdigest():
        raise DataError(f"{manifest}: differs from the manifest that {about.name} was written for; {remedy}")
    rows = []
    try:
        for line in csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True):
            if None in line.values():
                raise ValueError("a column is missing")
            rows.append(Row(**(line | {"seconds": float(line["seconds"])})))
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        place = f"{manifest}:{len(rows) + 2}"
        raise DataError(f"{place}: not a row of the manifest ({error}); {remedy}") from None
    check_rows(rows, str(manifest), remedy)
    if info.get("splits") != totals(rows):
        raise DataError(f"{about}: key 'splits' does not add up to what {manifest.name} holds; {remedy}")
    return info, rows


def verify_corpus(folder: str | os.PathLike, remedy: str = REMEDY) -> dict:
    """Check a corpus folder in full, the SHA-256 of every audio file included, and return its `corpus.json`.

    Raises:
        DataError: names the first file that is missing or differs from the manifest.
    """
    info, rows = read_corpus(folder, remedy)
    for row in rows:
        path = Path(folder) / row.path
        if not path.is_file():
            raise DataError(f"{path}: the audio of {row.id!r} is missing; {remedy}")
        if sha256_of(path) != row.sha256:
            raise DataError(f"{path}: differs from the audio that the manifest describes; {remedy}")
    return info
