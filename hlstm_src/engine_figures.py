"""What `bench engine --json` measured, as figures: time against density, and how near the machine's limits.

Plain data in, a `Picture` out; nothing here measures.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .figures import AUBERGINE, BLUE, BROWN, FOREST, GREY, VERMILION, Picture, _styled, told

SPARSE = {"unstructured": (BLUE, "-", "o"), "balanced": (FOREST, "-.", "^"), "16-row blocks": (VERMILION, "--", "s")}
OTHERS = {"CSR": (AUBERGINE, "X"), "dense float32": ("black", "P"), "dense int8": (BROWN, "D")}


@dataclass(frozen=True)
class Timed:
    """One contestant: microseconds, bytes of weights and live multiply-accumulates, all of a step."""
    engine: str
    microseconds: float
    bytes: int
    live: int


@dataclass(frozen=True)
class Layer:
    """One case of the benchmark: MACs of a dense step, its contestants, the quickest dense float32 one among them."""
    macs: int
    contestants: dict[str, Timed]
    best: Timed

    def faster(self, engine: str) -> float:
        """How many times faster than the best dense engine."""
        return self.best.microseconds / self.contestants[engine].microseconds

    def curve(self, structure: str) -> list[Timed]:
        """The contestants with masks of a structure, float32, the sparsest last."""
        found = [t for t in self.contestants.values() if re.fullmatch(rf"{structure} [\d.]+%", t.engine)]
        return sorted(found, key=lambda t: -t.live)

    def quickest(self) -> Timed | None:
        """The quickest contestant with masks of any structure, float32, if there is one."""
        sparse = [t for structure in SPARSE for t in self.curve(structure)]
        return min(sparse, key=lambda t: t.microseconds, default=None)


def layers(bench: Mapping) -> dict[str, Layer]:
    """The cases of what `bench engine --json` wrote, by name."""
    time = {(row["case"], row["engine"]): row["microseconds"] for row in bench["latency"]}
    found = {}
    for case in bench["cases"]:
        name, contestants = case["case"], {}
        for engine, size in case["bytes"].items():
            contestants[engine] = Timed(engine, time[name, engine], size, case["live"][engine])
        best = min((contestants[engine] for engine in case["dense"]), key=lambda t: t.microseconds)
        found[name] = Layer(case["macs"], contestants, best)
    return found


def in_two_lines(name: str, width: int = 28) -> str:
    """A case's name; if it is long, broken at the last comma that leaves the first line short enough."""
    parts = name.split(", ")
    for k in range(len(parts) - 1, 0, -1) if len(name) > width else ():
        if len(first := ", ".join(parts[:k])) <= width:
            return f"{first},\n{', '.join(parts[k:])}"
    return name


@_styled
def latency(found: Mapping[str, Layer]) -> Picture:
    """Microseconds a step against the live share of the weights, a panel for each layer."""
    rows = -(-len(found) // 2)
    gains = {name: layer.faster(t.engine) for name, layer in found.items() if (t := layer.quickest())}
    fig = Picture(0.9 + 2.7 * rows, "Time of a step against live weights. How many times faster the quickest sparse "
                  f"engine is than the best dense one: {told(gains)}")
    axes = np.ravel(fig.subplots(rows, min(2, len(found)), squeeze=False))
    for ax, (name, layer) in zip(axes, found.items()):
        for structure, (colour, line, marker) in SPARSE.items():
            curve = layer.curve(structure)
            ax.plot([100 * t.live / layer.macs for t in curve], [t.microseconds for t in curve], line, color=colour,
                    marker=marker, label=structure)
        for t in layer.contestants.values():
            if t.engine.endswith("CSR"):
                ax.plot(100 * t.live / layer.macs, t.microseconds, OTHERS["CSR"][1], color=OTHERS["CSR"][0],
                        markersize=7, label="unstructured, CSR")
        ax.axhline(layer.best.microseconds, color="black", linewidth=1.4, label="best dense float32")
        for wanted, look in (("int8", ":"), ("half as wide", "--")):
            dense = [t.microseconds for t in layer.contestants.values()
                     if t.engine.endswith(wanted) and "structured" not in t.engine]
            if dense:
                ax.axhline(min(dense), color=GREY, linestyle=look, linewidth=1.4, label=f"dense, {wanted}")
        ax.set(xscale="log", yscale="log", title=in_two_lines(name))
        ax.invert_xaxis()
        ax.set_xticks([20, 10, 5, 2.5], ["20", "10", "5", "2.5"])
        ax.set_xticks([], minor=True)
        low, high = ax.get_ylim()
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= t <= high]
        ax.set_yticks(ticks, [str(t) for t in ticks])
        ax.set_yticks([], minor=True)
        ax.set_xlabel("live weights (%)")
        ax.set_ylabel("µs a step")
    for ax in axes[len(found):]:
        ax.set_axis_off()
    marks = {label: mark for ax in axes for mark, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=3)
    return fig


