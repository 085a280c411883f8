"""The compiled element-wise work of a step says what PyTorch's operations say, there and back."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import HLSTM, gates, library, scan
from hlstm_src.lstm import ACTIVATIONS

sizes = st.tuples(st.integers(1, 5), st.integers(1, 40))           # R rows, H hidden
LOWS = [torch.float32, torch.bfloat16]


def drawn(R, H, seed, scale, low):
    """z of two steps (2, R, 4, H) in the type `low`, and c before the first, (R, H)."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, R, 4, H, generator=generator)).to(low), torch.randn(R, H, generator=generator)


def by_torch(z, c):
    """Gates (R, 4, H), c and h (R, H) of one step."""
    i, f, g, o = z.float().unbind(1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return torch.stack([i, f, g, o], 1), c, o * c.tanh()


def run(z, start):
    """Both steps by the compiled function: gates, cs, hs as arrays."""
    R, _, H = z.shape[1:]
    room = np.empty((2, R, 4, H), np.float32), np.empty((2, R, H), np.float32), np.empty((2, R, H), np.float32)
    for t in range(2):
        gates.forward(library.as_array(z[t]), t, start.numpy(), *room, *scan.ALONE)
    return room


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from(LOWS))
def test_a_step_is_that_of_torch(size, seed, scale, low):
    z, c = drawn(*size, seed, scale, low)
    found = run(z, c)
    for t in range(2):
        made, c, h = by_torch(z[t], c)
        for ours, theirs in zip((array[t] for array in found), (made, c, h)):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=4e-7)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from(LOWS), st.integers(0, 1))
def test_the_way_back_is_that_of_autograd(size, seed, scale, low, t):
    z, start = drawn(*size, seed, scale, low)
    made, cs, _ = run(z, start)
    before = start if t == 0 else torch.from_numpy(cs[0])
    into, c = z[t].float().requires_grad_(), before.clone().requires_grad_()
    _, c_after, h = by_torch(into, c)
    dh, dc = torch.randn(2, *before.shape, generator=torch.Generator().manual_seed(seed + 1))
    wanted, wanted_c = torch.autograd.grad((h * dh).sum() + (c_after * dc).sum(), (into, c))
    running, d = dc.clone(), torch.empty(wanted.shape, dtype=low)
    gates.backward(dh.numpy(), running.numpy(), t, start.numpy(), made, cs, library.as_array(d), *scan.ALONE)
    torch.testing.assert_close(running, wanted_c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d.float(), wanted, **({"rtol": 1e-5, "atol": 1e-6} if low == torch.float32 else
                                                     {"rtol": 2 ** -8, "atol": 1e-6}))


def test_bfloat16_is_rounded_as_torch_rounds_it():
    """Gradients of the gate o with h's tanh 1 and o a half are a quarter of dh: all halves of a last place occur."""
    dh = (torch.arange(2 ** 18, dtype=torch.int32) + 0x3f7e0000).view(torch.float32)[None]   # all around 1
    H = dh.shape[1]
    made, cs = np.full((1, 1, 4, H), 0.5, np.float32), np.full((1, 1, H), 80, np.float32)
    d = torch.empty(1, 4, H, dtype=torch.bfloat16)
    zero = np.zeros((1, H), np.float32)
    gates.backward(dh.numpy(), zero.copy(), 0, zero, made, cs, library.as_array(d), *scan.ALONE)
    assert d[0, 3].equal((dh[0] / 4).bfloat16()) and len(d[0, 3].unique()) > 3


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_a_number_that_is_none_is_not_hidden(where):
    z, c = drawn(2, 9, 0, 1.0, torch.float32)
    z[0, 1, where, 4] = torch.nan
    found = run(z, c)
    assert np.isnan(found[2][0, 1, 4]) and np.isnan(found[2]).sum() >= 1 and not np.isnan(found[2][0, 0]).any()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "gate_dropout": 0.3, "gate_layers": 2}], ids=str)
def test_a_layer_without_numba_computes_the_same(monkeypatch, options, low):
    results = []
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, "hlstm_src.gates", None)
            monkeypatch.delattr("hlstm_src.gates")
        torch.manual_seed(0)
        layer, x = HLSTM(6, 10, **options), torch.randn(30, 3, 6, requires_grad=True)
        assert (scan._fused(x, torch.float32) is None) == missing
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = layer(x)[0]
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, **({"rtol": 0.1, "atol": 0.05 * theirs.abs().max().item()} if low
                                                    else {"rtol": 1e-4, "atol": 1e-4}))
    assert not all(ours.equal(theirs) for ours, theirs in zip(*results))     # or it was never called


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_it_is_for_float32_states(dtype):
    assert scan._fused(torch.zeros(2, dtype=dtype), dtype) is None
    assert scan._fused(torch.zeros(2, device="meta"), torch.float32) is None
    assert scan._fused(torch.zeros(2), torch.float16) is None
    assert scan._fused(torch.zeros(2), torch.bfloat16) is gates


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from(LOWS),
       st.sampled_from(gates.ACTIVATIONS))
def test_a_hidden_layer_is_that_of_torch(size, seed, scale, low, activation):
    generator = torch.Generator().manual_seed(seed)
    a, b = ((scale * torch.randn(size, generator=generator)).to(low) for _ in range(2))
    out = torch.empty(size, dtype=low)
    gates.hidden(*map(library.as_array, (a, b, out)), gates.ACTIVATIONS.index(activation), *scan.ALONE)
    wanted = ACTIVATIONS[activation](a.float() + b.float())
    torch.testing.assert_close(out.float(), wanted, **({"rtol": 2e-6, "atol": 4e-7} if low == torch.float32 else
                                                       {"rtol": 2 ** -8, "atol": 1e-6}))


@pytest.mark.parametrize("activation", gates.ACTIVATIONS)
def test_a_number_that_is_none_passes_a_hidden_layer(activation):
    a = torch.tensor([[1.0, float("nan"), -1.0]])
    out = torch.empty(1, 3)
    gates.hidden(a.numpy(), a.numpy(), out.numpy(), gates.ACTIVATIONS.index(activation), *scan.ALONE)
    assert out.isnan().tolist() == [[False, True, False]]
