"""The four sizes in which everything here can run: from a test of seconds to the paper's own."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINI_SPEECH = "data_prep/mini/speech"
MINI_SCENES = "data_prep/mini/scenes"


@dataclass(frozen=True)
class Speech:
    """Sizes of the speech experiments. `epochs` is a dense run's; grow-and-prune adds rounds of its own to a first
    stretch that must be long enough for CTC to find the letters."""
    corpus: str                     # folder, relative to the project's root
    hidden: int                     # H, width of the recurrent state
    channels: int                   # of the convolutions
    lstm_layers: int
    hlstm_layers: int
    epochs: int
    growth_epochs: int              # the network grows at the end of each of the first so many
    train_epochs: int               # growth included, before the first pruning
    rounds: int                     # of pruning and retraining, at most
    prune_ratio: float
    retrain_epochs: int             # in each round
    final_epochs: int               # with the last good masks
    tolerance: float                # points of validation WER that pruning may cost before the last retraining
    grid_epochs: int                # of each cell of the paper's grid; sparse ones have as many, pruning included
    accurate: float = 0.5           # density of the grid's accurate model
    compression: float = 23.5       # weights of the LSTM x5 for each of the grid's compact model's: the paper's factor
                                    # of FLOPs, so that its 19.4 of parameters is met, too
    batch: int = 16
    lr: float = 1e-3
    retrain_lr: float = 0.5         # peak when retraining after pruning, as a share of `lr`
    limit: int | None = None        # use only the first so many utterances of each split
    precision: str = "bf16"


@dataclass(frozen=True)
class Captions:
    """Sizes of the caption experiments. All cells train for `epochs`, sparse ones in as many, pruning included."""
    corpus: str                     # folder, relative to the project's root
    encoder: str                    # whose features are read; "tiny" learns along, from pixels
    hidden: int = 512               # H, and the width of the word embedding
    epochs: int = 20
    rounds: int = 4                 # of pruning and retraining
    accurate: float = 0.125         # density of the accurate model's cell
    compression: float = 45.5       # weights of the cell of the LSTM x3 for each of the compact model's: the paper's
                                    # factor of FLOPs, so that its 38.7 of parameters is met, too
    activation: str = "tanh"        # inside the gates
    lr: float = 1e-3                # peak of one cycle; with a `decay`, where it begins
    decay: float | None = None      # the paper's schedule: by this factor every six epochs, without weight decay
    patience: int | None = None     # epochs without a better CIDEr after which dense training ends
    batch: int = 64                 # captions
    dropout: float = 0.5
    limit: int | None = None        # use only the first so many pictures of each split
    finetune_epochs: int = 0        # afterwards, in which the encoder learns, too; 0: none
    finetune_lr: float = 1e-6       # there, for both
    finetune_all: bool = False      # of every experiment, not of those named `-tuned` alone
    java: bool = True               # score with the PTB tokeniser and METEOR, where there is a Java
    precision: str = "bf16"
    seeds: int = 1                  # 0, 1, ...: so many runs of each experiment


@dataclass(frozen=True)
class Toy:
    """Sizes of the experiments on the interlock; all of them train for the same number of epochs."""
    levers: int = 4                 # n
    hidden: int = 24                # H of the H-LSTM; the LSTM gets the width that makes it as large
    activation: str = "tanh"        # inside the gates; learns this task better than relu does
    epochs: int = 24
    length: int = 20                # batches in an epoch
    batch: int = 64
    held_out: int = 512             # sequences for validation, and as many for the test
    density: float = 0.1            # with which all rivals end
    rounds: int = 4                 # of pruning and retraining
    lr: float = 5e-2
    lstm_lr: float = 8e-2           # each cell has what served it best in trials
    seeds: int = 5                  # 0, 1, ...: so many runs of each experiment


@dataclass(frozen=True)
class Profile:
    name: str
    speech: Speech
    kept: bool                      # its records are history: committed, made anew on request only
    captions: Captions = Captions(MINI_SCENES, "tiny")
    flowers: Captions | None = None     # the second caption corpus, where there is one
    toy: Toy = Toy()


PROFILES = {p.name: p for p in (
    Profile("smoke", Speech(MINI_SPEECH, hidden=16, channels=4, lstm_layers=1, hlstm_layers=1, epochs=4,
                            growth_epochs=1, train_epochs=2, rounds=1, prune_ratio=0.5, retrain_epochs=1,
                            final_epochs=1, tolerance=100, grid_epochs=4, batch=4, limit=12, precision="fp32"),
            kept=False,
            captions=Captions(MINI_SCENES, "tiny", hidden=16, epochs=6, rounds=2, lr=1e-2, batch=16, limit=12,
                              java=False, precision="fp32"),
            toy=Toy(levers=2, hidden=8, epochs=5, length=2, batch=8, held_out=16, density=0.3, rounds=2, seeds=1)),
    Profile("laptop", Speech(MINI_SPEECH, hidden=64, channels=8, lstm_layers=2, hlstm_layers=2, epochs=48,
                             growth_epochs=3, train_epochs=40, rounds=4, prune_ratio=0.5, retrain_epochs=3,
                             final_epochs=6, tolerance=4, grid_epochs=48, batch=8, lr=3e-3), kept=False,
            captions=Captions(MINI_SCENES, "tiny", hidden=128, epochs=16, lr=5e-3, batch=32, dropout=0.2)),
    Profile("desk", Speech("data/an4", hidden=256, channels=16, lstm_layers=3, hlstm_layers=2, epochs=87,
                           growth_epochs=3, train_epochs=48, rounds=3, prune_ratio=0.5, retrain_epochs=5,
                           final_epochs=24, tolerance=6, grid_epochs=60, lr=1e-3, retrain_lr=1.0), kept=True,
            captions=Captions("data/ucm", "efficientnet_lite0", epochs=14, rounds=3, lr=2e-3, seeds=3,
                              finetune_epochs=2, finetune_lr=1e-5),
            flowers=Captions("data/flowers", "efficientnet_lite0", epochs=14, rounds=3, lr=4e-3, seeds=2)),
    Profile("paper", Speech("data/an4", hidden=800, channels=32, lstm_layers=5, hlstm_layers=3, epochs=120,
                            growth_epochs=8, train_epochs=60, rounds=8, prune_ratio=0.4, retrain_epochs=6,
                            final_epochs=12, tolerance=1, grid_epochs=120, lr=5e-4), kept=True,
            captions=Captions("data/coco", "vgg16", epochs=90, lr=3e-4, decay=0.8, patience=12, activation="relu",
                              finetune_epochs=10, finetune_all=True)),
)}


def profile(name: str) -> Profile:
    """The profile of that name. Raises ValueError that lists the names."""
    if name not in PROFILES:
        raise ValueError(f"profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
