"""From a trained model's file to a compact one, and what each way of storing it takes."""

import gzip
import hashlib
import tempfile
from pathlib import Path

import numpy as np

from .. import experiments, records
from . import format

KINDS = {"speech": "recogniser", "captions": "captioner"}      # what can be packed, by benchmark


def pack(source: Path, target: Path, values: str = "fp16") -> int:
    """Writes the compact file of a trained model and returns its bytes. Raises ValueError naming the file."""
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: would take the place of the trained model; give the compact file another name")
    if target.is_dir():
        raise ValueError(f"{target}: a folder; name the file to write in it")
    tensors, masks, metadata = read(source)
    kind = KINDS.get(metadata.get("benchmark", "speech"))
    if kind is None:
        raise ValueError(f"{source}: neither a recogniser nor a captioner, and only those can be packed")
    needed = {"recogniser": ("alphabet",), "captioner": ("vocabulary", "longest", "encoder", "java")}[kind]
    about = {"kind": kind, "model": metadata["model"], **{name: metadata[name] for name in needed}, "provenance": {
        "experiment": metadata.get("experiment"), "profile": metadata.get("profile"), "seed": metadata.get("seed"),
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest()}}
    path = source.with_suffix(".json")
    if path.exists():
        record = records.read(path)
        if values != "int8":                                       # which rounds once more, and has scores of its own
            about["scores"] = record.scores
        about["provenance"]["commit"] = record.provenance.commit
    return format.write(target, tensors, masks, about, values)


def sizes(source: Path) -> dict[str, int]:
    """Bytes of a model on disk: all entries as float32, alone and through gzip, and compact files."""
    tensors, masks, _ = read(source)
    whole = b"".join(np.asarray(t, np.float32).tobytes() for t in tensors.values())
    found = {"fp32, zeros too": len(whole), "the same, gzip": len(gzip.compress(whole, 6))}
    with tempfile.TemporaryDirectory() as room:
        for values in ("fp32", "fp16", "int8"):
            found[f"compact {values}"] = format.write(Path(room) / "model", tensors, masks, {}, values)
    return found


def read(source: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Tensors, masks and metadata of a trained model."""
    model, masks, metadata = experiments.load(source)
    tensors = {n: t.numpy() for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    return tensors, {n: m.numpy() for n, m in masks.items()}, metadata
