"""Rivals of grow-and-prune behind the interface of its schedule, made to meet at one density after equal epochs.

    seed_density, schedule = rival("rigl", epochs=30, density=0.1)
    masks = None if seed_density is None else ConnectionMasks(model, "rnn.*", seed_density, generator)

Every schedule here is a small variation of two: `Dense`, which only counts epochs, and `GrowPruneSchedule`. What
they are compared by is data, epochs and the final number of connections; the validation score steers none of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .growprune import Gradients, best_dormant, check, grow, prune_to, sleep
from .masks import ConnectionMasks, random_scores, seeded, weights_of
from .schedule import GROWTHS, Dense, Event, GrowPruneSchedule, between

RIVALS = {
    "dense": "all connections, all epochs: what sparsity is measured against",
    "small-dense": "dense, but so narrow that, biases and all, it has about as many parameters as the others keep",
    "one-shot": "trained dense, pruned once, fine-tuned",
    "prune-only": "trained dense, then rounds of pruning and retraining (the paper's comparison; Han et al., 2015)",
    "gradual": "pruned a little after each epoch, ever more slowly, within one training (Zhu and Gupta, 2017)",
    "imp": "rounds of pruning; after each the weights rewind to an early epoch and train anew (Frankle et al., 2020)",
    "set": "as sparse throughout; the smallest weights move to random places (Mocanu et al., 2018)",
    "rigl": "as sparse throughout; the smallest weights move to where gradients are large (Evci et al., 2020)",
    "gp-no-growth": "grow-and-prune's sparse seed and its pruning, no growth",
    "gp-random": "grow-and-prune; as many connections grow, but anywhere",
    "gp-sized": "grow-and-prune; woken connections begin as large as the others are, not at zero",
    "gp-cycle": "grow-and-prune; the learning rate falls once over all of it, with no restart after each pruning",
    "gp-gradual": "grow-and-prune within one training: sparse seed, growth by gradient, then pruned gradually",
    "gp": "grow-and-prune: sparse seed, growth by gradient, rounds of pruning and retraining",
}


def rival(name: str, *, epochs: int, density: float | Mapping[str, float], seed_density: float = 0.5,
          growth_epochs: int | None = None, growth_ratio: float = 0.8, rounds: int = 4, train_share: float = 0.5,
          seed: int = 0, per: str = "matrix", structure: str | None = None,
          ) -> tuple[float | None, Dense | GrowPruneSchedule]:
    """(density of the masks to start with, schedule) of a rival; None instead of a density: no masks at all.

    Every schedule takes exactly `epochs` epochs; all but "dense" and "small-dense" end with as many live connections
    as a random seed of `density` has. Those that first train and then prune train for about `train_share` of the
    epochs and prune in `rounds` rounds of equal length ("one-shot": one round as long as all of them);
    `growth_epochs` is a quarter of the first stretch ("gp-gradual": an eighth of all epochs) unless given. `seed` is
    that of random growth. `structure` is that of pruning (see `prune`), which then meets the density nearly; *set* and
    *rigl* have none. The gradual ones take a density for each pattern of names, too.

    Raises ValueError for an unknown name, for too few epochs, for a seed sparser than the goal, or for a structure or
    densities that the rival does not take.
    """
    retrain = max(1, int((1 - train_share) * epochs / rounds)) if rounds > 0 else 0
    train = epochs - rounds * retrain
    if name not in RIVALS:
        raise ValueError(f"rival {name!r}: choose one of {', '.join(RIVALS)}")
    gradual, densities = name.endswith("gradual"), density.values() if isinstance(density, Mapping) else [density]
    if not all(0 < d <= 1 for d in densities):
        raise ValueError(f"density {density} must lie in (0, 1]")
    if isinstance(density, Mapping) and not gradual:
        raise ValueError(f"{name} takes one density; only gradual and gp-gradual take several")
    if structure and name in ("set", "rigl"):
        raise ValueError(f"{name} rewires single connections; it takes no structure")
    if not (0 <= train_share <= 1 and 0 < seed_density <= 1):
        raise ValueError(f"train_share {train_share} must lie in [0, 1] and seed_density {seed_density} in (0, 1]")
    if (rounds < 1 or train < 1) and not (gradual or name in ("dense", "small-dense", "set", "rigl")):
        raise ValueError(f"{epochs} epochs are too few for {rounds} rounds of pruning, which must be at least 1")
    if name.startswith("gp") and seed_density < max(densities):
        raise ValueError(f"a seed of density {seed_density} cannot be pruned to {density}; choose a denser seed")
    flow = {"train_epochs": train, "rounds": rounds, "retrain_epochs": retrain, "growth_epochs": 0,
            "density": density, "tolerance": None, "per": per, "structure": structure}
    little = {"density": density, "per": per, "structure": structure}
    early = max(1, epochs // 8)
    grown = flow | {"growth_epochs": max(1, round(train / 4)) if growth_epochs is None else growth_epochs,
                    "growth_ratio": growth_ratio, "seed": seed}
    return {
        "dense": lambda: (None, Dense(epochs)),
        "small-dense": lambda: (None, Dense(epochs)),
        "one-shot": lambda: (1.0, GrowPruneSchedule(**flow | {"rounds": 1, "retrain_epochs": rounds * retrain})),
        "prune-only": lambda: (1.0, GrowPruneSchedule(**flow)),
        "gradual": lambda: (1.0, Gradual(epochs, **little)),
        "gp-gradual": lambda: (seed_density, Gradual(epochs, **little, growth_ratio=growth_ratio,
                                                     growth_epochs=early if growth_epochs is None else growth_epochs)),
        "imp": lambda: (1.0, Rewinding(epochs, rounds=rounds, **little)),
        "set": lambda: (density, Rewiring(epochs, growth="random", seed=seed)),
        "rigl": lambda: (density, Rewiring(epochs, growth="gradient", seed=seed)),
        "gp-no-growth": lambda: (seed_density, GrowPruneSchedule(**flow)),
        "gp-random": lambda: (seed_density, GrowPruneSchedule(**grown, growth="random")),
        "gp-sized": lambda: (seed_density, GrowPruneSchedule(**grown, init="sized")),
        "gp-cycle": lambda: (seed_density, GrowPruneSchedule(**grown, restarts=False)),
        "gp": lambda: (seed_density, GrowPruneSchedule(**grown)),
    }[name]()


@dataclass
class Gradual(Dense):
    """One training in which density falls along a cubic, fast at first (Zhu and Gupta, 2017).

    Prunes after each epoch from the share `first` of the training to the share `last`; then trains what is left.
    With `growth_epochs` the network, then begun sparse, first grows at the end of so many epochs, as in
    GrowPruneSchedule: the paper's flow, but with small steps down instead of large ones, and without restarts of the
    learning rate. Raises ValueError if no epoch is left to prune in.
    """
    phase: str = "train"
    density: float | Mapping[str, float] = 0.1             # as `prune_to` takes it
    first: float = 0.25
    last: float = 0.75
    per: str = "matrix"
    structure: str | None = None
    growth_epochs: int = 0
    growth_ratio: float = 0.8
    growth_batches: int | None = None
    absolute: bool = False
    top: float = 1.0           # density before the first pruning

    def __post_init__(self):
        super().__post_init__()
        check("growth_ratio", self.growth_ratio, self.per, self.structure)
        goals = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        if not all(0 < d <= 1 for d in goals):
            raise ValueError(f"density {self.density} must lie in (0, 1]")
        self._start = max(int(self.first * self.epochs), self.growth_epochs)
        self._stop = int(self.last * self.epochs)
        if not 0 <= self._start < self._stop < self.epochs:
            raise ValueError(f"of {self.epochs} epochs none lies between the shares {self.first} and {self.last}"
                             + f", {self.growth_epochs} of growth before them" * (self.growth_epochs > 0))
        if self.growth_epochs < 0:
            raise ValueError(f"growth_epochs {self.growth_epochs} must be at least 0")

    @property
    def growing(self) -> bool:
        return self.at < self.growth_epochs

    def end_epoch(self, masks: ConnectionMasks, gradients: Gradients, score: float) -> Event | None:
        growing = self.growing
        super().end_epoch(masks, gradients, score)
        if growing:
            woken = grow(masks, gradients.sums, self.growth_ratio, per=self.per)
            gradients.clear()
            return Event.now("grow", masks, note=f"{woken} connections woken")
        if self.at <= self._start or self.at > self._stop:
            return None
        if self.at == self._start + 1:
            self.top = masks.density()
        left = ((self._stop - self.at) / (self._stop - self._start)) ** 3
        goals = self.density if isinstance(self.density, Mapping) else {"*": self.density}
        prune_to(masks, {pattern: d + (self.top - d) * left for pattern, d in goals.items()}, per=self.per,
                 structure=self.structure)
        return Event.now("prune", masks)


@dataclass
class Rewiring(Dense):
    """Constant density: after each epoch the smallest weights of each matrix sleep and as many connections wake.

    growth="gradient" is RigL (Evci et al., 2020): those wake whose |accumulated gradient| is largest, over the last
    `growth_batches` steps of the epoch (RigL: 1; None: all). growth="random" is SET (Mocanu et al., 2018). Both
    move a share that falls from `share` to zero along a cosine, over the first `until` of the training: RigL's rule,
    which its authors found to help SET too. Who has just fallen asleep may wake again, at zero.
    """
    phase: str = "rewire"
    growth: str = "gradient"
    share: float = 0.3
    until: float = 0.75
    growth_batches: int | None = None
    absolute: bool = False
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.growth not in GROWTHS:
            raise ValueError(f"growth={self.growth!r}: choose one of {GROWTHS}")
        check("share", self.share, "matrix")

    @property
    def growing(self) -> bool:
        return self.growth == "gradient" and self._moves(self.at + 1) > 0

    def _moves(self, at: int) -> float:
        """Share of the live connections that move after `at` epochs."""
        end = self.until * self.epochs
        return self.share / 2 * (1 + math.cos(math.pi * at / end)) if at < end else 0.0

    def end_epoch(self, masks: ConnectionMasks, gradients: Gradients, score: float) -> Event | None:
        super().end_epoch(masks, gradients, score)
        share, generator, moved = self._moves(self.at), seeded(self.seed, self.at), 0
        if share == 0:
            return None
        for name in masks.masks:
            if not masks.parameters[name].requires_grad:           # frozen
                continue
            if self.growth == "gradient" and name not in gradients.sums:
                raise ValueError(f"gradients hold nothing for {name}; call collect after backward")
            n = sleep(masks, [name], round(share * int(masks.masks[name].sum())))
            p = masks.parameters[name]
            scores = gradients.sums[name].abs() if self.growth == "gradient" else random_scores(p, generator)
            moved += masks.wake_(name, best_dormant(masks.masks[name], scores, n))
        gradients.clear()
        return Event.now("rewire", masks, note=f"{moved} connections moved")


@dataclass
class Rewinding(Dense):
    """Iterative magnitude pruning with rewinding (Frankle et al., 2020): only the masks go from round to round.

    The epochs are cut into rounds + 1 stretches of (nearly) equal length. After each but the last the network is
    pruned, in equal ratios down to `density`; then all parameters and buffers go back to what they were after epoch
    `rewind`, those asleep stay zero, and the optimiser begins anew. Pruning without rewinding is "prune-only".
    """
    phase: str = "train"
    density: float = 0.1
    rounds: int = 4
    rewind: int = 1
    per: str = "matrix"
    structure: str | None = None
    round: int = 0
    past: int = 0              # epochs of the stretches before

    def __post_init__(self):
        super().__post_init__()
        check("density", self.density, self.per, self.structure)
        if not 1 <= self.rewind <= self.epochs // (self.rounds + 1):
            raise ValueError(f"{self.epochs} epochs in {self.rounds + 1} stretches leave no epoch {self.rewind} "
                             "to rewind to; train longer or in fewer rounds")
        self._early: dict[str, Tensor] = {}

    @property
    def length(self) -> int:
        stretches = self.rounds + 1
        return self.epochs // stretches + (self.round < self.epochs % stretches)

    @property
    def epochs_left(self) -> int:
        return self.epochs - self.past - self.at

    def end_epoch(self, masks: ConnectionMasks, gradients: Gradients, score: float) -> Event | None:
        self.at += 1
        if self.past + self.at == self.rewind:
            self._early = weights_of(masks.module)
        self.done = self.epochs_left == 0
        if self.at < self.length or self.done:
            return None
        self.past, self.at, self.round = self.past + self.at, 0, self.round + 1
        prune_to(masks, between(1.0, self.density, self.round, self.rounds), per=self.per, structure=self.structure)
        masks.module.load_state_dict(self._early)
        masks.apply_()
        masks.restart_()
        return Event.now("prune", masks, note=f"round {self.round}; weights rewound to epoch {self.rewind}")

    def state_dict(self) -> tuple[dict, dict[str, Tensor]]:
        return asdict(self), dict(self._early)

    def load_state_dict(self, state: dict, tensors: dict[str, Tensor]) -> None:
        super().load_state_dict(state, tensors)
        self._early = dict(tensors)


def parameters_left(module: nn.Module, masks: ConnectionMasks | None = None) -> int:
    """Parameters of a module, without the dormant ones."""
    live, total = masks.count() if masks is not None else (0, 0)
    return sum(p.numel() for p in module.parameters()) - (total - live)


def small_width(build: Callable[[int], nn.Module], parameters: int, most: int = 4096) -> int:
    """The width in [1, most] at which the module `build(width)` has the number of parameters nearest to a target.

    For "small-dense": small_width(lambda h: nn.LSTM(64, h), parameters_left(model, masks)). The number must not fall
    with the width. Of two that are as near the smaller. Modules are built without memory for their weights.
    Raises ValueError if even the narrowest is more than twice as large.
    """
    def size(width: int) -> int:
        with torch.device("meta"):
            return parameters_left(build(width))
    low, high = 1, most                                            # size(low) <= parameters, if any width has that
    if size(low) > 2 * parameters:
        raise ValueError(f"a width of 1 already takes {size(low)} parameters, more than twice {parameters}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    return min((low, high), key=lambda width: abs(size(width) - parameters))
