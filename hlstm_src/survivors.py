"""Where the live connections of a trained network came from: from its sparse seed, or from growth."""

from pathlib import Path

import torch
from torch import Tensor

from . import experiments, records
from .masks import ConnectionMasks
from .tables import Table, density, short

KINDS = {"input": "weight_ih", "state": "weight_hh", "inside the gates": "weight_gate", "all": "weight"}


def seed_masks(file: Path) -> dict[str, Tensor]:
    """With which connections a stored model began: drawn again, from its recipe and seed.

    Raises ValueError naming the file for a network that began without masks.
    """
    model, _, about = experiments.load(file)
    made = experiments.recipe(about["experiment"], about["profile"])
    share, _ = experiments.plan(made, about["seed"])
    if share is None:
        raise ValueError(f"{file}: {about['experiment']} was trained without masks, so it has no sparse seed")
    return ConnectionMasks(model, made.masked, share, torch.Generator().manual_seed(about["seed"])).masks


def tab_survivors(grown: Path, pruned: Path | None = None) -> Table:
    """What growth found, and whether pruning alone found it, too (`tab-survivors-<experiment>`); of stored models.

    Of the live connections of `grown`: which share growth woke, and which share lives in `pruned` as well, a network
    of the same shape that was pruned only. Beside each stands what chance would give: pruning that does not tell woken
    connections from the seed's, and survivors that know nothing of each other. Raises ValueError for files that do not
    fit each other, RecordError where there is no record beside the first.
    """
    live, seed = experiments.load(grown)[1], seed_masks(grown)
    record = records.read(grown.with_suffix(".json"))
    most = {name: max(row.densities[name] for row in record.history) for name in live}       # when growth had ended
    other = experiments.load(pruned)[1] if pruned else {}
    if pruned and {name: mask.shape for name, mask in other.items()} != {n: mask.shape for n, mask in live.items()}:
        raise ValueError(f"{pruned}: its masks do not have the shapes of those in {grown}")
    lines = []
    for kind, part in KINDS.items():
        names = [name for name in live if part in name.split(".")[-1]]
        sizes = {name: int(live[name].sum()) for name in names}
        size, woken = sum(sizes.values()), {name: live[name] & ~seed[name] for name in names}
        by_chance = sum(sizes[name] * (1 - share_of(seed[name]) / most[name]) for name in names)
        cells = [short(size), density(alive(woken) / size), density(by_chance / size)]
        if pruned:
            both = alive({name: live[name] & other[name] for name in names})
            lucky = sum(sizes[name] * share_of(other[name]) for name in names)
            ours_alone = alive({name: woken[name] & ~other[name] for name in names})
            cells += [density(both / size), density(lucky / size), density(ours_alone / size)]
        lines.append((kind, cells))
    heads = [("", "live"), ("", "woken by growth"), ("", "by chance")]
    if pruned:
        heads += [("", "kept by pruning alone"), ("", "by chance, too"), ("", "woken, not kept by it")]
    notes = [f"{record.experiment}, {record.profile}, seed {record.seed}; shares are of its live connections."]
    return Table(f"tab-survivors-{record.experiment}", "Where the survivors came from", "weights", heads, lines, notes)


def alive(masks: dict[str, Tensor]) -> int:
    """Live connections of several matrices."""
    return sum(int(mask.sum()) for mask in masks.values())


def share_of(mask: Tensor) -> float:
    """Density of one matrix."""
    return mask.double().mean().item()
