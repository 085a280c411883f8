"""`load_compact`: a model file becomes a recogniser that runs on the engine, without torch. Captioners: not yet."""

from pathlib import Path

from .format import ModelFile
from .recogniser import Recogniser


def load_compact(path: str | Path, *, values: str = "fp32", kind: str | None = None, threads: int = 1) -> Recogniser:
    """Opens a model file that `pack` or training wrote and packs its matrices for this CPU.

    values: how weights are held while running, "fp32", "bf16" or "int8"; kind forces one layout (see layouts.py);
    threads=2 runs the two directions of a layer side by side. Raises ModelFileError for a file that is missing,
    damaged, too new or of another kind.
    """
    file = ModelFile(path)
    if file.metadata.get("benchmark", file.metadata.get("kind", "speech")) not in ("speech", "recogniser"):
        raise file.error("not a recogniser")
    return Recogniser(file, values, kind, threads)
