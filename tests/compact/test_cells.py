"""Cells: every kind of cell on every layout computes what torch does, in one call, in steps and on two threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hlstm_src import HLSTM, ConnectionMasks, prune

pytest.importorskip("numba")
from hlstm_src.compact import cells, kernels, layouts  # noqa: E402

KINDS = (None, *layouts.KINDS)


def numbers(module):
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


def masked(module, share, structure=None):
    """Prunes the module in place -> its masks as numpy arrays."""
    masks = ConnectionMasks(module, "weight_*")
    prune(masks, share, structure=structure)
    return {name: m.numpy() for name, m in masks.masks.items()}


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(I=st.integers(1, 50), H=st.integers(1, 40), T=st.integers(1, 70), kind=st.sampled_from(KINDS),
       share=st.sampled_from([0, 0.5, 0.9, 1.0]), gate_layers=st.integers(0, 2), shared=st.booleans(),
       width=st.sampled_from([None, 5, 33, [3, 18, 40, 7]]), bias=st.booleans(),
       activation=st.sampled_from(["relu", "leaky_relu", "tanh", "elu"]), data=st.data())
def test_lstms_are_torchs(I, H, T, kind, share, gate_layers, shared, width, bias, activation, data):  # noqa: E741
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shared = shared and not isinstance(width, list)
    layer = HLSTM(I, H, gate_layers=gate_layers, gate_width=width, shared_hidden=shared, activation=activation,
                  bias=bias, bidirectional=True)
    masks = masked(layer, share)
    x, state = torch.randn(T, I), (torch.randn(2, H), torch.randn(2, H))
    want, (h_n, c_n) = layer(x, state)
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        cell = cells.lstm(numbers(layer), masks, activation=activation, suffix=suffix, kind=kind)
        hs, h, c = cell.run(x.numpy(), *(s[d].numpy() for s in state), reverse=d == 1)
        close(hs, want[:, d * H:(d + 1) * H])
        close(h, h_n[d])
        close(c, c_n[d])


@settings(max_examples=30, deadline=None)
@given(I=st.integers(1, 50), H=st.integers(1, 40), T=st.integers(1, 70), kind=st.sampled_from(KINDS),
       share=st.sampled_from([0, 0.5, 0.9, 1.0]), bias=st.booleans(), data=st.data())
def test_grus_are_torchs(I, H, T, kind, share, bias, data):  # noqa: E741
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    layer = torch.nn.GRU(I, H, bias=bias, bidirectional=True)
    masks = masked(layer, share)
    x, state = torch.randn(T, I), torch.randn(2, H)
    want, h_n = layer(x, state)
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        cell = cells.gru(numbers(layer), masks, suffix=suffix, kind=kind)
        hs, h, c = cell.run(x.numpy(), state[d].numpy(), reverse=d == 1)
        close(hs, want[:, d * H:(d + 1) * H])
        close(h, h_n[d])
        assert c is None


@pytest.mark.parametrize("structure", ["balanced", "block16"])
def test_structured_masks(structure):
    layer = HLSTM(70, 48, gate_width=40)
    masks = masked(layer, 0.8, structure)
    x = torch.randn(9, 70)
    for kind in KINDS:
        close(cells.lstm(numbers(layer), masks, kind=kind).run(x.numpy())[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["lstm", "hlstm", "gru"])
def test_steps_of_a_beam_are_those_of_a_sequence(cell, kind):
    layer = torch.nn.GRU(20, 33) if cell == "gru" else HLSTM(20, 33, gate_layers=int(cell == "hlstm"))
    masks = masked(layer, 0.7)
    made = (cells.gru if cell == "gru" else cells.lstm)(numbers(layer), masks, kind=kind)
    x = np.random.default_rng(0).normal(size=(6, 5, 20)).astype(np.float32)          # T, k, I
    h, c = np.zeros((5, 33), np.float32), None if cell == "gru" else np.zeros((5, 33), np.float32)
    runs = [made.run(x[:, k]) for k in range(5)]
    for t in range(6):
        alone = [made.step(x[t, k:k + 1], h[k:k + 1], None if c is None else c[k:k + 1]) for k in range(5)]
        before = h.copy()
        new, c = made.step(x[t], h, c)
        assert (h == before).all()                                 # what was given stays as it was
        h = new.copy()
        np.testing.assert_allclose(h, np.concatenate([a for a, _ in alone]), atol=1e-6)
        np.testing.assert_allclose(h, np.stack([hs[t] for hs, _, _ in runs]), atol=1e-6)
    if c is not None:
        np.testing.assert_allclose(c, np.stack([last for _, _, last in runs]), atol=1e-6)


def test_two_threads_give_the_same_bits():
    layer = HLSTM(64, 64, bidirectional=True, merge="sum")
    masks, x = masked(layer, 0.9), torch.randn(200, 64)
    ways = [cells.lstm(numbers(layer), masks, suffix=s) for s in ("_l0", "_l0_reverse")]
    alone = cells.both(*ways, x.numpy())
    close(alone, layer(x)[0])
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            assert (cells.both(*ways, x.numpy(), pool) == alone).all()


def test_rounded_values_are_near():
    layer = HLSTM(64, 64)
    masks, x = masked(layer, 0.8), torch.randn(20, 64)
    want = layer(x)[0].detach().numpy()
    errors = {v: np.abs(cells.lstm(numbers(layer), masks, values=v).run(x.numpy())[0] - want).max()
              for v in layouts.VALUES}
    assert errors["fp32"] < 1e-5 < errors["bf16"] < 0.02 and 1e-5 < errors["int8"] < 0.02


def test_large_sums_saturate():
    layer = HLSTM(3, 4, gate_layers=0)
    x = torch.tensor([[1e3, -1e3, 1e3], [1e30, 0, 0], [-1e30, 1e30, 1]])
    close(cells.lstm(numbers(layer)).run(x.numpy())[0], layer(x)[0])


@settings(deadline=None)
@given(st.integers(0, 70), st.sampled_from([0.1, 3.0, 200.0]), st.integers(0, 2**32 - 1))
def test_activations_of_any_width_are_those_of_float64(n, size, seed):
    """Whole vectors and what is left of one: within roundings, nothing written behind the end, NaN handed on."""
    z = np.float32(size) * np.random.default_rng(seed).standard_normal(n + 3).astype(np.float32)
    z[:n // 5] = np.nan
    exact = z[:n].astype(np.float64)
    for bend, want in ((kernels.tanh_, np.tanh(exact)), (kernels.sigmoid_, 0.5 + 0.5 * np.tanh(exact / 2))):
        y = z.copy()
        bend(y, n)
        np.testing.assert_allclose(y[:n], want, rtol=1e-6, atol=1e-6)
        assert np.array_equal(y[n:], z[n:])


def test_no_steps_at_all():
    hs, h, c = cells.lstm(numbers(HLSTM(3, 4))).run(np.zeros((0, 3), np.float32), np.ones(4), np.full(4, 2))
    assert hs.shape == (0, 4) and (h == 1).all() and (c == 2).all()


def test_shapes_that_do_not_fit_are_refused():
    weights = numbers(HLSTM(3, 4))
    with pytest.raises(KeyError, match="weight_hh_l1"):
        cells.lstm(weights, suffix="_l1")
    with pytest.raises(ValueError, match="the last layer, of 4 gates, has rows: 12, not 16"):
        cells.lstm(weights | {"weight_gate1_l0": weights["weight_gate1_l0"][:12], "bias_gate1_l0": np.zeros(12)})
    with pytest.raises(ValueError, match="weight_gate1_l0"):
        cells.lstm(weights | {"weight_gate1_l0": weights["weight_gate1_l0"][:, :3]})


@pytest.mark.parametrize("name, rows, words", [
    ("weight_ih_l0", 512, "W_ih has rows: 512, not"), ("weight_ih_l0", 8, "W_ih has rows: 8, not"),
    ("weight_hh_l0", 8, ": 8, not|not 8"), ("bias_ih_l0", 1, "bias 0 has numbers: 1, not"),
    ("bias_ih_l0", 99, "bias 0 .*: 99, not")])
@pytest.mark.parametrize("module", [HLSTM(3, 4), HLSTM(3, 4, gate_layers=0), nn.GRU(3, 4)])
def test_layers_that_do_not_fit_each_other_are_refused_not_read_past(module, name, rows, words):
    """The compiled loops would write behind their buffers, or read what is not there."""
    weights = numbers(module)
    weights[name] = np.resize(weights[name], (rows, *weights[name].shape[1:]))
    weights.pop("bias_hh_l0", None) if isinstance(module, HLSTM) else None         # is added to bias_ih before
    with pytest.raises(ValueError, match=words):
        (cells.gru if isinstance(module, nn.GRU) else cells.lstm)(weights)


def test_the_weights_of_another_kind_of_cell_are_refused():
    for module, make in ((nn.LSTM(3, 4), cells.gru), (nn.RNN(3, 4), cells.gru), (nn.GRU(3, 4), cells.lstm)):
        with pytest.raises(ValueError, match="the last layer, of . gates, has rows"):
            make(numbers(module))


@pytest.mark.parametrize("module, make", [(HLSTM(3, 4), cells.lstm), (nn.GRU(3, 4), cells.gru)])
def test_a_mask_of_no_weight_is_refused_not_overlooked(module, make):
    with pytest.raises(ValueError, match="masks of weight_ih: there are no such weights, but weight_ih_l0"):
        make(numbers(module), {"weight_ih": np.ones((16, 3), bool)})


OLDER = """
import numpy as np
from hlstm_src.compact import cells, kernels
assert not kernels.cpu_features()
rng = np.random.default_rng(0)
w = {n: rng.normal(size=s).astype(np.float32) / 8 for n, s in
     (("weight_ih_l0", (96, 40)), ("weight_hh_l0", (96, 24)), ("bias_ih_l0", (96,)))}
