"""Drawings: nothing cut off, nothing overlapping, and what is drawn is what was given."""

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import HLSTM, drawings
from hlstm_src.counting import Counts
from tests.pictures import drawn, overlaps, texts


def test_the_cells_stand_side_by_side_and_differ_by_the_hidden_layers():
    picture = drawn(drawings.hlstm_cell())
    left, right = picture.axes
    words = [[t.get_text() for t in ax.texts] for ax in (left, right)]
    assert (left.get_title(loc="center"), right.get_title(loc="center")) == ("LSTM", "H-LSTM")
    for said in words:
        assert said.count("σ") == 3 and said.count("tanh") == 2 and said.count("×") == 3 and said.count("+") == 1
        assert {"$x_t$", "$h_{t-1}$", "$c_{t-1}$", "$c_t$", "$h_t$", "$i$", "$f$", "$g$", "$o$"} <= set(said)
    assert words[0].count("ReLU") == 0 and words[1].count("ReLU") == 4
    assert words[0].count("$W, b$") == 4 and words[1].count("$W, b$") == 8
    assert overlaps(picture) == []


def test_the_cell_is_legible_on_a_page():
    sizes = [t.get_fontsize() for t in drawings.hlstm_cell().findobj(matplotlib.text.Text) if t.get_text().strip()]
    assert min(sizes) >= 8                                         # points, on a picture 7 inches wide


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_layout_shows_the_true_shapes(inputs, hidden):
    picture = drawn(drawings.weight_layout(inputs, hidden))
    with torch.device("meta"):
        layer = HLSTM(inputs, hidden, gate_layers=0)
    assert texts(picture).count(f"${hidden} \\times {inputs}$") >= 4
    assert f"$4H = {len(layer.weight_ih_l0)}$ rows" in texts(picture)


def test_the_layout_has_the_rows_in_pytorch_order():
    names = [t for t in texts(drawings.weight_layout(3, 2)) if t[-1] == "$" and t[-3:-1] in ("$i", "$f", "$g", "$o")]
    assert [name.split()[0] for name in names] == ["input", "forget", "candidate", "output"]


def test_the_layout_of_nothing_is_refused():
    with pytest.raises(ValueError, match="hidden_size 0 must be at least 1"):
        drawings.weight_layout(3, 0)


def test_gradients_are_drawn_as_they_are_and_zeros_left_out():
    picture = drawn(drawings.gradient_flow({"a": [1, 1e-3, 0], "b": torch.tensor([1.0, 2.0, 3.0])}))
    a, b = picture.axes[0].lines
    assert picture.axes[0].get_yscale() == "log"
    assert picture.alt.endswith("Farthest back it is: a 0; b 3")
    assert list(a.get_ydata()[:2]) == [1, 1e-3] and np.isnan(a.get_ydata()[2]) and list(b.get_ydata()) == [1, 2, 3]


def test_traces_show_each_step():
    picture = drawn(drawings.traces({"gates": {"i": [0, 1, 0], "f": [1, 1, 0]}, "state": {"c": torch.ones(3)}}))
    assert len(picture.axes) == 2
    assert [list(s.get_data().values) for s in picture.axes[0].patches] == [[0, 1, 0], [1, 1, 0]]


def test_a_spread_has_its_median_and_its_range():
    values = torch.tensor([[10.0, 20.0, 90.0], [1.0, 2.0, 3.0]])
    picture = drawn(drawings.learning_spread([0, 10], {"a": values}, "errors (%)"))
    ax = picture.axes[0]
    assert picture.alt.endswith("Medians after 10 updates: a 2.0")
    assert list(ax.lines[0].get_ydata()) == [20, 2]
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == 1 and heights.max() == 90


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_seed_has_its_dot(runs):
    networks = {f"network {k}": values for k, values in enumerate(runs)}
    ax = drawn(drawings.seeds({"one": networks, "two": networks}, "errors (%)")).axes[0]
    shown = sorted(y for line in ax.lines for y in line.get_ydata())
    assert shown == sorted(2 * [v for values in runs for v in values])
    medians = [c.get_segments()[0][0][1] for c in ax.collections]
    assert medians == [float(np.median(values)) for values in runs for _ in range(2)]


def test_a_network_may_be_missing_from_a_group():
    ax = drawn(drawings.seeds({"one": {"a": [1.0], "b": [2.0]}, "two": {"b": [3.0]}}, "errors (%)")).axes[0]
    assert sorted(float(line.get_ydata()[0]) for line in ax.lines) == [1, 2, 3]


def test_a_timeline_keeps_order_and_length():
    lanes = {"slow": [("x", 1.0), ("h", 2.0), ("x", 1.5)], "fast": [("x", 0.5), ("h", 2.0)]}
    picture = drawn(drawings.timeline(lanes))
    bars = [(p.get_y() + p.get_height() / 2, p.get_x(), p.get_width()) for p in picture.axes[0].patches]
    assert bars == pytest.approx(np.array([(0, 0, 1), (0, 1, 2), (0, 3, 1.5), (1, 0, 0.5), (1, 0.5, 2)]))
    assert {"4.5 ms", "2.5 ms", "time (ms)"} <= set(texts(picture))


def test_kinds_of_work_are_told_apart_and_named():
    kinds = [str(k) for k in range(len(drawings.PIECES))]
    picture = drawn(drawings.timeline({"a": [(kind, 1.0) for kind in kinds]}))
    looks = [[patch.get_facecolor() for patch in patches] for patches in (picture.axes[0].patches,
                                                                         picture.legends[0].get_patches())]
    assert looks[0] == looks[1] and len(set(looks[0])) == len(kinds)
    assert {patch.get_edgecolor()[:3] for patch in picture.axes[0].patches} == {(1, 1, 1)}


def test_a_timeline_of_too_many_kinds_is_refused():
    with pytest.raises(ValueError, match="can be told apart"):
        drawings.timeline({"a": [(str(k), 1.0) for k in range(7)]})


def test_costs_show_all_and_live_of_every_layer():
    layers = {"wide": Counts(params=2000, nonzero_params=500, macs=9_000_000, nonzero_macs=3_000_000),
              "narrow": Counts(params=10, nonzero_params=10, macs=40, nonzero_macs=40)}
    picture = drawn(drawings.costs({"one": layers, "two": {"wide": layers["wide"]}}))
    assert len(picture.axes) == 4
    bars = [[(p.get_y() + p.get_height() / 2, p.get_width()) for p in ax.patches] for ax in picture.axes]
    assert bars[0] == pytest.approx(np.array([(0, 2000), (1, 10), (0, 500), (1, 10)]))
    assert bars[1] == pytest.approx(np.array([(0, 9e6), (1, 40), (0, 3e6), (1, 40)]))
    assert bars[3] == pytest.approx(np.array([(0, 9e6), (0, 3e6)]))
    assert [t.get_text() for t in picture.axes[1].texts] == ["3.0 M", "40"]
    assert [t.get_text() for t in picture.axes[0].get_yticklabels()] == ["wide", "narrow"]
    assert {"parameters", "MACs in a frame", "one", "two"} <= set(texts(picture))
    assert "one, 510 of 2.0 K parameters and 3.0 M of 9.0 M MACs live; two, 500 of" in picture.alt


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    drawings.hlstm_cell()
    assert dict(matplotlib.rcParams) == before
