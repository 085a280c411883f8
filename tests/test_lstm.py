"""The cell: the paper's equations, the readable definition and the fast layer are one and the same."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hlstm_src import HLSTM, ConnectionMasks, HLSTMCell, bench, library, lstm, scan
from hlstm_src.lstm import ACTIVATIONS, CellWeights, step, unroll
from hlstm_src.sequences import flip

SIZES = 3, 4                                # input and state
STEPS, BATCH = 6, 3
LENGTHS = torch.tensor([4, 6, 1])           # unsorted, one of a single step


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(layer: HLSTM, batch: int = BATCH, dtype=torch.float64) -> list[torch.Tensor]:
    """x (T, B, I) and random initial states, all of which ask for gradients."""
    states = layer.num_layers * layer.directions, batch, layer.hidden_size
    shapes = (STEPS, batch, layer.input_size), states, states
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(outputs, wanted) -> list[torch.Tensor]:
    """Of a sum of the outputs in which each entry has its own random weight."""
    generator = torch.Generator().manual_seed(1)
    total = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    return torch.autograd.grad(total, wanted)


def close(ours, theirs, tolerance: float) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# gate_layers=0 is torch.nn.LSTM -----------------------------------------------------------------------------

def twins(dtype=torch.float32, **options) -> tuple[HLSTM, nn.LSTM]:
    theirs = nn.LSTM(*SIZES, **options).to(dtype)
    ours = HLSTM(*SIZES, gate_layers=0, **options).to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


PLAIN = [dict(num_layers=n, bidirectional=d, bias=b, batch_first=f)
         for n, d, b, f in itertools.product((1, 2), (False, True), (True, False), (False, True))]


@pytest.mark.parametrize("options", PLAIN, ids=lambda o: "-".join(str(int(v)) for v in o.values()))
@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
def test_without_hidden_layers_it_is_pytorchs_lstm(options, with_states):
    ours, theirs = twins(**options)
    x, h, c = inputs(ours, dtype=torch.float32)
    given_x = x.transpose(0, 1) if options["batch_first"] else x
    hx = (h, c) if with_states else None
    (y1, s1), (y2, s2) = ours(given_x, hx), theirs(given_x, hx)
    close([y1, *s1], [y2, *s2], 1e-6)
    wanted = [x, h, c] if with_states else [x]
    close(gradients([y1, *s1], [*wanted, *ours.parameters()]),
          gradients([y2, *s2], [*wanted, *theirs.parameters()]), 1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_hidden_layers_gradients_agree_to_the_last_digits(bidirectional):
    ours, theirs = twins(torch.float64, num_layers=2, bidirectional=bidirectional)
    x, h, c = inputs(ours)
    (y1, s1), (y2, s2) = ours(x, (h, c)), theirs(x, (h, c))
    close(gradients([y1, *s1], [x, h, c, *ours.parameters()]),
          gradients([y2, *s2], [x, h, c, *theirs.parameters()]), 1e-12)


@pytest.mark.parametrize("sequence", ["unbatched", "unsorted", "sorted", "sorted for pytorch"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_unbatched_and_packed_sequences_are_as_in_pytorchs_lstm(sequence, bidirectional):
    ours, theirs = twins(num_layers=2, bidirectional=bidirectional)
    x, h, c = (t.detach() for t in inputs(ours, dtype=torch.float32))
    if sequence == "unbatched":
        (y1, s1), (y2, s2) = (m(x[:, 0], (h[:, 0], c[:, 0])) for m in (ours, theirs))
        assert y1.dim() == s1[0].dim() == 2
        return close([y1, *s1], [y2, *s2], 1e-6)
    lengths = LENGTHS if sequence == "unsorted" else LENGTHS.sort(descending=True).values
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sequence == "sorted for pytorch")
    (y1, s1), (y2, s2) = ours(packed, (h, c)), theirs(packed, (h, c))
    close([y1.data, *s1], [y2.data, *s2], 1e-6)
    for part in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(y1, part), getattr(y2, part)
        assert (a is None) == (b is None) and (a is None or a.equal(b))
    # Padded sequences with lengths say the same as packed ones, with or without the states.
    for with_state in (True, False):
        y3, s3 = ours(x, (h, c), lengths=lengths, with_state=with_state)
        close([y3], [pad_packed_sequence(y2)[0]], 1e-6)
        assert s3 is None or close(s3, s2, 1e-6) is None
        assert (s3 is not None) == with_state


@pytest.mark.parametrize("gate_layers", [0, 1])
def test_packed_sequences_of_equal_length_keep_the_order_they_came_in(gate_layers):
    order = torch.tensor([2, 0, 1])                                # of three, two of them equally long
    x, lengths = torch.randn(STEPS, 3, 3), torch.tensor([6, 2, 6])
    packed = pack_padded_sequence(x[:, order], lengths[order])
    packed = packed._replace(sorted_indices=order, unsorted_indices=order.argsort())
    layer = HLSTM(3, 4, gate_layers=gate_layers, bidirectional=True)
    y, states = layer(packed)
    assert y.sorted_indices.equal(order) and y.unsorted_indices.equal(order.argsort())
    wanted, states_wanted = layer(x, lengths=lengths)
    close([y.data, *states], [pack_padded_sequence(wanted[:, order], lengths[order]).data, *states_wanted], 1e-6)


def test_a_gate_width_of_any_whole_number_type_is_one():
    for width in (np.int64(5), [np.int64(5)] * 4):
        layer, same = HLSTM(3, 4, gate_width=width), HLSTM(3, 4, gate_width=5)
        assert [p.shape for p in layer.parameters()] == [p.shape for p in same.parameters()]


# The definition ---------------------------------------------------------------------------------------------

BY_HAND = {"relu": lambda x: x.clamp(min=0), "leaky_relu": lambda x: torch.where(x > 0, x, x / 100),
           "elu": lambda x: torch.where(x > 0, x, x.exp() - 1), "tanh": lambda x: 2 / (1 + (-2 * x).exp()) - 1}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["own stacks", "one stack"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_step_is_the_papers_equations_gate_by_gate(depth, shared, activation):
    (I, H), G, act = SIZES, 5, BY_HAND[activation]                     # noqa: E741
    widths = [I + H, *[G] * depth]

    def stack():
        return [(torch.randn(b, a, dtype=torch.float64), torch.randn(b, dtype=torch.float64))
                for a, b in zip(widths, widths[1:])]
    common = stack()
    hidden = {gate: common if shared else stack() for gate in "ifgo"}
    last = {gate: (torch.randn(H, widths[-1], dtype=torch.float64), torch.randn(H, dtype=torch.float64))
            for gate in "ifgo"}
    x, h, c = (torch.randn(BATCH, n, dtype=torch.float64) for n in (I, H, H))

    def gate(name):
        a = torch.cat([x, h], dim=1)                                   # z = [x_t, h_(t-1)]
        for W, b in hidden[name]:
            a = act(a @ W.T + b)
        W, b = last[name]
        return a @ W.T + b
    c_new = gate("f").sigmoid() * c + gate("i").sigmoid() * gate("g").tanh()
    h_new = gate("o").sigmoid() * c_new.tanh()

    layers = [[*hidden[name], last[name]] for name in "ifgo"]          # PyTorch's order of the gates
    joined = []
    for j in range(depth + 1):
        rows = [layer[j] for layer in (layers[:1] if shared and j < depth else layers)]
        joined.append((torch.cat([W for W, _ in rows]), torch.cat([b for _, b in rows])))
    W, b = joined[0]
    stacks = [(W.chunk(1 if shared else 4), b) for W, b in joined[1:]]
    ours = step(x, h, c, CellWeights(W[:, :I], W[:, I:], b, stacks), activation)
    close(ours, (h_new, c_new), 1e-12)


def real_units(layer: HLSTM, factors):
    """Dropout factors (T or 1, B, S*G) of one direction without those of units that only fill up narrower gates."""
    stacks = factors.chunk(len(layer.widths), 2)
    factors = torch.cat([f[..., :width] for f, width in zip(stacks, layer.widths)], 2)
    return factors if layer.gate_dropout_per == "step" else factors[0]


def by_definition(layer: HLSTM, x, h0, c0, lengths, noises=None):
    """The whole layer by `unroll`, one sequence after another: padded outputs (T, B, .), h_n and c_n."""
    T, B, _ = x.shape
    outputs, hn, cn = [], [], []
    for b, n in enumerate(lengths):
        y = x[:n, b:b + 1]
        for k in range(layer.num_layers):
            ways = []
            for d in range(layer.directions):
                row = k * layer.directions + d
                noise = None
                if noises is not None:
                    noise = [real_units(layer, f[:, b:b + 1].chunk(layer.directions, 2)[d]) for f in noises[k]]
                hs, cs = unroll(y.flip(0) if d else y, h0[row, b:b + 1], c0[row, b:b + 1],
                                layer.weights(k, bool(d)), layer.activation, noise)
                hn.append(hs[-1])
                cn.append(cs[-1])
                ways.append(hs.flip(0) if d else hs)
            y = ways[0] if len(ways) == 1 else sum(ways) if layer.merge == "sum" else torch.cat(ways, dim=2)
        outputs.append(torch.cat([y, y.new_zeros(T - n, 1, y.shape[2])]))
    rows = layer.num_layers * layer.directions
    return torch.cat(outputs, 1), *(torch.cat(s).view(B, rows, -1).transpose(0, 1) for s in (hn, cn))


WAYS = [dict(bidirectional=False), dict(bidirectional=True, merge="concat"), dict(bidirectional=True, merge="sum")]
HIDDEN = [dict(gate_layers=depth, shared_hidden=shared, **way, gate_width=(5, 2, None)[k % 3], bias=k % 4 != 3,
               activation=list(ACTIVATIONS)[k % 4], num_layers=1 + k % 2)
          for k, (depth, shared, way) in enumerate(itertools.product((1, 2, 3), (False, True), WAYS))]
HIDDEN += [dict(gate_layers=1, gate_width=(2, 5, 3, 1)),
           dict(gate_layers=3, gate_width=dict(i=1, f=2, g=4, o=3), bidirectional=True, merge="sum", activation="elu"),
           dict(gate_layers=2, gate_width=[6, 1, 2, 2], bias=False, num_layers=2, gate_dropout_per="step"),
           dict(gate_layers=2, shared_hidden=True, gate_dropout_per="step", bidirectional=True, activation="tanh")]
SCANNED = [dict(gate_layers=0, num_layers=2), dict(gate_layers=0, bias=False, gate_width=(2, 5, 3, 1)),
           dict(gate_layers=0, bidirectional=True, merge="sum")]     # LSTMs, which `scan` runs where they are large


@pytest.mark.parametrize("options", HIDDEN + SCANNED, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("gate_dropout", [0.0, 0.4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:gate_dropout drops units")
def test_the_fast_layer_is_the_readable_definition(options, gate_dropout, padded, monkeypatch):
    monkeypatch.setattr(lstm, "_slow_way_back", lambda *_: True)
    layer = HLSTM(*SIZES, gate_dropout=gate_dropout, **options).double()
    whole = padded == bool(gate_dropout)                               # all 6 steps at once, or 4 and then 2
    monkeypatch.setattr(scan, "STRETCH", (STEPS * BATCH if whole else 4 * BATCH - 1, 0))
    x, h, c = inputs(layer)
    noises = []
    if gate_dropout:                                                   # the layer's own draws, written down
        draw = layer.noise
        monkeypatch.setattr(layer, "noise", lambda *args: noises.append(draw(*args)) or noises[-1])
    y, (hn, cn) = layer(x, (h, c), lengths=LENGTHS if padded else None)
    lengths = LENGTHS.tolist() if padded else [STEPS] * BATCH
    expected = by_definition(layer, x, h, c, lengths, noises or None)
    assert len(noises) == (layer.num_layers if gate_dropout else 0)
    close([y, hn, cn], expected, 1e-12)
    wanted = [x, h, c, *layer.parameters()]
    close(gradients([y, hn, cn], wanted), gradients(expected, wanted), 1e-11)


@pytest.mark.parametrize("options", [
    dict(gate_layers=1, activation="relu", merge="sum"), dict(gate_layers=2, activation="tanh", gate_width=3),
    dict(gate_layers=1, activation="elu", shared_hidden=True),
    dict(gate_layers=2, activation="elu", gate_width=(1, 2, 1, 3)),
    dict(gate_layers=1, activation="leaky_relu", gate_width=1)], ids=lambda o: "-".join(str(v) for v in o.values()))
def test_gradients_are_those_of_finite_differences(options):
    layer = HLSTM(2, 2, bidirectional=True, **options).double()
    x, h, c = (t.detach()[-3:, :2].requires_grad_() for t in inputs(layer, batch=2))
    names, parameters = zip(*layer.named_parameters())

    def run(x, h, c, *parameters):
        y, states = torch.func.functional_call(layer, dict(zip(names, parameters)), (x, (h, c), torch.tensor([2, 3])))
        return y, *states
    assert torch.autograd.gradcheck(run, (x, h, c, *parameters), atol=1e-7, rtol=1e-5)


def test_only_the_last_state_may_be_asked_for():
    layer = HLSTM(*SIZES, num_layers=2, bidirectional=True).double()
    x, h, c = inputs(layer)
    wanted = [x, h, c, *layer.parameters()]
    _, _, cn = by_definition(layer, x, h, c, [STEPS] * BATCH)
    close(torch.autograd.grad(layer(x, (h, c))[1][1].sum(), wanted, materialize_grads=True),
          torch.autograd.grad(cn.sum(), wanted, materialize_grads=True), 1e-11)


def test_without_packed_operators_products_are_the_plain_ones(monkeypatch):
    weight, x = torch.randn(6, 4), torch.randn(5, 8)
    monkeypatch.setattr(library, "PACK_FROM", (0, 0))
    with_them = library.product(weight, 2, 5, 9)(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)         # calling it would fail
    close([library.product(weight, 2, 5, 9)(x)], [with_them], 1e-6)


def test_packed_weights_change_nothing(monkeypatch):
    """From a certain size on, products in float32 and bfloat16 run on packed weights."""
    for packed, k in itertools.product((True, False), range(0, len(HIDDEN), 5)):
        monkeypatch.setattr(library, "PACK_FROM", (0, 0) if packed else (2 ** 62, 0))
        torch.manual_seed(k)
        layer = HLSTM(*SIZES, **HIDDEN[k])
        x, h, c = inputs(layer, dtype=torch.float32)
        y, states = layer(x, (h, c), LENGTHS)
        expected = by_definition(layer, x, h, c, LENGTHS)
        close([y, *states], expected, 1e-5)
        wanted = [x, h, c, *layer.parameters()]
        close(gradients([y, *states], wanted), gradients(expected, wanted), 1e-5)


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 8), st.integers(1, 17), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_products_are_block_by_block(monkeypatch, packed, dtype, within, groups, rows, columns, width, biased):
    monkeypatch.setattr(library, "PACK_FROM", (0, 0) if packed else (2 ** 62, 0))
    weight, bias = torch.randn(groups * width, columns), torch.randn(groups * width)
    x, d = torch.randn(rows, groups * columns), torch.randn(rows, groups * width)
    weight, bias, x, d = (t.to(dtype) for t in (weight, bias, x, d))
    block = torch.block_diag(*weight.double().chunk(groups))
    bias = bias if biased else None
    for ours, theirs in [(library.product(weight, groups, rows, 9, bias)(x),
                          x.double() @ block.T + (bias.double() if biased else 0)),
                         (library.back(weight, groups, rows, 9)(d), d.double() @ block)]:
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= within * (1 + theirs.abs().max())


def test_the_operator_keeps_the_rules_of_custom_operators():
    T, B, D, I, H, G = 4, 2, 2, 4, 3, 5                                # noqa: E741
    def random(*shape):                                                # noqa: E306
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)
    N = D * 4 * G
    args = (random(T, B, D * I), random(B, D * H), random(B, D * H),
            [random(N, I), random(N, H), random(N, G), random(D * 4 * H, G)], [random(N), random(N), random(D * 4 * H)],
            [], 4 * D, "tanh", torch.float64, torch.tensor([T - 1, 1]))
    torch.library.opcheck(scan.scan, args)


def test_second_derivatives_are_refused_not_wrong():
    layer, x = HLSTM(*SIZES).double(), torch.randn(STEPS, BATCH, SIZES[0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x), lambda f, x: torch.func.vjp(f, x),
    lambda f, x: torch.func.vmap(f)(x[None])])
def test_transforms_of_functions_are_refused_not_wrong(transform):
    layer, x = HLSTM(*SIZES), torch.randn(STEPS, BATCH, SIZES[0])
    with pytest.raises(NotImplementedError, match="use unroll"):
        transform(lambda x: layer(x)[0], x)


# Widths of the gates ----------------------------------------------------------------------------------------

def test_each_gate_may_have_its_own_width():
    """Four numbers are those of f, i, o, g; only real units are parameters."""
    layer = HLSTM(3, 4, gate_layers=2, gate_width=(2, 5, 7, 1))
    by_name = HLSTM(3, 4, gate_layers=2, gate_width=dict(f=2, i=5, o=7, g=1))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in by_name.named_parameters()}
    assert shapes == {"weight_ih_l0": (15, 3), "weight_hh_l0": (15, 4), "bias_ih_l0": (15,),
                      "weight_gate1_i_l0": (5, 5), "weight_gate1_f_l0": (2, 2), "weight_gate1_g_l0": (1, 1),
                      "weight_gate1_o_l0": (7, 7), "bias_gate1_l0": (15,),
                      "weight_gate2_i_l0": (4, 5), "weight_gate2_f_l0": (4, 2), "weight_gate2_g_l0": (4, 1),
                      "weight_gate2_o_l0": (4, 7), "bias_gate2_l0": (16,)}
    assert list(HLSTM(3, 4, gate_width=(6, 6, 6, 6)).state_dict()) == list(HLSTM(3, 4).state_dict())


def test_a_wide_gate_is_the_gate_that_was_named():
    """With only the output gate's hidden layer wide, closing that gate alone makes h vanish while c goes on."""
    layer, x = HLSTM(*SIZES, gate_width=dict(f=2, i=2, g=2, o=9)), torch.randn(STEPS, BATCH, SIZES[0])
    c = layer(x)[1][1]
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        c = layer(x)[1][1]
        layer.weight_gate1_o_l0.zero_()
        layer.bias_gate1_l0[-4:] = -200
    y, (_, c_closed) = layer(x)
    assert (y.abs() < 1e-30).all() and c_closed.equal(c) and (c != 0).any()


