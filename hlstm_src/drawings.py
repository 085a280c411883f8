"""Figures drawn by code alone, or from a few arrays on the spot: the cells, their weights, their gradients, their time.

Like `figures.py`, whose style they share, but no run record stands behind them. Nothing here trains or reads files.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from .counting import Counts
from .figures import (
    BLUE,
    FOREST,
    LINES,
    ORANGE,
    PINE,
    PLUM,
    PURPLE,
    RUST,
    SKY,
    VERMILION,
    Picture,
    _array,
    _styled,
    told,
)
from .paper import short

GATES = {"i": ("input", BLUE), "f": ("forget", RUST), "g": ("candidate", PINE), "o": ("output", PLUM)}
INK = "#222222"
PIECES = [BLUE, ORANGE, FOREST, SKY, VERMILION, PURPLE]             # neighbours differ in lightness, or in blue


class _Circuit:
    """A few strokes to draw a circuit with, in units of a tenth of the panel's width."""

    def __init__(self, ax):
        self.ax = ax

    def line(self, *points, arrow=True):
        """A path through `points`, the last stretch an arrow."""
        path = points[:-1] if arrow else points
        if len(path) > 1:
            self.ax.plot(*zip(*path), color=INK, linewidth=1.4, solid_joinstyle="round", zorder=2)
        if arrow:
            self.ax.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=9, linewidth=1.4,
                                              color=INK, shrinkA=0, shrinkB=0, zorder=2))

    def node(self, x, y, sign):
        """A circle in which two values are multiplied or added."""
        self.ax.add_patch(Circle((x, y), 0.42, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=4))
        self.ax.text(x, y - 0.03, sign, ha="center", va="center", fontsize=12, zorder=5)

    def box(self, x, y, text, color, filled=True, width=1.5, height=0.84):
        """A function of one value: filled where it has weights."""
        self.ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, linewidth=1.3, zorder=4,
                                         edgecolor=color,
                                         boxstyle=f"round,pad=0,rounding_size={min(0.18, height / 2, width / 2)}",
                                         facecolor=color if filled else "white"))
        self.ax.text(x, y - 0.03, text, ha="center", va="center", fontsize=9.5, zorder=5,
                     color="white" if filled else INK)

    def dot(self, x, y):
        """Here one line becomes two."""
        self.ax.plot(x, y, "o", color=INK, markersize=3.6, zorder=3)


