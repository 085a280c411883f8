"""Compiled steps: products are those of matrices, the layer says what the definition says, rows know nothing of each
other."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import HLSTM, library, lstm
from hlstm_src import scan as scans
from hlstm_src.compact.cells import one_step
from hlstm_src.compact.kernels import product as panels
from hlstm_src.lstm import unroll

steps = pytest.importorskip("hlstm_src.steps")
large = pytest.importorskip("hlstm_src.large")
products, team = steps.products, steps.team
compiled = pytest.importorskip("hlstm_src.compiled")
KINDS = [pytest.param(kind, marks=pytest.mark.skipif(not products.available(kind), reason=f"no {what} on this CPU"))
         for kind, what in ((torch.float32, "AVX2"), (torch.bfloat16, "AVX512-BF16, no AMX"))]


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
    multiplied(library.as_array(x), packed, groups, found)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-4)
    if back and kind == torch.float32:                             # cut as it is needed: the same bits
        cut = np.full(expected.shape, np.nan, np.float32)
        multiplied(library.as_array(x), weight.numpy(), groups, cut)
        assert np.array_equal(cut, found)
    if kind == torch.bfloat16 and products.HAS("avx512bf16"):      # by vectors even where there are tiles
        found[:] = np.nan
        products.by_pairs(library.as_array(x), packed, groups, found, (0, len(x)), 0, 1)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-4)


@compiled.compiled
def multiplied(x, packed, groups, out):
    products.begin(x)
    products.product(x, packed, groups, out, (0, len(x)))
    products.end(x)


# Each kind, and whether tile units make it.
LARGE = [pytest.param(torch.float32, False, marks=KINDS[0].marks),
         pytest.param(torch.bfloat16, False, marks=pytest.mark.skipif(not products.HAS("avx512bf16"),
                                                                      reason="no AVX512-BF16 on this CPU")),
         pytest.param(torch.bfloat16, True, marks=pytest.mark.skipif(not products.TILES, reason="no AMX on this CPU"))]


@pytest.mark.parametrize("kind, tiles", LARGE)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(1, 70),
       st.booleans(), st.booleans(), st.integers(0, 99))
def test_large_products_are_those_of_the_matrices_with_any_threads(kind, tiles, n, batch, groups, wide, columns, biased,
                                                                   more, seed):
    """For any number of rows and of columns: there, back, the weight's gradient, afresh or on top of what is there, and
    the bias's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "TILES", tiles)
        _large_products(kind, n, batch, groups, wide, columns, biased, more, seed)


