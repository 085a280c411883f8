"""Growing and pruning connections (paper: Method, grow and prune).

Neither rule knows which network it acts on: both see masks, weights and gradients only. schedule.py joins the two
into the paper's training; rivals.py has other ways to a sparse network.
"""

from collections.abc import Mapping
from fnmatch import fnmatch
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import ConnectionMasks, density_of, live_count, random_scores

INITS = "zero", "gradient", "sized"
STRUCTURES = (None, "block16", "balanced", "row", "column")


class Gradients:
    """Accumulates the dense gradients that growth looks at, dormant connections included: one copy of the matrices, in
    float32 at least, as sums in half precision would soon stand still.

    `absolute=False` sums them with their signs, so that a connection scores which would help many batches in the same
    direction: the gradient of the loss over all those batches. It is the default, and what we take the paper to mean:
    it accumulates the gradient and then compares its magnitude (unverified; the abstract leaves it open).
    `absolute=True` sums magnitudes, so that one scores as well which batches pull to and fro. Growth ranks alike by
    sum and by mean, so we do not divide.
    """

    def __init__(self, absolute: bool = False):
        self.absolute, self.sums = absolute, {}

    @torch.no_grad()
    def collect(self, masks: ConnectionMasks) -> None:
        """Adds the present gradients: call after `backward`, before `mask_gradients_`.

        Gradients that a GradScaler scaled up must be scaled back before, and steps that it skips be left out. Raises
        ValueError for a sparse gradient.
        """
        for name in masks.masks:
            if (g := masks.gradient(name)) is not None:
                g = g.abs() if self.absolute else g
                self.sums[name] = self.sums[name].add_(g) if name in self.sums else g.to(
                    torch.promote_types(g.dtype, torch.float32), copy=True)

    def clear(self) -> None:
        self.sums = {}


