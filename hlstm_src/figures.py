"""Figures made from records and arrays: matplotlib in, a `Picture` out. Nothing here trains or reads files; `slide`
writes one, for those who teach.

All share one style: as wide as a page is read (7 in), units on every axis, and colours that colour-blind readers tell
apart. Those of Okabe and Ito fill areas; letters and lines on white need darker ones. Each colour of a line has a style
and a marker of its own, for print without colour.
"""

import base64
import functools
import html
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from .records import RunRecord

WIDTH = 7.0                            # inches
SLIDE = (1920, 1080)                   # pixels
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
GREY = "#767676"
RUST, PINE, PLUM = "#B84E00", "#007A5A", "#8F4A78"     # for letters, and under white ones: a contrast of 4.5 and more
# For lines: a contrast of 3 and more on white and on the tints below, apart for the colour-blind too, and in lightness.
FOREST, AUBERGINE, BROWN, TEAL = "#004D36", "#803080", "#6B4700", "#468C8C"
LINES = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (FOREST, "-.", "^"), (AUBERGINE, ":", "D"), (BROWN, "-", "v"),
         (TEAL, "--", "P"), ("black", "-.", "X")]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")    # for areas side by side, which colour alone would tell apart
STYLE = {"font.size": 10.5, "axes.titlesize": 10.5, "axes.labelsize": 10.5, "legend.fontsize": 10,
         "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd", "axes.axisbelow": True,
         "axes.titlelocation": "left", "lines.linewidth": 1.8, "lines.markersize": 5, "image.cmap": "viridis",
         "legend.frameon": False, "figure.constrained_layout.w_pad": 0.09, "figure.constrained_layout.h_pad": 0.07}
PHASES = {"grow": "growth", "train": "training", "prune": "pruning and retraining", "final": "last retraining"}
METRICS = {"wer": "WER (%)", "error": "error (%)", "cider": "CIDEr"}      # what a validation score is called on an axis
TINTS = {"grow": "#d9f0e6", "train": "#eeeeee", "prune": "#fbe3d3", "final": "#dcebf5"}


class Picture(Figure):
    """A figure that shows itself on a page, with `alt`: what it shows, for those who cannot see it.

    Drawn finer than a plain screen shows; where the page is narrow it keeps a legible size and scrolls. Labels may go
    into `alt` as they are: it becomes one line without the marks of formulas, which would be read aloud.
    """

    def __init__(self, height: float, alt: str = ""):
        super().__init__(figsize=(WIDTH, height), layout="constrained")
        self.alt = " ".join(alt.replace("$", "").split())

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=160)
        code = base64.b64encode(file.getvalue()).decode()
        return {"text/html": framed(f"data:image/png;base64,{code}", self.alt), "image/png": code,
                "text/plain": self.alt}


def framed(source: str, alt: str) -> str:
    """HTML of an image in a box that scrolls where the page is narrow, with the keyboard too; it is named by the topic
    of `alt`, which ends with the first full stop, colon or semicolon."""
    topic = html.escape(re.split(r"[.:;](?= |$)", alt)[0] or "figure")
    return (f'<div style="overflow-x: auto" tabindex="0" role="group" aria-label="{topic}">'
            f'<img alt="{html.escape(alt)}" src="{source}" '
            f'style="width: 100%; min-width: 36rem; max-width: {100 * WIDTH:.0f}px; height: auto"></div>')


def told(values: Mapping[str, float], form: str = ".1f") -> str:
    """Names with their numbers, for an `alt`; between them a semicolon, as there are names with commas."""
    return "; ".join(f"{name} {value:{form}}" for name, value in values.items())


def slide(picture: Figure, path: str | Path, size: tuple[int, int] = SLIDE) -> Path:
    """Write a picture as large as fits a slide, its letters growing with it; gives the path.

    A `.png` has `size` (width, height) in pixels, the picture in its middle, the rest white. A `.svg` or `.pdf` is the
    picture alone, which stays sharp at any size. Raises ValueError for another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path.name}: a slide is a .png, a .svg or a .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".png":
        picture.savefig(path)
        return path
    file, dpi = io.BytesIO(), min(pixels / inches for pixels, inches in zip(size, picture.get_size_inches()))
    picture.savefig(file, format="png", dpi=dpi)
    drawn, whole = Image.open(file).convert("RGB"), Image.new("RGB", size, "white")
    whole.paste(drawn, tuple((room - used) // 2 for room, used in zip(size, drawn.size)))
    whole.save(path)
    return path


def _styled(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    """Draws in our style and leaves matplotlib's own settings as they were."""
    @functools.wraps(draw)
    def styled(*args, **options) -> Picture:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
            return draw(*args, **options)
    return styled


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _spans(record: RunRecord) -> list[tuple[str, int, int]]:
    """(phase, first epoch, end) of each unbroken stretch of a run."""
    runs = itertools.groupby(record.history, key=lambda row: row.phase)
    stretches = [(phase, list(rows)) for phase, rows in runs]
    return [(phase, rows[0].epoch, rows[-1].epoch + 1) for phase, rows in stretches]


