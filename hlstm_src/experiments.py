"""`run` turns a recipe of the catalogue (recipes.py) into a record, and a record's model back into scores.

    record = run("ds2-lstm5", "laptop", seed=0)

returns the record if it is up to date and otherwise trains. Records of desk, wide and paper are history: they
are made anew only with `force=True`.
"""

import hashlib
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from . import benchmarks, records, rivals
from .corpora import CaptionCorpus, CorpusError, SpeechCorpus
from .deepspeech2 import DeepSpeech2, spectrogram
from .encoders import Pretrained
from .files import alone, replacing
from .masks import ConnectionMasks, load_model, load_tensors, save_model
from .neuraltalk import NeuralTalk
from .profiles import Profile, place
from .profiles import profile as sizes_of
from .recipes import CATALOGUE, Recipe, recipe  # noqa: F401 (to be had here, too)
from .schedule import Dense, GrowPruneSchedule
from .tasks import SpeechTask
from .toy import Interlock, ToyModel
from .training import Trainer, TrainingError, accelerator

# The code that decides what a run computes: a change in one of these makes the records of smoke and laptop stale.
CODE = [Path(__file__).parent / f"{name}.py" for name in
        ("compiled", "gates", "vectors", "tiles", "products", "team", "large", "steps", "library", "scan", "sequences",
         "lstm", "masks", "growprune", "schedule", "rivals", "audio", "deepspeech2", "decoding", "search", "neuraltalk",
         "encoders", "corpora", "scores", "caption_scores", "counting", "tasks", "toy", "benchmarks", "training",
         "recipes", "experiments", "compact/pictures")]
BENCHMARKS = {"speech": benchmarks.Speech, "toy": benchmarks.Toy, "captions": benchmarks.Captions}


def benchmark(made: Recipe, p: Profile) -> benchmarks.Speech | benchmarks.Captions | benchmarks.Toy:
    """The benchmark of a recipe, with its corpus or rules. Raises CorpusError where the corpus is missing."""
    if made.benchmark == "toy":
        return benchmarks.Toy(Interlock(**made.task["rules"]))
    if made.benchmark == "captions":
        import_module("pycocoevalcap")                             # not to be missed after an epoch only
        return benchmarks.Captions(CaptionCorpus(place(made.task["corpus"]), made.task["encoder"]))
    return benchmarks.Speech(SpeechCorpus(place(p.speech.corpus)))


def key_of(made: Recipe, corpus) -> str:
    """Recipe, corpus (whatever has a `sha256`) and training code as one hash: an equal key and an equal seed mean an
    equal result."""
    return records.fingerprint(asdict(made), corpus.sha256, CODE)


def run(name: str, profile: str = "laptop", seed: int = 0, *, force: bool = False,
        progress: bool = True) -> records.RunRecord:
    """Returns the record of an experiment, training first if there is none that is up to date.

    Writes `seed<k>.json` and the model beside it; an interrupted run goes on from its checkpoint. Raises ValueError
    for unknown names, RecordError for a damaged record of history or model of it, CorpusError, TrainingError, also
    where another process is at this run, Interrupted.
    """
    made, p = recipe(name, profile), sizes_of(profile)
    if name.endswith("-flowers") and p.kept and not p.flowers:
        raise ValueError(f"{name}: the profile {profile} has no second caption corpus; choose another profile")
    path = records.path_of(name, profile, seed)
    if path.exists() and not force and p.kept:
        records.check_model(path.with_suffix(".safetensors"))
        return records.read_at(name, profile, seed)
    bench = benchmark(made, p)
    key = key_of(made, bench)
    if path.exists() and not force:
        try:
            records.check_model(path.with_suffix(".safetensors"))
            record = records.read_at(name, profile, seed)
        except records.RecordError:        # damaged, another's, or of an older schema: scratch work, made anew
            record = None
        if record and record.key == key and path.with_suffix(".safetensors").exists():
            return record
    try:
        with alone(path) if os.environ.get("RANK", "0") == "0" else nullcontext():    # of several processes, the first
            _set_aside(path)
            return _made(name, profile, seed, made, bench, key, path, progress)
    except BlockingIOError:
        raise TrainingError(f"{name} {profile} seed {seed}: another process is training it; wait for it, or stop it"
                            ) from None