# Forms of input ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
def test_forms_of_input_are_as_in_pytorchs_lstm_with_hidden_layers_too(bias):
    layer = HLSTM(*SIZES, num_layers=2, bidirectional=True, bias=bias)
    first = HLSTM(*SIZES, num_layers=2, bidirectional=True, bias=bias, batch_first=True)
    first.load_state_dict(layer.state_dict())
    x, h, c = (t.detach() for t in inputs(layer, dtype=torch.float32))
    y, states = layer(x, (h, c))
    y_first, states_first = first(x.transpose(0, 1), (h, c))
    close([y, *states], [y_first.transpose(0, 1), *states_first], 1e-6)
    for model in (layer, first):
        y_one, states_one = model(x[:, 1], (h[:, 1], c[:, 1]))
        close([y[:, 1], *(s[:, 1] for s in states)], [y_one, *states_one], 1e-6)
    y, states = layer(x, (h, c), lengths=LENGTHS)
    for model in (layer, first):
        packed, states_packed = model(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), (h, c))
        close([y, *states], [pad_packed_sequence(packed)[0], *states_packed], 1e-6)
    close([first(x.transpose(0, 1), (h, c), lengths=LENGTHS)[0].transpose(0, 1)], [y], 1e-6)
    close([layer(x, (h, c), lengths=LENGTHS.tolist())[0]], [y], 0)