def _shade(axes: Sequence, record: RunRecord) -> None:
    """Phases of grow-and-prune behind all axes, named above the first: in full, in short or upright, as it fits."""
    spans = _spans(record)
    total = spans[-1][2] if spans else 1
    for phase, start, end in spans:
        room = (end - start) / total * (WIDTH - 1.2)
        name = PHASES.get(phase, phase)
        name = name if room > 0.082 * len(name) else phase
        for ax in axes:
            ax.axvspan(start, end, color=TINTS.get(phase, "#f4f4f4"), linewidth=0, zorder=0)
            ax.axvline(end, color="white", linewidth=1.5, zorder=0.5)
        axes[0].annotate(name, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), fontsize=9.5,
                         textcoords="offset points", ha="center", va="bottom",
                         rotation=0 if room > 0.082 * len(name) else 90)


def _epoch_axis(ax, last: int) -> None:
    ax.set(xlabel="epochs of training", xlim=(0, max(last, 1) * 1.012 + 0.15))     # room for half a marker
    ax.xaxis.get_major_locator().set_params(integer=True)


def _metric(record: RunRecord) -> str:
    """The score by which a run is judged: the first of METRICS that it has."""
    scores = [*(row.scores for row in record.history), *(row.scores for row in record.phases)]
    return next((name for name in METRICS if any(name in each for each in scores)), "wer")


def _wer_axis(ax, rates: Sequence[float], metric: str = "wer") -> None:
    """From 0 to the highest rate; of error rates what lies above 100 % is left out, and the picture says so."""
    known = [rate for rate in rates if np.isfinite(rate)] or [100]
    cut = max(known) > 104 and min(known) <= 100 and metric != "cider"
    ax.set(ylabel=f"validation {METRICS[metric]}", ylim=(0, (100 if cut else max(*known, 1)) * 1.04))
    if cut:
        ax.set_title("rates above 100 % (more errors than words) are cut off", loc="right", fontsize=9.5, color=GREY)


