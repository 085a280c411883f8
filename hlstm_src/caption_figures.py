"""Pictures of captioning: the network, the search for a sentence, what was said of which picture, what lives where.

Like `figures.py`, whose style they share: plain data in, a `Picture` out; nothing here trains or reads files.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from torch import nn

from .drawings import GATES, INK, _Circuit
from .figures import BLUE, GREY, PINE, RUST, WIDTH, Picture, _array, _styled
from .neuraltalk import NeuralTalk
from .paper import short


@dataclass(frozen=True)
class Node:
    """A beginning of a caption in the search: its last word, the node it goes on from (None: the start), the word's
    probability behind that one, the log probability of all words together, and whether the caption ends here."""
    word: str
    parent: int | None
    probability: float
    total: float
    ended: bool = False


def _width(text: str, size: float) -> float:
    """Inches that a bold text takes."""
    return TextPath((0, 0), text, size=size, prop=FontProperties(weight="bold")).get_extents().width / 72


def _ranks(nodes: Sequence[Node]) -> list[float]:
    """A row for each node: leaves one below the other, the best on top; the others in the middle of what follows."""
    children = {k: [] for k in [None, *range(len(nodes))]}
    for k in sorted(range(len(nodes)), key=lambda k: -nodes[k].total):
        children[nodes[k].parent].append(k)
    rows, below = [0.0] * len(nodes), 0

    def place(k: int) -> float:
        nonlocal below
        if not children[k]:
            below += 1
            rows[k] = below - 1.0
        else:
            own = [place(child) for child in children[k]]
            rows[k] = (own[0] + own[-1]) / 2
        return rows[k]
    for k in children[None]:
        place(k)
    return rows


@_styled
def beam_tree(nodes: Sequence[Node], best: int, start: str = "start") -> Picture:
    """The search as a tree, read from left to right: each word with its probability behind the words before it.

    `nodes` in any order in which parents come first; `best` is the number of the node that ends the caption found,
    whose path is drawn strong. Letters are as large as a caption of about ten words allows, smaller for longer ones.
    Raises ValueError without nodes.
    """
    if not nodes:
        raise ValueError("beam_tree needs at least one node")
    depth = [0] * len(nodes)
    for k, node in enumerate(nodes):
        depth[k] = 0 if node.parent is None else depth[node.parent] + 1
    path, k = set(), best
    while k is not None:
        path.add(k)
        k = nodes[k].parent
    room = WIDTH - 0.3
    columns = [_width(start, 1)] + [0.0] * (max(depth) + 1)        # inches a point
    for node, d in zip(nodes, depth):
        columns[d + 1] = max(columns[d + 1], _width(node.word, 1), 0.85 * _width(_chance(node), 1))
    columns = [column + 0.03 for column in columns]                # between two words
    size = min(10.0, room / sum(columns))
    gap, left = 0.03 * size, size * np.concatenate([[0], np.cumsum(columns)])
    rows = _ranks(nodes)
    top = [row for row, node in zip(rows, nodes) if node.parent is None]
    said = " ".join(nodes[k].word for k in sorted(path, key=depth.__getitem__))
    fig = Picture(0.5 + 0.4 * (max(rows) + 1), f"Beam search as a tree of {len(nodes)} words. It found: {said}")
    ax = fig.subplots()
    ax.set(xlim=(-0.02, max(room, left[-1])), ylim=(max(rows) + 0.75, -0.6))
    ax.axis("off")
    ax.text(0, np.mean([top[0], top[-1]]), start, va="center", fontsize=size, color=GREY)
    for k, (node, row) in enumerate(zip(nodes, rows)):
        colour, weight = (BLUE, "bold") if k in path else (INK, "normal")
        x, before = left[depth[k] + 1], left[depth[k]]
        parent = node.word if node.parent is None else nodes[node.parent].word
        end = before + _width(start if node.parent is None else parent, size) + 0.06
        y = np.mean([top[0], top[-1]]) if node.parent is None else rows[node.parent]
        ax.plot([end, max(end, x - gap * 0.7), x - 0.05], [y, y, row], color=colour, zorder=1 + (k in path),
                linewidth=2.2 if k in path else 1.0)
        ax.text(x, row, node.word, va="center", fontsize=size, color=colour, fontweight=weight)
        ax.text(x, row + 0.2, _chance(node), va="top", fontsize=0.85 * size, color=colour)
    return fig


def _chance(node: Node) -> str:
    """What stands below a word: its probability; below the end: that of the whole caption."""
    return f"{np.exp(node.total):.2%}" if node.ended else f"{node.probability:.0%}"


@dataclass(frozen=True)
class Said:
    """A picture (height, width, 3); captions by who says them, and what people say of it."""
    image: object
    references: Sequence[str]
    captions: Mapping[str, str] = field(default_factory=dict)


@_styled
def captioned(shown: Sequence[Said], across: int = 3) -> Picture:
    """Pictures in rows of `across`; below each what was said of it, and in grey what people said.

    Captions are named by who says them, unless that is "". Raises ValueError without pictures.
    """
    if not shown:
        raise ValueError("captioned needs at least one picture")
    letters, line, side = int(92 / across), 0.165, min((WIDTH - 0.2) / across * 0.62, 1.6)
    texts = [[(f"{name}: {text or '(nothing)'}" if name else text or "(nothing)", INK)
              for name, text in each.captions.items()] + [(text, GREY) for text in each.references] for each in shown]
    blocks = [[(part, colour) for text, colour in each for part in textwrap.wrap(text, letters)] for each in texts]
    rows = [range(k, min(k + across, len(shown))) for k in range(0, len(shown), across)]
    heights = [side + 0.2 + line * max(len(blocks[k]) for k in row) for row in rows]
    fig = Picture(sum(heights), "Pictures and captions. " + "; ".join(
        " / ".join(text for text, _ in each) for each in texts))
    fig.set_layout_engine("none")
    width, height = fig.get_size_inches()
    top = height - 0.05
    for row, high in zip(rows, heights):
        for column, k in enumerate(row):
            middle, image = (column + 0.5) / across, _array(shown[k].image)
            ax = fig.add_axes((middle - side / width / 2, (top - side) / height, side / width, side / height))
            ax.imshow(image, interpolation="nearest" if len(image) < 100 else "auto")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():                       # a picture on white ends somewhere, too
                spine.set(visible=True, color="lightgrey", linewidth=0.6)
            for n, (text, colour) in enumerate(blocks[k]):
                fig.text(middle, (top - side - 0.05 - n * line) / height, text, ha="center", va="top", fontsize=9,
                         color=colour)
        top -= high
    return fig


@_styled
def cells(networks: Mapping[str, tuple[Sequence[float], int, float | None]], label: str = "CIDEr",
          step: str = "word") -> Picture:
    """The dense cells against each other (`fig-neuraltalk-cells`, `fig-ds2-cells`): {name: (score of each seed,
    weights, µs a `step`)}.

    A disc at the mean, its area in proportion to the weights, a bar from the lowest seed to the highest, the time
    beside it where it is known. Raises ValueError where a network has no score.
    """
    if not networks or not all(len(scores) for scores, _, _ in networks.values()):
        raise ValueError("cells needs at least one score of each network")
    fig = Picture(3.8, f"{label} of dense networks: " + "; ".join(
        f"{name} {np.mean(scores):.1f}, {short(weights)} weights" for name, (scores, weights, _) in networks.items()))
    ax, most = fig.subplots(), max(weights for _, weights, _ in networks.values())
    for x, (scores, weights, _) in enumerate(networks.values()):
        ax.scatter(x, np.mean(scores), s=2600 * weights / most, color=BLUE, alpha=0.35, linewidth=0, zorder=2)
        ax.plot([x, x], [min(scores), max(scores)], color=BLUE, linewidth=2.2, zorder=3)
        ax.plot([x] * len(scores), scores, "o", color=BLUE, markersize=4.5, zorder=4)
    ax.set_xticks(range(len(networks)), [
        f"{name}\n{short(weights)} weights" + (f"\n{time:.0f} µs a {step}" if time else "")
        for name, (_, weights, time) in networks.items()])
    ax.set(ylabel=f"{label}\n(dot: a seed; disc: the mean)", xlim=(-0.5, len(networks) - 0.5))
    ax.margins(y=0.3)
    return fig


@_styled
def gate_shares(masks: Mapping[str, object]) -> Picture:
    """Where live connections are: the share alive of each matrix (4R, C), gate by gate, and of the whole matrix.

    Rows of a matrix are the gates i, f, g, o. Raises ValueError without masks.
    """
    if not masks:
        raise ValueError("gate_shares needs at least one mask")
    shares = {name: [100 * part.mean() for part in np.split(_array(mask).astype(float), 4)]
              for name, mask in masks.items()}
    fig = Picture(2.7, "Share of live connections by gate: " + "; ".join(
        f"{name}: " + ", ".join(f"{gate} {share:.1f} %" for gate, share in zip(GATES, values))
        for name, values in shares.items()))
    axes = np.atleast_1d(fig.subplots(1, len(shares), sharey=True))
    for ax, (name, values) in zip(axes, shares.items()):
        for x, (share, (_, colour)) in enumerate(zip(values, GATES.values())):
            ax.bar(x, share, 0.7, color=colour, zorder=2)
            # Its white box hides the dashed line, which would make 4-5 of 4.5.
            ax.annotate(f"{share:.1f}", (x, share), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        ax.axhline(np.mean(values), color=INK, linestyle="--", linewidth=1, zorder=1.5)
        ax.set_title(name, loc="center")
        ax.set_xticks(range(4), list(GATES))
        ax.set_xlabel("gate")
    axes[0].set_ylabel("live connections (%)\n(dashed: all four gates)")
    axes[0].set_ylim(0, 1.15 * max(max(values) for values in shares.values()) or 1)
    return fig


@_styled
def architecture(model: NeuralTalk, words: Sequence[str], encoder: str) -> Picture:
    """The captioner with its true shapes (`fig-neuraltalk-arch`), unrolled over the first words of a caption.

    Raises ValueError for fewer than two words.
    """
    if len(words) < 2:
        raise ValueError("architecture needs at least two words")
    rnn, V, E = model.rnn, *model.words.weight.shape
    kind = "GRU" if isinstance(rnn, nn.GRU) else "H-LSTM" if rnn.gate_layers else "LSTM"
    layers, H, D = rnn.num_layers, rnn.hidden_size, model.picture.in_features
    fig = Picture(2.9 + 0.62 * layers, f"The captioner unrolled: a picture's {D} numbers, made {E} wide, are the first "
                  f"input of {layers} {kind} layer{'s' * (layers > 1)} of width {H}; then come the start mark and the "
                  f"words, and behind each an output over {V} words.")
    ax, reads = fig.subplots(), ["picture", "start", *words[:-1]]
    says = [None, *words]
    step, x0, y_in, y_cell = 1.5, 2.4, 1.0, 2.1
    y_out = y_cell + 0.95 * layers
    pen = _Circuit(ax)
    ax.set(xlim=(-0.1, x0 + step * len(reads) - 0.3), ylim=(-0.65, y_out + 1.35), aspect="auto")
    ax.axis("off")
    middle = y_cell + 0.475 * (layers - 1)
    for y, text in ((0, "reads"), (y_in, f"becomes\n{E} numbers"), (middle, f"{kind} x{layers}\n{H} wide"),
                    (y_out, "gives each word\na probability"), (y_out + 1.0, "says")):
        ax.text(0, y, text, va="center", fontsize=9.5, color=GREY)
    for k, (read, say) in enumerate(zip(reads, says)):
        x = x0 + step * k
        text, colour = (f"{E} × {D}", PINE) if k == 0 else (f"{V} × {E}", RUST)
        pen.line((x, 0.15), (x, y_in - 0.36))
        pen.box(x, y_in, text, colour, width=1.38, height=0.66)
        ax.text(x, 0.05, read if k else encoder, ha="center", va="top", fontsize=9.5,
                style="normal" if k < 2 else "italic")
        pen.line((x, y_in + 0.33), (x, y_cell - 0.36))
        for layer in range(layers):
            y = y_cell + 0.95 * layer
            pen.box(x, y, kind, BLUE, width=0.95, height=0.66)
            pen.line((x + 0.475, y), (x + step - 0.5, y))
            if layer < layers - 1:
                pen.line((x, y + 0.33), (x, y + 0.6))
        if say is not None:
            pen.line((x, y_out - 0.62), (x, y_out - 0.33))
            pen.box(x, y_out, f"{V} × {H}", INK, width=1.38, height=0.66)
            pen.line((x, y_out + 0.33), (x, y_out + 0.85))
            ax.text(x, y_out + 0.9, say, ha="center", va="bottom", fontsize=9.5, style="italic")
    return fig
