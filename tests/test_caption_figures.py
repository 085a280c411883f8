"""Pictures of captioning: nothing cut off, nothing overlapping, and what is drawn is what was given."""

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import caption_figures as cf
from hlstm_src.caption_figures import Node, Said
from hlstm_src.neuraltalk import NeuralTalk
from tests.pictures import drawn, overlaps, texts

WORDS = ["a", "of", "star", "purple", "background", "to"]


@st.composite
def trees(draw):
    """What a search keeps: in each step some go on from the step before, the last step ends."""
    nodes, before = [], [None]
    for _ in range(draw(st.integers(1, 9))):
        now = []
        for _ in range(draw(st.integers(1, 4))):
            parent, p = draw(st.sampled_from(before)), draw(st.floats(0.01, 1))
            total = np.log(p) + (nodes[parent].total if parent is not None else 0)
            nodes.append(Node(draw(st.sampled_from(WORDS)), parent, p, total))
            now.append(len(nodes) - 1)
        before = now
    parent = draw(st.sampled_from(before))
    return [*nodes, Node("end", parent, 0.5, nodes[parent].total + np.log(0.5), True)]


@settings(max_examples=25, deadline=None)
@given(trees())
def test_a_tree_shows_each_word_once_and_no_two_on_each_other(nodes):
    picture = drawn(cf.beam_tree(nodes, len(nodes) - 1))
    shown = [t for t in texts(picture) if "%" not in t and t != "start"]
    assert sorted(shown) == sorted(node.word for node in nodes)
    assert overlaps(picture) == []


def test_a_tree_of_a_usual_caption_is_legible():
    words = "a purple triangle is above a yellow star end".split()
    nodes = [Node(word, k - 1 if k else None, 0.9, -0.1 * k, word == "end") for k, word in enumerate(words)]
    picture = drawn(cf.beam_tree(nodes, len(nodes) - 1))
    assert min(t.get_fontsize() for t in picture.axes[0].texts) >= 8


def test_the_path_that_won_is_strong_and_its_probability_told():
    nodes = [Node("a", None, 0.5, np.log(0.5)), Node("two", None, 0.4, np.log(0.4)),
             Node("star", 0, 0.25, np.log(0.125)), Node("end", 2, 0.8, np.log(0.1), True)]
    picture = drawn(cf.beam_tree(nodes, 3))
    bold = {t.get_text() for t in picture.findobj(matplotlib.text.Text) if t.get_fontweight() == "bold"}
    assert bold == {"a", "star", "end"} and "10.00%" in texts(picture) and "25%" in texts(picture)
    assert "a star end" in picture.alt
    heights = {t.get_text(): t.get_position()[1] for t in picture.axes[0].texts}
    assert heights["a"] < heights["two"] and picture.axes[0].yaxis_inverted()      # the likelier one on top


def test_a_tree_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one node"):
        cf.beam_tree([], 0)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=18).map(" ".join), min_size=1, max_size=8),
       st.integers(1, 4))
def test_captions_stand_whole_below_their_pictures(captions, across):
    shown = [Said(np.zeros((8, 8, 3), np.uint8), ("what a person says",), {"": c, "other": c}) for c in captions]
    picture = drawn(cf.captioned(shown, across))
    said = " ".join(texts(picture)).split()
    wanted = [w for c in captions for w in 2 * (c or "(nothing)").split() + ["other:", *"what a person says".split()]]
    assert sorted(said) == sorted(wanted) and len(picture.axes) == len(captions)
    assert overlaps(picture) == []


def test_pictures_keep_their_pixels():
    image = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    (ax,) = drawn(cf.captioned([Said(image, ("two",))])).axes
    assert (ax.images[0].get_array() == image).all()


def test_cells_show_each_seed_and_areas_go_with_weights():
    picture = drawn(cf.cells({"LSTM x1": ([300.0, 302.0], 2_000_000, None), "LSTM x3": ([290.0], 6_000_000, 321.0)}))
    (ax,) = picture.axes
    dots = sorted(y for line in ax.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert dots == [290, 300, 302]
    small, large = (c.get_sizes()[0] for c in ax.collections)
    assert large == pytest.approx(3 * small)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["LSTM x1\n2.00 M weights", "LSTM x3\n6.00 M weights\n321 µs a word"]
    with pytest.raises(ValueError, match="at least one score"):
        cf.cells({"LSTM x1": ([], 1, None)})


def test_gate_shares_are_those_of_the_masks():
    masks = {name: torch.rand(16, 6, generator=torch.Generator().manual_seed(k)) < 0.3
             for k, name in enumerate(("weight_ih", "weight_hh"))}
    picture = drawn(cf.gate_shares(masks))
    for ax, mask in zip(picture.axes, masks.values()):
        heights = [bar.get_height() for bar in ax.patches]
        assert heights == pytest.approx([100 * float(part.float().mean()) for part in mask.chunk(4)])
        assert list(ax.lines[0].get_ydata()) == pytest.approx([100 * float(mask.float().mean())] * 2)
        assert all(t.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for t in ax.texts)  # hides the dashes
    drawn(cf.gate_shares({"weight_ih": np.zeros((8, 3), bool)}))


@pytest.mark.parametrize("cell, layers, name", [("lstm", 3, "LSTM"), ("gru", 1, "GRU"), ("hlstm", 1, "H-LSTM")])
def test_the_architecture_has_the_true_shapes(cell, layers, name):
    model = NeuralTalk(305, 1280, cell, layers, hidden=70, embedding=512)
    picture = drawn(cf.architecture(model, ["many", "boats", "…"], "efficientnet_lite0:\n1280 numbers"))
    said = texts(picture)
    assert said.count("512 × 1280") == 1 and said.count("305 × 512") == 3 and said.count("305 × 70") == 3
    assert said.count(name) == 4 * layers and f"{name} x{layers}\n70 wide" in said
    assert overlaps(picture) == []
    assert said.count("many") == said.count("boats") == 2 and said.count("…") == 1     # said, then read
