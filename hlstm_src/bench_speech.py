"""A whole recogniser, from samples to text: the engine against the model that it was packed from, in PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import torch

from . import bench, experiments, load_compact, scores
from .audio import SAMPLE_RATE
from .bench import interleaved, threads
from .corpora import SpeechCorpus
from .deepspeech2 import spectrogram
from .masks import load_tensors
from .records import LatencyRow


def speech(model: Path, corpus: SpeechCorpus, limit: int = 20, rounds: int = 5, against: Sequence[Path] = ()
           ) -> tuple[list[LatencyRow], float]:
    """Transcribes the first utterances of the test split one by one: (microseconds a second of speech, its seconds).

    against: other recognisers, each of which takes part in torch and on the engine, by the name of its experiment.
    Raises ValueError if the engine hears something else than torch.
    """
    for file in (model, *against):
        about = load_tensors(file)[1]
        if about.get("benchmark", "speech") != "speech" or "kind" in about:       # `pack` writes a kind
            raise ValueError(f"{file}: no trained recogniser, as `run` writes it")
    waves = [corpus.audio(u) for u in corpus.split("test", limit=limit)]
    seconds = sum(len(w) for w in waves) / SAMPLE_RATE

    def with_torch(file: Path):
        whole = experiments.load(file)[0]

        def run() -> list[str]:
            with torch.no_grad():
                return [scores.greedy(*whole(*spectrogram(w[None], torch.tensor([len(w)]))))[0] for w in waves]
        return run

    def with_engine(engine):
        return lambda: [engine.transcribe(w.numpy()) for w in waves]
    runs = {"torch, with all weights": with_torch(model)} | {
        name: with_engine(load_compact(model, **options)) for name, options in {
            "engine": {}, "engine, all weights": {"kind": "dense"}, "engine, int8": {"values": "int8"},
            "engine, two threads": {"threads": 2}}.items()}
    for other in against:
        name = experiments.load(other)[2].get("experiment", other.stem)
        runs |= {f"{name}, torch": with_torch(other), f"{name}, engine": with_engine(load_compact(other))}
    if runs["torch, with all weights"]() != runs["engine"]():
        raise ValueError(f"{model}: the engine hears something else than torch; please report it")
    with threads(1):
        took = interleaved(runs, rounds)
    return [LatencyRow(engine=name, threads=2 if "two" in name else 1, case="a second of speech",
                       microseconds=1e6 * t / seconds) for name, t in took.items()], seconds


def start(model: Path, sound: Path) -> tuple[float, float]:
    """A fresh process that transcribes one file, its code compiled before: (seconds until it ends, peak MB)."""
    return bench.start("import sys; from hlstm_src import load_compact\n"
                       "load_compact(sys.argv[1]).transcribe(sys.argv[2])", model, sound)
