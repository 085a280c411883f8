"""Prepare AN4, the corpus of the paper's speech experiments.

Speakers at Carnegie Mellon University spell names and addresses and say numbers, dates and commands into a
close-talking microphone: 948 training and 130 test utterances, 48.4 minutes in all, by 84 speakers, none of
them in both sets.

    python -m data_prep.an4 --out data/an4

AN4 has no validation set. Choosing anything by the test set would flatter the result, so eight training
speakers are held out here, four whose name begins with f and four with m, by a fixed rule: of each kind those
whose name has the smallest SHA-256. A recipe once chosen may be trained on all 948, that is on `train` and
`valid` together.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer

from data_prep import command, corpus
from data_prep.corpus import SAMPLE_RATE, DataError, Row
from data_prep.fetch import Progress, download, unpack
from hlstm_src.errors import told
from hlstm_src.files import missing


@dataclass(frozen=True)
class Source:
    """Where the corpus is published, which archives are known, and what a complete one holds."""

    urls: tuple[str, ...] = ("http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz",)
    # SHA-256 -> which archive that is. Any other has to be trusted by hand, by --sha256 or --archive.
    known: Mapping[str, str] = field(
        default_factory=lambda: {
            "593f2ec67e6f752e80f4f28bd5c7fec9ed2c96086d2d99a3018a3a7588b30fe9": "re-packed, complete",
        }
    )
    utterances: Mapping[str, int] = field(default_factory=lambda: {"train": 948, "test": 130})
    minutes: float = 48.4  # of all utterances, to one decimal
    held_out: int = 4  # validation speakers of each kind, f and m


AN4 = Source()
TITLE = "CMU AN4 (census)"
LICENCE = "AN4 licence of Carnegie Mellon University (BSD-style, any use); the notice is in the file LICENSE"
NOTE = (
    "AN4 has no validation set. Here {count} training speakers are held out: of those whose name "
    "begins with f and of those with m, the {each} whose name has the smallest SHA-256. train and valid "
    "together are the {train} training utterances."
)
FOLDERS = {"train": "an4_clstk", "test": "an4test_clstk"}
FILLERS = {"<s>", "</s>", "<sil>"}  # marks of silence in the published lists, not words


@dataclass(frozen=True)
class Utterance:
    """One line of the archive's lists; `path` is that of the wave, below `an4/wav` and without its ending."""

    path: str
    speaker: str
    id: str
    transcript: str


def _wrong(place: str, what: str) -> DataError:
    return DataError(f"{place}: {what}; the archive is not complete or is not AN4, fetch it again")


def validation_speakers(speakers: Iterable[str], each: int = AN4.held_out) -> list[str]:
    """The held-out speakers: of those named f... and of those named m..., `each` with the smallest SHA-256.

    Raises:
        DataError: there are not more than `each` speakers of a kind, so none would be left to train on.
    """
    chosen = []
    for kind in "fm":
        names = {name for name in speakers if name.startswith(kind)}
        if len(names) <= each:
            place = "an4/etc/an4_train.fileids"
            raise _wrong(place, f"only {len(names)} speakers whose name begins with {kind}")
        chosen += sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:each]
    return sorted(chosen)


def parse_transcript(line: str) -> tuple[str, str]:
    """Split `<s> YES </s> (an251-fash-b)`, with or without the marks, into the id and the words in capitals.

    Raises:
        ValueError: the line has another form.
    """
    match = re.fullmatch(r"(.*\S)\s*\(([\w-]+)\)\s*", line)
    if not match:
        raise ValueError("not of the form WORDS (id)")
    words = " ".join(word for word in match[1].split() if word.lower() not in FILLERS).upper()
    if not (corpus.TRANSCRIPT.fullmatch(words) and match[1].isascii()):       # a sharp s has two capitals
        raise ValueError(f"{words!r} is not words of letters and apostrophes")
    return match[2], words


def _lines(root: Path, name: str) -> list[tuple[str, str]]:
    """The lines of a list of the archive, each with its place, `name:number`; blank lines are passed over."""
    try:
        text = (root / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _wrong(f"an4/{name}", "is not in the archive") from None
    except UnicodeDecodeError as error:
        raise _wrong(f"an4/{name}", f"is not text ({error})") from None
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(f"an4/{name}:{number}", line) for number, line in lines if line]


def _read_transcripts(root: Path, split: str) -> dict[str, tuple[str, str]]:
    """Id -> (place of the line, words) of one set."""
    said: dict[str, tuple[str, str]] = {}
    for place, line in _lines(root, f"etc/an4_{split}.transcription"):
        try:
            name, words = parse_transcript(line)
        except ValueError as error:
            raise _wrong(place, f"bad transcript line, {error}") from None
        if name in said:
            raise _wrong(place, f"utterance {name} has a transcript already, {said[name][0]}")
        said[name] = place, words
    return said


