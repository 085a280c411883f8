"""A whole recogniser, from samples to text: the engine against the model that it was packed from, in PyTorch."""

from pathlib import Path

import torch

from . import bench, experiments, load_compact, scores
from .audio import SAMPLE_RATE
from .bench import interleaved, threads
from .corpora import SpeechCorpus
from .deepspeech2 import spectrogram
from .records import LatencyRow


def speech(model: Path, corpus: SpeechCorpus, limit: int = 20, rounds: int = 5) -> tuple[list[LatencyRow], float]:
    """Transcribes the first utterances of the test split one by one: (microseconds a second of speech, its seconds)."""
    waves = [corpus.audio(u) for u in corpus.split("test", limit=limit)]
    seconds = sum(len(w) for w in waves) / SAMPLE_RATE
    whole = experiments.load(model)[0]

    def with_torch() -> list[str]:
        with torch.no_grad():
            return [scores.greedy(*whole(*spectrogram(w[None], torch.tensor([len(w)]))))[0] for w in waves]

    def with_engine(engine):
        return lambda: [engine.transcribe(w.numpy()) for w in waves]
    runs = {"torch, with all weights": with_torch} | {
        name: with_engine(load_compact(model, **options)) for name, options in {
            "engine": {}, "engine, all weights": {"kind": "dense"}, "engine, int8": {"values": "int8"},
            "engine, two threads": {"threads": 2}}.items()}
    if with_torch() != runs["engine"]():
        raise ValueError(f"{model}: the engine hears something else than torch; please report it")
    with threads(1):
        took = interleaved(runs, rounds)
    return [LatencyRow(engine=name, threads=2 if "two" in name else 1, case="a second of speech",
                       microseconds=1e6 * t / seconds) for name, t in took.items()], seconds


def start(model: Path, sound: Path) -> tuple[float, float]:
    """A fresh process that transcribes one file, its code compiled before: (seconds until it ends, peak MB)."""
    return bench.start("import sys; from hlstm_src import load_compact\n"
                       "load_compact(sys.argv[1]).transcribe(sys.argv[2])", model, sound)
