"""Run an image encoder over the pictures of a caption corpus, once, and store what it says.

    python -m data_prep.features --corpus data/ucm --encoder efficientnet_lite0

The store is `features/<encoder>.safetensors` in the corpus folder: float16, one row a picture in the order of
manifest.csv, with the digest of that manifest and of the encoder's weights. A run that was stopped goes on where
it was. For the encoder `tiny`, which is trained with the captioner, the rows are pixels (3 x 64 x 64, uint8);
small corpora need no such store, since the reader can take the pixels from the pictures.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from data_prep import command
from data_prep.corpus import write_atomic
from data_prep.fetch import Progress
from hlstm_src.corpora import CaptionCorpus, CorpusError, Picture, UndecodablePicture
from hlstm_src.encoders import Encoder, EncoderError, load_encoder
from hlstm_src.errors import told
from hlstm_src.files import alone

BATCH = {"cpu": 4}  # pictures at a time; on a CPU large batches are slower, because they fall out of its cache


def _about(corpus: CaptionCorpus, encoder: Encoder) -> dict[str, str]:
    """What a store says of itself; safetensors keeps strings."""
    return {
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "corpus": corpus.name,
        "manifest_sha256": corpus.manifest_sha256,
    }


def _made_by(path: Path, about: dict[str, str]) -> list[str] | None:
    """The skipped pictures of the store at `path`, if it is there and `about` fits it."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
        return json.loads(found["skipped"]) if found.items() >= about.items() else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _rows(
    corpus: CaptionCorpus, encoder: Encoder, batch: list[Picture], skip_broken: bool, skipped: list[str]
) -> torch.Tensor:
    """Features (B, ...) of a batch; pictures that do not decode are added to `skipped` and have rows of zeros."""
    images, places = [], []
    for k, picture in enumerate(batch):
        try:
            images.append(corpus.image(picture))
            places.append(k)
        except UndecodablePicture:
            if not skip_broken:
                raise
            skipped.append(picture.id)
    rows = torch.zeros(len(batch), *encoder.shape, dtype=encoder.dtype)
    if images:
        rows[places] = encoder(images).to(encoder.dtype)
        if not rows.isfinite().all():
            where = batch[int((~rows.isfinite()).flatten(1).any(1).nonzero()[0])]
            raise CorpusError(f"{where.path}: its feature is infinite or beyond what float16 holds; are these the "
                              f"weights of {encoder.name}?")
    return rows


def store_features(
    corpus: CaptionCorpus,
    encoder: Encoder,
    *,
    skip_broken: bool = False,
    say: Callable[[str], object] = print,
) -> tuple[Path, bool]:
    """Write the feature store of an encoder into the corpus folder.

    Args:
        skip_broken: leave out pictures that do not decode, with a line for each, instead of refusing them.
        say: called with a line for the user.

    Returns:
        The store, and whether there was anything to do.

    Raises:
        CorpusError: a picture is missing, changed or does not decode, its feature is beyond float16, or another
            process is making the store. What was done so far is kept.
    """
    path = corpus.folder / "features" / f"{encoder.name}.safetensors"
    try:
        with alone(path):
            return _store(path, corpus, encoder, skip_broken, say)
    except BlockingIOError:
        raise CorpusError(f"{path}: another process is making it; wait for it, or stop it") from None


def _store(path: Path, corpus: CaptionCorpus, encoder: Encoder, skip_broken: bool, say: Callable) -> tuple[Path, bool]:
    """`store_features`, by one process at a time."""
    part, state = path.with_suffix(".rows.part"), path.with_suffix(".json.part")
    about, pictures = _about(corpus, encoder), corpus.pictures
    skipped = _made_by(path, about)
    if skipped is not None and (skip_broken or not skipped):
        return path, False
    try:
        kept = json.loads(state.read_text())
        begun = kept["about"] == about and isinstance(kept["skipped"], list) and part.exists()
    except (OSError, ValueError, KeyError, TypeError):
        begun = False
    size = BATCH.get(encoder.device, 64)
    width = int(np.prod(encoder.shape)) * encoder.dtype.itemsize
    done = part.stat().st_size // (width * size) * size if begun else 0
    first = {picture.id for picture in pictures[:done]}
    skipped = [name for name in kept["skipped"] if name in first] if begun else []
    if skipped and not skip_broken:
        done, skipped = 0, []
    progress = Progress("features", len(pictures), "pictures", done)
    with open(part, "r+b" if begun else "wb") as file, progress as bar:
        file.seek(done * width)
        for start in range(done, len(pictures), size):
            batch = pictures[start : start + size]
            before = len(skipped)
            rows = _rows(corpus, encoder, batch, skip_broken, skipped)
            for name in skipped[before:]:
                say(f"skipped: the picture {name!r} does not decode")
            if start == done or len(skipped) > before:  # before the rows: a row that is there is accounted for
                write_atomic(state, json.dumps({"about": about, "skipped": skipped}).encode())
            file.write(rows.numpy().tobytes())
            file.flush()
            bar.update(len(batch))
    dtype = np.uint8 if encoder.dtype == torch.uint8 else np.float16
    rows = torch.from_numpy(np.fromfile(part, dtype).reshape(len(pictures), *encoder.shape))
    about |= {"weights": encoder.weights, "skipped": json.dumps(skipped)}
    write_atomic(path, save({"features": rows}, metadata=about))
    part.unlink()
    state.unlink(missing_ok=True)
    return path, True


def check_device(device: str) -> None:
    """Raise EncoderError if torch cannot run on a device of this name here."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise EncoderError(f"--device {device}: cannot be used here ({reason}); leave it out for the CPU") from None


def main(
    corpus: Annotated[Path, typer.Option(help="A caption corpus, made by data_prep.karpathy or data_prep.coco.")],
    encoder: Annotated[str, typer.Option(help="vgg16, efficientnet_lite0 or tiny.")],
    weights: Annotated[str | None, typer.Option(help="vgg16: a file of weights, or 'random' for a trial.")] = None,
    device: Annotated[str, typer.Option(help="Where the encoder runs: cpu, cuda.")] = "cpu",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures that do not decode.")] = False,
) -> None:
    """Store the features of every picture of a caption corpus."""
    try:
        check_device(device)
        opened = CaptionCorpus(corpus)
        path, new = store_features(opened, load_encoder(encoder, weights, device), skip_broken=skip_broken)
    except (CorpusError, EncoderError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{path} {'is ready' if new else 'is up to date'}: {len(opened.pictures):,} pictures")


if __name__ == "__main__":
    command.run(main)
