"""The mini caption corpus: what is shipped is what the program makes, and what is said is what is drawn."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from data_prep import mini_scenes
from data_prep.captions import tokenize, verify_corpus
from data_prep.corpus import SPLITS
from data_prep.mini_scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    NOUNS,
    RADII,
    SHAPES,
    SIZE_WORDS,
    encode,
    generate,
    render,
    scene,
    split_of,
)
from hlstm_src.corpora import CaptionCorpus

SHIPPED = Path(mini_scenes.__file__).parent / "mini" / "scenes"
ALL = [(split, number) for split in SPLITS for number in range(COUNTS[split])]
ANY_NOUN = {word: shape for shape in SHAPES for word in NOUNS.get(shape, (shape,))}
NOUN = re.compile(rf"\b({'|'.join(ANY_NOUN)})(?:es|s)?\b")


@pytest.fixture(scope="module")
def made():
    return {(split, number): scene(0, split, number) for split, number in ALL}


@pytest.fixture(scope="module")
def corpus():
    return CaptionCorpus(SHIPPED)


def test_the_program_makes_what_is_shipped(made, corpus):
    verify_corpus(SHIPPED)
    assert len(corpus.pictures) == len(ALL)
    for (split, number), picture in zip(ALL, corpus.pictures):
        _, image, said = made[split, number]
        assert picture.id == f"{split}-{number:03d}" and picture.split == split and picture.raw == said
        assert np.array_equal(np.asarray(corpus.image(picture)), image)
        assert picture.captions == tuple(tuple(tokenize(sentence)) for sentence in said)


def test_a_second_run_finds_nothing_to_do_and_another_seed_makes_another_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_scenes, "COUNTS", {"train": 3, "valid": 2, "test": 2})
    info, new = generate(tmp_path / "scenes")
    files = {p: p.read_bytes() for p in sorted((tmp_path / "scenes").rglob("*")) if p.is_file()}
    assert new and generate(tmp_path / "scenes") == (info, False)
    assert {p: p.read_bytes() for p in files} == files
    assert generate(tmp_path / "other", seed=1)[0]["sha256"] != info["sha256"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_it_is_small_free_and_complete(corpus):
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 2_000_000
    named = {p.path for p in corpus.pictures} | {SHIPPED / name for name in (
        "corpus.json", "manifest.csv", "captions.csv", "vocabulary.txt", "LICENCE.txt")}
    assert set(files) == named
    assert "CC0" in (SHIPPED / "LICENCE.txt").read_text() and "CC0" in corpus.info["licence"]


def test_what_a_held_out_scene_shows_was_never_trained_on_but_its_parts_were(made):
    seen = {split: set() for split in SPLITS}
    for (split, _), (layout, _, _) in made.items():
        things = [(thing.shape, thing.colour, thing.size) for thing in layout.things]
        assert any(split_of(*thing) == split for thing in things)
        seen[split] |= set(things)
    assert not any(split_of(*thing) != "train" for thing in seen["train"])
    assert not any(split_of(*thing) == "valid" for thing in seen["test"])
    for shape in SHAPES:
        for colour in COLOURS:
            kinds = [split_of(shape, colour, size) for size in RADII]
            assert sorted(kinds) in (["train", "train", "valid"], ["test", "train", "train"])
            assert {(shape, colour, size) for size, kind in zip(RADII, kinds) if kind == "train"} <= seen["train"]


def test_sentences_of_a_scene_differ_and_all_words_are_learned(made, corpus):
    assert all(len(set(said)) == len(said) == 5 for _, _, said in made.values())
    counts = {word: 0 for word in corpus.vocabulary.words[1:]}
    for picture in corpus.pictures:
        for caption in picture.captions:
            assert 3 <= len(caption)
            for word in caption:
                counts[word] += picture.split == "train"
    assert min(counts.values()) >= 20, "a word that is rare cannot be learned"
    distinct = {caption for p in corpus.split("test") for caption in p.captions}
    known = {caption for p in corpus.split("train") for caption in p.captions}
    assert len(distinct - known) / len(distinct) > 0.6, "most sentences of the test cannot be learned by heart"


def test_nothing_is_said_that_is_not_so(made):
    sizes = {word: size for size, words in SIZE_WORDS.items() for word in words if word}
    for layout, _, said in made.values():
        by_shape = {thing.shape: thing for thing in layout.things}
        for sentence in said:
            text = sentence.lower().replace(f"on a {layout.background} background", "").replace("little dots", "dots")
            assert "dots" not in text or layout.dots
            assert not set(BACKGROUNDS) - {layout.background} & set(tokenize(text))
            before = 0
            for match in NOUN.finditer(text):
                thing, words = by_shape[ANY_NOUN[match[1]]], tokenize(text[before:match.start()])
                colours, told = set(words) & set(COLOURS), {sizes[word] for word in words if word in sizes}
                assert colours <= {thing.colour} and told <= {thing.size}, sentence
                number = [n for n, word in enumerate(mini_scenes.NUMBERS) if word and word in words[-4:] and n > 1]
                assert not number or number == [len(thing.places)], sentence
                plural = match[0] != match[1]
                assert plural == (len(thing.places) > 1), sentence
                before = match.end()


@pytest.mark.parametrize("phrases, axis, sign", [
    (("left of", "on the left of"), 0, -1), (("right of",), 0, 1),
    (("above", "over"), 1, -1), (("below", "under", "beneath"), 1, 1),
])
def test_things_lie_where_the_sentence_says(made, phrases, axis, sign):
    checked = 0
    for layout, _, said in made.values():
        if layout.kind != "pair":
            continue
        by_shape = {thing.shape: thing for thing in layout.things}
        for sentence in said:
            match = re.search(rf"\b(?:{'|'.join(phrases)})\b", sentence.lower())
            nouns = [(m.start(), by_shape[ANY_NOUN[m[1]]]) for m in NOUN.finditer(sentence.lower())]
            if not match or len(nouns) != 2:
                continue
            first, second = (thing for _, thing in nouns)
            if match.start() > nouns[1][0]:  # "an x and a y above it": the second one is what lies there
                first, second = second, first
            assert sign * (np.mean(first.places, 0) - np.mean(second.places, 0))[axis] > 10, sentence
            checked += 1
    assert checked > 100


def test_things_are_in_the_frame_have_their_colour_and_do_not_cover_each_other(made):
    for layout, image, _ in made.values():
        for thing in layout.things:
            places, radius = np.array(thing.places), RADII[thing.size]
            assert (places >= 0.9 * radius).all() and (places <= 64 - 0.9 * radius).all()
            gaps = np.abs(places[:, None] - places[None]).max(-1) + 99 * np.eye(len(places))
            assert gaps.min() >= 1.99 * radius - 0.1
            near = np.abs(image.astype(int) - np.array(COLOURS[thing.colour])).max(-1) <= 15
            assert near.sum() >= 10 * len(places)


def test_a_scene_is_drawn_the_same_again_and_apart_from_its_neighbour(made):
    layout, image, said = scene(0, "test", 5)
    assert layout == made["test", 5][0] and np.array_equal(image, made["test", 5][1]) and said == made["test", 5][2]
    assert not np.array_equal(image, scene(1, "test", 5)[1])
    assert not np.array_equal(image, made["test", 6][1])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_square_and_no_more(shape):
    thing = mini_scenes.Thing(shape, "red", "big", ((32.0, 32.0),))
    layout = mini_scenes.Layout("single", (thing,), "in the middle", "black", ())
    drawn = render(layout, np.random.default_rng(0))[..., 0] > 120
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert 18 <= rows.min() and rows.max() <= 45 and 18 <= columns.min() and columns.max() <= 45
    assert len(rows) > 20 and len(columns) > 20 and 150 < drawn.sum() < 784


def test_png_gives_the_pixels_back():
    image = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), image)


def test_the_command_line_leaves_another_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_scenes, "scene", None)                # nothing is drawn first
    app = Typer()
    app.command()(mini_scenes.main)
    (tmp_path / "corpus.json").write_text(json.dumps({"name": "ucm"}))
    done = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert done.exit_code == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "is no corpus called mini_scenes" in done.stderr and [p.name for p in tmp_path.iterdir()] == ["corpus.json"]
