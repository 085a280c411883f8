"""The catalogue: one named recipe a row of the paper's tables, and `run`, which turns a recipe into a record.

    record = run("ds2-lstm", "laptop", seed=0)

returns the record if it is up to date and otherwise trains. Records of the profiles desk and paper are history: they
are made anew only with `force=True`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import records, scores
from .corpora import ALPHABET, SpeechCorpus
from .counting import convolution_positions, count
from .deepspeech2 import BINS, DeepSpeech2, spectrogram
from .growprune import Dense, GrowPruneSchedule
from .masks import ConnectionMasks, load_model, load_tensors, save_model
from .profiles import ROOT, Speech, profile
from .tasks import SpeechTask
from .training import Settings, Trainer, accelerator

# The code that decides what a run computes: a change in one of these makes the records of smoke and laptop stale.
CODE = [Path(__file__).with_name(f"{name}.py") for name in
        ("scan", "lstm", "masks", "growprune", "deepspeech2", "corpora", "scores", "counting", "tasks", "training",
         "experiments")]
RECURRENT = "rnns.*weight_*"           # what is grown and pruned: the matrices of the recurrent layers


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, apart from seed, corpus and code."""
    title: str
    model: dict                        # arguments of DeepSpeech2
    schedule: dict                     # arguments of Dense or GrowPruneSchedule
    settings: Settings
    task: dict                         # arguments of SpeechTask
    seed_density: float | None = None  # share of connections that the sparse seed starts with; None: dense, no masks
    masked: str = field(default=RECURRENT)


def _speech(s: Speech, title: str, cell: str, layers: int, schedule: dict, **options) -> Recipe:
    model = {"labels": len(ALPHABET), "cell": cell, "layers": layers, "hidden": s.hidden, "channels": s.channels,
             "dropout": 0.1} | ({"activation": "tanh"} if cell == "hlstm" else {})
    return Recipe(title, model, schedule, Settings(lr=s.lr, precision=s.precision),
                  {"batch": s.batch, "limit": s.limit}, **options)


def _grow_and_prune(s: Speech) -> dict:
    names = "train_epochs", "growth_epochs", "prune_ratio", "retrain_epochs", "rounds", "tolerance", "final_epochs"
    return {name: getattr(s, name) for name in names}


CATALOGUE: dict[str, Callable[[Speech], Recipe]] = {
    "ds2-lstm": lambda s: _speech(s, "DeepSpeech2, LSTM, dense", "lstm", s.lstm_layers, {"epochs": s.epochs}),
    "ds2-hlstm": lambda s: _speech(s, "DeepSpeech2, H-LSTM, dense", "hlstm", s.hlstm_layers, {"epochs": s.epochs}),
    "ds2-hlstm-gp": lambda s: _speech(s, "DeepSpeech2, H-LSTM, grow and prune", "hlstm", s.hlstm_layers,
                                      _grow_and_prune(s), seed_density=0.5),
}