@pytest.mark.parametrize("gate_layers", [0, 1, 2])
@pytest.mark.parametrize("with_state", [True, False])
def test_padding_changes_nothing_whatever_stands_there(gate_layers, with_state):
    layer = HLSTM(*SIZES, num_layers=2, gate_layers=gate_layers, bidirectional=True, merge="sum").double()
    x, h, c = inputs(layer)

    def run(fill, extra):
        long = torch.cat([x, x.new_zeros(extra, *x.shape[1:])])
        padding = torch.arange(STEPS + extra)[:, None] >= LENGTHS
        y, states = layer(long.masked_fill(padding[..., None], fill), (h, c), LENGTHS, with_state)
        assert (y[padding] == 0).all()
        results = [y[:STEPS], *(states or ())]
        return [*results, *gradients(results, [x, h, c, *layer.parameters()][:None if with_state else 1])]
    expected = run(0, 0)
    assert all(r.isfinite().all() for r in expected)
    for fill, extra in [(1e30, 0), (float("nan"), 0), (-7, 5), (float("inf"), 1)]:
        close(run(fill, extra), expected, 1e-12)


@pytest.mark.parametrize("gate_layers", [0, 1])
def test_outputs_behind_the_end_are_zero_even_where_a_sequence_was_no_number(gate_layers):
    layer = HLSTM(*SIZES, gate_layers=gate_layers, bidirectional=True)
    x = torch.randn(STEPS, len(LENGTHS), SIZES[0])
    x[0] = float("nan")
    y, _ = layer(x, lengths=LENGTHS)
    padding = torch.arange(STEPS)[:, None] >= LENGTHS
    assert padding.any() and (y[padding] == 0).all() and y[~padding].isnan().any()