def _read_set(root: Path, split: str, wanted: int) -> dict[str, Utterance]:
    """Place of the line -> utterance of one set, after its two lists and its audio were found to agree."""
    said = _read_transcripts(root, split)
    listed: dict[str, str] = {}
    found: dict[str, Utterance] = {}
    for place, line in _lines(root, f"etc/an4_{split}.fileids"):
        match = re.fullmatch(rf"{FOLDERS[split]}/([\w-]+)/([\w-]+)", line)
        if not match:
            raise _wrong(place, f"{line!r} is not {FOLDERS[split]}/speaker/id")
        speaker, name = match.groups()
        if name in listed:
            raise _wrong(place, f"utterance {name} is listed twice, first at {listed[name]}")
        if name not in said:
            raise _wrong(place, f"utterance {name} has no transcript")
        if not (root / "wav" / f"{line}.sph").is_file():
            raise _wrong(f"an4/wav/{line}.sph", f"the wave is missing, {place} names it")
        listed[name] = place
        found[place] = Utterance(line, speaker, name, said[name][1])
    for name, (place, _) in said.items():
        if name not in listed:
            raise _wrong(place, f"transcript of {name}, for which no audio is listed")
    if len(found) != wanted:
        raise _wrong(f"an4/etc/an4_{split}.fileids", f"lists {len(found)} utterances, not {wanted}")
    return found


def read_lists(root: Path, source: Source = AN4) -> dict[str, list[Utterance]]:
    """The utterances of the training and the test set in the unpacked archive at `root`.

    Raises:
        DataError: lists and audio do not agree, a count is off, an id or a speaker is in both sets.
    """
    sets = {split: _read_set(root, split, wanted) for split, wanted in source.utterances.items()}
    first: dict[str, str] = {}
    for split, part in sets.items():
        for place, utterance in part.items():
            if first.setdefault(utterance.id, split) != split:
                raise _wrong(place, f"utterance {utterance.id} is in both sets")
            if first.setdefault(f"speaker {utterance.speaker}", split) != split:
                raise _wrong(place, f"speaker {utterance.speaker} is in both sets")
    named = {f"{utterance.path}.sph" for part in sets.values() for utterance in part.values()}
    for file in sorted((root / "wav").rglob("[!.]*.sph")):
        path = file.relative_to(root / "wav").as_posix()
        if path not in named:
            raise _wrong(f"an4/wav/{path}", "audio without a transcript, no list names it")
    return {split: list(part.values()) for split, part in sets.items()}


def read_sphere(path: Path, name: str) -> np.ndarray:
    """Read 16 kHz NIST SPHERE: int16 samples (frames,), checked against the header's length and checksum.

    Raises:
        DataError: the file, called `name` in the message, is damaged or not 16 kHz, one channel, 16 bit.
    """
    try:
        header = path.read_bytes()[:1024].decode("latin-1")
        with soundfile.SoundFile(path) as file:
            kind = file.format, file.subtype, file.samplerate, file.channels
            samples = file.read(dtype="int16")
    except soundfile.LibsndfileError as error:
        raise _wrong(name, f"corrupt wave ({error.error_string})") from None
    if kind != ("NIST", "PCM_16", SAMPLE_RATE, 1):
        raise _wrong(name, f"{kind} is not SPHERE of 16 bit, 16 kHz and one channel")
    # The reader takes a truncated file without complaint, so the header's own figures are held against it.
    stated = dict(re.findall(r"^(sample_count|sample_checksum) -i (\d+)$", header, flags=re.MULTILINE))
    count = int(stated.get("sample_count", len(samples)))
    if count != len(samples):
        raise _wrong(name, f"corrupt wave, {len(samples)} samples where its header says {count}")
    if not count:
        raise _wrong(name, "a wave without samples")
    checksum = int(samples.view(np.uint16).sum(dtype=np.int64)) % 65536
    if int(stated.get("sample_checksum", checksum)) != checksum:
        raise _wrong(name, "corrupt wave, its samples do not add up to the checksum in its header")
    return samples