def _cell(ax, title: str, hidden: bool) -> None:
    """One cell into `ax`: inputs below, the four gates in columns, the element-wise circuit above."""
    pen, bus, top, line_c = _Circuit(ax), 1.9, 9.35, 13.6
    ax.set(xlim=(-0.35, 10.35), ylim=(-0.45, 14.6), aspect="equal")
    ax.axis("off")
    ax.set_title(title, loc="center", fontsize=11.5, fontweight="bold", pad=2)
    # The step's inputs: h comes from the left, x from below, and z = [x, h] goes to every gate.
    columns = {"f": 2.1, "i": 4.1, "g": 6.1, "o": 8.1}
    if hidden:
        ax.text(0.55, 4.32, "hidden\nlayers $H^*$", ha="center", va="center", rotation=90, fontsize=9)
    pen.line((0, bus), (columns["o"], bus), arrow=False)
    pen.line((1.0, 0.45), (1.0, bus))
    pen.dot(1.0, bus)
    ax.text(0, bus + 0.25, "$h_{t-1}$", ha="left", va="bottom", fontsize=12)
    ax.text(1.0, 0.35, "$x_t$", ha="center", va="top", fontsize=12)
    ax.text(5.1, bus - 1.05, "$z = [x_t, h_{t-1}]$ goes to every gate", ha="center", va="top", fontsize=9.2)
    for gate, x in columns.items():
        name, color = GATES[gate]
        if gate != "o":
            pen.dot(x, bus)
        if hidden:
            ax.add_patch(FancyBboxPatch((x - 0.9, 3.05), 1.8, 2.55, boxstyle="round,pad=0,rounding_size=0.25",
                                        facecolor=color, edgecolor="none", alpha=0.16, zorder=1))
            pen.line((x, bus), (x, 3.28))
            pen.box(x, 3.7, "$W, b$", color)
            pen.line((x, 4.12), (x, 4.53), arrow=False)
            pen.box(x, 4.95, "ReLU", color, filled=False)
        pen.line((x, 5.37 if hidden else bus), (x, 6.68))
        pen.box(x, 7.1, "$W, b$", color)
        pen.line((x, 7.52), (x, 8.28), arrow=False)
        pen.box(x, 8.7, "tanh" if gate == "g" else "σ", color, filled=False)
        ax.text(x, bus - 0.35, name, ha="center", va="top", fontsize=8.2, color=color, fontweight="bold")
        ax.text(x + 0.2, top + 0.22, f"${gate}$", ha="left", va="center", fontsize=12, color=color)
    # c is scaled by f, and what i lets in of g is added: a line without a matrix, along which memory lasts.
    f, i, g, o = (columns[k] for k in "figo")
    mid, meet = (i + g) / 2, 11.3
    pen.line((0, line_c), (f - 0.42, line_c))
    pen.line((f + 0.42, line_c), (mid - 0.42, line_c))
    pen.line((mid + 0.42, line_c), (10.1, line_c))
    pen.line((f, 9.12), (f, line_c - 0.42))
    pen.line((i, 9.12), (i, meet), (mid - 0.42, meet))
    pen.line((g, 9.12), (g, meet), (mid + 0.42, meet))
    pen.line((mid, meet + 0.42), (mid, line_c - 0.42))
    # h shows what o lets out of tanh(c).
    pen.dot(o, line_c)
    pen.line((o, line_c), (o, 12.82), arrow=False)
    pen.box(o, 12.4, "tanh", INK, filled=False)
    pen.line((o, 11.98), (o, meet - 0.2 + 0.42))
    pen.line((o, 9.12), (o, meet - 0.2 - 0.42))
    pen.line((o + 0.42, meet - 0.2), (10.1, meet - 0.2))
    for x, y, sign in ((f, line_c, "×"), (mid, line_c, "+"), (mid, meet, "×"), (o, meet - 0.2, "×")):
        pen.node(x, y, sign)
    ax.text(0, line_c + 0.25, "$c_{t-1}$", ha="left", va="bottom", fontsize=12)
    ax.text(10.1, line_c + 0.25, "$c_t$", ha="right", va="bottom", fontsize=12)
    ax.text(10.1, meet + 0.05, "$h_t$", ha="right", va="bottom", fontsize=12)


@_styled
def hlstm_cell() -> Picture:
    """The H-LSTM cell beside the LSTM cell (`fig-hlstm-cell`), one step each."""
    fig = Picture(5.35, "Two circuits side by side. Left, the LSTM cell: the previous state h and the input x feed "
                  "four gates, each one matrix with a sigmoid or tanh. Right, the H-LSTM cell: the same, but in front "
                  "of each gate's matrix stands a hidden layer, a matrix and ReLU. In both, f scales the old memory c, "
                  "i times g is added to it, and o times tanh of c is the new h.")
    left, right = fig.subplots(1, 2)
    _cell(left, "LSTM", hidden=False)
    _cell(right, "H-LSTM", hidden=True)
    fig.text(0.5, 0.004, "filled: has weights    white: element-wise    × and + act on each of the H units by itself",
             ha="center", va="bottom", fontsize=9.2, color=INK)
    fig.get_layout_engine().set(rect=(0, 0.045, 1, 0.945), w_pad=0.02)
    return fig


@_styled
def weight_layout(input_size: int, hidden_size: int) -> Picture:
    """Where the weights of an LSTM sit: rows i, f, g, o of `weight_ih` (4H, I) and `weight_hh` (4H, H), to scale."""
    width, H = input_size, hidden_size
    if min(width, H) < 1:
        raise ValueError(f"input_size {width} and hidden_size {H} must be at least 1")
    fig = Picture(4.3, f"Layout of an LSTM's weights: a matrix of {4 * H} by {width} that acts on x beside one of "
                  f"{4 * H} by {H} that acts on h and two columns of biases; four blocks of {H} rows, for i, f, g, o.")
    ax = fig.subplots()
    x_part = width / (width + H)                                   # both matrices' columns to one scale
    blocks = [("weight_ih", "x_t", width, 0.0, x_part), ("weight_hh", "h_{t-1}", H, x_part + 0.03, 1 - x_part)]
    for k, (gate, (name, color)) in enumerate(GATES.items()):
        for _, _, size, left, part in blocks:
            ax.add_patch(Rectangle((left, k), part, 0.95, facecolor=color, alpha=0.28, linewidth=0))
            ax.text(left + part / 2, k + 0.475, f"${H} \\times {size}$", ha="center", va="center")
        for j in range(2):
            ax.add_patch(Rectangle((1.08 + 0.05 * j, k), 0.035, 0.95, facecolor=color, alpha=0.55, linewidth=0))
        ax.text(-0.02, k + 0.475, f"{name} ${gate}$", ha="right", va="center", color=color, fontweight="bold")
    for matrix, read, _, left, part in blocks:
        ax.text(left + part / 2, -0.1, f"{matrix}\nacts on ${read}$", ha="center", va="bottom")
    ax.text(1.1225, -0.1, "bias_ih\nbias_hh", ha="center", va="bottom")
    ax.text(1.19, 2, f"$4H = {4 * H}$ rows", ha="left", va="center", rotation=90)
    ax.set(xlim=(-0.2, 1.25), ylim=(4.02, -0.85))
    ax.axis("off")
    return fig