@pytest.mark.parametrize("gate_layers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_an_input_of_another_type_is_refused_by_name(gate_layers, dtype):
    layer = HLSTM(*SIZES, gate_layers=gate_layers)
    for batch in (2, 0):
        with pytest.raises(ValueError, match=f"input {dtype}: the weights are torch.float32"):
            layer(torch.zeros(STEPS, batch, SIZES[0], dtype=dtype))


@pytest.mark.parametrize("gate_layers", [0, 1, 2])
def test_a_sequence_does_not_know_its_neighbours(gate_layers):
    layer = HLSTM(*SIZES, num_layers=2, gate_layers=gate_layers, bidirectional=True).double()
    x, h, c = inputs(layer)
    y, (hn, cn) = layer(x, (h, c), lengths=LENGTHS)
    order = torch.tensor([2, 0, 1])
    y2, (hn2, cn2) = layer(x[:, order], (h[:, order], c[:, order]), lengths=LENGTHS[order])
    close([y2, hn2, cn2], [y[:, order], hn[:, order], cn[:, order]], 1e-12)
    for b, n in enumerate(LENGTHS):
        alone, (hn3, cn3) = layer(x[:n, b], (h[:, b], c[:, b]))
        close([alone, hn3, cn3], [y[:n, b], hn[:, b], cn[:, b]], 1e-12)
    (to_x,) = torch.autograd.grad(y[:, 0].sum() + hn[:, 0].sum(), x)
    assert (to_x[:LENGTHS[0], 0] != 0).all() and (to_x[:, 1:] == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 7), st.lists(st.integers(1, 3), max_size=2))
def test_flip_reverses_each_sequence_and_undoes_itself(data, steps, rest):
    lengths = data.draw(st.lists(st.integers(1, steps), min_size=1, max_size=4))
    x = torch.arange(steps * len(lengths)).view(steps, -1, *[1] * len(rest)).expand(-1, -1, *rest).clone()
    turned = flip(x, torch.tensor(lengths))
    for b, n in enumerate(lengths):
        column = x[:, b].tolist()
        assert turned[:, b].tolist() == column[:n][::-1] + column[n:]
    assert flip(turned, torch.tensor(lengths)).equal(x)
    assert flip(x, None).equal(flip(x, torch.full((len(lengths),), steps)))


