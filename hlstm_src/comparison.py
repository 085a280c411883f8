"""The paper, the recorded runs and this run in one table (`compare`), and whether a claim of the paper's is met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from . import paper, records
from .records import RunRecord
from .tables import MISSING, RECORDED, Table, spread


@dataclass(frozen=True)
class Column:
    """A column of a comparison: what a record holds and which figure of a paper's model stands beside it.

    `of_record(record, baseline)` gives a number or None; `baseline` holds the profile's records of
    the first row, which compression is measured against. Runs of the small profiles show only what is
    `main`.
    """

    heading: str
    paper: str
    of_record: Callable[[RunRecord, list[RunRecord]], float | None]
    show: Callable[[float], str]
    seeds: bool = False
    main: bool = True


def compression(record: RunRecord, baseline: list[RunRecord]) -> float | None:
    """How many times fewer live recurrent weights than the baseline (the mean of its seeds)."""
    if not baseline or not record.counts.cell.nonzero_params:
        return None
    whole = statistics.fmean(each.counts.cell.nonzero_params for each in baseline)
    return whole / record.counts.cell.nonzero_params


def verdict(value: float | None, goal: float, ours: list[float], base: list[float], score: str = "CIDEr",
            better: int = 1) -> str:
    """A claim of so many times less, or so many points more: "met", "not met" or not known yet, with the doubt that the
    seeds' spread leaves. ours and base: the score of each seed, which may not be worse; better: -1 for error rates."""
    if value is None or not ours or not base:
        return "not measured yet" if ours and base else "not recorded yet"
    if value < goal:
        return "not met"
    if better * (statistics.fmean(ours) - statistics.fmean(base)) < 0:
        return f"not met: {score} is {'lower' if better > 0 else 'higher'}"
    if min(len(ours), len(base)) < 2:
        return "met, by one seed"
    apart = min(better * x for x in ours) > max(better * x for x in base)
    return "met" if apart else f"met in the mean; in {score} the seeds overlap"


def _paper_cell(benchmark: str, model: str | None, column: Column) -> str:
    figure = paper.model(benchmark, model).figures.get(column.paper) if model else None
    if figure is None:
        return MISSING
    return (figure.text().removesuffix(" %") if "%" in column.heading else figure.text()) + figure.mark


def compare(
    name: str,
    caption: str,
    benchmark: str,
    rows: Iterable[tuple],
    columns: Iterable[Column],
    profile: str | None,
    root: str | Path | None = None,
    recorded: str = RECORDED,
) -> Table:
    """The paper, the recorded runs and this run side by side.

    Args:
        rows: (name, model of the paper or None, experiment or None) and, optional, a function that says
            what of a record the row shows (record -> record); the first row with an experiment is the
            baseline of the compression.
        profile: that of "this run"; where it is the recorded one, the two groups are one. None: the
            recorded runs alone.
        recorded: the profile of the recorded runs.
        root: repository of the records, as `records.path_of` takes it.
    """
    rows = [(*row, None)[:4] for row in rows]
    baseline = next(experiment for _, _, experiment, _ in rows if experiment)
    columns = list(columns)
    told = [c for c in columns if any(m and c.paper in paper.model(benchmark, m).figures for _, m, _, _ in rows)]
    groups = {recorded: f"recorded ({recorded})"}
    if profile == recorded:
        groups = {recorded: f"recorded ({recorded}), this run"}
    elif profile:
        groups[profile] = f"this run ({profile})"
    shown = {g: [c for c in columns if c.main or g not in records.LOCAL] for g in groups}
    heads = [("paper", column.heading) for column in told]
    heads += [(text, column.heading) for group, text in groups.items() for column in shown[group]]
    ran = list(dict.fromkeys(experiment for _, _, experiment, _ in rows if experiment))
    runs = {(group, each): records.find(group, each, root) for group in groups for each in ran}
    lines = []
    for row, model, experiment, view in rows:
        cells = [_paper_cell(benchmark, model, column) for column in told]
        for group in groups:
            own = runs.get((group, experiment), [])
            own = [view(record) for record in own] if view else own
            for column in shown[group]:
                values = [column.of_record(record, runs[group, baseline]) for record in own]
                values = [value for value in values if value is not None]
                cells.append(spread(values, column.show, seeds=column.seeds))
        lines.append((row, cells))
    notes = [paper.FOOTNOTE] if any(paper.DAGGER in cell for _, cells in lines for cell in cells) else []
    if any(", n=" in cell for _, cells in lines for cell in cells):
        notes.append("n: seeds; the number is their mean, in brackets stand the lowest and the highest")
    for group in groups:
        if lacking := [each for each in ran if not runs[group, each]]:
            notes.append(f"{MISSING} no record yet in the profile {group}: {', '.join(lacking)}")
    return Table(name, caption, "model", heads, lines, notes, experiments=tuple(ran),
                 missing="the paper gives no such figure, or we did not measure it")


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the seeds of a less that of b, and its standard error; None with fewer than three seeds of either.

    More than two standard errors are called clear: a rule of thumb for a handful of seeds.
    """
    gap = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 3:
        return gap, None
    return gap, (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5


def chance(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely the means of a and b would lie so far apart if nothing but luck told the two apart, between 0 and 1.

    If so, their values could as well be dealt out otherwise, as many to each; this is the share of all such deals in
    which the means lie at least as far apart (an exact permutation test, two-sided). With n of each it is never below
    2 / (2n choose n): 0.1 for three, 0.008 for five. Raises ValueError if either is empty.
    """
    if not a or not b:
        raise ValueError("a permutation test takes values of both kinds")
    whole, n = [*a, *b], len(a)

    def gap(chosen: Iterable[float]) -> float:
        own = math.fsum(chosen)
        return abs(own / n - (math.fsum(whole) - own) / len(b))
    least = gap(a) * (1 - 1e-9)                                    # the same sum in another order counts as equal
    return statistics.fmean(gap(dealt) >= least for dealt in combinations(whole, n))