def _build(root: Path, folder: Path, digest: str, source: Source) -> dict:
    """Convert the unpacked archive at `root` into a corpus folder; returns the content of its corpus.json."""
    sets = read_lists(root, source)
    held_out = validation_speakers({utterance.speaker for utterance in sets["train"]}, source.held_out)
    rows = []
    with Progress("convert", sum(map(len, sets.values()))) as progress:
        for split, part in sets.items():
            for item in part:
                samples = read_sphere(root / "wav" / f"{item.path}.sph", f"an4/wav/{item.path}.sph")
                path = f"wav/{item.speaker}/{item.id}.wav"
                corpus.write_wave(folder / path, samples)
                part_of = "valid" if split == "train" and item.speaker in held_out else split
                seconds, hashed = len(samples) / SAMPLE_RATE, corpus.sha256_of(folder / path)
                rows.append(Row(item.id, item.speaker, part_of, path, seconds, item.transcript, hashed))
                progress.update()
    minutes = sum(row.seconds for row in rows) / 60
    if round(minutes, 1) != source.minutes:
        raise _wrong("an4/wav", f"{minutes:.2f} minutes of speech, not {source.minutes}")
    for notice in ("LICENSE", "README"):  # the licence asks that its notice goes with the audio
        if (root / notice).is_file():
            shutil.copyfile(root / notice, folder / notice)
    note = NOTE.format(count=len(held_out), each=source.held_out, train=len(sets["train"]))
    about = dict(name="an4", title=TITLE, licence=LICENCE, source=source.urls[0], note=note)
    return corpus.write_corpus(folder, rows=rows, archive_sha256=digest, **about)


def prepare(
    out: str | os.PathLike,
    archive: str | os.PathLike | None = None,
    *,
    sha256: str | None = None,
    force: bool = False,
    source: Source = AN4,
    say: Callable[[str], object] = print,
) -> tuple[dict, bool]:
    """Make the corpus folder `out` from the archive given, or from the published one, which is downloaded.

    The folder is built under another name and put in place when it is complete; if anything is wrong, what
    stood there stays.

    Args:
        out: the corpus folder to make.
        archive: a `.tar.gz` at hand; any digest will do, since the content is checked in full. If there is
            none, the published archive is downloaded to the folder that holds `out`.
        sha256: digest of a download to trust beside the known ones.
        force: build even if `out` is valid and made from the same archive.
        source: addresses, known digests and the counts expected.
        say: called with a line for the user.

    Returns:
        The content of corpus.json, and whether the folder was built anew.

    Raises:
        DataError: names the file, what is wrong with it and the remedy.
    """
    out = Path(out)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DataError(f"--sha256 {sha256}: is not 64 hexadecimal digits; copy the digest in full")
    accepted = {*source.known, *([sha256.lower()] if sha256 else [])}
    try:
        have = corpus.verify_corpus(out)
    except DataError:
        have = None
    if archive is None:
        if have and have["archive_sha256"] in accepted and not force:
            return have, False
        corpus.check_replaceable(out, "an4")  # before a long download, not after it
        archive = out.parent / source.urls[0].rsplit("/", 1)[1]
        digest = download(source.urls, archive, accepted)
    elif not Path(archive).is_file():
        raise DataError(f"{missing(archive)}; give the path of the archive, or leave --archive out")
    else:
        digest = corpus.sha256_of(archive)
        if sha256 is not None and digest != sha256.lower():
            raise DataError(f"{archive}: its SHA-256 is {digest}, not {sha256}; take another copy, or leave the "
                            "option out")
    if have and have["archive_sha256"] == digest and not force:
        return have, False
    if digest not in accepted:
        say(f"warning: {archive}: its SHA-256 {digest} is not a known one; its content is checked")
    with corpus.new_folder(out, "an4") as folder, tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        unpack(archive, unpacked)
        try:
            info = _build(Path(unpacked) / "an4", folder, digest, source)
        except DataError as error:
            raise DataError(f"{archive}: {error}") from None
    return info, True


def describe(info: Mapping) -> str:
    """A line for each split and one for the hash of the corpus."""
    lines = [
        f"  {split:<5} {total['utterances']:>5} utterances {total['speakers']:>4} speakers"
        f" {total['seconds'] / 60:>6.1f} minutes"
        for split, total in info["splits"].items()
    ]
    return "\n".join([*lines, f"  manifest SHA-256 {info['manifest_sha256']}"])


def main(
    out: Annotated[Path, typer.Option(help="The corpus folder to make.")] = Path("data/an4"),
    archive: Annotated[Path | None, typer.Option(help="The archive at hand; nothing is downloaded.")] = None,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that a download, or the archive, must have.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it again even if it is up to date.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the folder and its audio.")] = False,
) -> None:
    """Prepare the AN4 speech corpus: fetch or take the archive, check it, write WAV files and a manifest."""
    try:
        if check:
            corpus.check_name(out, "an4")
            info = corpus.verify_corpus(out, f"prepare it again: python -m data_prep.an4 --out {out}")
            verdict = "is valid"
        else:
            warn = partial(typer.echo, err=True)
            info, built = prepare(out, archive, sha256=sha256, force=force, say=warn)
            verdict = "is ready" if built else "is up to date"
    except (DataError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out} {verdict}\n{describe(info)}")


if __name__ == "__main__":
    command.run(main)