# Dropout, precision, copies ---------------------------------------------------------------------------------

def test_gate_dropout_is_one_draw_a_sequence_and_only_in_training():
    layer = HLSTM(*SIZES, gate_layers=2, gate_width=50, gate_dropout=0.25, bidirectional=True)
    x = torch.randn(STEPS, BATCH, SIZES[0])

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)[0]
    assert run(1).equal(run(1)) and not run(1).equal(run(2))
    factors = layer.noise((1, BATCH, 400), x)
    assert len(factors) == 2 and not factors[0].equal(factors[1])
    share = torch.cat(factors).eq(0).float().mean()
    assert torch.cat(factors).unique().tolist() == [0, pytest.approx(1 / 0.75)] and abs(share - 0.25) < 0.05
    layer.eval()
    plain = HLSTM(*SIZES, gate_layers=2, gate_width=50, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    assert run(1).equal(run(2)) and run(1).equal(plain(x)[0])


def test_gate_dropout_may_be_drawn_anew_at_each_step():
    options = dict(gate_layers=2, gate_width=50, gate_dropout=0.25)
    each, whole = (HLSTM(*SIZES, **options, gate_dropout_per=per) for per in ("step", "sequence"))
    x = torch.randn(STEPS, BATCH, SIZES[0])
    factors = each.noise((STEPS, BATCH, 200), x)
    assert [tuple(f.shape) for f in factors] == [(STEPS, BATCH, 200)] * 2 and not factors[0][0].equal(factors[0][1])
    assert [tuple(f.shape) for f in whole.noise((STEPS, BATCH, 200), x)] == [(1, BATCH, 200)] * 2
    # A constant input and no recurrence: what differs between the steps' outputs is what was dropped.
    for layer, same in ((each, False), (whole, True)):
        layer.load_state_dict({k: torch.zeros_like(v) if k == "weight_hh_l0" else v
                               for k, v in each.state_dict().items()})
        with torch.no_grad():
            layer.bias_gate2_l0[4:8] = -200                            # forget everything: c = i g
        y = layer(x[:1].expand_as(x))[0]
        assert torch.allclose(y[0], y[1], atol=1e-6) == same
        layer.eval()
        assert torch.allclose(*layer(x[:1].expand_as(x))[0][:2], atol=1e-6)


@pytest.mark.parametrize("gate_layers", [0, 1])
def test_dropout_acts_between_layers_only(gate_layers):
    x = torch.randn(STEPS, BATCH, SIZES[0])
    one = HLSTM(*SIZES, gate_layers=gate_layers, dropout=0.5)
    assert one(x)[0].equal(one(x)[0])
    two = HLSTM(*SIZES, 2, gate_layers=gate_layers, dropout=0.5)
    (y1, (h1, _)), (y2, (h2, _)) = two(x), two(x)
    assert not y1.equal(y2) and h1[0].equal(h2[0]) and not h1[1].equal(h2[1])
    two.eval()
    assert two(x)[0].equal(two(x)[0])


@pytest.mark.parametrize("options, within", [
    pytest.param(dict(gate_layers=0), 0.03, marks=pytest.mark.skipif(
        not library.has_bfloat16(), reason="PyTorch's LSTM knows no bfloat16 on this CPU")),
    (dict(gate_layers=1, activation="tanh"), 0.03),
    (dict(gate_layers=2, activation="tanh", gate_dropout=0.2), 0.03), (dict(gate_layers=1), 0.15)],
    ids=["plain", "tanh", "tanh-2-dropout", "relu"])
@pytest.mark.parametrize("large", [False, True])                   # of which a plain LSTM is `scan`'s, too
@pytest.mark.parametrize("padded", [False, True])
def test_bfloat16_is_close_to_float32(options, within, padded, large, monkeypatch):
    """Outputs and states within 0.02, every gradient within 3 % of its norm, over 60 steps.

    With ReLU within 15 %: rounding puts some hidden units on the other side of zero, in `unroll` just as here.
    """
    layer = HLSTM(20, 24, num_layers=2, bidirectional=True, merge="sum", **options)
    x = torch.randn(60, 4, 20, requires_grad=True)
    lengths = torch.tensor([60, 31, 44, 2]) if padded else None
    monkeypatch.setattr(scan, "STRETCH", (80, 80 if padded else 1024))         # 20 steps each
    monkeypatch.setattr(lstm, "APART", 0 if large else lstm.APART)

    def run(enabled):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, states = layer(x, lengths=lengths)
        results = [y, *states]
        return [r.float() for r in results], gradients(results, [x, *layer.parameters()])
    (full, full_gradients), (half, half_gradients) = run(False), run(True)
    assert any(not a.equal(b) for a, b in zip(full, half))             # autocast did do something
    for a, b in zip(half, full):
        assert (a - b).abs().max() < 0.02
    for a, b in zip(half_gradients, full_gradients):
        assert a.dtype == b.dtype and (a - b).norm() < within * b.norm()


def test_under_autocast_the_states_stay_in_float32():
    layer = HLSTM(*SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(torch.randn(STEPS, BATCH, SIZES[0]).bfloat16())
    assert y.dtype == h.dtype == c.dtype == torch.float32


@pytest.mark.parametrize("options", HIDDEN[3:6] + HIDDEN[-2:] + [dict(gate_layers=0, num_layers=2)])
def test_copies_and_state_dicts_give_the_same_layer(options, tmp_path):
    layer = HLSTM(*SIZES, **options)
    x = torch.randn(STEPS, BATCH, SIZES[0])
    y = layer(x)[0]
    y.sum().backward()
    twin, other = copy.deepcopy(layer), HLSTM(*SIZES, **options)
    assert not other(x)[0].equal(y)
    other.load_state_dict(layer.state_dict())
    assert twin(x)[0].equal(y) and other(x)[0].equal(y)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.reset_parameters()
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert other(x)[0].equal(y)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    assert twin(x)[0].equal(y) and not layer(x)[0].equal(y)


@pytest.mark.parametrize("width", [100, 40, 250])
def test_new_hidden_layers_hand_each_unit_on_to_one_gate(width):
    """Without its small random part, an H-LSTM starts with the identity in each gate, wrapped where widths differ."""
    layer = HLSTM(50, 100, gate_layers=2, gate_width=width, bidirectional=True)
    for name, p in layer.named_parameters():
        bound = width ** -0.5 if name.startswith("weight_gate") else 0.1
        ones = torch.zeros_like(p)
        if name.startswith("weight_gate"):
            for block in ones.chunk(4):                            # a stack each
                for k in range(max(block.shape)):
                    block[k % block.shape[0], k % block.shape[1]] = 1
        assert 0.9 * bound < (p - ones).abs().max() <= bound + 1e-6 and abs((p - ones).mean()) < 0.2 * bound
    square = HLSTM(50, 100, activation="tanh")
    assert all((rows - torch.eye(100)).abs().max() <= 0.1 + 1e-6 for rows in square.weight_gate1_l0.chunk(4))


def test_a_sparse_seed_keeps_the_ones_that_an_hlstm_starts_with():
    layer = HLSTM(10, 40, gate_layers=2, gate_width=30)
    large = {name: p > 0.5 for name, p in layer.named_parameters() if name.startswith("weight_gate")}
    masks = ConnectionMasks(layer, "weight_gate*", 0.05, torch.Generator().manual_seed(0)).masks
    assert large.keys() == masks.keys() and all((masks[name] | ~large[name]).all() for name in large)


@pytest.mark.parametrize("options", [PLAIN[2], PLAIN[13], dict(num_layers=2, dropout=0.3)])
def test_pytorchs_lstm_comes_in_and_goes_out(options):
    theirs = nn.LSTM(*SIZES, **options).double().eval()
    ours = HLSTM.from_lstm(theirs)
    again = ours.to_lstm()
    x = torch.randn(STEPS, BATCH, SIZES[0], dtype=torch.float64)
    y, states = theirs(x)
    for other in (ours, again):
        y2, states2 = other(x)
        close([y2, *states2], [y, *states], 1e-12)
    assert type(again) is nn.LSTM and repr(again) == repr(theirs)
    assert not ours.training and again.weight_hh_l0.dtype == torch.float64
    with torch.no_grad():
        theirs.weight_hh_l0.zero_()                                    # copies share nothing
    close([ours(x)[0], again(x)[0]], [y, y], 1e-12)


def test_what_pytorchs_lstm_cannot_be_is_refused():
    for layer in (HLSTM(*SIZES), HLSTM(*SIZES, gate_layers=0, bidirectional=True, merge="sum")):
        with pytest.raises(ValueError, match="gate_layers=0 and merge='concat'"):
            layer.to_lstm()
    with pytest.raises(ValueError, match="proj_size=2"):
        HLSTM.from_lstm(nn.LSTM(*SIZES, proj_size=2))
    with pytest.raises(TypeError, match="GRU: only a torch.nn.LSTM"):
        HLSTM.from_lstm(nn.GRU(*SIZES))


COMPILED = [dict(), dict(gate_layers=2, bidirectional=True, merge="sum", num_layers=2),
            dict(gate_width=(1, 2, 3, 4), bias=False), dict(gate_layers=0, num_layers=2)]


@pytest.mark.parametrize("backend, options", [*[("aot_eager", o) for o in COMPILED], pytest.param(
    "inductor", COMPILED[1], marks=pytest.mark.skipif(not bench.has_compiler(), reason="no C++ compiler"))],
    ids=lambda o: o if isinstance(o, str) else "-".join(str(v) for v in o.values()) or "default")
def test_a_compiled_layer_computes_the_same_in_one_graph(backend, options):
    layer = HLSTM(*SIZES, **options)
    x, h, c = inputs(layer, dtype=torch.float32)
    fast = torch.compile(layer, backend=backend, fullgraph=True)
    wanted = [x, h, c, *layer.parameters()]
    (y, states), (y2, states2) = layer(x, (h, c)), fast(x, (h, c))
    close([y2, *states2], [y, *states], 1e-6)
    close(gradients([y2, *states2], wanted), gradients([y, *states], wanted), 1e-5)


@pytest.mark.parametrize("options", COMPILED, ids=lambda o: "-".join(str(v) for v in o.values()) or "default")
def test_an_exported_layer_computes_the_same_also_for_other_lengths(options, tmp_path):
    layer = HLSTM(*SIZES, **options).eval()
    x, h, c = (t.detach() for t in inputs(layer, dtype=torch.float32))
    dynamic = {0: torch.export.Dim.AUTO} if layer.gate_layers else None      # PyTorch's LSTM is unrolled on export
    program = torch.export.export(layer, (x, (h, c)), dynamic_shapes=dynamic and (dynamic, (None, None)),
                                  strict=False)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for given_x in [x] + ([torch.randn(n * STEPS, *x.shape[1:]) for n in (2, 50)] if dynamic else []):
        (y, states), (y2, states2) = layer(given_x, (h, c)), loaded(given_x, (h, c))       # 50: in several stretches
        close([y2, *states2], [y, *states], 1e-6)


def test_an_exported_layer_takes_other_lengths_of_sequences():
    layer, dynamic = HLSTM(3, 4, bidirectional=True).eval(), {0: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (torch.randn(6, 3, 3), None, torch.tensor([6, 2, 4])),
                                  dynamic_shapes=(dynamic, None, None)).module()
    for steps in (6, 300):
        x, lengths = torch.randn(steps, 3, 3), torch.tensor([steps, 1, steps - 2])
        (y, states), (y2, states2) = layer(x, None, lengths), program(x, None, lengths)
        close([y2, *states2], [y, *states], 1e-6)


def test_dropout_without_hidden_layers_is_warned_of():
    with pytest.warns(UserWarning, match="gate_layers=0"):
        HLSTM(3, 4, gate_layers=0, gate_dropout=0.5)


def test_new_weights_of_a_plain_lstm_are_spread_as_pytorchs():
    bound = 100 ** -0.5
    for p in HLSTM(50, 100, 2, gate_layers=0).parameters():
        assert 0.9 * bound < p.abs().max() <= bound and abs(p.mean()) < 0.2 * bound


# One step at a time -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(gate_layers=0), dict(),
                                     dict(gate_layers=2, gate_width=5, activation="tanh"),
                                     dict(gate_layers=2, shared_hidden=True, bias=False),
                                     dict(gate_width=(1, 2, 3, 4))],
                         ids=lambda o: "-".join(str(v) for v in o.values()) or "default")