masks = {n: rng.random(a.shape) < 0.05 for n, a in w.items() if a.ndim == 2}
x = rng.normal(size=(9, 40)).astype(np.float32)
made = {kind: cells.lstm(w, masks, kind=kind) for kind in (None, "dense", "block16", "gather", "sliced", "csr")}
assert "gather" not in {m.kind for m in made[None].matrices}
ys = [cell.run(x)[0] for cell in made.values()]
assert all(np.abs(y - ys[0]).max() < 1e-5 for y in ys) and np.abs(ys[0]).mean() > 0.01
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="pretends to be an older x86")
def test_a_cpu_without_avx512(tmp_path):
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2",
             "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OLDER], env=os.environ | older, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("args, words", [
    (((4, 5),), r"x \(4, 5\): .* 6 wide"), (((6,),), "two dimensions"), (((4, 6), (3,)), "h .*: the state is 8 wide"),
    (((4, 6), (8,), (9,)), "c .*: the state is 8 wide")])
def test_a_sequence_that_does_not_fit_is_refused_not_read_past(args, words):
    with pytest.raises(ValueError, match=words):
        cells.lstm(numbers(HLSTM(6, 8))).run(*(np.zeros(shape, np.float32) for shape in args))


@pytest.mark.parametrize("shapes, words", [
    (((2, 5), (2, 8), (2, 8)), "6 wide"), (((2, 6), (2, 7), (2, 8)), "h .*8 wide"), (((2, 6), (2, 8), (2, 9)), "c .*8"),
    (((9, 6), (1, 8), (1, 8)), "x has 9 rows, h 1, c 1"), (((2, 6), (2, 8), (3, 8)), "h 2, c 3")])
def test_a_step_that_does_not_fit_is_refused_not_read_past(shapes, words):
    with pytest.raises(ValueError, match=words):
        cells.lstm(numbers(HLSTM(6, 8))).step(*(np.zeros(shape, np.float32) for shape in shapes))


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="'gelu': choose one of"):
        cells.lstm(numbers(HLSTM(6, 8)), activation="gelu")