def recipe(name: str, profile_name: str) -> Recipe:
    """The recipe of an experiment in a profile. Raises ValueError that lists the names."""
    if name not in CATALOGUE:
        raise ValueError(f"experiment {name!r}: choose one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name](profile(profile_name).speech)


def key_of(made: Recipe, corpus: SpeechCorpus) -> str:
    """Recipe, corpus and training code as one hash: an equal key means an equal result."""
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
    corpus = SpeechCorpus(ROOT / p.speech.corpus)
    key = key_of(made, corpus)
    if path.exists() and not force:
        try:
            record = records.read(path)
        except records.RecordError:        # damaged, or of an older schema: scratch work, made anew
            record = None
        if record and record.key == key and path.with_suffix(".safetensors").exists():
            return record
    provenance = records.provenance(corpus.name, corpus.sha256)
    trainer = _train(made, corpus, seed, path, key, f"{name} {profile_name} seed {seed}", progress)
    file = path.with_suffix(".safetensors")
    save_model(file, trainer.model, trainer.masks, {"format": 1, "experiment": name, "profile": profile_name,
                                                    "seed": seed, "model": made.model, "alphabet": ALPHABET})
    # Scores are those of the stored file, so that `evaluate` gives them again.
    model, masks, _ = load(file)
    task = trainer.task
    test = corpus.split("test", limit=made.task["limit"])
    heard = task.transcribe(model, test, torch.device("cpu"))
    record = records.RunRecord(
        experiment=name, profile=profile_name, seed=seed, title=made.title, key=key, recipe=asdict(made),
        history=trainer.history, phases=trainer.phases,
        scores=scores.error_rates([u.transcript for u in test], heard),
        valid_scores=task.evaluate(model, torch.device("cpu")), normalisation=scores.NORMALISATION,
        samples=[{"id": u.id, "speaker": u.speaker, "reference": u.transcript, "hypothesis": text}
                 for u, text in zip(test, heard)],
        counts=counts(model, masks),
        model={"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
               "bytes": file.stat().st_size},
        provenance=provenance.closed(trainer.seconds))
    record.save(path)
    if trainer.checkpoint is not None:
        trainer.checkpoint.unlink(missing_ok=True)
    return record


def _train(made: Recipe, corpus: SpeechCorpus, seed: int, path: Path, key: str, name: str, progress: bool) -> Trainer:
    torch.manual_seed(seed)
    model = DeepSpeech2(**made.model).to(accelerator(made.settings.precision).device)
    masks = None
    if made.seed_density is not None:
        masks = ConnectionMasks(model, made.masked, made.seed_density, torch.Generator().manual_seed(seed))
        masks.rescale_()
    schedule = Dense(**made.schedule) if "epochs" in made.schedule else GrowPruneSchedule(**made.schedule)
    trainer = Trainer(model, SpeechTask(corpus, seed=seed, **made.task), schedule, made.settings, masks=masks,
                      seed=seed, checkpoint=path.with_suffix(".checkpoint"), key=key, name=name, progress=progress)
    trainer.train()
    trainer.model = trainer.accelerator.unwrap_model(trainer.prepared, keep_fp32_wrapper=False)
    return trainer


def load(file: Path) -> tuple[DeepSpeech2, dict[str, torch.Tensor], dict]:
    """A stored model: (model in evaluation mode, its masks, its metadata). Raises ValueError naming the file."""
    _, metadata = load_tensors(file)
    try:
        model = DeepSpeech2(**metadata["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a model file of this project ({error})") from None
    return model.eval(), load_model(file, model), metadata


def counts(model: DeepSpeech2, masks: dict[str, torch.Tensor]) -> dict:
    """Of one output frame (20 ms of sound): the recurrent matrices alone, and the whole model."""
    spec, lengths = torch.zeros(1, BINS, 201), torch.tensor([201])
    with torch.no_grad():
        made = int(model(spec, lengths)[1])
    positions = {name: n // made for name, n in convolution_positions(model, spec, lengths).items()}
    return {"cell": count(model, masks, include="rnns.", weights_only=True).record(),
            "model": count(model, masks, positions=positions).record()}


def evaluate(file: Path, corpus: SpeechCorpus, split: str = "test", batch: int = 16,
             limit: int | None = None) -> tuple[dict[str, float], list[str]]:
    """Scores a stored model on a split, or on its first `limit` utterances: (error rates, transcripts)."""
    model, _, _ = load(file)
    task, chosen = SpeechTask(corpus, batch=batch), corpus.split(split, limit=limit)
    heard = task.transcribe(model, chosen, torch.device("cpu"))
    return scores.error_rates([u.transcript for u in chosen], heard), heard


def log_probs(model: DeepSpeech2, wave: torch.Tensor) -> torch.Tensor:
    """Log probabilities (T', labels) of one utterance (N samples at 16 kHz), for pictures of alignments."""
    with torch.no_grad():
        return model.eval()(*spectrogram(wave[None], torch.tensor([len(wave)])))[0][0]