def _set_aside(path: Path) -> None:
    """A checkpoint that is older than the record is of a run that was killed when it had written the record and not
    yet removed the checkpoint: nothing is to be gone on with."""
    for checkpoint in (path.with_suffix(end) for end in (".checkpoint", ".finetune.checkpoint")):
        if path.exists() and checkpoint.exists() and checkpoint.stat().st_mtime_ns <= path.stat().st_mtime_ns:
            checkpoint.replace(checkpoint.with_suffix(".old"))
            print(f"{checkpoint}: older than the record; set aside as {checkpoint.stem}.old", file=sys.stderr)


def _made(name: str, profile: str, seed: int, made: Recipe, bench, key: str, path: Path,
          progress: bool) -> records.RunRecord:
    """Trains, and writes model and record."""
    provenance = records.provenance(bench.name, bench.sha256)
    told, files = f"{name} {profile} seed {seed}", [path.with_suffix(".checkpoint")]
    trainer = _trainer(made, bench, seed, checkpoint=files[0], key=key, name=told, progress=progress)
    trainer.train()
    if made.finetune:
        files.append(path.with_suffix(".finetune.checkpoint"))
        trainer, bench = _finetune(trainer, made, bench, seed, files[1], told, progress)
    file = path.with_suffix(".safetensors")
    with replacing(file) as part:                                  # no model beside the record of another
        save_model(part, trainer.model, trainer.masks, {"format": 1, "experiment": name, "profile": profile,
                                                        "seed": seed, "benchmark": made.benchmark,
                                                        "model": made.model | bench.sizes, **bench.about(made.task)})
        # Scores are those of the stored file, so that `evaluate` gives them again.
        model, masks, _ = load(part)
        record = records.RunRecord(
            experiment=name, profile=profile, seed=seed, title=made.title, key=key, recipe=asdict(made),
            history=trainer.history, phases=trainer.phases, **bench.results(model, trainer.task),
            counts=bench.counts(model, masks),
            model={"file": file.name, "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
                   "bytes": part.stat().st_size},
            provenance=provenance.closed(trainer.seconds, trainer.precision))
    record.save(path)
    for checkpoint in files:
        checkpoint.unlink(missing_ok=True)
    return record


def trainer(name: str, profile: str = "laptop", seed: int = 0, precision: str | None = None,
            **options) -> Trainer:
    """The trainer of an experiment before its first step, for those who want to look on; it writes nothing.

    `options` go to `Trainer`. Once trained, its history is that of the record, unless `precision` is another.
    """
    made = recipe(name, profile)
    if precision is not None:
        made = replace(made, settings=replace(made.settings, precision=precision))
    return _trainer(made, benchmark(made, sizes_of(profile)), seed, **options)


def plan(made: Recipe, seed: int) -> tuple[float | None, Dense | GrowPruneSchedule]:
    """Density of the sparse seed (None: no masks at all), and the schedule."""
    schedule = dict(made.schedule)
    if "rival" in schedule:
        return rivals.rival(schedule.pop("rival"), seed=seed, **schedule)
    return None, Dense(**schedule)


def _trainer(made: Recipe, bench, seed: int, **options) -> Trainer:
    torch.manual_seed(seed)
    model = bench.make(**made.model | bench.sizes).to(accelerator(made.settings.precision).device)
    density, schedule = plan(made, seed)
    masks = None
    if density is not None:
        masks = ConnectionMasks(model, made.masked, density, torch.Generator().manual_seed(seed))
        masks.rescale_()
    return Trainer(model, bench.task(seed, **made.task), schedule, made.settings, masks=masks, seed=seed, **options)


def _finetune(first: Trainer, made: Recipe, bench: benchmarks.Captions, seed: int, checkpoint: Path, name: str,
              progress: bool) -> tuple[Trainer, benchmarks.Captions]:
    """Trains on with the encoder learning, too (paper: Experiments); connections stay as they are.

    Returns what tells of both parts together: the trainer, and the benchmark that reads pixels. The learning rate is
    constant. Raises CorpusError where the encoder's weights are not those which made the stored features.
    """
    stored = bench.corpus.encoder_info
    bench = benchmarks.Captions(CaptionCorpus(bench.corpus.folder, bench.corpus.encoder, pixels=True))
    if bench.corpus.pixels:                                        # the encoder `tiny` learns from the start
        first.model.encoder = Pretrained(stored["encoder"], stored.get("weights") or None).to(first.accelerator.device)
        if first.model.encoder.weights_sha256 != stored["weights_sha256"]:
            raise CorpusError(f"{bench.corpus.folder}: its features were made with other weights of {stored['encoder']}"
                              "; make them again with `python -m data_prep.features`")
    settings = replace(made.settings, lr=made.finetune["lr"], decay=1.0, patience=None)
    second = Trainer(first.model, bench.task(seed, **made.task), Dense(made.finetune["epochs"], phase="finetune"),
                     settings, masks=first.masks, seed=seed, checkpoint=checkpoint, key=first.key,
                     name=f"{name}, with its encoder", progress=progress)
    second.train()
    for row in second.history:
        row["epoch"] += len(first.history)
    second.history, second.phases = first.history + second.history, first.phases
    second.seconds += first.seconds
    return second, bench