def _large_products(kind, n, batch, groups, wide, columns, biased, more, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(32 * wide * groups, columns).to(kind), torch.randn(n, batch, groups * columns)
    d, bias = torch.randn(n, batch, len(weight)).to(kind), torch.randn(len(weight)) if biased else None
    block, total, sums = torch.block_diag(*weight.double().chunk(groups)), torch.randn(weight.shape), torch.randn(
        len(weight))
    later, found = large.Later(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        added, rows = total.clone() if more else torch.full_like(total, torch.nan), sums.clone()
        added = added if threads == 1 else added.T.contiguous().T
        later.add_outer(added, d, x, groups, more)
        later.add_rows(rows, d)
        back = torch.full(x.shape, torch.nan)
        later.back(weight, groups)(d, back)
        later.now()
        found.append([large.product(weight, groups, bias)(x.to(kind).flatten(0, 1)), back.flatten(0, 1), added, rows])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    flat, turned = x.to(kind).flatten(0, 1).double(), d.flatten(0, 1).double()
    expected = [flat @ block.T + (0 if bias is None else bias), turned @ block, total * more + torch.cat(
        [rows.T @ part for rows, part in zip(turned.chunk(groups, 1), flat.chunk(groups, 1))]), sums + turned.sum(0)]
    for ours, theirs in zip(found[0], expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


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
@pytest.mark.parametrize("T, B, H, G", [(9, 3, 32, 64), (70, 16, 32, 32), (5, 33, 64, 32), (6, 70, 160, 32)])
@pytest.mark.parametrize("own", [True, False])
def test_the_layer_says_what_the_definition_says(monkeypatch, kind, activation, T, B, H, G, own):
    """To the rounding of its products, and no further from it than the way step by step; whoever makes the large ones.
    """
    torch.manual_seed(T)
    monkeypatch.setattr(large, "WORTH_IT", dict.fromkeys(large.WORTH_IT, own))
    layer, x, low = HLSTM(48, H, gate_width=G, activation=activation), torch.randn(T, B, 48), kind != torch.float32
    begun = []
    monkeypatch.setattr(steps, "forward", lambda *a, real=steps.forward: begun.append(len(a[0])) or real(*a))
    exact, ours = defined(layer, x), ran(layer, x, low=low)
    assert begun == [min(scans._stretch(T, B, kind), T - t) for t in range(0, T, scans._stretch(T, B, kind))]
    monkeypatch.setattr(products, "available", lambda _: False)
    before = ran(layer, x, low=low)
    assert len(begun) == -(-T // scans._stretch(T, B, kind))
    far, was = distance(ours, exact), distance(before, exact)
    assert max(far) < (0.06 if low else 1e-5)
    assert all(a < 1.5 * b + (1e-3 if low else 1e-6) for a, b in zip(far, was))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"shared_hidden": True}, {"gate_layers": 2}])
def test_weights_may_lie_column_by_column(monkeypatch, kind, own, options):
    monkeypatch.setattr(large, "WORTH_IT", dict.fromkeys(large.WORTH_IT, own))
    torch.manual_seed(3)
    layer, x, low = HLSTM(48, 32, activation="tanh", **options), torch.randn(20, 9, 48), kind != torch.float32
    before = ran(layer, x, low=low)
    for name, weight in list(layer.named_parameters()):
        if weight.dim() == 2:
            setattr(layer, name, torch.nn.Parameter(weight.detach().T.contiguous().T))
    assert max(distance(ran(layer, x, low=low), before)) < (0.06 if low else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared_hidden": True}, {"merge": "sum"}])
@pytest.mark.parametrize("batch", [5, 16])
def test_two_directions_unequal_lengths_and_no_biases(monkeypatch, kind, bias, options, batch):
    torch.manual_seed(1)
    layer, low = HLSTM(32, 32, bidirectional=True, bias=bias, activation="tanh", **options), kind != torch.float32
    x, lengths = torch.randn(11, batch, 32), torch.tensor([11, 3, 7, 1, 11] * 4)[:batch]
    ours = ran(layer, x, lengths, low)
    monkeypatch.setattr(products, "available", lambda _: False)
    exact = ran(layer.double(), x.double(), lengths, low=False)
    before = ran(layer.float(), x, lengths, low)
    assert all(a < 1.5 * b + (1e-3 if low else 1e-6) for a, b in zip(distance(ours, exact), distance(before, exact)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, B", [(11, 5), (3, 33), (30, 16)])
@pytest.mark.parametrize("options", [{"gate_dropout_per": "step"}, {"gate_dropout_per": "sequence"},
                                     {"gate_dropout_per": "step", "bidirectional": True, "activation": "relu"},
                                     {"gate_dropout_per": "sequence", "bidirectional": True, "shared_hidden": True}])
def test_dropout_in_the_gates_drops_what_it_does_step_by_step(monkeypatch, kind, options, T, B):
    """Equal factors: near the values of the other way, in single precision and over several stretches, too."""
    torch.manual_seed(5)
    layer = HLSTM(32, 32, **{"activation": "tanh"} | options, gate_dropout=0.4)
    x, low = torch.randn(T, B, 32), kind != torch.float32
    begun, found = [], {}
    monkeypatch.setattr(steps, "forward", lambda *a, real=steps.forward: begun.append(len(a[5])) or real(*a))
    for own, precise in ((True, low), (False, low), (False, False)):
        monkeypatch.setattr(products, "available", lambda _, real=products.available, own=own: own and real(kind))
        torch.manual_seed(6)
        found[own, precise] = ran(layer, x, low=precise)
    assert begun == [1 if options["gate_dropout_per"] == "sequence" else min(scans._stretch(T, B, kind), T - t)
                     for t in range(0, T, scans._stretch(T, B, kind))]
    exact = found[False, False]
    far, was = distance(found[True, low], exact), distance(found[False, low], exact)
    assert max(far) < (0.15 if low else 1e-5)
    assert all(a < 1.5 * b + (1e-2 if low else 1e-6) for a, b in zip(far, was))
    torch.manual_seed(7)
    assert max(distance(ran(layer, x, low=False), exact)) > 0.01                   # other factors, other values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("some", [[0], [4, 2], [17, 3, 20, 8], list(range(19))])
def test_a_row_is_the_same_bits_in_any_batch(kind, some):
    """What comes from x is left out; the matrix library may sum it in another order."""
    torch.manual_seed(2)
    layer, h = HLSTM(32, 32, activation="tanh"), (torch.randn(1, 21, 32), torch.randn(1, 21, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float32):
        whole = layer(torch.zeros(6, 21, 32), h)[0][:, some]
        assert torch.equal(whole, layer(torch.zeros(6, len(some), 32), tuple(s[:, some] for s in h))[0])


def steps_of(layer, x, kind):
    """What the compiled steps fill in, there and back, apart from the matrix library's part: all that `scan` keeps, and
    the gradients of the first states."""
    torch.manual_seed(8)
    h, c = (torch.ones(layer.directions, x.shape[1], layer.hidden_size, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float32), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "product", lambda *a: lambda x: torch.ones(len(x), len(a[0])).to(a[0]))
        forward, backward = steps.forward, steps.backward
        patch.setattr(steps, "forward", lambda *a: (forward(*a), kept.extend(a)))
        patch.setattr(steps, "backward", lambda *a: (backward(*a), kept.extend(a)))
        y, (_, last) = layer(x, (h, c))
        (y.float().sin().sum() + last.cos().sum()).backward()
    arrays = [torch.from_numpy(a.astype(np.int64) if a.dtype == np.uint16 else a) for a in kept
              if isinstance(a, np.ndarray)]
    return [y.detach(), h.grad, c.grad, *arrays]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"shared_hidden": True, "bias": False},
                                     {"gate_dropout": 0.3}])
@pytest.mark.parametrize("batch", [1, 5, 32, 37, 64, 70])
def test_several_threads_make_the_bits_of_one(kind, options, batch):
    torch.manual_seed(4)
    layer = HLSTM(32, 64, gate_width=32, activation="tanh", **options)
    x, alone = torch.randn(7, batch, 32, requires_grad=True), None
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert team.size() == (threads if team.library() else 1)
        found = steps_of(layer, x, kind)
        alone = alone or found
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, B, cuts", [(3, 64, True), (31, 64, True), (32, 64, False), (3, 63, False)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "gate_width": 160}, {"shared_hidden": True}])
def test_a_few_steps_of_many_rows_need_no_packed_matrices_on_the_way_back(monkeypatch, kind, T, B, cuts, options):
    """And have the same bits as with them, for weights that lie otherwise in memory, too."""
    torch.manual_seed(9)
    layer, x = HLSTM(32, 32, activation="tanh", **options), torch.randn(T, B, 32)
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().T.contiguous().T)
    packed, low = [], kind != torch.float32
    monkeypatch.setattr(products, "pack_back", lambda *a, real=products.pack_back: packed.append(a) or real(*a))
    found = ran(layer, x, low=low)
    assert len(packed) == (0 if cuts and not low else 2)
    monkeypatch.setattr(products, "CUT", (10 ** 9, 0))
    assert all(torch.equal(a, b) for a, b in zip(found, ran(layer, x, low=low), strict=True))


@pytest.mark.skipif(not team.library(), reason="no libgomp")
def test_meetings_hold_all_parts_back():
    """Each part writes its turn; behind a meeting nobody may have missed a turn of another."""
    for threads in (2, 4):
        torch.set_num_threads(threads)
        board, seen = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
        team.together(partial(taken, board, seen))
        assert board.tolist() == [200] * threads and not seen.any()


@compiled.compiled
def taken(board, seen, counter, part, parts):
    met = 0
    for turn in range(200):
        board[part] += 1
        met = team.meet(counter, parts, met)
        for other in range(parts):
            seen[part] += board[other] != turn + 1
        met = team.meet(counter, parts, met)


@pytest.mark.skipif(not team.library(), reason="no libgomp")
def test_who_fails_keeps_nobody_waiting():
    torch.set_num_threads(2)

    def work(counter, part, parts):
        if part == parts - 1:
            raise KeyboardInterrupt
        taken(np.zeros(parts, np.int64), np.zeros(parts, np.int64), counter, part, parts)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            team.together(work)


@pytest.mark.skipif(not team.library(), reason="no libgomp")
def test_a_team_has_torchs_threads_up_to_a_limit_and_needs_its_library(monkeypatch):
    torch.set_num_threads(64)
    assert team.size() == team.MOST
    monkeypatch.setattr(team, "library", lambda: None)
    assert team.size() == 1
    monkeypatch.setattr(steps, "forward", lambda *_: pytest.fail("compiled steps were used"))
    ran(HLSTM(32, 32), torch.randn(3, 2, 32), low=False)           # in float32 the matrix library's threads do more


@pytest.mark.skipif(not products.available(torch.bfloat16), reason="no AVX512-BF16, no AMX on this CPU")
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
                                            ((32, 32), {"gate_layers": 2})])
