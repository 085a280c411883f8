"""Prepare a caption corpus: pictures with sentences, in the layout of Karpathy's split files.

    python -m data_prep.karpathy --archive ucm_captions.tar.gz --out data/ucm
    python -m data_prep.karpathy --captions dataset_flickr8k.json --images Flicker8k_Dataset --out data/flickr8k

The layout, which MSCOCO, Flickr8k, Flickr30k and others are published in, is one JSON file,
`{"dataset": ..., "images": [{"filename", "split", "sentences": [{"raw"}]}]}`, beside a folder of pictures. The
annotation files of MSCOCO (`captions_*.json`) are read too; they name no split, so a hash of the picture's name
decides: of twenty pictures, eighteen train, one is for validation and one for the test.

Sentences are tokenised from `raw`, because the published `tokens` of some corpora differ from what was written.
"""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from data_prep import command
from data_prep.captions import Scene, describe, plain_path, tokenize, verify_corpus, write_corpus
from data_prep.corpus import DataError, sha256_of
from data_prep.fetch import unpack
from hlstm_src.errors import told
from hlstm_src.files import missing

SPLIT_OF = {"train": "train", "restval": "train", "val": "valid", "test": "test"}
REMEDY = "correct the file or fetch it again"
LONGEST = 10_000                       # characters of a caption: more is a mistake, and a table's cell has its limits


@dataclass(frozen=True)
class About:
    """What is known of a published corpus."""

    name: str
    title: str
    licence: str
    source: str
    note: str = ""


# By the key `dataset` of the JSON file.
KNOWN = {
    "UCM": About(
        "ucm",
        "UCM-Captions",
        "research use; do not redistribute",
        "aerial images of USGS (UC Merced Land Use), sentences by Qu, Li, Tao and Lu, CITS 2016",
        "Most sentences are near-duplicates of others, which inflates every caption score.",
    ),
    "flowers102-captions": About(
        "flowers",
        "Oxford Flowers-102 with captions",
        "research use; do not redistribute",
        "photographs by Nilsback and Zisserman 2008, sentences by Reed, Akata, Schiele and Lee 2016",
        "One reference a picture: CIDEr is low and noisy, perplexity is steadier.",
    ),
    "flickr8k": About(
        "flickr8k",
        "Flickr8k",
        "research use; the photographs belong to their authors",
        "Hodosh, Young and Hockenmaier 2013; split by Karpathy",
    ),
    "flickr30k": About(
        "flickr30k",
        "Flickr30k",
        "research use; the photographs belong to their authors",
        "Young, Lai, Hodosh and Hockenmaier 2014; split by Karpathy",
    ),
    "coco": About(
        "coco",
        "MSCOCO 2014 by the Karpathy split",
        "captions CC BY 4.0; the photographs are under their authors' Flickr terms",
        "cocodataset.org; split by Karpathy",
        "restval, the part of val2014 that is in neither valid nor test, counts as training data.",
    ),
}


