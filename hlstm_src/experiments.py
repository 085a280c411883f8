"""The catalogue: one named recipe a row of the paper's tables, and `run`, which turns a recipe into a record.

    record = run("ds2-lstm5", "laptop", seed=0)

returns the record if it is up to date and otherwise trains. Records of the profiles desk and paper are history: they
are made anew only with `force=True`.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import benchmarks, records, rivals
from .audio import ALPHABET
from .corpora import CaptionCorpus, CorpusError, SpeechCorpus
from .deepspeech2 import DeepSpeech2, bins_left, spectrogram
from .encoders import Pretrained
from .lstm import HLSTM
from .masks import ConnectionMasks, live_count, load_model, load_tensors, save_model
from .neuraltalk import NeuralTalk
from .profiles import ROOT, Captions, Profile, Speech, Toy, profile
from .schedule import Dense, GrowPruneSchedule
from .tasks import SpeechTask
from .toy import Interlock, ToyModel
from .training import Settings, Trainer, accelerator

# The code that decides what a run computes: a change in one of these makes the records of smoke and laptop stale.
CODE = [Path(__file__).with_name(f"{name}.py") for name in
        ("compiled", "gates", "products", "team", "steps", "scan", "lstm", "masks", "growprune", "schedule", "rivals",
         "audio", "deepspeech2", "decoding", "search", "neuraltalk", "encoders", "corpora", "scores", "caption_scores",
         "counting", "tasks", "toy", "benchmarks", "training", "experiments")]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from seed, corpus and code."""
    title: str
    model: dict                        # arguments of the benchmark's model
    schedule: dict                     # arguments of Dense or, with the name of a `rival`, of `rivals.rival`
    settings: Settings
    task: dict                         # arguments of the benchmark's task
    masked: str = benchmarks.Speech.masked
    benchmark: str = "speech"
    finetune: dict | None = None       # of a captioner: `epochs` at `lr` in which its encoder learns, too; at the end


def _layers(s: Speech, cell: str, layers: int, hidden: int | None = None) -> nn.ModuleList:
    """The recogniser's recurrent layers, without biases and without memory: to be counted."""
    hidden = hidden or s.hidden
    with torch.device("meta"):
        return nn.ModuleList(HLSTM(hidden if k else bins_left() * s.channels, hidden, bidirectional=True, merge="sum",
                                   gate_layers=int(cell == "hlstm"), bias=False) for k in range(layers))


def _recogniser(s: Speech, title: str, cell: str, layers: int, rival: str = "dense", compact: bool = False,
                convolutions: bool = False, fast: bool = False) -> Recipe:
    """A recogniser. A sparse one ends at the density of the accurate model or, if `compact`, with at least
    `compression` times fewer live recurrent weights than the LSTM x5 has; "small-dense" is so narrow instead. With
    `convolutions` these are pruned, too; of a `fast` one as well, and all connections go in blocks of 16, which any CPU
    multiplies by quickly."""
    whole, hidden = _layers(s, cell, layers), s.hidden
    most = rivals.parameters_left(_layers(s, "lstm", 5)) / s.compression
    if rival == "small-dense":
        hidden = rivals.small_width(lambda width: _layers(s, cell, layers, width), int(most), most=s.hidden)
    sizes = [p.numel() for p in whole.parameters()]
    density = s.fast if fast else s.accurate
    if compact:
        density = (most - len(sizes)) / sum(sizes)                 # each matrix rounds by one at most
    schedule = {"epochs": s.epochs}
    if rival not in ("dense", "small-dense"):
        schedule |= {"rival": rival, "density": density, "rounds": s.rounds}
    if convolutions or fast:
        schedule |= {"density": {"rnns.*": density, "convolutions.*": s.convolutions}}
    if fast:
        schedule |= {"structure": "block16"}
    model = {"labels": len(ALPHABET), "cell": cell, "layers": layers, "hidden": hidden, "channels": s.channels,
             "stride": s.stride, "dropout": 0.1} | ({"activation": "tanh"} if cell == "hlstm" else {})
    settings = Settings(lr=s.lr, retrain_lr=s.retrain_lr, precision=s.precision, fused=True)
    return Recipe(title, model, schedule, settings, {"batch": s.batch, "limit": s.limit, "ordered": s.ordered},
                  masked="[rc]*.weight*" if convolutions or fast else benchmarks.Speech.masked)


