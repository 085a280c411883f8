"""`load_compact`: a model file becomes a recogniser or a captioner that runs on the engine, without torch."""

from pathlib import Path

from .captioner import Captioner
from .format import ModelFile
from .recogniser import Recogniser


def load_compact(path: str | Path, *, values: str = "fp32", kind: str | None = None,
                 threads: int = 1) -> Recogniser | Captioner:
    """Opens a model file that `pack` or training wrote and packs its matrices for this CPU.

    values: how weights are held while running, "fp32", "bf16" or "int8"; kind forces one layout (see layouts.py);
    threads=2 runs the two directions of a recogniser's layer side by side. Raises ModelFileError for a file that is
    missing, damaged, too new or of another kind.
    """
    file = ModelFile(path)
    kind_of_model = file.metadata.get("kind", file.metadata.get("benchmark", "speech"))
    if kind_of_model in ("recogniser", "speech"):
        return Recogniser(file, values, kind, threads)
    if kind_of_model in ("captioner", "captions"):
        return Captioner(file, values, kind)
    raise file.error("neither a recogniser nor a captioner")
