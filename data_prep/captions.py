"""The folder of a caption corpus: what the programs of `data_prep` write and the captioners read.

    corpus.json      name, licence, source, totals by split, and the SHA-256 of the three files below
    manifest.csv     one row a picture: id, split, path, sha256
    captions.csv     one row a caption: the picture's id, its tokens, the sentence as it was written
    vocabulary.txt   the words a captioner can say, the most frequent first; line k is the word with id k
    images/...       the pictures, at the paths the manifest names

`sha256` in corpus.json is the digest of the three files one after the other: it stands for the whole corpus,
and run records quote it. Features depend on pictures alone and go by the digest of manifest.csv.
"""

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.corpus import REMEDY, SPLITS, DataError, new_folder, sha256_of, write_atomic
from data_prep.fetch import Progress

SCHEMA = 1
LONGEST = 16  # words of a caption that a captioner learns, as in NeuralTalk2
UNKNOWN = "UNK"  # stands for every word that is not in the vocabulary; tokens are in lower case, so none is it
PARTS = ("manifest.csv", "captions.csv", "vocabulary.txt")
# Words, with inner hyphens, apostrophes, dots and commas; n't, 's and the like are words of their own.
CLITIC = r"'(?:s|m|d|re|ve|ll)\b"
TOKENS = re.compile(rf"\w+(?=n't\b)|n't\b|{CLITIC}|\d+(?:[.,:]\d+)+|\w+(?:(?:-|'(?!{CLITIC[1:]}))\w+)*")


@dataclass(frozen=True)
class Scene:
    """One picture on its way into a corpus: its file, where that goes below `images/`, and its sentences."""

    id: str
    split: str
    file: Path
    path: str
    sentences: tuple[str, ...]


def tokenize(sentence: str) -> list[str]:
    """Words of a sentence in lower case and without punctuation, as the Penn treebank splits them.

    It does by regular expressions what the PTB tokeniser of the caption scores does in Java: "don't" gives
    `do n't`, "the tree's" gives `the tree 's`, and a hyphen stays inside its word. Unlike there, brackets go
    with the rest of the punctuation, and a slash parts two words.
    """
    plain = sentence.lower().replace("\u2019", "'").replace("_", " ")
    return TOKENS.findall(re.sub(r"\bcannot\b", "can not", plain))


def build_vocabulary(captions: Iterable[list[str]], min_count: int) -> list[str]:
    """`UNKNOWN`, then the words that occur at least `min_count` times, the most frequent first."""
    counts = Counter(word for caption in captions for word in caption)
    kept = [word for word, count in counts.items() if count >= min_count]
    return [UNKNOWN, *sorted(kept, key=lambda word: (-counts[word], word))]


def default_min_count(captions: int) -> int:
    """5, as NeuralTalk has it, for a corpus of 50,000 training captions or more; 2 for a smaller one.

    A word that was seen once teaches a model little, but it gives the unknown word something to stand for.
    """
    return 5 if captions >= 50_000 else 2


def plain_path(path: str) -> bool:
    """Whether a path is relative, stays in its folder, uses '/' and holds no character that cannot be seen."""
    parts = PurePosixPath(path)
    return bool(parts.parts) and path.isprintable() and not (
        parts.is_absolute() or ".." in parts.parts or "\\" in path)


def _check(scenes: list[Scene], where: str) -> None:
    """Raise DataError if two scenes have the same id or path, or a split is unknown or empty."""
    ids: set[str] = set()
    paths: set[str] = set()
    for scene in scenes:
        for value, seen, what in ((scene.id, ids, "id"), (scene.path, paths, "file")):
            if value in seen:
                raise DataError(f"{where}: {what} {value!r} stands there twice; correct the file or fetch it again")
            seen.add(value)
    for split in SPLITS:
        if not any(scene.split == split for scene in scenes):
            raise DataError(f"{where}: no picture in split {split}; correct the file or fetch it again")


