"""The catalogue: one named recipe a row of the paper's tables, in the sizes of each profile. Nothing here trains.

    recipe("ds2-lstm5", "laptop")
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial

import torch
from torch import nn

from . import benchmarks, rivals
from .audio import ALPHABET
from .deepspeech2 import bins_left
from .lstm import HLSTM
from .masks import live_count
from .profiles import Captions, Speech, Toy
from .profiles import profile as sizes_of
from .toy import Interlock, ToyModel
from .training import Settings


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


def _recogniser(s: Speech, title: str, cell: str = "hlstm", layers: int = 3, rival: str = "dense",
                compact: bool = False, medium: bool = False, convolutions: bool = False, fast: bool = False,
                long: int = 1, twice: bool = False, everything: bool = False, gate_dropout: float = 0.0,
                precision: str | None = None) -> Recipe:
    """A recogniser. A sparse one ends at the density of the accurate model or, if `compact`, with at least
    `compression` times fewer live recurrent weights than the LSTM x5 has; "small-dense" is so narrow instead. A
    `medium` one has as many as the compact model of the profile `wide`, if that makes it sparser than the accurate one.
    With `convolutions` these are pruned, too; of a `fast` one as well, and all connections go in blocks of 16, which
    any CPU multiplies by quickly. A `long` one trains for so many times the epochs, and after a quarter of them more of
    the spectrogram is blanked. `twice` does that in the usual epochs, and from then on hears each utterance twice; the
    two have to agree. With `everything` it learns from the validation speakers, too. `gate_dropout` drops hidden units
    of the gates, the same ones in a whole utterance. `precision` is the profile's unless given."""
    whole, hidden = _layers(s, cell, layers), s.hidden
    most = rivals.parameters_left(_layers(s, "lstm", 5)) / s.compression
    if rival == "small-dense":
        hidden = rivals.small_width(lambda width: _layers(s, cell, layers, width), int(most), most=s.hidden)
    sizes = [p.numel() for p in whole.parameters()]
    density = s.fast if fast else s.accurate
    if medium:
        wide = sizes_of("wide").speech
        left = rivals.parameters_left(_layers(wide, "lstm", 5)) / wide.compression
        density = min(density, (left - len(sizes)) / sum(sizes))
    if compact:                                                    # each matrix rounds by half a unit at most
        density = (most - len(sizes) * (8 if fast else 1)) / sum(sizes)
    schedule, task = {"epochs": s.epochs}, {"batch": s.batch, "limit": s.limit, "ordered": s.ordered}
    if long > 1:
        schedule, task = {"epochs": long * s.epochs}, task | {"harder": long * s.epochs // 4}
    task |= {"harder": s.epochs // 4, "agree": 0.2} if twice else {}
    task |= {"everything": True} if everything else {}
    if rival not in ("dense", "small-dense"):
        schedule |= {"rival": rival, "density": density, "rounds": s.rounds}
    if convolutions or fast:
        schedule |= {"density": {"rnns.*": density, "convolutions.*": s.convolutions}}
    if fast:
        schedule |= {"structure": "block16"}
    model = {"labels": len(ALPHABET), "cell": cell, "layers": layers, "hidden": hidden, "channels": s.channels,
             "stride": s.stride, "dropout": 0.1} | ({"activation": "tanh"} if cell == "hlstm" else {})
    model |= {"gate_dropout": gate_dropout} if gate_dropout else {}
    settings = Settings(lr=s.lr, retrain_lr=s.retrain_lr, precision=precision or s.precision, fused=True)
    return Recipe(title, model, schedule, settings, task,
                  masked="[rc]*.weight*" if convolutions or fast else benchmarks.Speech.masked)


def _named(make: Callable[..., Recipe], name: str, title: str, rows: Iterable[tuple[str, str, dict]]) -> dict:
    """A part of the catalogue, of rows (end of the name, end of the title, options of `make`)."""
    return {name + key: partial(make, title=title + told, **options) for key, told, options in rows}


CATALOGUE: dict[str, Callable[[Speech | Toy | Captions], Recipe]] = _named(_recogniser, "ds2-", "DeepSpeech2, ", (
    ("lstm5", "LSTM x5, dense", {"cell": "lstm", "layers": 5}),
    ("lstm4", "LSTM x4, dense", {"cell": "lstm", "layers": 4}),
    ("gru4", "GRU x4, dense", {"cell": "gru", "layers": 4}),
    ("gru5", "GRU x5, dense", {"cell": "gru", "layers": 5}),
    ("hlstm3", "H-LSTM x3, dense", {}),
    ("hlstm3-prune", "H-LSTM x3, prune only", {"rival": "prune-only"}),
    ("hlstm3-gp", "H-LSTM x3, grow and prune, accurate", {"rival": "gp"}),
    ("hlstm3-compact", "H-LSTM x3, grow and prune, compact", {"rival": "gp", "compact": True}),
    ("hlstm3-compact-prune", "H-LSTM x3, prune only, compact", {"rival": "prune-only", "compact": True}),
    ("hlstm3-compact-gradual", "H-LSTM x3, pruned gradually, compact", {"rival": "gradual", "compact": True}),
    ("hlstm3-compact-gp-gradual", "H-LSTM x3, grown, pruned gradually, compact",
     {"rival": "gp-gradual", "compact": True}),
    ("hlstm3-gp-gradual", "H-LSTM x3, grown, pruned gradually, accurate", {"rival": "gp-gradual"}),
    ("hlstm3-compact-whole", "H-LSTM x3, grown, pruned gradually, convolutions, too, compact",
     {"rival": "gp-gradual", "compact": True, "convolutions": True}),
    ("hlstm3-fast", "H-LSTM x3, grown, pruned gradually in blocks, fast", {"rival": "gp-gradual", "fast": True}),
    ("hlstm3-compact-fast", "H-LSTM x3, grown, pruned gradually in blocks, compact and fast",
     {"rival": "gp-gradual", "compact": True, "fast": True}),
    ("small-lstm", "LSTM x5 as small as the compact model", {"cell": "lstm", "layers": 5, "rival": "small-dense"}),
    ("small-hlstm", "H-LSTM x3 as small as the compact model", {"rival": "small-dense"}),
    ("lstm5-fp32", "LSTM x5, dense, single precision", {"cell": "lstm", "layers": 5, "precision": "fp32"}),
    ("gru4-fp32", "GRU x4, dense, single precision", {"cell": "gru", "layers": 4, "precision": "fp32"}),
    ("lstm5-long", "LSTM x5, dense, trained longer", {"cell": "lstm", "layers": 5, "long": 2}),
    ("hlstm3-long", "H-LSTM x3, dense, trained longer", {"long": 2}),
    ("hlstm3-dropout-long", "H-LSTM x3, dense, dropout in the gates, trained longer",
     {"gate_dropout": 0.2, "long": 2}),
    ("hlstm3-gp-gradual-long", "H-LSTM x3, grown, pruned gradually, accurate, trained longer",
     {"rival": "gp-gradual", "long": 2}),
    ("hlstm3-medium-gp-gradual-long", "H-LSTM x3, grown, pruned gradually, medium, trained longer",
     {"rival": "gp-gradual", "medium": True, "long": 2}),
    ("hlstm3-compact-gp-gradual-long", "H-LSTM x3, grown, pruned gradually, compact, trained longer",
     {"rival": "gp-gradual", "compact": True, "long": 2}),
    ("hlstm3-fast-long", "H-LSTM x3, grown, pruned gradually in blocks, fast, trained longer",
     {"rival": "gp-gradual", "fast": True, "long": 2}),
    ("lstm5-twice", "LSTM x5, dense, heard twice", {"cell": "lstm", "layers": 5, "twice": True}),
    ("hlstm3-twice", "H-LSTM x3, dense, heard twice", {"twice": True}),
    ("hlstm3-gp-gradual-twice", "H-LSTM x3, grown, pruned gradually, accurate, heard twice",
     {"rival": "gp-gradual", "twice": True}),
    ("hlstm3-medium-gp-gradual-twice", "H-LSTM x3, grown, pruned gradually, medium, heard twice",
     {"rival": "gp-gradual", "medium": True, "twice": True}),
    ("hlstm3-fast-twice", "H-LSTM x3, grown, pruned gradually in blocks, fast, heard twice",
     {"rival": "gp-gradual", "fast": True, "twice": True}),
    ("lstm5-long-all", "LSTM x5, dense, trained longer, on validation speakers, too",
     {"cell": "lstm", "layers": 5, "long": 2, "everything": True}),
    ("hlstm3-gp-gradual-long-all",
     "H-LSTM x3, grown, pruned gradually, accurate, trained longer, on validation speakers, too",
     {"rival": "gp-gradual", "long": 2, "everything": True}),
    ("hlstm3-compact-gp-gradual-long-all",
     "H-LSTM x3, grown, pruned gradually, compact, trained longer, on validation speakers, too",
     {"rival": "gp-gradual", "compact": True, "long": 2, "everything": True}),
    ("lstm5-longer", "LSTM x5, dense, trained four times as long", {"cell": "lstm", "layers": 5, "long": 4}),
    ("hlstm3-gp-gradual-longer", "H-LSTM x3, grown, pruned gradually, accurate, trained four times as long",
     {"rival": "gp-gradual", "long": 4})))


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
               tuned: bool = False, fitted: bool = False) -> Recipe:
    """A captioner. A sparse one ends at the density of the accurate model or, if `compact`, with at least
    `compression` times fewer live weights in the cell than the LSTM x3 has; "small-dense" is so narrow instead. With
    `output` the output projection is as sparse: its weights and the cell's are ranked together. A `tuned` one learns on
    together with its encoder, which until then was only read. A `fitted` one has the rate and dropout of small ones."""
    size, hidden = rivals.parameters_left(_cell(c, "hlstm")), c.hidden
    most = rivals.parameters_left(_cell(c, "lstm", 3)) / c.compression
    if rival == "small-dense":
        hidden = rivals.small_width(lambda width: _cell(c, cell, hidden=width), int(most), most=c.hidden)
    density = math.floor(most / 3) / (size / 3) if compact else c.accurate    # three matrices of one size
    lr, dropout = (c.small_lr or c.lr, c.dropout if c.small_dropout is None else c.small_dropout) if fitted else (
        c.lr, c.dropout)
    model = {"cell": cell, "layers": layers, "hidden": hidden, "embedding": c.hidden, "dropout": dropout}
    model |= {"activation": activation or c.activation} if cell == "hlstm" else {}
    schedule, dense = {"epochs": c.epochs}, rival in ("dense", "small-dense")
    if not dense:
        schedule |= {"rival": rival, "density": density, "rounds": c.rounds} | ({"per": "global"} if output else {})
    settings = Settings(lr=lr, decay=c.decay, weight_decay=1e-2 if c.decay is None else 0,      # 0: plain Adam
                        patience=c.patience if dense else None, precision=c.precision, fused=True)
    return Recipe(title, model, schedule, settings,
                  {"corpus": c.corpus, "encoder": c.encoder, "batch": c.batch, "limit": c.limit, "java": c.java},
                  masked="[ro][nu]*weight*" if output else benchmarks.Captions.masked, benchmark="captions",
                  finetune={"epochs": c.finetune_epochs, "lr": c.finetune_lr}
                  if c.finetune_epochs and (tuned or c.finetune_all) else None)


_CAPTIONERS = _named(_captioner, "nt-", "NeuralTalk, ", (
    ("lstm1", "LSTM x1, dense", {"cell": "lstm"}),
    ("lstm2", "LSTM x2, dense", {"cell": "lstm", "layers": 2}),
    ("lstm3", "LSTM x3, dense", {"cell": "lstm", "layers": 3}),
    ("gru1", "GRU x1, dense", {"cell": "gru"}),
    ("hlstm1", "H-LSTM x1, dense", {}),
    ("hlstm1-prune", "H-LSTM x1, prune only", {"rival": "prune-only"}),
    ("hlstm1-gp", "H-LSTM x1, grow and prune, accurate", {"rival": "gp"}),
    ("hlstm1-compact", "H-LSTM x1, grow and prune, compact", {"rival": "gp", "compact": True}),
    ("hlstm1-compact-output", "H-LSTM x1, compact, output projection, too",
     {"rival": "gp", "compact": True, "output": True}),
    ("lstm1-tuned", "LSTM x1, dense, its encoder trained on", {"cell": "lstm", "tuned": True}),
    ("hlstm1-compact-tuned", "H-LSTM x1, compact, its encoder trained on",
     {"rival": "gp", "compact": True, "tuned": True}),
    ("small-lstm", "LSTM x1 as small as the compact model", {"cell": "lstm", "rival": "small-dense"}),
    ("small-hlstm", "H-LSTM x1 as small as the compact model", {"rival": "small-dense"}),
    ("small-lstm-fitted", "LSTM x1 as small as the compact model, rate and dropout its own",
     {"cell": "lstm", "rival": "small-dense", "fitted": True}),
    ("small-hlstm-fitted", "H-LSTM x1 as small as the compact model, rate and dropout its own",
     {"rival": "small-dense", "fitted": True})))
ONCE = ("nt-gru1", "nt-hlstm1-prune", "nt-hlstm1-compact-output", "nt-lstm1-tuned", "nt-hlstm1-compact-tuned",
        "nt-small-lstm-fitted", "nt-small-hlstm-fitted")
TWICE = tuple(name for name in _CAPTIONERS if name not in ONCE)    # on both corpora
_CAPTIONERS |= _named(_captioner, "nt-hlstm1-", "NeuralTalk, H-LSTM x1, ",
                      ((name, name, {"activation": name}) for name in ("relu", "leaky_relu", "tanh")))
_CAPTIONERS |= _named(_captioner, "nt-compact-", "NeuralTalk, H-LSTM x1, compact, ",
                      ((name, name, {"rival": name, "compact": True}) for name in rivals.RIVALS
                       if name not in ("dense", "small-dense", "gp")))
CATALOGUE |= _CAPTIONERS | {f"{name}-flowers": _CAPTIONERS[name] for name in TWICE}


def recipe(name: str, profile: str) -> Recipe:
    """The recipe of an experiment in a profile. Raises ValueError that lists the names."""
    if name not in CATALOGUE:
        raise ValueError(f"experiment {name!r}: choose one of {', '.join(CATALOGUE)}")
    p = sizes_of(profile)
    if name.startswith("nt-"):
        return CATALOGUE[name]((p.flowers if name.endswith("-flowers") else None) or p.captions)
    return CATALOGUE[name](p.toy if name.startswith("toy-") else p.speech)