def load(file: Path) -> tuple[nn.Module, dict[str, torch.Tensor], dict]:
    """A stored model: (model in evaluation mode, its masks, its metadata). Raises ValueError naming the file."""
    metadata = _about(file)
    try:
        kind = metadata.get("benchmark", "speech")
        model = BENCHMARKS[kind].make(**metadata["model"])
        metadata[{"toy": "task", "captions": "vocabulary", "speech": "alphabet"}[kind]]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a model file of this project ({error})") from None
    return model.eval(), load_model(file, model), metadata


def _about(file: Path) -> dict:
    """The metadata of a model file as `run` writes it. Raises ValueError naming the file."""
    metadata = load_tensors(file)[1]
    if "kind" in metadata:
        raise ValueError(f"{file}: a compact file already; name the .safetensors file that it was made of")
    return metadata


def counts(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict:
    """Of one step or output frame: the recurrent matrices alone, and the whole model."""
    return next(b for b in BENCHMARKS.values() if isinstance(model, b.make)).counts(model, masks)


def open_corpus(file: Path, folder: Path) -> SpeechCorpus | CaptionCorpus:
    """The corpus in that folder as a stored model wants it. Raises CorpusError, and ValueError for a damaged file."""
    metadata = _about(file)
    if metadata.get("benchmark") == "captions":
        model, encoder = metadata.get("model"), metadata.get("encoder")
        if not (isinstance(model, dict) and isinstance(encoder, str)):
            raise ValueError(f"{file}: not a model file of this project (no model or no encoder named)")
        return CaptionCorpus(folder, encoder, pixels=model.get("encoder") is not None)         # a large one that learnt
    return SpeechCorpus(folder)


def evaluate(file: Path, corpus: SpeechCorpus | CaptionCorpus | None = None, split: str = "test", batch: int = 16,
             limit: int | None = None) -> tuple[dict[str, float], list]:
    """Scores a stored model on a split, or on its first `limit` utterances or pictures: (scores, transcripts or greedy
    captions).

    A model of the interlock needs no corpus and takes no limit: (its error, the settings it read, (count, T, n)).
    Raises ValueError for a recogniser or captioner without its corpus.
    """
    model, _, metadata = load(file)
    if isinstance(model, ToyModel):
        bench = benchmarks.Toy(Interlock(**metadata["task"]["rules"]))
        task = bench.task(0, **metadata["task"])
        if split not in task.splits:                               # its training batches are drawn anew each time
            raise ValueError(f"split {split!r}: the interlock has {' and '.join(task.splits)}")
        return task.evaluate(model, benchmarks.CPU, split), task.read(model, benchmarks.CPU, split).tolist()
    if corpus is None:
        kind, folder = ("captioner", "data/ucm") if isinstance(model, NeuralTalk) else ("recogniser", "data/an4")
        raise ValueError(f"{file}: a {kind} is scored on a corpus; name its folder, such as {folder}")
    if isinstance(model, NeuralTalk):
        if list(corpus.vocabulary.words) != metadata["vocabulary"]:
            raise ValueError(f"{file}: its vocabulary is not that of {corpus.folder}; name the corpus it learnt from")
        bench = benchmarks.Captions(corpus)
        said, found, _ = bench.scored(model, bench.task(0, java=metadata["java"]), corpus.split(split, limit=limit))
        return found, said
    heard, found = benchmarks.Speech.scored(model, SpeechTask(corpus, batch=batch), corpus.split(split, limit=limit))
    return found, heard


def log_probs(model: DeepSpeech2, wave: torch.Tensor) -> torch.Tensor:
    """Log probabilities (T', labels) of one utterance (N samples at 16 kHz), for pictures of alignments. The model is
    left in evaluation mode."""
    with torch.no_grad():
        return model.eval()(*spectrogram(wave[None], torch.tensor([len(wave)])))[0][0]
