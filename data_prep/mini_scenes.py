"""Generate the mini caption corpus: drawn scenes of shapes, with five varied sentences each.

The corpus in `data_prep/mini/scenes` was made by this program and is shipped, so that the book runs with no
network. To make it anew:

    python -m data_prep.mini_scenes --out DIR [--seed 0]

What a scene of the validation or the test set shows was never seen in training: of each of the 36 combinations of
shape and colour one size is held out, half of them for validation and half for the test. Where such a scene shows two
things, one of them may be a known one.
Every scene has a random generator of its own, made from the seed, the split and its number.
"""

import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data_prep import captions, command
from data_prep.captions import write_corpus
from data_prep.corpus import SPLITS, DataError, check_replaceable
from hlstm_src.errors import told

SIDE = 64  # pixels
FINE = 4  # every pixel is drawn as 4 x 4 points, for smooth edges
COUNTS = {"train": 900, "valid": 80, "test": 80}
SENTENCES = 5

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 222, 40),
    "purple": (130, 50, 170),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {"white": (244, 244, 244), "grey": (160, 160, 160), "black": (24, 24, 24)}
RADII = {"small": 6.0, "medium": 9.0, "big": 14.0}


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A star of five points, one of them up: what lies within at least four of the five lines of a pentagram."""
    normals = ((0.0, -1.0), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309))
    return sum(a * u + b * v <= 0.31 for a, b in normals) >= 4


# u to the right, v downwards, both in [-1, 1] within the shape.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: u * u + v * v <= 0.95,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.85,
    "triangle": lambda u, v: (v <= 0.8) & (2 * abs(u) <= v + 1),
    "star": _star,
    "ring": lambda u, v: (u * u + v * v <= 0.95) & (u * u + v * v >= 0.35),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.28) & (np.maximum(abs(u), abs(v)) <= 0.92),
}
NOUNS = {"circle": ("circle", "disc"), "square": ("square", "box"), "cross": ("cross", "plus sign")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large"), "medium": ("",)}
NUMBERS = ("", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Thing:
    """One kind of object in a scene: shape, colour, size, and the centres (x, y) of all of that kind, in pixels."""

    shape: str
    colour: str
    size: str
    places: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Layout:
    """What a scene shows; `relation` is where the first thing lies, or how those of a group lie to each other."""

    kind: str
    things: tuple[Thing, ...]
    relation: str
    background: str
    dots: tuple[tuple[float, float], ...]


def split_of(shape: str, colour: str, size: str) -> str:
    """The split in which a combination is seen: of each shape in each colour, one size is held out."""
    number = list(SHAPES).index(shape) + list(COLOURS).index(colour) + 2 * list(RADII).index(size)
    return {0: "valid", 1: "test"}.get(number % len(COLOURS), "train")


def _draw_thing(rng: np.random.Generator, split: str, sizes: tuple[str, ...], unlike: Thing | None = None) -> Thing:
    """A thing without places, of a combination that the split may show, of another shape and colour than `unlike`."""
    while True:
        shape, colour, size = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, sizes))
        # One thing of two in a held-out scene may be a known one.
        allowed = {split} if unlike is None else {split, "train"}
        alike = unlike is not None and (shape == unlike.shape or colour == unlike.colour)
        if split_of(shape, colour, size) in allowed and not alike:
            return Thing(shape, colour, size, ())


def _at(thing: Thing, *places: tuple[float, float]) -> Thing:
    return Thing(thing.shape, thing.colour, thing.size, tuple((float(x), float(y)) for x, y in places))


SPOTS = {
    "in the middle": (32, 32),
    "in the top left corner": (16, 16),
    "in the top right corner": (48, 16),
    "in the bottom left corner": (16, 48),
    "in the bottom right corner": (48, 48),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


def _single(rng: np.random.Generator, split: str) -> tuple[tuple[Thing, ...], str]:
    thing, spot = _draw_thing(rng, split, tuple(RADII)), str(rng.choice(list(SPOTS)))
    return (_at(thing, SPOTS[spot] + rng.uniform(-2, 2, 2)),), spot


def _group(rng: np.random.Generator, split: str) -> tuple[tuple[Thing, ...], str]:
    """Two to five of a kind, in a row, in a column or scattered."""
    count, how = int(rng.integers(2, 6)), str(rng.choice(("row", "column", "scattered")))
    thing = _draw_thing(rng, split, ("small",) if count > 3 else ("small", "medium"))
    radius = RADII[thing.size]
    if how == "scattered":
        cells = [(x, y) for x in (12, 32, 52) for y in (12, 32, 52)]
        chosen = rng.permutation(len(cells))[:count]
        return (_at(thing, *(np.array(cells[k]) + rng.uniform(radius - 10, 10 - radius, 2) for k in chosen)),), how
    along = (np.arange(count) - (count - 1) / 2) * min(2.3 * radius, 60 / count) + 32
    across = rng.uniform(20, 44)
    return (_at(thing, *((a, across) if how == "row" else (across, a) for a in along)),), how


def _pair(rng: np.random.Generator, split: str) -> tuple[tuple[Thing, ...], str]:
    """One to three of a kind, and one of another to the left, to the right, above or below."""
    first = _draw_thing(rng, split, ("small", "medium", "big"))
    second = _draw_thing(rng, split, ("medium", "big"), unlike=first)
    where = str(rng.choice(list(DIRECTIONS)))
    count = int(rng.choice((1, 1, 2, 3))) if first.size == "small" else 1
    step = np.array(DIRECTIONS[where], float)
    middle = 32 + rng.uniform(-2, 2, 2)
    beside = step[::-1] * 14  # several stand beside each other, across the direction
    places = [middle + 15 * step + beside * (k - (count - 1) / 2) for k in range(count)]
    pair = _at(first, *places), _at(second, middle - 15 * step)
    return (pair, where) if rng.random() < 0.5 or count > 1 else (pair[::-1], _opposite(where))


def _inside(rng: np.random.Generator, split: str) -> tuple[tuple[Thing, ...], str]:
    """A small thing on a big one that is closed."""
    while True:
        first = _draw_thing(rng, split, ("small",))
        second = _draw_thing(rng, split, ("big",), unlike=first)
        if second.shape in ("circle", "square", "ring"):
            place = 32 + rng.uniform(-10, 10, 2)
            return (_at(first, place), _at(second, place)), "inside"


def _opposite(where: str) -> str:
    return {"left": "right", "right": "left", "above": "below", "below": "above"}[where]


KINDS = {"single": _single, "group": _group, "pair": _pair, "inside": _inside}
TURNS = ("pair", "single", "pair", "group", "inside", "pair", "group")


def draw_layout(rng: np.random.Generator, split: str, number: int) -> Layout:
    """Decide what the scene of this number shows; the kinds take turns."""
    kind = TURNS[number % len(TURNS)]
    things, relation = KINDS[kind](rng, split)
    background = str(rng.choice(list(BACKGROUNDS)))
    places = np.array([place for thing in things for place in thing.places])
    reach = max(RADII[thing.size] for thing in things) + 3
    dots = []
    for place in rng.uniform(2, SIDE - 2, (40, 2)) if rng.random() < 0.35 else ():
        if len(dots) < 12 and (np.abs(places - place).max(1) > reach).all():
            dots.append((float(place[0]), float(place[1])))
    return Layout(kind, things, relation, background, tuple(dots) if len(dots) >= 6 else ())


def render(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: uint8 (64, 64, 3). Shades differ a little from scene to scene."""
    points = (np.arange(SIDE * FINE) + 0.5) / FINE
    x, y = points[None, :], points[:, None]
    image = np.ones((SIDE, SIDE, 3)) * (np.array(BACKGROUNDS[layout.background]) + rng.uniform(-10, 10))

    def paint(mask: np.ndarray, colour: np.ndarray) -> None:
        cover = mask.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3))[..., None]  # (64, 64, 1), in sixteenths
        image[:] = image * (1 - cover) + colour * cover

    shade = np.array((90, 90, 90) if layout.background == "white" else (215, 215, 215))
    for px, py in layout.dots:
        paint((x - px) ** 2 + (y - py) ** 2 <= 1.2, shade)
    for thing in reversed(layout.things):  # what is inside comes last
        colour, radius = np.array(COLOURS[thing.colour]) + rng.uniform(-14, 14, 3), RADII[thing.size]
        for px, py in thing.places:
            paint(SHAPES[thing.shape]((x - px) / radius, (y - py) / radius), colour)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