@_styled
def gradient_flow(curves: Mapping[str, Sequence[float]]) -> Picture:
    """Sizes of gradients against the steps back from the end, on a logarithmic scale; zeros are left out."""
    curves = {label: _array(values).astype(float) for label, values in curves.items()}
    fig = Picture(3.6, "Size of the gradient, relative to the last step, against the steps back. Farthest back it is: "
                  + told({label: values[-1] for label, values in curves.items()}, ".2g"))
    ax = fig.subplots()
    for (label, values), (color, line, marker) in zip(curves.items(), itertools.cycle(LINES)):
        values = np.where(values > 0, values, np.nan)
        ax.semilogy(np.arange(len(values)), values, line, color=color, marker=marker, label=label,
                    markevery=max(1, len(values) // 10))
    ax.set(xlabel="steps back from the end", ylabel="size of the gradient\nrelative to the last step", xlim=(0, None))
    fig.legend(loc="outside lower center", ncols=min(3, len(curves)))
    return fig


@_styled
def traces(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> Picture:
    """Values over steps, one panel a row: {panel: {line: values}}, as stairs, so that each step can be seen."""
    fig = Picture(0.7 + 1.15 * len(rows), "Values over the steps: " + "; ".join(
        f"{panel}: {', '.join(lines)}" for panel, lines in rows.items()))
    axes = np.atleast_1d(fig.subplots(len(rows), sharex=True))
    for ax, (panel, lines) in zip(axes, rows.items()):
        for (label, values), (color, line, _) in zip(lines.items(), LINES):
            values = _array(values).astype(float)
            ax.stairs(values, np.arange(len(values) + 1) - 0.5, baseline=None, color=color, linestyle=line,
                      linewidth=1.9, label=label)
        ax.set_ylabel(panel)
        ax.margins(y=0.15)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


@_styled
def learning_spread(updates: Sequence[int], curves: Mapping[str, object], ylabel: str, title: str = "") -> Picture:
    """Curves (K, S) of S seeds at K moments of training: the median as a line, from best to worst as a band."""
    curves = {label: _array(values) for label, values in curves.items()}
    fig = Picture(3.6, f"{ylabel} against updates, median and range over seeds. Medians after {max(updates)} updates: "
                  + told({label: np.median(values[-1]) for label, values in curves.items()}))
    ax = fig.subplots()
    for (label, values), (color, line, marker) in zip(curves.items(), itertools.cycle(LINES)):
        ax.plot(updates, np.median(values, 1), line, color=color, marker=marker, label=label)
        ax.fill_between(updates, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel="updates of the weights", ylabel=ylabel, title=title, xlim=(0, max(updates)), ylim=(0, None))
    fig.legend(loc="outside lower center", ncols=min(3, len(curves)))
    return fig


@_styled
def seeds(groups: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str) -> Picture:
    """{group: {network: values of its seeds}}: one dot a seed, a bar at their median."""
    fig = Picture(3.7, f"{ylabel}, one dot a seed. Medians: " + told({
        f"{group}, {name}": np.median(_array(values)) for group, networks in groups.items()
        for name, values in networks.items() if len(values)}))
    ax = fig.subplots()
    names = list(dict.fromkeys(name for networks in groups.values() for name in networks))
    step = 0.8 / len(names)
    for k, (name, (color, _, marker)) in enumerate(zip(names, itertools.cycle(LINES))):
        for x, networks in enumerate(groups.values()):
            values = np.sort(_array(networks[name]).astype(float)) if name in networks else np.array([])
            if len(values):
                at = x + step * (k - (len(names) - 1) / 2)
                ax.plot(at + np.linspace(-0.3, 0.3, len(values)) * step, values, marker, color=color, alpha=0.85,
                        label=name if x == 0 else None, clip_on=False)
                ax.hlines(np.median(values), at - 0.42 * step, at + 0.42 * step, color=color, linewidth=2)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set(ylabel=ylabel, xlim=(-0.5, len(groups) - 0.5))
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    fig.legend(loc="outside lower center", ncols=min(3, len(names)))
    return fig


@_styled
def timeline(lanes: Mapping[str, Sequence[tuple[str, float]]]) -> Picture:
    """Work in the order in which it is done: {lane: [(kind, milliseconds), ...]}, each piece as long as it takes."""
    kinds = list(dict.fromkeys(kind for lane in lanes.values() for kind, _ in lane))
    if len(kinds) > len(PIECES):
        raise ValueError(f"{len(kinds)} kinds of work: {len(PIECES)} can be told apart")
    # A hair of white between pieces, which are too narrow for hatches.
    looks = {kind: {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}
             for kind, colour in zip(kinds, PIECES)}
    totals = {name: sum(ms for _, ms in lane) for name, lane in lanes.items()}
    fig = Picture(1.5 + 0.75 * len(lanes), "Timeline in milliseconds: " + "; ".join(
        f"{name} {total:.1f} ms" for name, total in totals.items()))
    ax = fig.subplots()
    for y, lane in enumerate(lanes.values()):
        start = 0.0
        for kind, ms in lane:
            ax.barh(y, ms, left=start, height=0.62, **looks[kind])
            start += ms
        ax.text(start + 0.01 * max(totals.values()), y, f"{start:.1f} ms", va="center", fontsize=9.5)
    ax.set_yticks(range(len(lanes)), list(lanes))
    ax.set(xlabel="time (ms)", xlim=(0, 1.12 * max(totals.values())), ylim=(len(lanes) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    marks = [Rectangle((0, 0), 1, 1, **looks[kind]) for kind in kinds]
    fig.legend(marks, kinds, loc="outside lower center", ncols=2)
    return fig


@_styled
def costs(networks: Mapping[str, Mapping[str, Counts]]) -> Picture:
    """Where a network's parameters and MACs sit: {network: {layer: its Counts}}, all of them beside the live ones."""
    rows = [len(layers) for layers in networks.values()]

    def total(layers: Mapping[str, Counts], what: str) -> str:
        return short(sum(getattr(layer, what) for layer in layers.values()), 2)
    fig = Picture(0.9 + 0.36 * sum(rows) + 0.45 * len(rows), "Parameters and MACs by layer, all and live. Together: "
                  + "; ".join(f"{name}, {total(layers, 'nonzero_params')} of {total(layers, 'params')} parameters and "
                              f"{total(layers, 'nonzero_macs')} of {total(layers, 'macs')} MACs live"
                              for name, layers in networks.items()))
    axes = fig.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False, height_ratios=rows)
    looks = {"all": {"color": "#bcd7ea"}, "live": {"color": BLUE}}
    for line, (name, layers) in zip(axes, networks.items()):
        for ax, what in zip(line, ("params", "macs")):
            whole = [getattr(layer, what) for layer in layers.values()]
            live = [getattr(layer, f"nonzero_{what}") for layer in layers.values()]
            ax.barh(range(len(whole)), whole, height=0.72, **looks["all"])
            ax.barh(range(len(live)), live, height=0.4, **looks["live"])
            for y, (n, k) in enumerate(zip(whole, live)):
                ax.annotate(short(k, 2), (n, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
            ax.grid(False, axis="y")
            ax.grid(True, axis="x")
            ax.xaxis.set_major_formatter(lambda value, _: short(value, 2))
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.margins(x=0.16)
        line[0].set_title(name)
        line[0].set_yticks(range(len(layers)), list(layers))
        line[0].set_ylim(len(layers) - 0.4, -0.6)
    for ax, label in zip(axes[-1], ("parameters", "MACs in a frame")):
        ax.set_xlabel(label)
    marks = [Rectangle((0, 0), 1, 1, linewidth=0, **look) for look in looks.values()]
    fig.legend(marks, ["all", "live (the number beside the bar)"], loc="outside lower center", ncols=2)
    return fig