@_styled
def roofline(layer: Layer, bandwidth: Mapping[int, float], macs: float) -> Picture:
    """Live multiply-accumulates a second against how many there are for each byte read, under the machine's limits.

    bandwidth: bytes a second from a matrix of so many bytes; the smallest and the largest are drawn, and the first that
    holds what the best dense engine reads. macs: the most float32 MACs a second.
    """
    points = {"The best dense engine": layer.best} | ({f"{t.engine} sparse": t} if (t := layer.quickest()) else {})
    fig = Picture(4.3, "Roofline, products a second against products for each byte read, under the machine's limits. "
                  + "; ".join(f"{name}: {t.live / t.microseconds / 1000:.1f} billion a second, {t.live / t.bytes:.2f} "
                              "a byte" for name, t in points.items()))
    ax = fig.subplots()
    x = np.geomspace(0.02, 3, 50)
    middle = min((size for size in bandwidth if size >= layer.best.bytes), default=max(bandwidth))
    for size, height in {min(bandwidth): 0.3, middle: 0.55, max(bandwidth): 0.55}.items():
        where = min(height * macs / bandwidth[size], 1.2)          # of its label, high up on the line
        ax.plot(x, np.minimum(x * bandwidth[size], macs) / 1e9, color=GREY, linewidth=1)
        unit = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
        ax.text(where, where * bandwidth[size] / 1e9, f"reading {unit}", fontsize=9, color=GREY, va="center",
                ha="center", clip_on=True, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.annotate("multiplying float32", (0.56, macs / 1e9), fontsize=9, color=GREY, va="bottom", ha="left",
                xytext=(0, 9), textcoords="offset points")
    for structure, (colour, line, marker) in SPARSE.items():
        curve = layer.curve(structure)
        ax.plot([t.live / t.bytes for t in curve], [t.live / t.microseconds / 1000 for t in curve], line, color=colour,
                marker=marker, label=structure)
    others = {"CSR": [], "dense float32": [layer.best], "dense int8": []}
    for t in layer.contestants.values():
        if t.engine.endswith("CSR"):
            others["CSR"].append(t)
        elif t.engine.endswith(", int8") and "structured" not in t.engine:
            others["dense int8"].append(t)
    for name, found in others.items():
        colour, marker = OTHERS[name]
        ax.plot([t.live / t.bytes for t in found], [t.live / t.microseconds / 1000 for t in found], marker,
                color=colour, markersize=8, label=name)
    ax.set(xscale="log", yscale="log", xlabel="live products (MACs) for each byte read",
           ylabel="live products a second (billions)", xlim=(x[0], x[-1]))
    ax.set_xticks([0.02, 0.05, 0.1, 0.25, 0.5, 1, 2], ["0.02", "0.05", "0.1", "0.25", "0.5", "1", "2"])
    ax.set_xticks([], minor=True)
    ax.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], ["1", "2", "5", "10", "20", "50", "100", "200"])
    ax.set_yticks([], minor=True)
    ax.set_ylim(1, None)
    fig.legend(loc="outside lower center", ncols=3)
    return fig