class Speaker:
    """Says what a layout shows, each time in other words and in other detail. It never says what is not so."""

    def __init__(self, layout: Layout, rng: np.random.Generator):
        self.layout, self.rng = layout, rng

    def pick(self, *choices: str) -> str:
        return choices[int(self.rng.integers(len(choices)))]

    def maybe(self, text: str, chance: float) -> str:
        return text if self.rng.random() < chance else ""

    def things(self, thing: Thing, definite: bool = False) -> str:
        """A noun phrase: "three tiny red discs", "an orange star", "the box"."""
        count = len(thing.places)
        noun = self.pick(*NOUNS.get(thing.shape, (thing.shape,)))
        plural = (noun + "es" if noun[-1] in "sx" else noun + "s") if count > 1 else noun
        size = self.maybe(self.pick(*SIZE_WORDS[thing.size]), 0.75)
        words = " ".join(filter(None, (size, self.maybe(thing.colour, 0.95), plural)))
        if definite:
            return f"the {words}"
        if count == 1:
            return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        number = NUMBERS[count]
        return f"{self.pick(number, number, number, 'a pair of' if count == 2 else 'some')} {words}"

    def behind(self) -> str:
        """The background, which is not always mentioned, and the dots."""
        layout = self.layout
        ground = self.pick(f"on a {layout.background} background", f"on {layout.background}")
        ground = self.maybe(ground, 0.3)
        dots = self.pick("with dots around", "among many dots", "with little dots in the background")
        return " ".join(filter(None, (ground, self.maybe(dots, 0.6) if layout.dots else "")))

    def relation(self, where: str) -> str:
        return self.pick(
            *{
                "left": ("to the left of", "on the left of", "left of"),
                "right": ("to the right of", "on the right of", "right of"),
                "above": ("above", "over"),
                "below": ("below", "under", "beneath"),
                "inside": ("inside", "in", "within"),
            }[where]
        )

    def sentence(self) -> str:
        """One sentence, without the full stop."""
        layout, first = self.layout, self.layout.things[0]
        many = len(first.places) > 1
        there, verb = self.pick("there are", "we see", "") if many else self.pick("there is", "we see", ""), "is"
        if layout.kind == "single":
            body = self.pick(
                f"{there} {self.things(first)} {layout.relation}",
                f"{self.things(first)} {verb} {layout.relation}",
                f"{layout.relation} there is {self.things(first)}",
            )
        elif layout.kind == "group":
            how = {
                "row": ("in a row", "side by side", "next to each other"),
                "column": ("in a column", "on top of each other", "one above the other"),
                "scattered": ("scattered around", "here and there", "in different places"),
            }[layout.relation]
            body = self.pick(
                f"{there} {self.things(first)} {self.pick(*how)}",
                f"{self.things(first)} are {self.pick(*how)}",
                f"the picture shows {self.things(first)} {self.pick(*how)}",
            )
        else:
            second, verb = layout.things[1], "are" if many else "is"
            forms = [
                f"{there} {self.things(first)} {self.relation(layout.relation)} {self.things(second)}",
                f"{self.things(first)} {verb} {self.relation(layout.relation)} {self.things(second)}",
            ]
            if layout.kind == "pair":
                other = self.relation(_opposite(layout.relation))
                forms.append(f"{self.things(second)} is {other} {self.things(first)}")
                forms.append(f"{self.things(first)} and {self.things(second)} {other} {'them' if many else 'it'}")
            else:
                forms.append(f"{self.things(second)} with {self.things(first)} {self.pick('inside', 'in it')}")
                forms.append(f"{self.things(second)} holds {self.things(first)}")
            body = self.pick(*forms)
        return " ".join(f"{body} {self.behind()}".split())

    def sentences(self, count: int = SENTENCES) -> tuple[str, ...]:
        """So many different sentences, with a capital letter and a full stop."""
        said: dict[str, None] = {}
        while len(said) < count:
            said[self.sentence()] = None
        return tuple(f"{text[0].upper()}{text[1:]}." for text in said)