def hashed_split(name: str) -> str:
    """The fixed split of a picture that has none: by SHA-256 of its name 90 % train, 5 % valid, 5 % test."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 20
    return {0: "valid", 1: "test"}.get(place, "train")


def _load(path: Path) -> dict:
    try:
        data = json.loads(path.read_bytes())
        json.dumps(data, ensure_ascii=False).encode()              # half a character cannot be written
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of the caption JSON with --captions") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); {REMEDY}") from None
    images = data.get("images") if isinstance(data, dict) else None
    if isinstance(images, list) and images and all(isinstance(image, dict) for image in images):
        if isinstance(data.get("annotations", []), list) and ("annotations" in data or "sentences" in images[0]):
            return data
    keys = ", ".join(sorted(map(str, data))[:8]) if isinstance(data, dict) else type(data).__name__
    raise DataError(
        f"{path}: key 'images' is not a list of pictures with 'sentences' (Karpathy's layout), nor is there a list "
        f"'annotations' beside it (MSCOCO's); it holds: {keys}; give a file of one of these layouts"
    )


class _Reader:
    """Reads one caption file; every message names the file and the key."""

    def __init__(self, path: Path, images: Path, skip_empty: bool):
        self.path, self.images, self.skip_empty = path, images, skip_empty
        self.seen: dict[tuple, str] = {}

    def fail(self, key: str, what: str, remedy: str = REMEDY) -> DataError:
        return DataError(f"{self.path}: {key}: {what}; {remedy}")

    def get(self, item: object, key: str, place: str, kind: type | tuple[type, ...]):
        value = item.get(key) if isinstance(item, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"{place}.{key}", "is missing" if value is None else f"is {value!r}")
        return value

    def once(self, item: dict, key: str, place: str) -> None:
        """An id, where there is one, stands for one thing alone."""
        if (value := item.get(key)) is not None:
            first = self.seen.setdefault((key, str(value)), place)
            if first != place:
                raise self.fail(f"{place}.{key}", f"the id {value!r} is that of {first} already")

    def sentence(self, item: dict, key: str, place: str) -> str | None:
        text = " ".join(self.get(item, key, place, str).split())
        if len(text) > LONGEST:
            raise self.fail(f"{place}.{key}", f"the caption has {len(text):,} characters, more than {LONGEST:,}")
        if tokenize(text):
            return text
        if self.skip_empty:
            return None
        raise self.fail(f"{place}.{key}", f"the caption {text!r} has no word", f"{REMEDY}, or pass --skip-empty")

    def scene(self, name: str, split: str, file: str, sentences: list[str | None], place: str) -> Scene:
        if not plain_path(file):
            raise self.fail(place, f"the file name {file!r} is not a plain relative path")
        file = str(PurePosixPath(file))                            # "./1.jpg" is "1.jpg"
        said = tuple(sentence for sentence in sentences if sentence)
        if not said:
            raise self.fail(place, f"the picture {file!r} has no caption")
        path, flat = self.images / file, self.images / PurePosixPath(file).name
        return Scene(name, split, flat if flat.is_file() and not path.is_file() else path, file, said)

    def karpathy(self, data: dict) -> list[Scene]:
        scenes = []
        for n, image in enumerate(data["images"]):
            place = f"images[{n}]"
            for key in ("imgid", "cocoid"):
                self.once(image, key, place)
            split = self.get(image, "split", place, str)
            if split not in SPLIT_OF:
                raise self.fail(f"{place}.split", f"{split!r} is none of {', '.join(SPLIT_OF)}")
            sentences = []
            for k, sentence in enumerate(self.get(image, "sentences", place, list)):
                where = f"{place}.sentences[{k}]"
                sentences.append(self.sentence(sentence, "raw", where))
                self.once(sentence, "sentid", where)
            file = self.get(image, "filename", place, str)
            name = PurePosixPath(file).stem
            if image.get("cocoid") is not None:
                name = str(self.get(image, "cocoid", place, (int, str)))
                if not name.strip() or not name.isprintable():     # manifests are read line by line
                    raise self.fail(f"{place}.cocoid", f"{name!r} is no name")
            file = f"{image['filepath']}/{file}" if image.get("filepath") else file
            scenes.append(self.scene(name, SPLIT_OF[split], file, sentences, place))
        return scenes

    def coco(self, data: dict) -> list[Scene]:
        said: dict[int, list[str | None]] = {}
        for n, image in enumerate(data["images"]):
            self.once(image, "id", f"images[{n}]")
            said[self.get(image, "id", f"images[{n}]", int)] = []
        for n, item in enumerate(data["annotations"]):
            place = f"annotations[{n}]"
            number = self.get(item, "image_id", place, int)
            if number not in said:
                raise self.fail(f"{place}.image_id", f"no picture has the id {number}")
            said[number].append(self.sentence(item, "caption", place))
        scenes = []
        for n, image in enumerate(data["images"]):
            file = self.get(image, "file_name", f"images[{n}]", str)
            scenes.append(self.scene(str(image["id"]), hashed_split(file), file, said[image["id"]], f"images[{n}]"))
        return scenes


def read_scenes(path: Path, images: Path, skip_empty: bool = False) -> tuple[str, list[Scene]]:
    """The name of the data set and the pictures with their sentences, from a caption file of either layout.

    Args:
        path: the JSON file.
        images: the folder of pictures.
        skip_empty: leave captions without a word out instead of refusing them.

    Raises:
        DataError: the file has another layout, an id twice, an empty caption or a picture without any.
    """
    data, reader = _load(path), _Reader(path, images, skip_empty)
    plain = "annotations" in data
    return str(data.get("dataset") or path.stem), (reader.coco(data) if plain else reader.karpathy(data))


def _about(dataset: str) -> About:
    name = re.sub(r"[^a-z0-9]+", "_", dataset.lower()).strip("_") or "captions"
    unknown = About(name, dataset, "not stated in the file; ask those who published it", "a caption file of the user")
    return KNOWN.get(dataset, unknown)


def prepare_folder(
    out: Path,
    captions: Path,
    images: Path,
    *,
    min_count: int | None = None,
    skip_empty: bool = False,
    expected: Mapping[str, int] | None = None,
) -> tuple[dict, bool]:
    """Make the corpus folder `out` from a caption file and a folder of pictures.

    Args:
        expected: how many pictures each split must have.

    Returns:
        The content of corpus.json, and whether the folder was built anew.

    Raises:
        DataError: names the file, the key and the remedy.
    """
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; give the folder of pictures with --images")
    dataset, scenes = read_scenes(captions, images, skip_empty)
    about, counts = _about(dataset), Counter(scene.split for scene in scenes)
    if expected is not None and counts != Counter(expected):
        raise DataError(f"{captions}: key 'images' has {dict(counts)} pictures, not {dict(expected)}; {REMEDY}")
    notices = [file for file in sorted(captions.parent.iterdir())
               if file.is_file() and re.match(r"(?i)(readme|licen[cs]e)", file.name)]
    return write_corpus(
        out,
        scenes,
        name=about.name,
        title=about.title,
        licence=about.licence,
        source=about.source,
        note=about.note,
        captions_sha256=sha256_of(captions),
        min_count=min_count,
        beside=notices if captions.parent.joinpath("images") == images else (),
        where=str(captions),
    )


def prepare_archive(out: Path, archive: Path, **options) -> tuple[dict, bool]:
    """Make the corpus folder `out` from a `.tar.gz` with one `dataset*.json` and its pictures in `images/` beside it.

    Raises:
        DataError: the archive is damaged, harmful or of another layout, or see `prepare_folder`.
    """
    if not archive.is_file():
        raise DataError(f"{missing(archive)}; give the path of the archive with --archive")
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as scratch:
        unpack(archive, scratch)
        found = sorted(Path(scratch).rglob("dataset*.json"))
        if len(found) != 1:
            raise DataError(f"{archive}: holds {len(found)} files dataset*.json, not one; give another archive")
        try:
            return prepare_folder(out, found[0], found[0].parent / "images", **options)
        except DataError as error:
            raise DataError(f"{archive}: {str(error).replace(scratch + os.sep, '')}") from None


def main(
    out: Annotated[Path, typer.Option(help="The corpus folder to make.")],
    archive: Annotated[Path | None, typer.Option(help="A .tar.gz with dataset.json and images/.")] = None,
    captions: Annotated[Path | None, typer.Option(help="A caption JSON, Karpathy's layout or MSCOCO's.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of its pictures.")] = None,
    min_count: Annotated[int | None, typer.Option(min=1, help="A word of the vocabulary occurs so often.")] = None,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out captions without a word.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the folder and its pictures.")] = False,
) -> None:
    """Prepare a caption corpus: check it, tokenise its sentences once, write tables and a vocabulary."""
    options = dict(min_count=min_count, skip_empty=skip_empty)
    try:
        if check:
            info, verdict = verify_corpus(out), "is valid"
        else:
            if archive and not (captions or images):
                info, built = prepare_archive(out, archive, **options)
            elif captions and images and not archive:
                info, built = prepare_folder(out, captions, images, **options)
            else:
                raise DataError("give either --archive, or --captions and --images")
            verdict = "is ready" if built else "is up to date"
    except (DataError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out} {verdict}\n{describe(info)}")


if __name__ == "__main__":
    command.run(main)
