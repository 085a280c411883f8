"""A whole recogniser, from samples to text: the engine against the model that it was packed from, in PyTorch."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from . import bench, benchmarks, experiments, load_compact, scores
from .audio import SAMPLE_RATE
from .bench import interleaved, threads
from .corpora import SpeechCorpus
from .deepspeech2 import spectrogram
from .masks import load_tensors, save_model
from .records import LatencyRow


def speech(model: Path, corpus: SpeechCorpus, limit: int = 20, rounds: int = 5, against: Sequence[Path] = ()
           ) -> tuple[list[LatencyRow], float]:
    """Transcribes the first utterances of the test split one by one: (microseconds a second of speech, its seconds).

    against: other recognisers, each of which takes part in torch and on the engine, by the name of its experiment. The
    name of a dense one will do, as `ds2-gru4`: it is timed untrained, in the size of `model`'s profile, since the time
    of a dense network depends on its shape alone. Raises ValueError for two of one name, or if the engine hears
    something else than torch.
    """
    with tempfile.TemporaryDirectory() as room:
        profile = load_tensors(model)[1].get("profile", "laptop")
        return _speech(model, corpus, limit, rounds, [
            untrained(str(other), profile, Path(room)) if str(other) in experiments.CATALOGUE else other
            for other in against])


def untrained(name: str, profile: str, folder: Path) -> Path:
    """A model file of a dense recogniser as it is before training. Raises ValueError for a sparse one."""
    made = experiments.recipe(name, profile)
    if made.benchmark != "speech" or experiments.plan(made, 0)[0] is not None:
        raise ValueError(f"{name}: no dense recogniser; name the file of one that is trained")
    torch.manual_seed(0)
    model, path = benchmarks.Speech.make(**made.model), folder / f"{name}.safetensors"
    save_model(path, model, None, {"format": 1, "experiment": name, "profile": profile, "benchmark": made.benchmark,
                                   "model": made.model, **benchmarks.Speech.about(made.task)})
    return path


def _speech(model: Path, corpus: SpeechCorpus, limit: int, rounds: int, against: Sequence[Path]
            ) -> tuple[list[LatencyRow], float]:
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
        if f"{name}, torch" in runs:
            raise ValueError(f"{other}: {name} takes part already; a name stands for one network")
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