def scene(seed: int, split: str, number: int) -> tuple[Layout, np.ndarray, tuple[str, ...]]:
    """Make one scene: what it shows, its pixels (64, 64, 3) and its sentences."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    layout = draw_layout(rng, split, number)
    return layout, render(layout, rng), Speaker(layout, rng).sentences()


def encode(image: np.ndarray) -> bytes:
    """PNG of uint8 (height, width, 3), without filters; numpy and zlib are all it takes."""
    height, width, _ = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


LICENCE = """The mini caption corpus: licence

The pictures, sentences and tables in this folder are released under CC0 1.0 (public domain dedication,
https://creativecommons.org/publicdomain/zero/1.0/). Where that cannot apply, the project's MIT licence does.
data_prep/mini_scenes.py drew them all.
"""


def generate(out: Path, seed: int = 0) -> tuple[dict, bool]:
    """Make the whole corpus in `out`; returns its `corpus.json`, and whether it is new.

    Raises:
        DataError: `out` holds something that is no mini caption corpus.
    """
    check_replaceable(out, "mini_scenes")  # before the drawing, not after it
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}-") as scratch:
        scenes = []
        for split, count in COUNTS.items():
            for number in range(count):
                _, image, said = scene(seed, split, number)
                path = Path(scratch) / f"{split}-{number:03d}.png"
                path.write_bytes(encode(image))
                scenes.append(captions.Scene(path.stem, split, path, path.name, said))
        (Path(scratch) / "LICENCE.txt").write_text(LICENCE)
        return write_corpus(
            out,
            scenes,
            name="mini_scenes",
            title="Mini caption corpus: drawn scenes of shapes",
            licence="CC0-1.0 (see LICENCE.txt)",
            source=f"generated by data_prep/mini_scenes.py with seed {seed}",
            note="Of each combination of shape and colour, one size is seen in the validation set alone, or in the"
            " test set alone.",
            min_count=1,
            beside=[Path(scratch) / "LICENCE.txt"],
        )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; an older mini caption corpus is replaced.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws scenes, shades and sentences.")] = 0,
) -> None:
    """Generate the mini caption corpus."""
    try:
        info, new = generate(out, seed)
    except (DataError, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out} {'is ready' if new else 'is up to date'}\n{captions.describe(info)}")


if __name__ == "__main__":
    command.run(main)
