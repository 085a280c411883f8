"""The flow of grow-and-prune training (paper: Method): seed, growth, pruning with retraining, the last good network.

A schedule is told of the end of each epoch and decides what happens to the connections; it never trains.
"""

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import ClassVar

from torch import Tensor

from .growprune import INITS, Gradients, check, grow, prune, prune_to
from .masks import ConnectionMasks, seeded, weights_of

GROWTHS = ("gradient", "random")


def between(start: float, end: float, round: int, rounds: int) -> float:
    """Density after so many of `rounds` steps from start to end in equal ratios; after the last exactly `end`."""
    return end if round == rounds else start * (end / start) ** (round / rounds)


@dataclass
class Event:
    """What the schedule did at the end of an epoch, for the record."""
    phase: str
    density: float
    nonzero: int
    kept: bool = True
    note: str = ""

    @classmethod
    def now(cls, phase: str, masks: ConnectionMasks, kept: bool = True, note: str = "") -> "Event":
        live, total = masks.count()
        return cls(phase, live / total, live, kept, note)


@dataclass
class Dense:
    """The schedule that neither grows nor prunes: `epochs` epochs in one stretch. Raises ValueError for less than 1."""
    epochs: int
    phase: str = "dense"
    at: int = 0                # epochs done of the present stretch
    done: bool = False
    growing: ClassVar[bool] = False
    absolute: ClassVar[bool] = False                       # see GrowPruneSchedule, as for the next
    growth_batches: ClassVar[int | None] = None
    restarts: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.epochs, Integral) or self.epochs < 1:
            raise ValueError(f"epochs {self.epochs} must be a whole number and at least 1")
        self.epochs = int(self.epochs)                     # NumPy's own cannot be stored in a checkpoint

    @property
    def length(self) -> int:
        """Epochs of the present stretch."""
        return self.epochs

    @property
    def cycle(self) -> tuple[int, int]:
        """(epochs done, epochs in all) of the present cycle of the learning rate: one for each stretch."""
        return self.at, self.length

    @property
    def epochs_left(self) -> int:
        return self.epochs - self.at

    def end_epoch(self, masks, gradients, score) -> Event | None:
        self.at += 1
        self.done = self.at >= self.epochs
        return None

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        return asdict(self), {}

    def load_state_dict(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.__dict__.update(state)


@dataclass
class GrowPruneSchedule:
    """Seed -> growth -> pruning with retraining, until the score breaks the floor; then the last good comes back.

    The first stretch has `train_epochs`; at the end of each of its first `growth_epochs` the network grows. Then come
    at most `rounds` rounds: prune the share `prune_ratio`, retrain `retrain_epochs`, look at the validation score. A
    round whose score is worse than the floor (the score before pruning, plus `tolerance`) ends the pruning: weights
    and masks of the last good round come back. A last stretch of `final_epochs` retrains what is left; its weights
    are kept unless the score got worse. `lower_is_better` fits error rates; turn it off for scores such as CIDEr.
    `per` and `structure` go to `grow` and `prune`.

    `growth="random"` wakes as many connections, but drawn from (`seed`, epoch). With a `density`, the rounds lead there
    in equal ratios instead of by `prune_ratio`, and the last meets it exactly (see `prune_to`), unless the network was
    sparser before: the event of the first stretch then says so. With `tolerance=None` there is no floor: every round is
    kept, so that the number of epochs is known beforehand. With `patience`, so many broken floors end nothing: the last
    good network comes back and is pruned by half the ratio of the failed round. Growth looks at the gradients of the
    last `growth_batches` steps of an epoch (None: all), summed with their signs or, if `absolute`, as magnitudes (see
    `Gradients`). Each stretch has a cycle of the learning rate to itself; without `restarts` one runs over them all.

    Call `end_epoch(masks, gradients, score)` after each epoch; between calls `phase`, `length` and `at` say where one
    is, `cycle` where the learning rate is, `growing` whether gradients are to be collected, `done` when to stop.
    Everything is in `state_dict`. Raises ValueError for numbers of epochs or ratios that make no schedule.
    Source: paper, Method; the numbers are unverified there and set by each recipe here.
    """
    train_epochs: int
    growth_epochs: int = 4
    growth_ratio: float = 0.8
    prune_ratio: float = 0.4
    retrain_epochs: int = 4
    rounds: int = 8
    tolerance: float | None = 0.0
    final_epochs: int = 0
    per: str = "matrix"
    structure: str | None = None
    lower_is_better: bool = True
    growth: str = "gradient"           # or "random"
    init: str = "zero"                 # of woken connections, as `grow` takes it
    seed: int = 0                      # of random growth
    density: float | None = None
    patience: int = 0
    growth_batches: int | None = None
    absolute: bool = False
    restarts: bool = True
    phase: str = "grow"
    at: int = 0
    round: int = 0
    failed: int = 0                    # rounds that broke the floor
    start: float | None = None         # density before the first pruning
    floor: float | None = None
    best: float | None = None
    done: bool = False

    def __post_init__(self):
        for name in ("train_epochs", "retrain_epochs", "growth_epochs", "rounds", "final_epochs", "patience"):
            least = int(name in ("train_epochs", "retrain_epochs"))
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be a whole number and at least {least}")
            setattr(self, name, int(getattr(self, name)))
        for name, kind in (("growth_ratio", float), ("prune_ratio", float), ("tolerance", float), ("density", float),
                           ("seed", int)):                         # a checkpoint cannot hold NumPy's own
            if getattr(self, name) is not None:
                setattr(self, name, kind(getattr(self, name)))
        if self.growth_epochs > self.train_epochs:
            raise ValueError(f"growth_epochs {self.growth_epochs} exceed train_epochs {self.train_epochs}")
        if self.tolerance is not None and not self.tolerance == self.tolerance:
            raise ValueError("tolerance must be a number, or None for no floor")
        check("growth_ratio", self.growth_ratio, self.per)
        check("prune_ratio", self.prune_ratio, self.per, self.structure)
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}: choose one of {INITS}")
        if self.growth not in GROWTHS:
            raise ValueError(f"growth={self.growth!r}: choose one of {GROWTHS}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} must lie in (0, 1]")
        if self.density is not None and self.rounds == 0:
            raise ValueError(f"density {self.density} is reached in rounds of pruning, of which there are none")
        if self.density is not None and self.patience:
            raise ValueError("patience halves prune_ratio, which a density leaves no room for; choose one of the two")
        if self.growth_batches is not None:
            if not isinstance(self.growth_batches, Integral) or self.growth_batches < 1:
                raise ValueError(f"growth_batches {self.growth_batches} must be at least 1 and whole, or None for all")
            self.growth_batches = int(self.growth_batches)
        self._good: dict[str, Tensor] = {}
        if self.growth_epochs == 0:
            self.phase = "train"
        self._every = self.epochs_left

    @property
    def growing(self) -> bool:
        return self.phase == "grow"

    @property
    def length(self) -> int:
        """Epochs of the present stretch."""
        return {"prune": self.retrain_epochs, "final": self.final_epochs}.get(self.phase, self.train_epochs)

    @property
    def epochs_left(self) -> int:
        """At most so many epochs are still to come."""
        if self.done:
            return 0
        rounds = self.rounds - self.round + (self.patience - self.failed if self.rounds else 0)
        later = 0 if self.phase == "final" else rounds * self.retrain_epochs + self.final_epochs
        return self.length - self.at + later

    @property
    def cycle(self) -> tuple[int, int]:
        """(epochs done, epochs in all) of the present cycle of the learning rate."""
        return (self.at, self.length) if self.restarts else (self._every - self.epochs_left, self._every)

    def end_epoch(self, masks: ConnectionMasks, gradients: Gradients, score: float) -> Event | None:
        """Grows, prunes, restores or moves on; returns what happened, or None."""
        self.at += 1
        note = "before pruning"
        if self.phase == "grow":
            generator = seeded(self.seed, self.at) if self.growth == "random" else None
            woken = grow(masks, gradients.sums, self.growth_ratio, per=self.per, init=self.init, generator=generator)
            gradients.clear()
            if self.at == self.growth_epochs:
                self.phase = "train"
            if self.at < self.train_epochs:
                return Event.now("grow", masks, note=f"{woken} connections woken")
            note += f"; {woken} connections woken"
        if self.at < self.length:
            return None
        if self.phase == "train":
            if self.tolerance is not None:
                self.floor = score + self.tolerance * (1 if self.lower_is_better else -1)
            self.start = masks.density()
            note += "; sparser than the density to be reached" * (self.start < (self.density or 0))
            self._keep(masks, score)
            event = Event.now("train", masks, note=note)
            self._next(masks)
        elif self.phase == "prune" and not self._worse(score, self.floor):
            self._keep(masks, score)
            event = Event.now("prune", masks, note=f"round {self.round}")
            self._next(masks)
        elif self.phase == "prune":
            event = Event.now("prune", masks, kept=False, note=f"round {self.round}: worse than the floor, undone")
            self._restore(masks)
            self.failed += 1
            if self.failed > self.patience:
                self._finish()
            else:
                self._prune(masks)
        else:
            kept = not self._worse(score, self.best)
            event = Event.now("final", masks, kept=kept, note="retrained" if kept else "got worse, undone")
            if not kept:
                self._restore(masks)
            self.done = True
        return event

    def _next(self, masks: ConnectionMasks) -> None:
        """The next pruning round, or what follows the last."""
        if self.round == self.rounds:
            return self._finish()
        self.phase, self.round = "prune", self.round + 1
        self._prune(masks)

    def _prune(self, masks: ConnectionMasks) -> None:
        self.at = 0
        if self.density is None:
            prune(masks, self.prune_ratio / 2 ** self.failed, per=self.per, structure=self.structure)
        else:
            target = between(self.start, self.density, self.round, self.rounds)
            prune_to(masks, target, per=self.per, structure=self.structure)

    def _finish(self) -> None:
        self.phase, self.at, self.done = "final", 0, self.final_epochs == 0

    def _worse(self, score: float, than: float | None) -> bool:
        if than is None:
            return False
        return not (score <= than if self.lower_is_better else score >= than)    # a score of NaN is worse

    def _keep(self, masks: ConnectionMasks, score: float) -> None:
        self.best = score
        self._good = {f"weight.{name}": t for name, t in weights_of(masks.module).items()}
        self._good |= {f"mask.{name}": t for name, t in masks.state_dict().items()}

    def _restore(self, masks: ConnectionMasks) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in self._good.items() if k.startswith(prefix)}
        masks.module.load_state_dict(part("weight."))
        masks.load_state_dict(part("mask."))
        masks.restart_()                                           # moments are of the weights that failed

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors of the last good model)."""
        return asdict(self), dict(self._good)

    def load_state_dict(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.__dict__.update(state)
        self._good = dict(tensors)