CATALOGUE: dict[str, Callable[[Speech | Toy | Captions], Recipe]] = {
    f"ds2-{cell}{layers}": partial(_recogniser, title=f"DeepSpeech2, {name} x{layers}, dense", cell=cell, layers=layers)
    for cell, name, layers in (("lstm", "LSTM", 5), ("lstm", "LSTM", 4), ("gru", "GRU", 4), ("gru", "GRU", 5),
                               ("hlstm", "H-LSTM", 3))}
CATALOGUE |= {
    "ds2-hlstm3-prune": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, prune only", cell="hlstm", layers=3,
                                rival="prune-only"),
    "ds2-hlstm3-gp": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grow and prune, accurate", cell="hlstm",
                             layers=3, rival="gp"),
    "ds2-hlstm3-compact": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grow and prune, compact", cell="hlstm",
                                  layers=3, rival="gp", compact=True),
    "ds2-hlstm3-compact-prune": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, prune only, compact", cell="hlstm",
                                        layers=3, rival="prune-only", compact=True),
    "ds2-hlstm3-compact-gradual": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, pruned gradually, compact",
                                          cell="hlstm", layers=3, rival="gradual", compact=True),
    "ds2-hlstm3-compact-gp-gradual": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grown, pruned gradually, "
                                             "compact", cell="hlstm", layers=3, rival="gp-gradual", compact=True),
    "ds2-hlstm3-gp-gradual": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grown, pruned gradually, accurate",
                                     cell="hlstm", layers=3, rival="gp-gradual"),
    "ds2-hlstm3-compact-whole": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grown, pruned gradually, "
                                        "convolutions, too, compact", cell="hlstm", layers=3, rival="gp-gradual",
                                        compact=True, convolutions=True),
    "ds2-hlstm3-fast": partial(_recogniser, title="DeepSpeech2, H-LSTM x3, grown, pruned gradually in blocks, fast",
                               cell="hlstm", layers=3, rival="gp-gradual", fast=True),
    "ds2-small-lstm": partial(_recogniser, title="DeepSpeech2, LSTM x5 as small as the compact model", cell="lstm",
                              layers=5, rival="small-dense"),
    "ds2-small-hlstm": partial(_recogniser, title="DeepSpeech2, H-LSTM x3 as small as the compact model", cell="hlstm",
                               layers=3, rival="small-dense"),
}


def _toy(t: Toy, name: str, cell: str = "hlstm") -> Recipe:
    """A rival on the interlock; "lstm" is a dense LSTM with as many weights as the dense H-LSTM."""
    rules = Interlock(t.levers)

    def build(hidden: int, cell: str = cell) -> ToyModel:
        return ToyModel(rules.inputs, rules.levers, cell, hidden, t.activation)
    hidden, rival, lr = t.hidden, name, t.lr
    with torch.device("meta"):
        dense = build(t.hidden, "hlstm")
    size = rivals.parameters_left(dense)
    if name == "lstm":
        hidden, rival, lr = rivals.small_width(build, size), "dense", t.lstm_lr
    elif name == "small-dense":
        masked = [p for n, p in dense.named_parameters() if fnmatch(n, benchmarks.Toy.masked)]
        asleep = sum(p.numel() - live_count(p.shape, t.density) for p in masked)
        hidden = rivals.small_width(build, size - asleep)
    title = "LSTM of the same size, dense" if name == "lstm" else f"H-LSTM, {name}"
    model = {"inputs": rules.inputs, "outputs": rules.levers, "cell": cell, "hidden": hidden,
             "activation": t.activation}
    schedule = {"rival": rival, "epochs": t.epochs, "density": t.density, "rounds": t.rounds}
    return Recipe(title, model, schedule, Settings(lr=lr, precision="fp32"),
                  {"rules": asdict(rules), "batch": t.batch, "length": t.length, "held_out": t.held_out},
                  masked=benchmarks.Toy.masked, benchmark="toy")


