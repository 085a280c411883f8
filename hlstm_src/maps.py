"""Pictures of connections: which live, which woke, which were put to sleep. Plain masks in, pictures out.

A mask is a boolean matrix (4R, C), the gates' rows one below the other in PyTorch's order i, f, g, o; a mapping of
names to masks is what `ConnectionMasks.masks` holds. Wide matrices are shown in blocks, a pixel mixing the colours of
its block. Each colour is at least twice as light as the next, so that they can be told apart without seeing colour.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .figures import BLUE, GREY, ORANGE, VERMILION, Picture, _array, _styled, framed

GATES = "ifgo"
STATES = {"alive": "#333333", "woken": BLUE, "put to sleep": ORANGE, "dormant": "#f4f4f4"}


def _blocks(mask: np.ndarray, most: int = 40) -> np.ndarray:
    """A mask (R, C) as shares in at most `most` by `most` blocks of nearly equal size."""
    rows, columns = (np.linspace(0, n, min(n, most) + 1).astype(int) for n in mask.shape)
    sums = np.add.reduceat(np.add.reduceat(mask.astype(float), rows[:-1], 0), columns[:-1], 1)
    return sums / np.outer(np.diff(rows), np.diff(columns))


def _mask(name: str, mask) -> np.ndarray:
    """A mask as an array, or a ValueError if its rows are not four gates."""
    mask = _array(mask).astype(bool)
    if mask.ndim != 2 or len(mask) % 4 or mask.size == 0:
        raise ValueError(f"{name}: a mask of shape {mask.shape} holds no four gates")
    return mask


def _states(before: np.ndarray | None, after: np.ndarray) -> dict[str, np.ndarray]:
    """What became of each connection, as one mask a state (the keys of STATES); each is in exactly one."""
    before = after if before is None else before
    return {"alive": before & after, "woken": after & ~before, "put to sleep": before & ~after,
            "dormant": ~before & ~after}


def _colours(before: np.ndarray | None, after: np.ndarray, most: int) -> np.ndarray:
    """The states of a mask (R, C) as an image (at most `most` x `most`, 3), each pixel the mean of its block."""
    shares = [_blocks(state, most)[..., None] for state in _states(before, after).values()]
    colours = [[int(colour[k:k + 2], 16) / 255 for k in (1, 3, 5)] for colour in STATES.values()]
    return sum(share * np.array(colour) for share, colour in zip(shares, colours))


def _paint(ax, image: np.ndarray, shape: tuple[int, int], **options):
    """An image of a gate into `ax`, whose axes count units (R) and inputs (C); `options` go to `imshow`."""
    ax.grid(False)
    ax.tick_params(labelsize=8.5)
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return ax.imshow(image, aspect="auto", interpolation="nearest", extent=(0, shape[1], shape[0], 0), **options)


def _legend(fig: Picture, wide: bool) -> None:
    patches = [Patch(facecolor=colour, edgecolor=GREY, linewidth=0.5, label=state) for state, colour in STATES.items()]
    fig.legend(handles=patches, loc="outside lower center", ncols=4, handlelength=1.2, columnspacing=1.4,
               title="a pixel mixes the colours of a block of connections" if wide else None, title_fontsize=9.5)


@_styled
def connection_maps(masks: Mapping[str, object]) -> Picture:
    """Where connections live: for each named mask (4R, C) a map of each gate, i, f, g, o.

    Names are matrices of one layer, or one matrix at several moments. A pixel is the live share of a block of
    connections. Raises ValueError for a mask whose rows are not four gates.
    """
    if not masks:
        raise ValueError("connection_maps needs at least one mask")
    masks = {name: _mask(name, mask) for name, mask in masks.items()}
    fig = Picture(0.35 + 1.95 * len(masks), "Where the live connections of each gate are: " + "; ".join(
        f"{name} {100 * mask.mean():.1f} % alive (" + ", ".join(
            f"{gate} {100 * part.mean():.1f}" for gate, part in zip(GATES, np.split(mask, 4))) + ")"
        for name, mask in masks.items()))
    parts = np.atleast_1d(fig.subfigures(len(masks), 1))
    for part, (name, mask) in zip(parts, masks.items()):
        maps = [100 * _blocks(gate) for gate in np.split(mask, 4)]
        axes = part.subplots(1, 4, sharey=True)
        for ax, values, gate in zip(axes, maps, GATES):
            image = _paint(ax, values, (len(mask) // 4, mask.shape[1]), vmin=0, vmax=np.max(maps) or 1, cmap="Blues")
            ax.set_title(f"gate {gate}", loc="center", fontsize=9.5)
        axes[0].set_ylabel("to unit", fontsize=9.5)
        part.supxlabel(_from(name), fontsize=9.5)
        part.colorbar(image, ax=axes, pad=0.01, label="live (%)")
        part.suptitle(f"{name}: {100 * mask.mean():.1f} % of {mask.size:,} alive", fontsize=10.5, x=0.01, ha="left")
    return fig


@_styled
def gp_masks(phases: Mapping[str, Mapping[str, object]], matrix: str | None = None) -> Picture:
    """The gates before and after each phase (`fig-gp-masks`): a column a phase, a row a gate.

    `phases` maps the names of the phases, in their order ("seed", "grown", "pruned"), to masks by matrix; `matrix`
    says which matrix is shown and may be left out where there is only one. From the second column on a colour says
    what the phase did. Raises ValueError without phases, for masks that are not four gates or change their shape, and
    KeyError for an unknown matrix.
    """
    if not phases:
        raise ValueError("gp_masks needs at least one phase")
    names = list(next(iter(phases.values())))
    if matrix is None and len(names) != 1:
        raise ValueError(f"which matrix? Choose one of {', '.join(names)}")
    matrix = names[0] if matrix is None else matrix
    shown = {phase: _mask(f"{phase}: {matrix}", masks[matrix]) for phase, masks in phases.items()}
    _same_shapes(shown.values())
    rows, columns = len(next(iter(shown.values()))) // 4, next(iter(shown.values())).shape[1]
    densities = {phase: 100 * mask.mean() for phase, mask in shown.items()}
    fig = Picture(6.6, f"Connections of {matrix} by gate: " + "; ".join(
        f"{phase} {density:.1f} % alive" for phase, density in densities.items()))
    grid, before = fig.subplots(4, len(shown), sharex=True, sharey=True, squeeze=False), None
    for column, (phase, mask) in enumerate(shown.items()):
        olds = [None] * 4 if before is None else np.split(before, 4)
        for ax, old, new in zip(grid[:, column], olds, np.split(mask, 4)):
            _paint(ax, _colours(old, new, 64), (rows, columns))
        grid[0, column].set_title(f"{phase}\n{densities[phase]:.1f} % alive", loc="center")
        before = mask
    for row, gate in enumerate(GATES):
        grid[row, 0].set_ylabel(f"gate {gate}\nto unit", fontsize=9.5)
    for ax in grid[-1]:
        ax.set_xlabel(_from(matrix), fontsize=9.5)
    fig.suptitle(matrix, x=0.01, ha="left", fontsize=10.5)
    _legend(fig, wide=max(rows, columns) > 64)
    return fig


def _from(matrix: str) -> str:
    """What the columns of a matrix stand for, by its name."""
    kinds = {"_ih": "from input", "_hh": "from state", "_gate": "from hidden unit"}
    return next((kind for part, kind in kinds.items() if part in matrix), "from unit")


def _same_shapes(masks: Iterable[np.ndarray]) -> None:
    shapes = {mask.shape for mask in masks}
    if len(shapes) > 1:
        raise ValueError(f"one matrix in several shapes: {sorted(shapes)}; take its masks from one network")


class Animation:
    """An animated GIF that shows itself on a page without network or program; `alt`: what it shows, in words.

    What stands on the page, and on paper, is its last picture. Nothing moves until the reader opens the line below it;
    then the GIF plays over and over, and closing the line puts it away.
    """

    def __init__(self, gif: bytes, last: bytes, alt: str):
        self.gif, self.last, self.alt = gif, last, alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        gif, last = (base64.b64encode(data).decode() for data in (self.gif, self.last))
        still = framed(f"data:image/png;base64,{last}", self.alt)
        moving = framed(f"data:image/gif;base64,{gif}", "The same from the first frame to the last, in motion.")
        play = f"<details><summary>Play all frames (close this line to stop)</summary>{moving}</details>"
        return {"text/html": still + play, "image/png": last, "text/plain": self.alt}


@_styled
def animation(frames: Sequence[tuple[str, Mapping[str, object]]], seconds: float = 0.5,
              limit: int = 1_000_000) -> Animation:
    """Masks through training as a moving picture of at most `limit` bytes.

    `frames` are (phase, masks by matrix) in their order, such as ("growth 1", {"weight_hh_l0": mask}). Each is shown
    for `seconds`, the last one longer: a row a matrix, a column a gate, coloured by what changed since the frame
    before; above them the phase and its density, below the density of all frames. Where a picture would become too
    large, blocks are made coarser. Raises ValueError without frames, for masks that are not four gates or that change
    their names or shapes, and where even coarse blocks exceed the limit.
    """
    if not frames:
        raise ValueError("animation needs at least one frame")
    shown = [(phase, {name: _mask(name, mask) for name, mask in masks.items()}) for phase, masks in frames]
    if any(masks.keys() != shown[0][1].keys() for _, masks in shown):
        raise ValueError("the frames name different matrices; take all of them from one network")
    for name in shown[0][1]:
        _same_shapes(masks[name] for _, masks in shown)
    for most in (64, 40, 24, 16):
        images = _frames(shown, most)
        gif, last = io.BytesIO(), io.BytesIO()
        images[-1].save(last, "PNG", optimize=True)
        palette = Image.fromarray(np.concatenate([np.asarray(image) for image in images[::max(1, len(images) // 4)]]))
        palette = palette.quantize(128, Image.Quantize.MAXCOVERAGE)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
        durations = [round(1000 * seconds)] * (len(images) - 1) + [max(round(1000 * seconds), 2500)]
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
        if len(gif.getvalue()) <= limit:
            said = "; ".join(f"{phase} {_density(masks):.1f} %" for phase, masks in shown)
            return Animation(gif.getvalue(), last.getvalue(), f"Live connections through training: {said}")
    raise ValueError(f"{len(shown)} frames take {len(gif.getvalue()):,} bytes of {limit:,}; show fewer of them")


def _density(masks: Mapping[str, np.ndarray]) -> float:
    """Live share of all matrices together, in percent."""
    return 100 * sum(mask.sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())


def _frames(shown: list[tuple[str, dict[str, np.ndarray]]], most: int) -> list[Image.Image]:
    """Each frame drawn: one figure, on which only the maps, the title and the marker are drawn anew."""
    first, densities = shown[0][1], [_density(masks) for _, masks in shown]
    fig = Picture(2.3 + 1.6 * len(first))
    canvas = FigureCanvasAgg(fig)
    fig.set_dpi(100)
    top, low = fig.subfigures(2, 1, height_ratios=[0.7 + 1.6 * len(first), 1.2])
    grid = top.subplots(len(first), 4, sharey="row", squeeze=False)
    painted = {}
    for axes, (name, mask) in zip(grid, first.items()):
        shape = len(mask) // 4, mask.shape[1]
        painted[name] = [_paint(ax, _colours(None, gate, most), shape) for ax, gate in zip(axes, np.split(mask, 4))]
        axes[0].set_ylabel(f"{name if len(name) < 20 else '…' + name[-18:]}\nto unit", fontsize=9)
        for ax in axes:
            ax.set_xlabel(_from(name), fontsize=9)
    for gate, above in zip(GATES, grid[0]):
        above.set_title(f"gate {gate}", loc="center", fontsize=9.5)
    ax = low.subplots()
    ax.plot(range(1, len(shown) + 1), densities, color=GREY)
    marker, = ax.plot(1, densities[0], "o", color=VERMILION, markersize=8)
    ax.set(xlabel="moment", ylabel="alive (%)", ylim=(0, 1.15 * max(*densities, 1)), xlim=(0.5, len(shown) + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    _legend(fig, wide=any(max(len(mask) // 4, mask.shape[1]) > most for mask in first.values()))
    title = fig.suptitle(" ", x=0.01, ha="left", fontsize=11)
    moving = [image for row in painted.values() for image in row] + [marker, title]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()                                                  # all that stands still, once
    still, images, before = canvas.copy_from_bbox(fig.bbox), [], None
    for k, (phase, masks) in enumerate(shown):
        title.set_text(f"{phase}: {densities[k]:.1f} % alive")
        marker.set_data([k + 1], [densities[k]])
        for name, mask in masks.items():
            olds = [None] * 4 if before is None else np.split(before[name], 4)
            for image, old, gate in zip(painted[name], olds, np.split(mask, 4)):
                image.set_data(_colours(old, gate, most))
        canvas.restore_region(still)
        for artist in moving:
            fig.draw_artist(artist)
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
        before = masks
    return images
