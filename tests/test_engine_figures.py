"""Figures of the engine's benchmark: every timing at its place, and the best dense engine found."""

import numpy as np
import pytest

from hlstm_src import engine_figures
from tests.pictures import drawn


def bench(names=("LSTM 8, 5 steps",), trained=False):
    """What `bench engine --json` writes, with round numbers."""
    engines = {"torch, layer": (90.0, 4000, 1000), "ours, dense": (80.0, 4200, 1000), "torch, int8": (20.0, 1000, 1000),
               "ours, dense, half as wide": (30.0, 1100, 250), "unstructured 95.0%": (10.0, 500, 50),
               "unstructured 80.0%": (40.0, 1400, 200), "unstructured 95.0%, CSR": (50.0, 400, 50),
               "unstructured 95.0%, int8": (9.0, 300, 50), "balanced 90.0%": (15.0, 700, 100),
               "16-row blocks 80.0%": (16.0, 800, 200), "16-row blocks 97.5%": (2.0, 100, 25)}
    cases = {name: engines for name in names}
    if trained:
        cases["trained, layer 1"] = {"torch, layer": (90.0, 4000, 1000), "its own masks": (30.0, 800, 100)}
    return {"latency": [{"engine": engine, "threads": 1, "case": name, "microseconds": us}
                        for name, found in cases.items() for engine, (us, _, _) in found.items()],
            "cases": [{"case": name, "steps": 5, "macs": 1000,
                       "dense": [e for e in ("torch, layer", "ours, dense") if e in found],
                       "bytes": {e: size for e, (_, size, _) in found.items()},
                       "live": {e: live for e, (_, _, live) in found.items()}} for name, found in cases.items()]}


def test_the_best_dense_engine_is_what_all_are_held_against():
    found = engine_figures.layers(bench(trained=True))
    assert list(found) == ["LSTM 8, 5 steps", "trained, layer 1"]
    layer = found["LSTM 8, 5 steps"]
    assert layer.best.engine == "ours, dense" and layer.faster("unstructured 95.0%") == 8
    assert layer.faster("torch, int8") == 4                        # quicker, but not float32: never the best dense
    assert found["trained, layer 1"].best.engine == "torch, layer"


def test_a_curve_holds_the_float32_timings_of_one_structure_from_dense_to_sparse():
    layer = engine_figures.layers(bench(trained=True))["LSTM 8, 5 steps"]
    assert [t.engine for t in layer.curve("unstructured")] == ["unstructured 80.0%", "unstructured 95.0%"]
    assert [t.live for t in layer.curve("16-row blocks")] == [200, 25]
    assert engine_figures.layers(bench(trained=True))["trained, layer 1"].curve("unstructured") == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_latency_has_a_panel_for_each_layer(n):
    found = engine_figures.layers(bench([f"LSTM {k}, 5 steps" for k in range(n)]))
    picture = drawn(engine_figures.latency(found))
    panels = [ax for ax in picture.axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in panels] == list(found)
    lines = {line.get_label(): line for line in panels[0].lines}
    assert list(lines["unstructured"].get_xdata()) == [20, 5] and list(lines["unstructured"].get_ydata()) == [40, 10]
    assert lines["unstructured, CSR"].get_ydata() == [50]
    assert lines["best dense float32"].get_ydata()[0] == 80
    assert lines["dense, half as wide"].get_ydata()[0] == 30 and lines["dense, int8"].get_ydata()[0] == 20
    assert [text.get_text() for text in picture.legends[0].texts].count("balanced") == 1
    assert "LSTM 0, 5 steps 40.0" in picture.alt                            # 80 µs to 2


def test_a_long_name_is_broken_at_a_comma():
    assert engine_figures.in_two_lines("LSTM 800, two directions, two threads, 200 steps") == (
        "LSTM 800, two directions,\ntwo threads, 200 steps")
    assert engine_figures.in_two_lines("H-LSTM 512, 100 steps") == "H-LSTM 512, 100 steps"
    assert engine_figures.in_two_lines("a name of more than twenty-eight letters") == (
        "a name of more than twenty-eight letters")


@pytest.mark.parametrize("sizes", [(1 << 10, 1 << 23, 1 << 27), (1 << 10, 1 << 12, 1 << 13, 1 << 27)])
def test_the_roofline_also_has_the_slope_at_the_size_of_the_best_dense_engine(sizes):
    layer = engine_figures.layers(bench())["LSTM 8, 5 steps"]      # which reads 4200 bytes
    rates = {size: 1e8 / (1 + k) for k, size in enumerate(sizes)}
    ax = drawn(engine_figures.roofline(layer, rates, 5e7)).axes[0]
    roofs = [line for line in ax.lines if len(line.get_xdata()) > 10]
    found = sorted(line.get_ydata()[0] / line.get_xdata()[0] * 1e9 for line in roofs)
    assert found == pytest.approx(sorted(rates[size] for size in (sizes[0], sizes[-2], sizes[-1])))
    points = [x for line in ax.lines if len(line.get_xdata()) <= 10 for x in line.get_xdata()]
    assert ax.get_xlim()[1] > 1.2 * max(points)


def test_the_roofline_shows_products_against_bytes_and_both_limits():
    layer = engine_figures.layers(bench())["LSTM 8, 5 steps"]
    picture = drawn(engine_figures.roofline(layer, {1 << 14: 1e8, 1 << 23: 5e7, 1 << 27: 2e7}, 5e7))
    ax = picture.axes[0]
    roofs = [line for line in ax.lines if len(line.get_xdata()) > 10]
    assert len(roofs) == 2
    for roof, rate in zip(roofs, (1e8, 2e7)):
        assert roof.get_ydata() == pytest.approx(np.minimum(roof.get_xdata() * rate, 5e7) / 1e9)
    assert "The best dense engine: 0.0 billion a second, 0.24 a byte; 16-row blocks 97.5% sparse: 0.0" in picture.alt
    points = {line.get_label(): line for line in ax.lines if len(line.get_xdata()) <= 10}
    assert points["dense float32"].get_xdata() == pytest.approx([1000 / 4200])
    assert points["dense float32"].get_ydata() == pytest.approx([1000 / 80e-6 / 1e9])
    assert points["CSR"].get_xdata() == pytest.approx([50 / 400])
    assert points["dense int8"].get_ydata() == pytest.approx([1000 / 20e-6 / 1e9])
    assert {"reading 16 KiB", "reading 128 MiB", "multiplying float32"} <= {t.get_text() for t in ax.texts}