CATALOGUE |= {f"toy-{name}": partial(_toy, name=name) for name in rivals.RIVALS}
CATALOGUE["toy-lstm"] = partial(_toy, name="lstm", cell="lstm")


def _cell(c: Captions, cell: str, layers: int = 1, hidden: int | None = None) -> HLSTM:
    """The captioner's recurrent layers, without biases and without memory: to be counted."""
    with torch.device("meta"):
        return HLSTM(c.hidden, hidden or c.hidden, layers, gate_layers=int(cell == "hlstm"), bias=False)


def _captioner(c: Captions, title: str, cell: str = "hlstm", layers: int = 1, rival: str = "dense",
               compact: bool = False, activation: str | None = None, output: bool = False,
               tuned: bool = False) -> Recipe:
    """A captioner. A sparse one ends at the density of the accurate model or, if `compact`, with at least
    `compression` times fewer live weights in the cell than the LSTM x3 has; "small-dense" is so narrow instead. With
    `output` the output projection is as sparse: its weights and the cell's are ranked together. A `tuned` one learns on
    together with its encoder, which until then was only read."""
    size, hidden = rivals.parameters_left(_cell(c, "hlstm")), c.hidden
    most = rivals.parameters_left(_cell(c, "lstm", 3)) / c.compression
    if rival == "small-dense":
        hidden = rivals.small_width(lambda width: _cell(c, cell, hidden=width), int(most), most=c.hidden)
    density = math.floor(most / 3) / (size / 3) if compact else c.accurate    # three matrices of one size
    model = {"cell": cell, "layers": layers, "hidden": hidden, "embedding": c.hidden, "dropout": c.dropout}
    model |= {"activation": activation or c.activation} if cell == "hlstm" else {}
    schedule, dense = {"epochs": c.epochs}, rival in ("dense", "small-dense")
    if not dense:
        schedule |= {"rival": rival, "density": density, "rounds": c.rounds} | ({"per": "global"} if output else {})
    settings = Settings(lr=c.lr, decay=c.decay, weight_decay=1e-2 if c.decay is None else 0,      # 0: plain Adam
                        patience=c.patience if dense else None, precision=c.precision, fused=True)
    return Recipe(title, model, schedule, settings,
                  {"corpus": c.corpus, "encoder": c.encoder, "batch": c.batch, "limit": c.limit, "java": c.java},
                  masked="[ro][nu]*weight*" if output else benchmarks.Captions.masked, benchmark="captions",
                  finetune={"epochs": c.finetune_epochs, "lr": c.finetune_lr}
                  if c.finetune_epochs and (tuned or c.finetune_all) else None)