def check(what: str, ratio: float, per: str, structure: str | None = None) -> None:
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
    lie there when no two are equal; a gradient of exactly zero never wakes anything. New weights start at zero; with
    `init="gradient"` at -step * gradient; with `init="sized"` as large as the live weights of their matrix are in the
    mean, and against the gradient, so that pruning by size finds nobody young. The optimiser begins anew with a
    matrix that grew. Source: paper, Method (detail unverified).

    With a `generator`, growth is random: each matrix wakes as many connections as its gradients would have woken,
    but which of the dormant ones is drawn. Held against that, one sees what the gradients' choice is worth.

    A matrix that does not learn (`requires_grad`) grows nothing. Where `gradients` are the parameters' own, they are
    zero afterwards at those who woke.

    Raises ValueError for a ratio outside [0, 1], gradients that do not fit the masks, or such as hold infinity or NaN.
    """
    check("growth ratio", ratio, per)
    if init not in INITS:
        raise ValueError(f"init={init!r}: choose one of {INITS}")
    for name, mask in masks.masks.items():
        if not masks.parameters[name].requires_grad:               # frozen: it grows no connection
            continue
        given = gradients.get(name)                                # None, where nothing was propagated back yet
        if given is None or given.shape != mask.shape:
            raise ValueError(f"gradients hold nothing of shape {tuple(mask.shape)} for {name}; call backward first")
        if not given.isfinite().all():                             # one of them would decide who wakes
            raise ValueError(f"gradients of {name} hold infinity or NaN; leave such steps out of what is summed")
    woken = 0
    for names in _groups(masks, per):
        if not (names := [name for name in names if masks.parameters[name].requires_grad]):
            continue
        scores = torch.cat([gradients[name].abs().flatten() for name in names])
        below = int(ratio * scores.numel() + 1e-9)                 # 0.29 * 100 is a little less than 29
        if below == scores.numel():
            continue
        threshold = scores.kthvalue(below + 1).values
        for name in names:
            score = gradients[name].abs()
            new = ~masks.masks[name] & (score >= threshold) & (score > 0)
            if generator is not None:
                new = best_dormant(masks.masks[name], random_scores(score, generator), int(new.sum()))
            first = None
            if init != "zero":
                g, live = gradients[name][new], masks.masks[name].sum().clamp(min=1)
                p = masks.parameters[name]                                     # of which dormant ones are zero
                size = p.abs().sum(dtype=torch.promote_types(p.dtype, torch.float32)) / live
                first = -step * g if init == "gradient" else -size * g.sign().to(size.dtype)
            woken += masks.wake_(name, new, first)
    return woken


def best_dormant(mask: Tensor, scores: Tensor, n: int) -> Tensor:
    """Where the n best of the dormant connections lie (bool, shaped as the mask); of equal scores the earlier ones.

    Scores must not be negative. Where fewer than n are dormant, all of them.
    """
    best = scores.masked_fill(mask, -1).flatten().argsort(descending=True, stable=True)[:n]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[best] = True
    return chosen & ~mask


def prune(masks: ConnectionMasks, ratio: float, *, per: str = "matrix", structure: str | None = None) -> int:
    """Puts the share `ratio` of the live connections, those with the smallest |w|, to sleep; returns how many.

    Of L live connections in a matrix (`per="global"`: in all matrices together) round(ratio L) go; of equal weights
    the earlier ones. Weights, gradients and moments of the sleepers become zero. Matrices that do not learn are pruned
    as well: leave out of the masks what shall stay. Source: paper, Method (detail unverified).
    With a `structure`, units go as a whole, the smallest score first, as many as come nearest to round(ratio L). A
    matrix is seen as (rows, the rest); a dormant connection counts as |w| = 0:
        "block16"   16 consecutive rows of one column (fewer at the bottom edge), by mean |w|
        "row"       a row, by the L2 norm of its weights: all that one output neuron hears
        "column"    a column, likewise: all that is heard of one input neuron
        "balanced"  the smallest live weight of every row in every panel of 32 columns, by their mean |w|: each keeps
                    the same number of connections, unless it had fewer
    Raises ValueError for a ratio outside [0, 1] or an unknown structure.
    """
    check("pruning ratio", ratio, per, structure)
    return sum(sleep(masks, names, round(ratio * _live(masks, names)), structure) for names in _groups(masks, per))


def prune_to(masks: ConnectionMasks, density: float | Mapping[str, float], *, per: str = "matrix",
             structure: str | None = None) -> int:
    """Prunes, as `prune` does, to as many live connections as a random seed of that density has; returns how many go.

    density: one number, or one for each pattern of names, as `ConnectionMasks` takes it. Without a structure the count
    is met exactly: `live_count` in each matrix, or with `per="global"` their sum over all. Who has no more than that
    loses nothing. Raises ValueError for a density that is missing or outside [0, 1], or a pattern that matches nothing.
    """
    wanted = {name: density_of(name, density) for name in masks.masks}
    for name, d in wanted.items():
        if d is None:
            raise ValueError(f"density of {name}: no pattern of {', '.join(density)} matches it")
        check("density", d, per, structure)
    for pattern in density if isinstance(density, Mapping) else ():
        if not any(fnmatch(name, pattern) for name in masks.masks):
            raise ValueError(f"pattern {pattern!r} matches none of {', '.join(masks.masks)}")
    left = {name: live_count(mask.shape, wanted[name], masks.blocks.get(name, 1)) for name, mask in masks.masks.items()}
    return sum(sleep(masks, names, _live(masks, names) - sum(left[name] for name in names), structure)
               for names in _groups(masks, per))


def _live(masks: ConnectionMasks, names: list[str]) -> int:
    return sum(int(masks.masks[name].sum()) for name in names)


@torch.no_grad()
def sleep(masks: ConnectionMasks, names: list[str], n: int, structure: str | None = None) -> int:
    """Puts the n smallest live connections of these matrices together to sleep, as `prune` says; returns how many."""
    masks.apply_(*names)
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
    masks.apply_(*names)
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
