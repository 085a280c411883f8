"""Compiled steps: products are those of matrices, the layer says what the definition says, rows know nothing of each
other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import HLSTM
from hlstm_src import scan as scans
from hlstm_src.lstm import unroll

steps = pytest.importorskip("hlstm_src.steps")
products = steps.products
KINDS = [pytest.param(kind, marks=pytest.mark.skipif(not products.available(kind), reason=f"no {what} on this CPU"))
         for kind, what in ((torch.float32, "AVX-512"), (torch.bfloat16, "AMX"))]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ACTIVATIONS = "tanh", "relu", "leaky_relu", "elu"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_product_is_that_of_the_matrices(kind, height, groups, wide, deep, back, seed):
    torch.manual_seed(seed)
    weight = torch.randn(32 * wide * groups, 32 * deep).to(kind)
    blocks = [block.float() for block in weight.chunk(groups)]
    blocks = [block.T for block in blocks] if back else blocks
    x = torch.randn(16 * height, groups * blocks[0].shape[1]).to(kind)
    expected = torch.cat([part.float() @ block.T for part, block in zip(x.chunk(groups, 1), blocks)], 1)
    packed = products.pack_back(weight, groups) if back else products.pack(weight)
    found = np.full(expected.shape, np.nan, np.float32)
    multiplied(scans._numpy(x), packed, groups, found)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-4)


@steps.njit
def multiplied(x, packed, groups, out):
    products.begin(x)
    products.product(x, packed, groups, out)
    products.end(x)


def ran(layer, x, lengths=None, low=True):
    """Output, last states and all gradients of a layer over x (T, B, I), in bfloat16 if `low`."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y, (h, c) = layer(x, lengths=lengths)
    (y.float().sin().sum() + c.cos().sum() + h.sum()).backward()
    return [y.detach(), h.detach(), c.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def defined(layer, x):
    """The same by the definition, in float32, for one direction."""
    x, w = x.clone().requires_grad_(), layer.weights(0)
    layer.zero_grad()
    zeros = x.new_zeros(x.shape[1], layer.hidden_size)
    hs, cs = unroll(x, zeros, zeros, w, layer.activation)
    (hs.sin().sum() + cs[-1].cos().sum() + hs[-1].sum()).backward()
    return [hs.detach(), hs[-1:].detach(), cs[-1:].detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def distance(ours, theirs):
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T, B, H, G", [(9, 3, 32, 64), (70, 16, 32, 32), (5, 33, 64, 32)])
def test_the_layer_says_what_the_definition_says(monkeypatch, kind, activation, T, B, H, G):
    """To the rounding of its products, and no further from it than the way step by step."""
    torch.manual_seed(T)
    layer, x, low = HLSTM(48, H, gate_width=G, activation=activation), torch.randn(T, B, 48), kind != torch.float32
    begun = []
    monkeypatch.setattr(steps, "forward", lambda *a, real=steps.forward: begun.append(a[0]) or real(*a))
    exact, ours = defined(layer, x), ran(layer, x, low=low)
    assert begun == list(range(0, T, scans._stretch(T, B, kind)))
    monkeypatch.setattr(products, "available", lambda _: False)
    before = ran(layer, x, low=low)
    assert len(begun) == -(-T // scans._stretch(T, B, kind))
    far, was = distance(ours, exact), distance(before, exact)
    assert max(far) < (0.06 if low else 1e-5)
    assert all(a < 1.5 * b + (1e-3 if low else 1e-6) for a, b in zip(far, was))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared_hidden": True}, {"merge": "sum"}])
def test_two_directions_unequal_lengths_and_no_biases(monkeypatch, kind, bias, options):
    torch.manual_seed(1)
    layer, low = HLSTM(32, 32, bidirectional=True, bias=bias, activation="tanh", **options), kind != torch.float32
    x, lengths = torch.randn(11, 5, 32), torch.tensor([11, 3, 7, 1, 11])
    ours = ran(layer, x, lengths, low)
    monkeypatch.setattr(products, "available", lambda _: False)
    exact = ran(layer.double(), x.double(), lengths, low=False)
    before = ran(layer.float(), x, lengths, low)
    assert all(a < 1.5 * b + (1e-3 if low else 1e-6) for a, b in zip(distance(ours, exact), distance(before, exact)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some", [[0], [4, 2], [17, 3, 20, 8], list(range(19))])
def test_a_row_is_the_same_bits_in_any_batch(kind, some):
    """What comes from x is left out; the matrix library may sum it in another order."""
    torch.manual_seed(2)
    layer, h = HLSTM(32, 32, activation="tanh"), (torch.randn(1, 21, 32), torch.randn(1, 21, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float32):
        whole = layer(torch.zeros(6, 21, 32), h)[0][:, some]
        assert torch.equal(whole, layer(torch.zeros(6, len(some), 32), tuple(s[:, some] for s in h))[0])


@pytest.mark.skipif(not products.available(torch.bfloat16), reason="no AMX on this CPU")
def test_first_states_and_gradients_of_every_state_count():
    torch.manual_seed(3)
    layer, x = HLSTM(32, 32, activation="tanh"), torch.randn(4, 2, 32)
    h, c = (torch.randn(1, 2, 32, requires_grad=True) for _ in range(2))
    found = []
    for low in (True, False):
        h.grad = c.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y, (_, last) = layer(x, (h, c))
        (y.sin().sum() + last.cos().sum()).backward()
        found.append([y.detach(), h.grad, c.grad])
    assert max(distance(*found)) < 0.03


@pytest.mark.parametrize("sizes, options", [((32, 40), {}), ((32, 32), {"gate_width": 24}),
                                            ((32, 32), {"gate_layers": 2}), ((32, 32), {"gate_dropout": 0.5})])
def test_what_does_not_fit_goes_the_other_way(monkeypatch, sizes, options):
    monkeypatch.setattr(steps, "forward", lambda *_: pytest.fail("compiled steps were used"))
    ran(HLSTM(*sizes, **options), torch.randn(3, 2, 32))
    ran(HLSTM(32, 32).double(), torch.randn(3, 2, 32).double(), low=False)
    torch.set_num_threads(2)
    ran(HLSTM(32, 32), torch.randn(3, 2, 32), low=False)


def test_a_change_in_any_of_its_files_compiles_the_steps_anew():
    """numba's own stamp is of one file; if it renames the place, ours would do nothing."""
    for function in (steps.forward, steps.backward):
        assert function._cache._cache_file._source_stamp == tuple(path.stat().st_mtime_ns for path in steps.SOURCES)
        assert {path.name for path in steps.SOURCES} == {"steps.py", "gates.py", "products.py"}