def test_stepping_a_cell_is_running_the_layer(options):
    cell = HLSTMCell(*SIZES, **options).double()
    x = torch.randn(STEPS, BATCH, SIZES[0], dtype=torch.float64)
    hs, (hn, cn) = cell.layer(x)
    state = None
    for t in range(STEPS):
        state = cell(x[t], state)
        close([state[0]], [hs[t]], 1e-12)
    close(state, [hn[0], cn[0]], 1e-12)


def test_a_cell_takes_what_pytorchs_cell_takes():
    cell, theirs = HLSTMCell(*SIZES, False, gate_layers=0), nn.LSTMCell(*SIZES, False)
    theirs.load_state_dict({name.removesuffix("_l0"): p for name, p in cell.layer.state_dict().items()})
    x, h, c = torch.randn(SIZES[0]), torch.randn(SIZES[1]), torch.randn(SIZES[1])          # without a batch
    close(cell(x, (h, c)), theirs(x, (h, c)), 1e-6)
    close(cell(x), theirs(x), 1e-6)


def test_a_cell_drops_hidden_units_in_training_only():
    cell, x = HLSTMCell(*SIZES, gate_dropout=0.5), torch.randn(BATCH, SIZES[0])
    assert not cell(x)[0].equal(cell(x)[0])
    cell.eval()
    assert cell(x)[0].equal(cell(x)[0])


