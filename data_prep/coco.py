"""Prepare MSCOCO by Karpathy's split, the corpus of the paper's captioner.

123,287 photographs of 2014 with five sentences each: 5,000 are for validation, 5,000 for the test, and the rest,
"restval" included, is for training.

    python -m data_prep.coco --out data/coco --sha256 DIGEST --sha256 DIGEST --sha256 DIGEST
    python -m data_prep.coco --out data/coco --captions dataset_coco.json --images FOLDER

The second form takes what is on disk, with `train2014` and `val2014` below FOLDER. The first downloads three
archives, 19 GB, into the folder that holds `out`. Those who publish them give no SHA-256, and none is built in
here: the first run downloads what it can, says which digest each file has, and stops. Compare them with what you
know, and pass those you trust. A download, and the unpacking, go on where they were stopped.
"""

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_prep import command
from data_prep.captions import describe, verify_corpus
from data_prep.corpus import DataError, check_name, check_replaceable
from data_prep.fetch import download, unpack_zip
from data_prep.karpathy import prepare_folder
from hlstm_src.errors import told

MIN_COUNT = 5  # as NeuralTalk and NeuralTalk2


@dataclass(frozen=True)
class Source:
    """Where the archives are, which digests are known, and what the split holds."""

    urls: Mapping[str, str] = field(
        default_factory=lambda: {
            "caption_datasets.zip": "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "train2014.zip": "http://images.cocodataset.org/zips/train2014.zip",
            "val2014.zip": "http://images.cocodataset.org/zips/val2014.zip",
        }
    )
    known: frozenset[str] = frozenset()
    pictures: Mapping[str, int] = field(default_factory=lambda: {"train": 113_287, "valid": 5_000, "test": 5_000})


COCO = Source()


def fetch(folder: Path, trusted: Collection[str], source: Source, say: Callable[[str], object]) -> Path:
    """Download and unpack all archives into `folder`; returns where they are unpacked.

    Raises:
        DataError: an archive could not be downloaded, or its digest is not trusted; there is a line for each.
    """
    if not {*source.known, *trusted}:
        say("note: no SHA-256 of these archives is known; the download stops when it knows them, see --sha256")
    problems = []
    for name, url in source.urls.items():
        try:
            download([url], folder / name, {*source.known, *trusted}, max_bytes=1 << 35, by_hand=None)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    unpacked = folder / "coco.unpacked"
    for name in source.urls:
        unpack_zip(folder / name, unpacked)
    return unpacked


def prepare(
    out: Path,
    captions: Path | None = None,
    images: Path | None = None,
    *,
    sha256: Collection[str] = (),
    min_count: int = MIN_COUNT,
    skip_empty: bool = False,
    source: Source = COCO,
    say: Callable[[str], object] = print,
) -> tuple[dict, bool]:
    """Make the corpus folder `out` from files on disk, or from the published archives.

    Args:
        captions, images: `dataset_coco.json` and the folder of `train2014` and `val2014`; both or neither.
        sha256: digests of archives to trust.
        source: addresses, known digests and sizes of the splits.
        say: called with a line for the user.

    Returns:
        The content of corpus.json, and whether the folder was built anew.

    Raises:
        DataError: names the file, what is wrong with it and the remedy.
    """
    for value in sha256:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise DataError(f"--sha256 {value}: is not 64 hexadecimal digits; copy the digest in full")
    if (captions is None) != (images is None):
        raise DataError("give both --captions and --images, or neither to download")
    check_replaceable(out, "coco")  # before a long download, not after it
    unpacked = None
    if captions is None:
        unpacked = fetch(out.parent, {value.lower() for value in sha256}, source, say)
        captions, images = unpacked / "dataset_coco.json", unpacked
    made = prepare_folder(
        out, captions, images, min_count=min_count, skip_empty=skip_empty, expected=source.pictures
    )
    if unpacked:
        shutil.rmtree(unpacked)  # the pictures have their second name in the corpus
    return made


def main(
    out: Annotated[Path, typer.Option(help="The corpus folder to make.")] = Path("data/coco"),
    captions: Annotated[Path | None, typer.Option(help="dataset_coco.json at hand; nothing is downloaded.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder that holds train2014 and val2014.")] = None,
    sha256: Annotated[list[str] | None, typer.Option(help="SHA-256 of an archive that you trust; repeat it.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="A word of the vocabulary occurs so often.")] = MIN_COUNT,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out captions without a word.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only verify the folder and its pictures.")] = False,
) -> None:
    """Prepare MSCOCO by the Karpathy split: fetch or take it, check it, write tables and a vocabulary."""
    try:
        if check:
            check_name(out, "coco")
            info, verdict = verify_corpus(out), "is valid"
        else:
            warn = partial(typer.echo, err=True)
            options = dict(sha256=sha256 or (), min_count=min_count, skip_empty=skip_empty, say=warn)
            info, built = prepare(out, captions, images, **options)
            verdict = "is ready" if built else "is up to date"
    except (DataError, OSError) as error:
        for line in told(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out} {verdict}\n{describe(info)}")


if __name__ == "__main__":
    command.run(main)
