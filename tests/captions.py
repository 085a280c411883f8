"""A caption corpus of seconds for the tests: squares of plain colours, at the left or at the right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.captions import Scene, write_corpus
from hlstm_src import experiments, profiles

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SIDES = {"left": slice(4, 28), "right": slice(36, 60)}
SIZES = {"train": 12, "valid": 4, "test": 5}


def picture(colour: str, side: str, rng: np.random.Generator) -> np.ndarray:
    """Pixels (64, 64, 3), uint8: a square on grey, with a little noise."""
    pixels = np.full((64, 64, 3), 128)
    pixels[20:44, SIDES[side]] = COLOURS[colour]
    return (pixels + rng.integers(-8, 9, pixels.shape)).astype(np.uint8)


def sentences(colour: str, side: str, count: int) -> tuple[str, ...]:
    """The first `count` of five ways to say it."""
    return (f"A {colour} square on the {side}.", f"There is a {colour} square at the {side} .",
            f"{side.capitalize()}: a square, {colour}", f"the square on the {side} is {colour}",
            f"It's a {colour} square.")[:count]


def make_corpus(folder: Path, sizes: dict[str, int] = SIZES, captions: int = 5, seed: int = 0, **about) -> Path:
    """A corpus folder as data_prep writes them, with so many pictures in each split; returns the folder."""
    rng, scenes = np.random.default_rng(seed), []
    drawn = folder.with_name(folder.name + "-drawn")
    drawn.mkdir(parents=True)
    for split, count in sizes.items():
        for k in range(count):
            colour, side = rng.choice(list(COLOURS)), rng.choice(list(SIDES))
            file = drawn / f"{split}-{k:02}.png"
            Image.fromarray(picture(colour, side, rng)).save(file)
            scenes.append(Scene(file.stem, split, file, file.name, sentences(colour, side, captions)))
    about = {"min_count": 1, "name": "squares", "title": "Squares", "licence": "CC0-1.0",
             "source": "made for a test", **about}
    write_corpus(folder, scenes, **about)
    return folder


@contextmanager
def trained(results: Path, names: tuple[str, ...], **sizes) -> Iterator[Path]:
    """A folder of results in which these experiments have been run, in the profile smoke with such captions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "PROFILES", dict(profiles.PROFILES))
        patch.setenv("HLSTM_RESULTS", str(results))
        smoke = profiles.PROFILES["smoke"]
        profiles.PROFILES["smoke"] = replace(smoke, captions=replace(smoke.captions, **sizes))
        for name in names:
            experiments.run(name, "smoke", progress=False)
        yield results