# What else torch.nn.LSTM takes -------------------------------------------------------------------------------

@pytest.mark.parametrize("gate_layers", [0, 1])
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch_comes_to_nothing(gate_layers, batch_first):
    layer, theirs = (make(*SIZES, 2, batch_first=batch_first, bidirectional=True) for make in (
        lambda *sizes, **options: HLSTM(*sizes, gate_layers=gate_layers, **options), nn.LSTM))
    x = torch.randn((0, STEPS, 3) if batch_first else (STEPS, 0, 3))
    (y, (h, c)), (wanted, (wanted_h, _)) = layer(x), theirs(x)
    assert y.shape == wanted.shape and h.shape == c.shape == wanted_h.shape
    y.sum().backward()                                             # a process without data learns with the others
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("options", [dict(bidirectional=True), dict(bidirectional=True, shared_hidden=True), {}])
@pytest.mark.parametrize("hidden", [1, 2, 32])
def test_any_width_and_any_layout_of_the_states_will_do(options, hidden):
    """One unit, too; and states that lie otherwise in memory, with gradients."""
    torch.manual_seed(1)
    layer = HLSTM(SIZES[0], hidden, **options)
    states = [torch.randn(layer.directions, hidden, BATCH, requires_grad=True) for _ in range(2)]
    x = torch.randn(STEPS, BATCH, SIZES[0], requires_grad=True)
    wanted = [x, *states, *layer.parameters()]
    found = layer(x, tuple(s.transpose(1, 2) for s in states))
    twin = copy.deepcopy(layer).double()
    doubles = [t.detach().double().requires_grad_() for t in (x, *states)]
    theirs = twin(doubles[0], tuple(s.transpose(1, 2) for s in doubles[1:]))
    close([found[0].double(), found[1][0].double()], [theirs[0], theirs[1][0]], 1e-6)
    close([g.double() for g in gradients([found[0], *found[1]], wanted)],
          gradients([theirs[0], *theirs[1]], [*doubles, *twin.parameters()]), 1e-5)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("gate_layers", [0, 1])
def test_lengths_may_be_whole_numbers_of_any_kind(kind, gate_layers):
    layer, x = HLSTM(*SIZES, gate_layers=gate_layers, bidirectional=True), torch.randn(STEPS, BATCH, SIZES[0])
    found, wanted = layer(x, lengths=LENGTHS.to(kind)), layer(x, lengths=LENGTHS)
    assert found[0].equal(wanted[0]) and found[1][0].equal(wanted[1][0])


def test_states_of_a_layer_before_may_be_bfloat16_under_autocast():
    layer, x, s = HLSTM(*SIZES), torch.randn(STEPS, BATCH, SIZES[0]), torch.randn(1, BATCH, SIZES[1])
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(x, (s.bfloat16(), s.bfloat16()))
    assert y.dtype == h.dtype == c.dtype == torch.float32
    with pytest.raises(ValueError, match="h_0 torch.bfloat16"):
        layer(x, (s.bfloat16(), s.bfloat16()))


def test_type_device_and_what_learns_go_along():
    layer = HLSTM(*SIZES, gate_layers=0, dtype=torch.float64, device="cpu")
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    layer.flatten_parameters()
    layer.bias_hh_l0.requires_grad_(False)
    for twin in (layer.to_lstm(), HLSTM.from_lstm(layer.to_lstm())):
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    text = repr(HLSTM(4, 6, gate_width=8, activation="tanh", shared_hidden=True))
    assert text == "HLSTM(4, 6, gate_layers=1, gate_width=8, activation='tanh', shared_hidden=True)"
    with pytest.raises(TypeError, match="float"):
        HLSTM(4, 6.0)