def _place(source: Path, target: Path) -> None:
    """Bring a picture into the corpus: a second name for the same bytes where the disk allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)                  # not a link to a link, which may lead nowhere soon
    except OSError:
        shutil.copyfile(source, target)


def _table(header: tuple[str, ...], rows: Iterable[tuple]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue().encode()


class _UpToDate(Exception):
    """What was built is what stands there already."""


def write_corpus(
    out: str | os.PathLike,
    scenes: Iterable[Scene],
    *,
    name: str,
    title: str,
    licence: str,
    source: str,
    captions_sha256: str | None = None,
    min_count: int | None = None,
    note: str = "",
    beside: Iterable[Path] = (),
    where: str = "captions",
) -> tuple[dict, bool]:
    """Build a caption corpus under another name and put it at `out` when it is complete.

    Features that stand at `out` stay if the pictures are the same ones.

    Args:
        scenes: pictures and their sentences; they are brought into the order of splits, then as they come.
        captions_sha256: digest of the file that the sentences come from.
        min_count: a word of the vocabulary occurs so often in the training captions; see `default_min_count`.
        beside: files to keep with the corpus, such as its licence.
        where: the file that messages name.

    Returns:
        The content of corpus.json, and whether the folder is new: one that holds the same already is left alone.

    Raises:
        DataError: a picture is missing, an id or path stands there twice, a split is empty, or `out` holds
            something else.
    """
    out = Path(out)
    scenes = sorted(scenes, key=lambda scene: SPLITS.index(scene.split))
    _check(scenes, where)
    tokens = {scene.id: [tokenize(sentence) for sentence in scene.sentences] for scene in scenes}
    learned = [caption for scene in scenes if scene.split == "train" for caption in tokens[scene.id]]
    min_count = default_min_count(len(learned)) if min_count is None else min_count
    words = build_vocabulary(learned, min_count)
    if words == [UNKNOWN]:
        raise DataError(f"{where}: no word stands {min_count:,} times in the training captions; "
                        "choose a smaller --min-count")
    try:
        with new_folder(out, name) as folder:
            rows = []
            with Progress("pictures", len(scenes)) as progress:
                for scene in scenes:
                    if not scene.file.is_file():
                        raise DataError(
                            f"{scene.file}: the picture of {scene.id!r} is missing, {where} names it; "
                            "give the folder with all pictures, or fetch them again"
                        )
                    path = f"images/{scene.path}"
                    _place(scene.file, folder / path)
                    rows.append((scene.id, scene.split, path, sha256_of(folder / path)))
                    progress.update()
            said = [
                (scene.id, " ".join(caption), sentence)
                for scene in scenes
                for caption, sentence in zip(tokens[scene.id], scene.sentences)
            ]
            parts = {
                "manifest.csv": _table(("id", "split", "path", "sha256"), rows),
                "captions.csv": _table(("id", "tokens", "raw"), said),
                "vocabulary.txt": "".join(f"{word}\n" for word in words).encode(),
            }
            for part, data in parts.items():
                write_atomic(folder / part, data)
            for file in beside:
                shutil.copyfile(file, folder / file.name)
            info = {
                "schema": SCHEMA,
                "kind": "captions",
                "name": name,
                "title": title,
                "licence": licence,
                "source": source,
                "note": note,
                "captions_sha256": captions_sha256,
                "min_count": min_count,
                "longest": LONGEST,
                "words": len(words),
                "splits": {
                    split: {
                        "pictures": sum(scene.split == split for scene in scenes),
                        "captions": sum(len(scene.sentences) for scene in scenes if scene.split == split),
                    }
                    for split in SPLITS
                },
                "sha256": hashlib.sha256(b"".join(parts.values())).hexdigest(),
            }
            text = (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode()
            write_atomic(folder / "corpus.json", text)
            if _same(out / "corpus.json", text) and _sound(out):
                raise _UpToDate
            if (out / "features").is_dir() and _same(out / "manifest.csv", parts["manifest.csv"]):
                shutil.copytree(out / "features", folder / "features", copy_function=_place_path)
    except _UpToDate:
        return info, False
    return info, True


def _place_path(source: str, target: str) -> None:
    _place(Path(source), Path(target))


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _sound(folder: Path) -> bool:
    try:
        verify_corpus(folder)
    except DataError:
        return False
    return True


def verify_corpus(folder: str | os.PathLike, remedy: str = REMEDY) -> dict:
    """Check a corpus folder in full, the SHA-256 of every picture included, and return its corpus.json.

    Raises:
        DataError: names the first file that is missing or differs.
    """
    from hlstm_src.corpora import CaptionCorpus, CorpusError  # torch: only where it is needed

    try:
        corpus = CaptionCorpus(folder)
    except CorpusError as error:
        raise DataError(str(error)) from None
    for picture in corpus.pictures:
        if not picture.path.is_file():
            raise DataError(f"{picture.path}: the picture {picture.id!r} is missing; {remedy}")
        if sha256_of(picture.path) != picture.sha256:
            raise DataError(f"{picture.path}: differs from the picture that the manifest describes; {remedy}")
    return corpus.info


def describe(info: dict) -> str:
    """A line for each split, and one each for the vocabulary and the hash of the corpus."""
    lines = [
        f"  {split:<5} {total['pictures']:>7,} pictures {total['captions']:>8,} captions"
        for split, total in info["splits"].items()
    ]
    words = f"  {info['words']:,} words, each at least {info['min_count']} times in the training captions"
    return "\n".join([*lines, words, f"  SHA-256 {info['sha256']}"])