@_styled
def learning_curves(records: Mapping[str, RunRecord]) -> Picture:
    """Training loss and validation score by epoch; `records`, all of one benchmark, by the name in the legend.

    The phases of the first run that grows and prunes in rounds are shaded. Raises ValueError without a record.
    """
    if not records:
        raise ValueError("learning_curves needs at least one record")
    metric = _metric(next(iter(records.values())))
    scores = {name: [s for row in record.history if np.isfinite(s := row.scores.get(metric, np.nan))]
              for name, record in records.items()}
    final = told({name: found[-1] if found else np.nan for name, found in scores.items()})
    fig = Picture(5.2, f"Training loss and validation {METRICS[metric]} by epoch. The latter ends at: {final}.")
    top, low = fig.subplots(2, sharex=True)
    grown = next((r for r in records.values() if {row.phase for row in r.history} & {"grow", "prune"}), None)
    last, all_rates = 1, []
    for (label, record), (colour, line, marker) in zip(records.items(), itertools.cycle(LINES)):
        ends = [row.epoch + 1 for row in record.history]
        rates = [row.scores.get(metric, np.nan) for row in record.history]
        look = {"color": colour, "linestyle": line, "marker": marker, "markevery": max(1, len(ends) // 12)}
        top.plot(ends, [row.loss for row in record.history], label=label, **look)
        low.plot(ends, rates, **look)
        last, all_rates = max([last, *ends]), all_rates + rates
    unit = {"wer": "(CTC, nats a letter)", "cider": "(nats a word)"}.get(metric, "(nats)")
    top.set(ylabel=f"training loss\n{unit}", ylim=(0, None))
    _wer_axis(low, all_rates, metric)
    _epoch_axis(low, last)
    if grown is not None:
        _shade((top, low), grown)
    fig.legend(loc="outside lower center", ncols=min(3, len(records)))
    return fig


@_styled
def gp_flow(record: RunRecord) -> Picture:
    """Seed -> growth -> pruning -> final (`fig-gp-flow`): density after each event, and validation score.

    An event that was undone is hatched and its score crossed. Raises ValueError for a run without events.
    """
    if not record.phases or record.history[0].density is None:
        raise ValueError(f"{record.experiment}: no growth or pruning in this run")
    events = record.phases
    metric = _metric(record)
    densities = [100 * d for d in (record.history[0].density, *(e.density for e in events))]
    rates = [event.scores.get(metric, np.nan) for event in events]
    fig = Picture(5.0, f"Growth and pruning of {record.experiment} ({record.profile}, seed {record.seed}): live "
                  f"connections and validation {METRICS[metric]} after each of {len(events)} events. From "
                  f"{densities[0]:.1f} % the density goes to {densities[-1]:.1f} %, between {min(densities):.1f} and "
                  f"{max(densities):.1f} %; the last {METRICS[metric]} is {rates[-1]:.1f}.")
    top, low = fig.subplots(2, sharex=True, height_ratios=(3, 2))
    kinds, kept = ["train", *(e.phase for e in events)], [True, *(e.kept for e in events)]
    colours = {"grow": GREEN, "train": GREY, "prune": VERMILION, "final": BLUE}
    small = 9.5 if len(densities) <= 14 else 7.5
    for x, (density, kind, good) in enumerate(zip(densities, kinds, kept)):
        colour = colours.get(kind, GREY)
        top.bar(x, density, 0.75, facecolor=colour if good else "white", edgecolor=colour, hatch="" if good else "////")
        top.annotate(f"{density:.0f}" if density >= 10 else f"{density:.1f}", (x, density), xytext=(0, 3),
                     fontsize=small, textcoords="offset points", ha="center")
    top.set(ylabel="live connections (%)", ylim=(0, max(densities) * 1.13))
    # The scale is that of the pruning; the high rates of the first epochs are told, not drawn to scale.
    later = [rate for rate, event in zip(rates, events) if event.phase != "grow"] or rates
    ceiling = 1.25 * max([*later, 1])
    groups = {("o", BLUE, "kept"): [], ("X", VERMILION, "undone"): [], ("^", GREY, "above the scale"): []}
    look = list(groups)
    for x, (rate, event) in enumerate(zip(rates, events), 1):
        groups[look[2] if rate > ceiling else look[not event.kept]].append((x, min(rate, ceiling)))
        low.annotate(f"{rate:.1f}", (x, min(rate, ceiling)), xytext=(0, 7), textcoords="offset points", ha="center",
                     fontsize=small, path_effects=[withStroke(linewidth=3, foreground="white")])
    for (marker, colour, label), points in groups.items():
        if points:
            low.plot(*zip(*points), marker, color=colour, markersize=7, label=label)
    low.set(ylabel=f"validation {METRICS[metric]}", ylim=(0, 1.22 * ceiling))
    rounds = Counter()
    names = ["seed"]
    for event in events:
        rounds[event.phase] += 1
        names.append(f"{event.phase}\n{rounds[event.phase]}" if event.phase in ("grow", "prune") else event.phase)
    low.set_xticks(range(len(names)), names, fontsize=small)
    low.set(xlabel="events of the run, in order", xlim=(-0.6, len(names) - 0.4))
    fig.legend(loc="outside lower center", ncols=4, columnspacing=1.2, handletextpad=0.5)
    return fig


@_styled
def rivals(scores: Mapping[str, Sequence[float]], label: str) -> Picture:
    """Every run as a dot: `scores` holds, by method, a number for each seed, of which a bar marks the mean.

    Methods stand in the order given, from above; `label` names the axis, with its unit. It begins at 0 unless all
    scores lie far from there, where they would hide each other. Raises ValueError where a method has no score.
    """
    if not scores or not all(len(values) for values in scores.values()):
        raise ValueError("rivals needs at least one score of each method")
    fig = Picture(1.0 + 0.36 * len(scores), f"{label}, a dot a seed: " + "; ".join(
        f"{name} " + ", ".join(f"{v:.2f}" for v in sorted(values)) for name, values in scores.items()))
    ax = fig.subplots()
    for y, values in enumerate(scores.values()):
        # Seeds lie side by side in their order, so that equal scores do not hide each other.
        heights = y + 0.36 * (np.arange(len(values)) - (len(values) - 1) / 2) / max(len(values) - 1, 1)
        ax.plot(values, heights, "o", color=BLUE, alpha=0.75, linestyle="none")
        ax.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=VERMILION, linewidth=2.2)
    ax.set_yticks(range(len(scores)), list(scores))
    ax.set(xlabel=f"{label} (dot: a seed; bar: the mean)", ylim=(len(scores) - 0.4, -0.6))
    known = [value for values in scores.values() for value in values]
    if min(known) < max(known) / 2:
        ax.set_xlim(0)
    ax.grid(True, axis="x")
    return fig