# Bad arguments ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    (dict(activation="gelu"), "'gelu'.*relu, leaky_relu, tanh, elu"), (dict(merge="mean"), "'mean'.*concat"),
    (dict(gate_layers=-1), "gate_layers"), (dict(gate_width=0), "gate_width"),
    (dict(gate_width=(1, 2, 3)), "order f, i, o, g"),
    (dict(gate_width=dict(f=1, i=2, o=3, c=4)), "order f, i, o, g"), (dict(gate_width=(1, 2, 3, 0)), "at least 1"),
    (dict(gate_width=(1, 2, 3, 4), shared_hidden=True), "shared"), (dict(gate_dropout_per="batch"), "'batch'.*step"),
    (dict(num_layers=0), "num_layers"),
    (dict(dropout=1.1), "dropout"), (dict(gate_dropout=1.0), "gate_dropout"),
    (dict(gate_dropout=-0.1), "gate_dropout")])
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        HLSTM(*SIZES, **options)


def test_sizes_below_one_are_refused():
    for sizes in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            HLSTM(*sizes)


X, S = torch.zeros(STEPS, BATCH, 3), torch.zeros(2, BATCH, 4)


@pytest.mark.parametrize("args, words", [
    ((X[..., :2],), r"\(6, 3, 2\).*input_size=3"), ((X[None],), r"\(1, 6, 3, 3\)"), ((X[0, 0],), r"input \(3,\)"),
    ((X[:0],), r"\(0, 3, 3\)"), ((X[:0, 0],), r"\(0, 3\)"), ((X, S), "a pair"),
    ((X, (S.double(), S)), r"h_0 torch.float64 and c_0 torch.float32"), ((X, (S, S.int())), "c_0 torch.int32"),
    ((pack_padded_sequence(X, [6, 6, 2]), None, torch.tensor([6, 6, 2])), "leave `lengths` out"),
    ((pack_padded_sequence(X[..., :2], [6, 6, 2]),), r"input_size=3"),
    ((X, (S[:1], S)), r"h_0 \(1, 3, 4\).*\(2, 3, 4\)"), ((X, (S, S[:, :2])), r"c_0 \(2, 2, 4\)"),
    ((X[:, 0], (S, S)), r"h_0"),
    ((X, None, torch.tensor([6, 6])), "lengths must be 3 whole numbers from 1 to 6"),
    ((X, None, torch.tensor([6, 7, 1])), "from 1 to 6"), ((X, None, torch.tensor([6, 0, 1])), "from 1 to 6"),
    ((X, None, torch.tensor([6.0, 2.5, 1])), "whole numbers")])
@pytest.mark.parametrize("gate_layers", [0, 1])
def test_shapes_that_do_not_fit_are_refused_by_name(gate_layers, args, words):
    with pytest.raises(ValueError, match=words):
        HLSTM(*SIZES, gate_layers=gate_layers, bidirectional=True)(*args)


def test_a_cell_refuses_what_it_cannot_do():
    for option in (dict(num_layers=2), dict(bidirectional=True), dict(batch_first=True), dict(gate_dropout_per="step")):
        with pytest.raises(ValueError, match=next(iter(option))):
            HLSTMCell(*SIZES, **option)
    cell = HLSTMCell(*SIZES)
    for args in ((X[0, 0, :2],), (X[0, :, :2],), (X[0], (S[0, :2], S[0, :2])), (X[0], (S[0], S[0, :, :3]))):
        with pytest.raises(ValueError, match=r"expected \(B, 3\) and twice \(B, 4\)"):
            cell(*args)


@pytest.mark.parametrize("options", [{}, {"shared_hidden": True}, {"gate_width": (5, 6, 7, 4)}, {"gate_dropout": 0.3},
                                     {"gate_dropout": 0.3, "gate_dropout_per": "step", "gate_layers": 2}], ids=str)
@pytest.mark.parametrize("lengths", [None, [3, 6, 1]])
def test_directions_give_the_same_together_and_one_after_the_other(monkeypatch, options, lengths):
    torch.manual_seed(0)
    layer = HLSTM(5, 6, 2, bidirectional=True, merge="sum", **options).double()
    x, found = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True), []
    states = tuple(torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for apart in (2 ** 60, 0):
        monkeypatch.setattr(lstm, "APART", apart)
        torch.manual_seed(1)
        y, ends = layer(x, states, lengths=None if lengths is None else torch.tensor(lengths))
        loss = sum((s * torch.arange(s.numel()).view_as(s).cos()).sum() for s in (y, *ends))
        found.append((y, *ends, *torch.autograd.grad(loss, [x, *states, *layer.parameters()])))
    for together, alone in zip(*found):
        torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-12)


def test_the_rows_of_a_batch_drop_units_of_their_own():
    cell = HLSTMCell(3, 4, gate_dropout=0.5)
    h, c = cell(torch.randn(1, 3).expand(20, 3))
    assert len(h.unique(dim=0)) > 10
    y = HLSTM(3, 4, gate_dropout=0.5)(torch.randn(1, 1, 3).expand(5, 20, 3))[0]
    assert all(len(step.unique(dim=0)) > 10 for step in y)


def test_the_ones_of_a_new_hidden_layer_come_on_top_of_what_is_drawn():
    square = HLSTM(50, 100).weight_gate1_l0
    diagonal = torch.cat([rows.diagonal() for rows in square.chunk(4)])
    assert (diagonal - 1).abs().max() > 0.09 and len(diagonal.unique()) > 350


@pytest.mark.parametrize("gate_layers", [0, 1])
@pytest.mark.parametrize("with_states", [False, True])
def test_each_sequence_starts_from_its_own_states_and_keeps_them(gate_layers, with_states):
    """Of lengths whose order and the way back from it differ."""
    lengths, x = torch.tensor([2, 6, 4, 1]), torch.randn(6, 4, 3)
    layer = HLSTM(3, 4, gate_layers=gate_layers, bidirectional=True)
    states = tuple(torch.randn(2, 4, 4) for _ in range(2)) if with_states else None
    y, (h, c) = layer(x, states, lengths)
    for b, n in enumerate(lengths.tolist()):
        own = tuple(s[:, b:b + 1] for s in states) if with_states else None
        alone, (last, cell) = layer(x[:n, b:b + 1], own)
        for found, wanted in ((y[:n, b:b + 1], alone), (h[:, b:b + 1], last), (c[:, b:b + 1], cell)):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