_CAPTIONERS = {
    "nt-lstm1": partial(_captioner, title="NeuralTalk, LSTM x1, dense", cell="lstm"),
    "nt-lstm2": partial(_captioner, title="NeuralTalk, LSTM x2, dense", cell="lstm", layers=2),
    "nt-lstm3": partial(_captioner, title="NeuralTalk, LSTM x3, dense", cell="lstm", layers=3),
    "nt-gru1": partial(_captioner, title="NeuralTalk, GRU x1, dense", cell="gru"),
    "nt-hlstm1": partial(_captioner, title="NeuralTalk, H-LSTM x1, dense"),
    "nt-hlstm1-prune": partial(_captioner, title="NeuralTalk, H-LSTM x1, prune only", rival="prune-only"),
    "nt-hlstm1-gp": partial(_captioner, title="NeuralTalk, H-LSTM x1, grow and prune, accurate", rival="gp"),
    "nt-hlstm1-compact": partial(_captioner, title="NeuralTalk, H-LSTM x1, grow and prune, compact", rival="gp",
                                 compact=True),
    "nt-hlstm1-compact-output": partial(_captioner, title="NeuralTalk, H-LSTM x1, compact, output projection, too",
                                        rival="gp", compact=True, output=True),
    "nt-lstm1-tuned": partial(_captioner, title="NeuralTalk, LSTM x1, dense, its encoder trained on", cell="lstm",
                              tuned=True),
    "nt-hlstm1-compact-tuned": partial(_captioner, title="NeuralTalk, H-LSTM x1, compact, its encoder trained on",
                                       rival="gp", compact=True, tuned=True),
    "nt-small-lstm": partial(_captioner, title="NeuralTalk, LSTM x1 as small as the compact model", cell="lstm",
                             rival="small-dense"),
    "nt-small-hlstm": partial(_captioner, title="NeuralTalk, H-LSTM x1 as small as the compact model",
                              rival="small-dense"),
}
ONCE = "nt-gru1", "nt-hlstm1-prune", "nt-hlstm1-compact-output", "nt-lstm1-tuned", "nt-hlstm1-compact-tuned"
TWICE = tuple(name for name in _CAPTIONERS if name not in ONCE)    # on both corpora
_CAPTIONERS |= {f"nt-hlstm1-{activation}": partial(_captioner, title=f"NeuralTalk, H-LSTM x1, {activation}",
                                                   activation=activation)
                for activation in ("relu", "leaky_relu", "tanh")}
_CAPTIONERS |= {f"nt-compact-{name}": partial(_captioner, title=f"NeuralTalk, H-LSTM x1, compact, {name}", rival=name,
                                              compact=True)
                for name in rivals.RIVALS if name not in ("dense", "small-dense", "gp")}
CATALOGUE |= _CAPTIONERS | {f"{name}-flowers": _CAPTIONERS[name] for name in TWICE}
BENCHMARKS = {"speech": benchmarks.Speech, "toy": benchmarks.Toy, "captions": benchmarks.Captions}


def recipe(name: str, profile_name: str) -> Recipe:
    """The recipe of an experiment in a profile. Raises ValueError that lists the names."""
    if name not in CATALOGUE:
        raise ValueError(f"experiment {name!r}: choose one of {', '.join(CATALOGUE)}")
    p = profile(profile_name)
    if name.startswith("nt-"):
        return CATALOGUE[name]((p.flowers if name.endswith("-flowers") else None) or p.captions)
    return CATALOGUE[name](p.toy if name.startswith("toy-") else p.speech)


def benchmark(made: Recipe, p: Profile) -> benchmarks.Speech | benchmarks.Captions | benchmarks.Toy:
    """The benchmark of a recipe, with its corpus or rules. Raises CorpusError where the corpus is missing."""
    if made.benchmark == "toy":
        return benchmarks.Toy(Interlock(**made.task["rules"]))
    if made.benchmark == "captions":
        return benchmarks.Captions(CaptionCorpus(ROOT / made.task["corpus"], made.task["encoder"]))
    return benchmarks.Speech(SpeechCorpus(ROOT / p.speech.corpus))


def key_of(made: Recipe, corpus) -> str:
    """Recipe, corpus (whatever has a `sha256`) and training code as one hash: an equal key means an equal result."""
    return records.fingerprint(asdict(made), corpus.sha256, CODE)


