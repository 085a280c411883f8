"""The five sizes in which everything here can run: from a test of seconds to the paper's own."""

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINI_SPEECH = "data_prep/mini/speech"
MINI_SCENES = "data_prep/mini/scenes"


def home() -> Path:
    """Where corpora and results lie: the project's root or, if only the package is installed, the current folder."""
    return ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()


def place(corpus: str) -> Path:
    """The folder of a profile's corpus; the mini corpora come with the code."""
    return (ROOT if corpus in (MINI_SPEECH, MINI_SCENES) else home()) / corpus


@dataclass(frozen=True)
class Speech:
    """Sizes of the speech experiments. All recognisers train for `epochs`, sparse ones in as many, pruning included."""
    corpus: str                     # folder, as `place` takes it
    hidden: int                     # H, width of the recurrent state
    channels: int                   # of the convolutions
    epochs: int
    rounds: int = 3                 # of pruning and retraining
    accurate: float = 0.5           # density of the accurate model
    compression: float = 23.5       # weights of the LSTM x5 for each of the compact model's: the paper's factor
                                    # of FLOPs, so that its 19.4 of parameters is met, too
    fast: float = 0.1               # density of the fast model's recurrent matrices
    convolutions: float = 0.25      # density of convolutions, where they are pruned, too
    stride: int = 4                 # windows for each frame that the recurrent layers read; the paper's: 2
    ordered: int = 1                # epochs at the start in which batches go from short to long
    batch: int = 16
    lr: float = 2e-3
    retrain_lr: float = 1.0         # peak when retraining after pruning, as a share of `lr`
    limit: int | None = None        # use only the first so many utterances of each split
    precision: str = "bf16"


@dataclass(frozen=True)
class Captions:
    """Sizes of the caption experiments. All cells train for `epochs`, sparse ones in as many, pruning included."""
    corpus: str                     # folder, as `place` takes it
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
    small_lr: float | None = None   # of the small dense networks named `-fitted`; None: as all others
    small_dropout: float | None = None      # likewise
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


DESK = Profile("desk", Speech("data/an4", hidden=256, channels=16, epochs=60), kept=True,
               captions=Captions("data/ucm", "efficientnet_lite0", epochs=14, rounds=3, lr=2e-3, seeds=3,
                                 small_lr=4e-3, small_dropout=0.1, finetune_epochs=2, finetune_lr=1e-5),
               flowers=Captions("data/flowers", "efficientnet_lite0", epochs=14, rounds=3, lr=4e-3, seeds=2))

PROFILES = {p.name: p for p in (
    Profile("smoke", Speech(MINI_SPEECH, hidden=16, channels=4, epochs=4, rounds=1, batch=4, limit=12,
                            precision="fp32"), kept=False,
            captions=Captions(MINI_SCENES, "tiny", hidden=16, epochs=6, rounds=2, lr=1e-2, batch=16, limit=12,
                              java=False, precision="fp32"),
            toy=Toy(levers=2, hidden=8, epochs=5, length=2, batch=8, held_out=16, density=0.3, rounds=2, seeds=1)),
    Profile("laptop", Speech(MINI_SPEECH, hidden=64, channels=8, epochs=40, batch=8, lr=3e-3), kept=False,
            captions=Captions(MINI_SCENES, "tiny", hidden=128, epochs=16, lr=5e-3, batch=32, dropout=0.2)),
    DESK,
    # As `desk`, but with recognisers as wide as the paper's, which a CPU can train within hours at stride 4.
    Profile("wide", Speech("data/an4", hidden=800, channels=32, epochs=40, lr=1e-3, accurate=0.49, compression=40),
            kept=True, captions=replace(DESK.captions, seeds=1), flowers=replace(DESK.flowers, seeds=1)),
    Profile("paper", Speech("data/an4", hidden=800, channels=32, epochs=120, rounds=8, stride=2, lr=5e-4), kept=True,
            captions=Captions("data/coco", "vgg16", epochs=90, lr=3e-4, decay=0.8, patience=12, activation="relu",
                              finetune_epochs=10, finetune_all=True)),
)}


def profile(name: str) -> Profile:
    """The profile of that name. Raises ValueError that lists the names."""
    if name not in PROFILES:
        raise ValueError(f"profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
