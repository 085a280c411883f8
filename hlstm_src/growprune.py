"""Growing and pruning connections (paper: Method, grow and prune), and the schedule that joins the two.

Neither rule knows which network it acts on: both see masks, weights and gradients only. Rivals: see rivals.py.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import ConnectionMasks, live_count

STRUCTURES = (None, "block16", "balanced", "row", "column")
GROWTHS = ("gradient", "random")


class Gradients:
    """Accumulates the dense gradients that growth looks at, dormant connections included.

    `absolute=False` sums them with their signs, so that a connection scores which would help many batches in the same
    direction; `absolute=True` sums magnitudes. The paper's abstract leaves this open; the signed sum is the gradient
    of the loss over all those batches and the default.
    """

    def __init__(self, absolute: bool = False):
        self.absolute, self.sums = absolute, {}

    @torch.no_grad()
    def collect(self, masks: ConnectionMasks) -> None:
        """Adds the present gradients: call after `backward`, before `mask_gradients_`."""
        for name, p in masks.parameters.items():
            if p.grad is not None:
                g = p.grad.abs() if self.absolute else p.grad
                self.sums[name] = self.sums[name].add_(g) if name in self.sums else g.clone()

    def clear(self) -> None:
        self.sums = {}


def _check(what: str, ratio: float, per: str, structure: str | None = None) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"{what} {ratio} must lie in [0, 1]")
    if per not in ("matrix", "global"):
        raise ValueError(f"per={per!r}: choose 'matrix' or 'global'")
    if structure not in STRUCTURES:
        raise ValueError(f"structure={structure!r}: choose None, 'block16', 'balanced', 'row' or 'column'")


def _groups(masks: ConnectionMasks, per: str) -> list[list[str]]:
    return [[name] for name in masks.masks] if per == "matrix" else [list(masks.masks)]


@torch.no_grad()
def grow(masks: ConnectionMasks, gradients: dict[str, Tensor], ratio: float, *, per: str = "matrix",
         init: str = "zero", step: float = 1e-3, generator: torch.Generator | None = None) -> int:
    """Wakes dormant connections with large gradients; returns how many.

    A dormant connection wakes if its |gradient| is at or above the `ratio`-quantile of |gradient| over the whole
    matrix, live connections included (`per="global"`: over all matrices together). Of n entries, n - floor(ratio n)
    lie there when no two are equal; a gradient of exactly zero never wakes anything. New weights start at zero, or
    with `init="gradient"` at -step * gradient; the optimiser begins anew with a matrix that grew. Source: paper,
    Method (detail unverified).

    With a `generator`, growth is random: each matrix wakes as many connections as its gradients would have woken,
    but which of the dormant ones is drawn. Held against that, one sees what the gradients' choice is worth.

    Raises ValueError for a ratio outside [0, 1] or gradients that do not fit the masks.
    """
    _check("growth ratio", ratio, per)
    if init not in ("zero", "gradient"):
        raise ValueError(f"init={init!r}: choose 'zero' or 'gradient'")
    for name, mask in masks.masks.items():
        if name not in gradients or gradients[name].shape != mask.shape:
            raise ValueError(f"gradients hold nothing of shape {tuple(mask.shape)} for {name}")
    woken = 0
    for names in _groups(masks, per):
        scores = torch.cat([gradients[name].abs().flatten() for name in names])
        below = int(ratio * scores.numel())
        if below == scores.numel():
            continue
        threshold = scores.kthvalue(below + 1).values
        for name in names:
            score = gradients[name].abs()
            new = ~masks.masks[name] & (score >= threshold) & (score > 0)
            if generator is not None:
                new = best_dormant(masks.masks[name], random_scores(score, generator), int(new.sum()))
            woken += wake(masks, name, new, -step * gradients[name][new] if init == "gradient" else None)
    return woken


def random_scores(like: Tensor, generator: torch.Generator) -> Tensor:
    """Scores in [0, 1), shaped as `like`, drawn on the CPU so that every device gets the same."""
    return torch.rand(like.shape, generator=generator).to(like.device)


def best_dormant(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """Where the n best of the dormant connections lie (bool, shaped as the mask); of equal scores the earlier ones.

    Scores must not be negative. Where fewer than n are dormant, all of them.
    """
    best = scores.masked_fill(mask, -1).flatten().argsort(descending=True, stable=True)[:n]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[best] = True
    return chosen & ~mask


@torch.no_grad()
def wake(masks: ConnectionMasks, name: str, new: Tensor, first: Tensor | None = None) -> int:
    """Wakes the connections of one matrix where `new` (bool, shaped as it) is True; returns how many.

    Their weights start at zero or at `first` (one value for each, in order); nothing is left of an earlier life, and
    the optimiser begins anew with the matrix.
    """
    masks.masks[name] |= new
    masks.clear_(name, new)
    if first is not None:
        masks.parameters[name][new] = first.to(masks.parameters[name].dtype)
    if new.any():
        masks.restart_(name)
    return int(new.sum())


def prune(masks: ConnectionMasks, ratio: float, *, per: str = "matrix", structure: str | None = None) -> int:
    """Puts the share `ratio` of the live connections, those with the smallest |w|, to sleep; returns how many.

    Of L live connections in a matrix (`per="global"`: in all matrices together) round(ratio L) go; of equal weights
    the earlier ones. Weights, gradients and moments of the sleepers become zero. Source: paper, Method (detail
    unverified). With a `structure`, units go as a whole, the smallest score first, as many as come nearest to
    round(ratio L). A matrix is seen as (rows, the rest); a dormant connection counts as |w| = 0:
        "block16"   16 consecutive rows of one column (fewer at the bottom edge), by mean |w|
        "row"       a row, by the L2 norm of its weights: all that one output neuron hears
        "column"    a column, likewise: all that is heard of one input neuron
        "balanced"  the smallest live weight of every row in every panel of 32 columns, by their mean |w|: each keeps
                    the same number of connections, unless it had fewer
    Raises ValueError for a ratio outside [0, 1] or an unknown structure.
    """
    _check("pruning ratio", ratio, per, structure)
    return sum(sleep(masks, names, round(ratio * _live(masks, names)), structure) for names in _groups(masks, per))


def prune_to(masks: ConnectionMasks, density: float, *, per: str = "matrix", structure: str | None = None) -> int:
    """Prunes, as `prune` does, to as many live connections as a random seed of that density has; returns how many go.

    Without a structure the count is met exactly: `live_count` in each matrix, or with `per="global"` their sum over
    all. Who has no more than that loses nothing. Raises ValueError for a density outside [0, 1].
    """
    _check("density", density, per, structure)
    return sum(sleep(masks, names, _live(masks, names) - sum(live_count(masks.masks[name].shape, density)
                                                             for name in names), structure)
               for names in _groups(masks, per))


def _live(masks: ConnectionMasks, names: list[str]) -> int:
    return sum(int(masks.masks[name].sum()) for name in names)


@torch.no_grad()
def sleep(masks: ConnectionMasks, names: list[str], n: int, structure: str | None = None) -> int:
    """Puts the n smallest live connections of these matrices together to sleep, as `prune` says; returns how many."""
    for name in names:
        masks.clear_(name, ~masks.masks[name])
    alive = [masks.masks[name].flatten(1) for name in names]
    found = [_units(masks.parameters[name].abs().flatten(1), mask, structure) for name, mask in zip(names, alive)]
    starts = accumulate([0] + [len(scores) for _, scores in found])
    units = [unit + start for (unit, _), start in zip(found, starts)]
    scores = torch.cat([scores for _, scores in found])
    live = torch.cat([unit[mask] for unit, mask in zip(units, alive)]).bincount(minlength=len(scores))
    order = scores.argsort(stable=True)
    gone = F.pad(live[order].cumsum(0), (1, 0))                    # live connections in the first 0, 1, ... units
    first = int((gone - n).abs().argmin())
    stays = torch.ones_like(scores, dtype=torch.bool)
    stays[order[:first]] = False
    for name, unit in zip(names, units):
        masks.masks[name] &= stays[unit].view_as(masks.masks[name])
        masks.clear_(name, ~masks.masks[name])
    return int(gone[first])


def _units(weights: Tensor, alive: Tensor, structure: str | None) -> tuple[Tensor, Tensor]:
    """|w| (rows, columns) -> the number of each connection's unit (rows, columns), the score of each unit."""
    (rows, columns), device = weights.shape, weights.device
    if structure == "row":
        return torch.arange(rows, device=device)[:, None].expand(rows, columns), weights.norm(dim=1)
    if structure == "column":
        return torch.arange(columns, device=device).expand(rows, columns), weights.norm(dim=0)
    if structure == "block16":
        scores = torch.stack([block.mean(0) for block in weights.split(16)])
        units = torch.arange(scores.numel(), device=device).view_as(scores)
        return units.repeat_interleave(16, 0)[:rows], scores.flatten()
    if structure == "balanced":                                    # unit 31 holds the largest of each panel
        panels = F.pad(weights.masked_fill(~alive, -1), (0, -columns % 32), value=-1).view(-1, 32)
        panels, order = panels.sort(dim=1, stable=True)
        return order.argsort(dim=1).view(rows, -1)[:, :columns], panels.clamp(min=0).mean(0)
    return torch.arange(weights.numel(), device=device).view_as(weights), weights.flatten()