def run(name: str, profile_name: str = "laptop", seed: int = 0, *, force: bool = False,
        progress: bool = True) -> records.RunRecord:
    """Returns the record of an experiment, training first if there is none that is up to date.

    Writes `seed<k>.json` and the model beside it; an interrupted run goes on from its checkpoint. Raises ValueError
    for unknown names, CorpusError, TrainingError, Interrupted.
    """
    made, p = recipe(name, profile_name), profile(profile_name)
    path = records.path_of(name, profile_name, seed)
    if path.exists() and not force and p.kept:
        return records.read(path)
    bench = benchmark(made, p)
    key = key_of(made, bench)
    if path.exists() and not force:
        try:
            record = records.read(path)
        except records.RecordError:        # damaged, or of an older schema: scratch work, made anew
            record = None
        if record and record.key == key and path.with_suffix(".safetensors").exists():
            return record
    provenance = records.provenance(bench.name, bench.sha256)
    told, files = f"{name} {profile_name} seed {seed}", [path.with_suffix(".checkpoint")]
    trainer = _train(made, bench, seed, files[0], key, told, progress)
    if made.finetune:
        files.append(path.with_suffix(".finetune.checkpoint"))
        trainer, bench = _finetune(trainer, made, bench, seed, files[1], told, progress)
    file = path.with_suffix(".safetensors")
    save_model(file, trainer.model, trainer.masks, {"format": 1, "experiment": name, "profile": profile_name,
                                                    "seed": seed, "benchmark": made.benchmark,
                                                    "model": made.model | bench.sizes, **bench.about(made.task)})
    # Scores are those of the stored file, so that `evaluate` gives them again.
    model, masks, _ = load(file)
    record = records.RunRecord(
        experiment=name, profile=profile_name, seed=seed, title=made.title, key=key, recipe=asdict(made),
        history=trainer.history, phases=trainer.phases, **bench.results(model, trainer.task),
        counts=bench.counts(model, masks),
        model={"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
               "bytes": file.stat().st_size},
        provenance=provenance.closed(trainer.seconds, trainer.precision))
    record.save(path)
    for checkpoint in files:
        checkpoint.unlink(missing_ok=True)
    return record


def trainer(name: str, profile_name: str = "laptop", seed: int = 0, precision: str | None = None,
            **options) -> Trainer:
    """The trainer of an experiment before its first step, for those who want to look on; it writes nothing.

    `options` go to `Trainer`. Once trained, its history is that of the record, unless `precision` is another.
    """
    made = recipe(name, profile_name)
    if precision is not None:
        made = replace(made, settings=replace(made.settings, precision=precision))
    return _trainer(made, benchmark(made, profile(profile_name)), seed, **options)


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


def _train(made: Recipe, bench, seed: int, path: Path, key: str, name: str, progress: bool) -> Trainer:
    trainer = _trainer(made, bench, seed, checkpoint=path.with_suffix(".checkpoint"), key=key, name=name,
                       progress=progress)
    trainer.train()
    trainer.model = trainer.accelerator.unwrap_model(trainer.prepared, keep_fp32_wrapper=False)
    return trainer


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
    second.model = second.accelerator.unwrap_model(second.prepared, keep_fp32_wrapper=False)
    for row in second.history:
        row["epoch"] += len(first.history)
    second.history, second.phases = first.history + second.history, first.phases
    second.seconds += first.seconds
    return second, bench


def load(file: Path) -> tuple[nn.Module, dict[str, torch.Tensor], dict]:
    """A stored model: (model in evaluation mode, its masks, its metadata). Raises ValueError naming the file."""
    _, metadata = load_tensors(file)
    try:
        model = BENCHMARKS[metadata.get("benchmark", "speech")].make(**metadata["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a model file of this project ({error})") from None
    return model.eval(), load_model(file, model), metadata


def counts(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict:
    """Of one step or output frame: the recurrent matrices alone, and the whole model."""
    return next(b for b in BENCHMARKS.values() if isinstance(model, b.make)).counts(model, masks)


def open_corpus(file: Path, folder: Path) -> SpeechCorpus | CaptionCorpus:
    """The corpus in that folder as a stored model wants it. Raises CorpusError, and ValueError for a damaged file."""
    metadata = load_tensors(file)[1]
    if metadata.get("benchmark") == "captions":
        own = metadata["model"].get("encoder")                      # a large one that learnt reads pixels
        return CaptionCorpus(folder, metadata["encoder"], pixels=own is not None)
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
    """Log probabilities (T', labels) of one utterance (N samples at 16 kHz), for pictures of alignments."""
    with torch.no_grad():
        return model.eval()(*spectrogram(wave[None], torch.tensor([len(wave)])))[0][0]