def test_what_does_not_fit_goes_the_other_way(monkeypatch, sizes, options):
    monkeypatch.setattr(steps, "forward", lambda *_: pytest.fail("compiled steps were used"))
    ran(HLSTM(*sizes, **options), torch.randn(3, 2, 32))
    ran(HLSTM(32, 32).double(), torch.randn(3, 2, 32).double(), low=False)


def test_compiled_code_is_kept_until_any_of_its_files_changes():
    """numba's own stamp is of one file; if it renames the place, ours would do nothing."""
    for function in (steps._forward, products.by_tiles, team.meet, one_step, panels, taken):
        own, *others = function._cache._cache_file._source_stamp
        assert own == Path(function.py_func.__code__.co_filename).stat().st_mtime_ns
        assert others == [path.stat().st_mtime_ns for path in compiled.FILES]
    users = {path for path in compiled.FILES[0].parent.rglob("*.py")
             if re.search("@(compiled|intrinsic)", path.read_text())}
    assert users - {path for path in users if path.name.startswith("bench")} == set(compiled.FILES[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"gate_width": 40}, {"gate_layers": 2}, {"gate_layers": 2, "bias": False},
                                     {"gate_layers": 0}, {"bidirectional": True, "gate_layers": 2}])
def test_large_products_serve_steps_that_are_not_compiled_as_well(monkeypatch, kind, options):
    torch.manual_seed(0)
    layer, x, low = HLSTM(48, 32, activation="tanh", **options), torch.randn(50, 9, 48), kind != torch.float32
    monkeypatch.setattr(steps, "forward", lambda *_: pytest.fail("compiled steps were used"))
    if layer.gate_layers == 0:
        monkeypatch.setattr(lstm, "APART", 0)                      # so that a plain LSTM is `scan`'s
    rows, found = [], []
    monkeypatch.setattr(large.Later, "add_outer", lambda self, total, d, *rest, real=large.Later.add_outer: (
        rows.append(d.shape[0] * d.shape[1]), real(self, total, d, *rest)))
    for own in (True, False):
        monkeypatch.setattr(large, "WORTH_IT", dict.fromkeys(large.WORTH_IT, own))
        found.append(ran(layer, x, low=low))
        assert sum(rows) == (50 * 9 * (layer.gate_layers + 2) if low or layer.gate_layers else 0)    # PyTorch's LSTM
    exact = ran(layer.double(), x.double(), low=False)
    ours, theirs = (distance(each, exact) for each in found)
    assert all(a < 1.5 * b + (1e-3 if low else 1e-6) for a, b in zip(ours, theirs))


def test_without_a_folder_that_can_be_written_code_is_compiled_and_not_kept(monkeypatch):
    def refusing(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'twice': no locator available")
        return njit(**options)
    njit = compiled.njit
    monkeypatch.setattr(compiled, "njit", refusing)
    assert compiled.compiled(lambda x: 2 * x)(3) == 6
