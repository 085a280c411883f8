"""Whole captions, from a picture's feature to words: the engine against the model it was packed from, in PyTorch."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import experiments, load_compact
from .bench import interleaved, rows_of, start, threads
from .compact import format, pack
from .compact.captioner import Captioner
from .masks import load_tensors
from .records import LatencyRow

PRUNED = 0.9                           # of the output projection, in a contestant that is here for its speed alone


@dataclass
class Timed:
    """Rows of microseconds a caption, and how many words the captions of each contestant have, by (case, engine)."""
    rows: list[LatencyRow]
    words: dict[tuple[str, str], float]


def check(*files: Path) -> None:
    """Raises ValueError for a file that is no trained captioner."""
    for file in files:
        about = load_tensors(file)[1]
        if about.get("benchmark") != "captions" or "kind" in about:            # `pack` writes a kind
            raise ValueError(f"{file}: no trained captioner, as `run` writes it")


def captions(model: Path, features: torch.Tensor, rounds: int = 5, beams: tuple[int, ...] = (1, 2),
             against: Sequence[Path] = ()) -> Timed:
    """Captions pictures one by one on one thread. features (N, D), or pixels for the encoder `tiny`.

    against: other captioners that read the same features; each takes part in torch and on the engine.

    The contestant whose output is pruned by magnitude, without training, says something else: its captions take other
    numbers of steps. Raises ValueError for a file that is no trained captioner, for two of one name, or if the engine
    says something else than torch.
    """
    check(model, *against)
    pictures, timed = features.numpy(), Timed([], {})
    contestants = {"torch, with all weights": _torch(model, features)}
    contestants |= {name: _engine(made, pictures) for name, made in {
        "engine": load_compact(model), "engine, all weights": load_compact(model, kind="dense"),
        "engine, int8": load_compact(model, values="int8"),
        f"engine, output pruned by {PRUNED:.0%}": _pruned(model)}.items()}
    for other in against:
        name = experiments.load(other)[2].get("experiment", other.stem)
        if f"{name}, torch" in contestants:
            raise ValueError(f"{other}: {name} takes part already; a name stands for one network")
        contestants |= {f"{name}, torch": _torch(other, features),
                        f"{name}, engine": _engine(load_compact(other), pictures)}
    for beam in beams:
        case, runs = f"a caption, beam {beam}", {name: partial(say, beam) for name, say in contestants.items()}
        said = {name: run() for name, run in runs.items()}
        if said["engine"] != said["torch, with all weights"]:
            raise ValueError(f"{model}: the engine says something else than torch; please report it")
        timed.words |= {(case, name): np.mean([len(text.split()) for text in texts]) for name, texts in said.items()}
        with threads(1):
            timed.rows += rows_of(interleaved(runs, rounds), case, 1, len(pictures))
    return timed


def _torch(model: Path, features: torch.Tensor) -> Callable[[int], list[str]]:
    """The captions at a beam, by PyTorch, picture by picture."""
    whole, _, metadata = experiments.load(model)

    def say(beam: int) -> list[str]:
        ids = [whole.caption(x[None], beam, metadata["longest"])[0] for x in features]
        return [" ".join(metadata["vocabulary"][k - 1] for k in said) for said in ids]
    return say


def _engine(captioner: Captioner, pictures: np.ndarray) -> Callable[[int], list[str]]:
    return lambda beam: [captioner.caption(x, beam) for x in pictures]


def _pruned(model: Path) -> Captioner:
    """The captioner with only the largest of its output's weights."""
    tensors, masks, metadata = pack.read(model)
    size = np.abs(tensors["output.weight"])
    masks["output.weight"] = size >= np.quantile(size, PRUNED)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "pruned.safetensors"
        format.write(file, tensors, masks, {**metadata, "format": format.FORMAT})
        return load_compact(file)


ENGINE = """
from hlstm_src import load_compact
load_compact(sys.argv[1]).caption(numpy.load(sys.argv[2]))
"""
TORCH = """
import torch
from hlstm_src import experiments
torch.set_num_threads(1)
experiments.load(Path(sys.argv[1]))[0].caption(torch.from_numpy(numpy.load(sys.argv[2]))[None], 2)
"""


def starts(model: Path, feature: torch.Tensor) -> dict[str, tuple[float, float]]:
    """By contestant, of a fresh process that captions one picture: (seconds until it ends, peak MB)."""
    with tempfile.TemporaryDirectory() as room:
        np.save(file := Path(room) / "feature.npy", feature.numpy())
        return {name: start(f"import sys, numpy; from pathlib import Path{code}", model, file)
                for name, code in (("torch, with all weights", TORCH), ("engine", ENGINE))}