def seeded(seed: int, epoch: int) -> torch.Generator:
    """The generator of what an epoch draws: seed and epoch are all of its state, so a resumed run draws the same."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


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
    """The schedule that neither grows nor prunes: `epochs` epochs in one stretch."""
    epochs: int
    phase: str = "dense"
    at: int = 0                # epochs done of the present stretch
    done: bool = False
    growing: ClassVar[bool] = False

    @property
    def length(self) -> int:
        """Epochs of the present stretch; the learning rate runs one cycle over it."""
        return self.epochs

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

    `growth="random"` wakes as many connections, but drawn from (`seed`, epoch). With a `density`, the rounds lead
    there in equal ratios instead of by `prune_ratio`, and the last meets it exactly (see `prune_to`). With
    `tolerance=None` there is no floor: every round is kept, so that the number of epochs is known beforehand.

    Call `end_epoch(masks, gradients, score)` after each epoch; between calls `phase`, `length` and `at` say where one
    is, `growing` whether gradients are to be collected, `done` when to stop. Everything is in `state_dict`. Raises
    ValueError for numbers of epochs or ratios that make no schedule.
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
    seed: int = 0                      # of random growth
    density: float | None = None
    phase: str = "grow"
    at: int = 0
    round: int = 0
    start: float | None = None         # density before the first pruning
    floor: float | None = None
    best: float | None = None
    done: bool = False

    def __post_init__(self):
        if self.growth_epochs > self.train_epochs:
            raise ValueError(f"growth_epochs {self.growth_epochs} exceed train_epochs {self.train_epochs}")
        for name in ("train_epochs", "retrain_epochs", "growth_epochs", "rounds", "final_epochs"):
            least = int(name in ("train_epochs", "retrain_epochs"))
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        _check("growth_ratio", self.growth_ratio, self.per)
        _check("prune_ratio", self.prune_ratio, self.per, self.structure)
        if self.growth not in GROWTHS:
            raise ValueError(f"growth={self.growth!r}: choose one of {GROWTHS}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} must lie in (0, 1]")
        self._good: dict[str, Tensor] = {}
        if self.growth_epochs == 0:
            self.phase = "train"

    @property
    def growing(self) -> bool:
        return self.phase == "grow"

    @property
    def length(self) -> int:
        """Epochs of the present stretch; the learning rate runs one cycle over it."""
        return {"prune": self.retrain_epochs, "final": self.final_epochs}.get(self.phase, self.train_epochs)

    @property
    def epochs_left(self) -> int:
        """At most so many epochs are still to come."""
        if self.done:
            return 0
        later = 0 if self.phase == "final" else (self.rounds - self.round) * self.retrain_epochs + self.final_epochs
        return self.length - self.at + later

    def end_epoch(self, masks: ConnectionMasks, gradients: Gradients, score: float) -> Event | None:
        """Grows, prunes, restores or moves on; returns what happened, or None."""
        self.at += 1
        note = "before pruning"
        if self.phase == "grow":
            generator = seeded(self.seed, self.at) if self.growth == "random" else None
            woken = grow(masks, gradients.sums, self.growth_ratio, per=self.per, generator=generator)
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
            self._finish()
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
        self.phase, self.at, self.round = "prune", 0, self.round + 1
        if self.density is None:
            prune(masks, self.prune_ratio, per=self.per, structure=self.structure)
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
        self._good = {f"weight.{name}": t.detach().clone() for name, t in masks.module.state_dict().items()}
        self._good |= {f"mask.{name}": t for name, t in masks.state_dict().items()}

    def _restore(self, masks: ConnectionMasks) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): t for k, t in self._good.items() if k.startswith(prefix)}
        masks.module.load_state_dict(part("weight."))
        masks.load_state_dict(part("mask."))

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        """(plain values, tensors of the last good model)."""
        return asdict(self), dict(self._good)

    def load_state_dict(self, state: dict, tensors: dict[str, Tensor]) -> None:
        self.__dict__.update(state)
        self._good = dict(tensors)
