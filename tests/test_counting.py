"""Counts: the paper's derived sizes, sums done by hand, brute force and the counters of others agree."""

from dataclasses import replace

import pytest
import thop
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hlstm_src import HLSTM, ConnectionMasks, HLSTMCell, benchmarks, count, experiments, paper, records
from hlstm_src.counting import output_positions, zero_shares
from hlstm_src.deepspeech2 import DeepSpeech2, MaskedBatchNorm
from hlstm_src.lstm import step, unroll

# Captioner: 512 in, 512 state. Recogniser: 672 from the convolutions, 800 wide, two directions.
SIZES = {
    "neuraltalk.params_lstm_x1": (lambda: HLSTM(512, 512, gate_layers=0), 2_097_152),
    "neuraltalk.params_lstm_x2": (lambda: HLSTM(512, 512, 2, gate_layers=0), 4_194_304),
    "neuraltalk.params_lstm_x3": (lambda: HLSTM(512, 512, 3, gate_layers=0), 6_291_456),
    "neuraltalk.params_hlstm_x1": (lambda: HLSTM(512, 512), 3_145_728),
    "deepspeech2.params_lstm_x4": (lambda: DeepSpeech2(29, "lstm", 4), 40_140_800),
    "deepspeech2.params_lstm_x5": (lambda: DeepSpeech2(29, "lstm", 5), 50_380_800),
    "deepspeech2.params_gru_x4": (lambda: DeepSpeech2(29, "gru", 4), 30_105_600),
    "deepspeech2.params_gru_x5": (lambda: DeepSpeech2(29, "gru", 5), 37_785_600),
    "deepspeech2.params_hlstm_x3": (lambda: DeepSpeech2(29, "hlstm", 3), 45_260_800)}


@pytest.mark.parametrize("name", SIZES)
def test_weights_are_as_many_as_derived_from_the_paper(name):
    make, weights = SIZES[name]
    with torch.device("meta"):                                          # shapes only: no memory, no time
        made = count(make(), include="rnns." if "deepspeech2" in name else "", weights_only=True)
    assert made.params == made.nonzero_params == made.macs == weights and made.flops == 2 * weights
    figure = paper.claim(name)
    assert abs(weights - figure.value) < 0.005 * figure.value and figure.source == "derived"


@pytest.mark.parametrize("benchmark, baseline", [("neuraltalk", "neuraltalk.params_lstm_x3"),
                                                 ("deepspeech2", "deepspeech2.params_lstm_x5")])
def test_the_compact_models_have_the_sizes_that_the_abstract_implies(benchmark, baseline):
    """163 K weights and 277 K FLOPs of the captioner; 2.60 M and 4.29 M of the recogniser."""
    make, _ = SIZES[baseline]
    with torch.device("meta"):
        made = count(make(), include="rnns." if benchmark == "deepspeech2" else "", weights_only=True)
    for what, size in (("params", made.params), ("flops", made.flops)):
        compact = paper.claim(f"{benchmark}.{what}_compact")
        left = size / paper.claim(f"{benchmark}.{what}_fewer").value
        assert paper.short(left) == paper.short(compact.value) and compact.source == "derived"
    # Fewer FLOPs than two for each weight: the paper leaves out products with zero.
    assert made.flops / paper.claim(f"{benchmark}.flops_fewer").value < 2 * compact.value
    assert paper.compute(f"{benchmark}.flops_compact") < 2 * paper.compute(f"{benchmark}.params_compact")


class Net(nn.Module):
    """A bit of everything: look-up, recurrence, convolutions in one and two dimensions, normalisation, output."""

    def __init__(self):
        super().__init__()
        self.words, self.rnn = nn.Embedding(10, 4), HLSTM(4, 3, gate_width=2)
        self.image, self.sound = nn.Conv2d(1, 2, (2, 3), stride=(2, 1)), nn.Conv1d(3, 5, 2, groups=1, bias=False)
        self.norm, self.out = nn.BatchNorm1d(5), nn.Linear(5, 10)

    def forward(self, picture, words):
        self.image(picture)
        return self.out(self.norm(self.sound(self.rnn(self.words(words))[0].permute(1, 2, 0))).mT)


MATRICES = {"words.weight": 40, "rnn.weight_ih_l0": 32, "rnn.weight_hh_l0": 24, "rnn.weight_gate1_l0": 24,
            "image.weight": 12, "sound.weight": 30, "out.weight": 50}
VECTORS = 8 + 12 + 2 + 5 + 5 + 10                                       # biases, and the scale of the norm
POSITIONS = {"image.weight": 2 * 4, "sound.weight": 6, "norm.weight": 6}


def picture_and_words():
    return torch.zeros(1, 1, 5, 6), torch.zeros(7, 1, dtype=torch.long)


def test_a_network_is_counted_as_by_hand():
    made = count(Net(), positions=POSITIONS)
    macs = 32 + 24 + 24 + 12 * 8 + 30 * 6 + 50                          # a look-up multiplies nothing
    params = sum(MATRICES.values()) + VECTORS
    assert (made.params, made.macs, made.flops) == (params, macs, 2 * macs)
    assert (made.nonzero_params, made.nonzero_macs, made.nonzero_flops) == (params, macs, 2 * macs)
    assert made.bytes_dense == made.bytes_sparse == 4 * params
    assert count(Net(), seq_len=9, positions=POSITIONS).macs == 9 * macs
    assert count(Net(), include="rnn.").params == 80 + 20 and count(Net(), include="rnn.").macs == 80
    assert count(Net(), include="rnn.", weights_only=True).params == 80
    assert made.active_macs == macs and made.active_flops == 2 * macs
    # 9 for each unit of the state, one for each hidden one, two for each value of the norm
    assert made.elementwise == (9 * 3 + 8) + 2 * 5 * 6
    outputs = {"words": 4, "rnn": 8 + 6 * 3, "image": 2 * 8, "sound": 5 * 6, "norm": 5 * 6, "out": 10}
    assert {name: layer.activations for name, layer in made.layers.items()} == outputs
    assert made.activations == sum(outputs.values()) and made.activation_bytes == 4 * made.activations
    assert made.record() == {"params": params, "nonzero_params": params, "macs": macs, "nonzero_macs": macs,
                             "flops": 2 * macs, "nonzero_flops": 2 * macs}


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 20), st.integers(0, 999))
def test_only_live_connections_count_as_nonzero(density, steps, seed):
    net = Net()
    masks = ConnectionMasks(net, ("rnn.*", "image*"), density, torch.Generator().manual_seed(seed))
    made = count(net, masks, steps, positions=POSITIONS)
    dense = count(net, None, steps, positions=POSITIONS)
    live = {name: sum(mask.flatten().tolist()) for name, mask in masks.masks.items()}
    gone = sum(MATRICES[name] - n for name, n in live.items())
    gone_macs = steps * sum((MATRICES[name] - n) * POSITIONS.get(name, 1) for name, n in live.items())
    assert (made.params, made.macs, made.flops, made.bytes_dense) == (
        dense.params, dense.macs, dense.flops, dense.bytes_dense)
    assert made.nonzero_params == dense.params - gone and made.nonzero_macs == dense.macs - gone_macs
    assert made.nonzero_flops == 2 * made.nonzero_macs
    assert made.bytes_sparse == dense.bytes_dense - 4 * gone + 4 + 3 + 3 + 2       # a bit for each connection
    assert count(net, masks.masks, steps, positions=POSITIONS) == made
    cell = sum(live.values()) - live["image.weight"]
    assert count(net, masks, weights_only=True, include="rnn.").nonzero_params == cell


def test_convolutions_are_counted_at_every_output_position():
    net = Net().train()
    net.norm.eval()
    mean = net.norm.running_mean.clone()
    assert output_positions(net, *picture_and_words()) == POSITIONS
    assert [name for name, m in net.named_modules() if not m.training] == ["norm"]
    assert net.norm.running_mean.equal(mean)
    twice = nn.Sequential(shared := nn.Conv1d(1, 1, 3), nn.ReLU(), shared)
    assert output_positions(twice, torch.zeros(1, 1, 10)) == {"0.weight": 8 + 6}
    for missing in ("image.weight", "sound.weight"):
        with pytest.raises(ValueError, match=f"{missing}.*positions"):
            count(net, positions={name: n for name, n in POSITIONS.items() if name != missing})


def test_looking_for_positions_leaves_no_trace_even_if_it_fails():
    net = Net().train()
    with pytest.raises(RuntimeError):
        output_positions(net, torch.zeros(1, 1, 1, 1), picture_and_words()[1])
    assert net.training and not net.image._forward_hooks and not net.sound._forward_hooks
    net.eval()
    output_positions(net, *picture_and_words())
    assert not net.training and not net.image._forward_hooks


@pytest.mark.parametrize("make, inputs", [
    (lambda: nn.LSTMCell(7, 5), (1, 7)), (lambda: HLSTMCell(7, 5, gate_layers=0), (1, 7)),
    (lambda: HLSTMCell(7, 5), (1, 7)), (lambda: HLSTMCell(7, 5, gate_layers=3, gate_width=6), (1, 7)),
    (lambda: HLSTMCell(7, 5, gate_layers=2, shared_hidden=True), (1, 7)), (lambda: nn.Linear(7, 5), (1, 7)),
    (lambda: nn.Conv2d(2, 3, (3, 2), stride=2, padding=1), (1, 2, 8, 9)),
    (lambda: nn.Conv1d(4, 6, 3, groups=2), (1, 4, 11))])
def test_pytorchs_own_counter_agrees(make, inputs):
    model, x = make(), torch.zeros(inputs)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert count(model, positions=output_positions(model, x)).flops == counter.get_total_flops() > 0


def test_masks_of_another_model_are_refused():
    net = Net()
    inner = ConnectionMasks(net.rnn, density=0.5)                       # names without "rnn."
    for masks in (inner, inner.masks, {"out.weight": torch.ones(5, 10, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="mask (weight_ih_l0|out.weight) .* fits no parameter"):
            count(net, masks, positions=POSITIONS)


def options(draw) -> dict:
    """Any shape that an HLSTM may have."""
    shared, gate_layers = draw(st.booleans()), draw(st.integers(0, 3))
    width = st.integers(1, 4)
    return {"num_layers": draw(st.integers(1, 3)), "gate_layers": gate_layers, "bias": draw(st.booleans()),
            "gate_width": draw(width if shared else st.one_of(st.none(), width, st.tuples(*[width] * 4))),
            "bidirectional": draw(st.booleans()), "merge": draw(st.sampled_from(["concat", "sum"])),
            "shared_hidden": shared}


class Seen(TorchDispatchMode):
    """How many numbers each operation gave, by its name, and the results of `scan`."""

    def __init__(self):
        super().__init__()
        self.numbers, self.scans = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        if isinstance(out, torch.Tensor):
            self.numbers[name] = self.numbers.get(name, 0) + out.numel()
        if name == "scan":
            self.scans.append(out)
        return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_hidden_layer_lstm_is_counted_as_pytorch_counts_its_definition(data):
    chosen = options(data.draw)
    layer, T = HLSTM(5, 3, **chosen), data.draw(st.integers(1, 4))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for k in range(layer.num_layers):
            x = torch.zeros(T, 1, 5 if k == 0 else layer.output_size)
            for reverse in range(layer.directions):
                unroll(x, torch.zeros(1, 3), torch.zeros(1, 3), layer.weights(k, bool(reverse)))
    made = count(layer, seq_len=T)
    assert made.flops == counter.get_total_flops() and made.params == sum(p.numel() for p in layer.parameters())
    assert len(made.layers) == layer.num_layers
    for name in ("params", "macs", "active_macs", "elementwise", "activations"):
        assert sum(getattr(part, name) for part in made.layers.values()) == getattr(made, name)
    if layer.gate_layers:
        with Seen() as seen, torch.no_grad():
            layer(torch.zeros(T, 1, 5))
        kept = sum(2 * h.numel() + gates.numel() + hidden.numel()      # c is as large as h, and made again
                   for h, _, _, gates, hidden in seen.scans)
        assert made.activations <= kept if layer.uneven else made.activations == kept      # uneven ones are filled up


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_element_wise_operations_are_those_of_the_definition(data):
    """All that `step` does besides matrix products and the additions that join these, which the products cover."""
    layer = HLSTM(5, 3, **options(data.draw) | {"num_layers": 1, "bidirectional": False})
    with Seen() as seen, torch.no_grad():
        step(torch.zeros(1, 5), torch.zeros(1, 3), torch.zeros(1, 3), layer.weights(0))
    operations = sum(seen.numbers.get(name, 0) for name in ("sigmoid", "tanh", "relu", "mul"))
    assert count(layer).elementwise == operations + 3              # and c, a sum of two


@pytest.mark.parametrize("kind, rows, elementwise, values", [("LSTM", 4, 9, 6), ("GRU", 3, 8, 4)])
@pytest.mark.parametrize("layers, both", [(1, False), (2, True), (3, False)])
def test_pytorchs_layers_cost_what_their_cells_cost(kind, rows, elementwise, values, layers, both):
    T, D = 4, 2 if both else 1
    whole = getattr(nn, kind)(7, 5, layers, bidirectional=both)
    cells = [getattr(nn, f"{kind}Cell")(7 if k == 0 else D * 5, 5) for k in range(layers) for _ in range(D)]
    with FlopCounterMode(display=False) as counter:
        for cell in cells:
            for _ in range(T):
                cell(torch.zeros(1, cell.input_size))
    made = count(whole, seq_len=T)
    assert made.flops == counter.get_total_flops() == sum(count(cell, seq_len=T).flops for cell in cells)
    assert made.flops == 2 * T * D * rows * 5 * (7 + 5 + (layers - 1) * (D * 5 + 5))
    assert made.params == sum(p.numel() for cell in cells for p in cell.parameters())
    assert (made.elementwise, made.activations) == (T * D * layers * elementwise * 5, T * D * layers * values * 5)
    assert list(made.layers) == ([f"l{k}" for k in range(layers)] if layers > 1 else [""])
    assert {layer.kind for layer in made.layers.values()} == {kind}


def test_adding_two_directions_is_an_operation_for_each_unit():
    both = {merge: count(HLSTM(5, 3, bidirectional=True, merge=merge), seq_len=4) for merge in ("concat", "sum")}
    assert both["concat"].elementwise == 4 * 2 * (9 * 3 + 4 * 3) == both["sum"].elementwise - 4 * 3
    assert both["concat"].macs == both["sum"].macs and both["concat"].activations == both["sum"].activations


def test_a_gru_step_takes_eight_element_wise_operations_a_unit():
    cell, x, h = nn.GRUCell(7, 5), torch.randn(1, 7), torch.randn(1, 5)
    with torch.no_grad():
        inputs, states = nn.functional.linear(x, cell.weight_ih, cell.bias_ih), h @ cell.weight_hh.T + cell.bias_hh
        (xr, xz, xn), (hr, hz, hn) = inputs.chunk(3, 1), states.chunk(3, 1)
        r, z = xr + hr, xz + hz                                    # joins two products: covered by them
        with Seen() as seen:
            n = (xn + r.sigmoid() * hn).tanh()
            new = n + z.sigmoid() * (h - n)
        torch.testing.assert_close(new, cell(x, h))
    assert sum(seen.numbers.values()) == count(cell).elementwise == 8 * 5


def test_projections_of_an_lstm_are_counted():
    made = count(nn.LSTM(7, 5, proj_size=2))
    assert made.macs == 4 * 5 * (7 + 2) + 2 * 5 and made.activations == 5 * 5 + 2 and made.elementwise == 9 * 5


def test_sequences_are_counted_without_their_padding():
    net = Net()
    masks = ConnectionMasks(net, "rnn.*", 0.5, torch.Generator().manual_seed(0))
    made, single = count(net, masks, (3, 1, 5), positions=POSITIONS), count(net, masks, positions=POSITIONS)
    assert made == count(net, masks, 9, positions=POSITIONS)
    assert made == count(net, masks, torch.tensor([3, 1, 5]), positions=POSITIONS)
    for name in ("macs", "nonzero_macs", "active_macs", "flops", "elementwise", "activations"):
        assert getattr(made, name) == 9 * getattr(single, name)
    for name in ("params", "nonzero_params", "bytes_dense", "bytes_sparse", "mask_bytes"):
        assert getattr(made, name) == getattr(single, name)


def brute_force(layer: HLSTM, masks: dict, sequences: list) -> int:
    """Live connections that multiply something other than zero, one sequence, step and direction at a time; those from
    inputs and states count always."""
    found = 0
    for x in sequences:                                            # (T, I)
        for k in range(layer.num_layers):
            outputs = []
            for reverse in range(layer.directions):
                suffix, w = f"_l{k}" + "_reverse" * reverse, layer.weights(k, bool(reverse))
                h, c, hs = torch.zeros(1, 3), torch.zeros(1, 3), []
                for now in (x.flip(0) if reverse else x)[:, None]:
                    found += sum(int(masks[f"weight_{name}{suffix}"].sum()) for name in ("ih", "hh"))
                    z = nn.functional.linear(now, w.ih, w.bias) + nn.functional.linear(h, w.hh)
                    for j, (blocks, bias) in enumerate(w.gates, 1):
                        stacks, parts = z.relu().split([block.shape[1] for block in blocks], 1), []
                        live = ([masks[f"weight_gate{j}_{gate}{suffix}"] for gate in "ifgo"] if layer.uneven
                                else masks[f"weight_gate{j}{suffix}"].chunk(len(blocks)))
                        for block, stack, mask in zip(blocks, stacks, live, strict=True):
                            found += int((mask & (stack != 0)).sum())
                            parts.append(stack @ block.T)
                        z = torch.cat(parts, 1) + bias
                    h, c = step(now, h, c, w)
                    hs.append(h)
                hs = torch.cat(hs)
                outputs.append(hs.flip(0) if reverse else hs)
            x = sum(outputs) if layer.merge == "sum" else torch.cat(outputs, 1)
    return found


@pytest.mark.parametrize("options", [
    {}, {"gate_layers": 2, "num_layers": 2, "bidirectional": True}, {"shared_hidden": True, "gate_width": 7},
    {"gate_layers": 2, "gate_width": (2, 5, 3, 4), "bidirectional": True, "merge": "sum", "num_layers": 2},
    {"gate_layers": 3, "gate_width": 2, "bidirectional": True, "shared_hidden": True}])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_zero_activations_are_left_out_as_by_brute_force(options, density):
    torch.manual_seed(0)
    layer = HLSTM(5, 3, **options, gate_dropout=0.5).train()
    masks = ConnectionMasks(layer, density=density, generator=torch.Generator().manual_seed(1))
    sequences = [torch.randn(T, 5) for T in (6, 2, 4)]
    with torch.no_grad():
        wanted = brute_force(layer, masks.masks, sequences)
    lengths = torch.tensor([6, 2, 4])
    padded = nn.utils.rnn.pad_sequence(sequences)
    for batches in ([(padded, None, lengths)], [(x[:, None],) for x in sequences], [(x,) for x in sequences],
                    [(pack_sequence(sequences, enforce_sorted=False),)]):
        zeros = zero_shares(layer, batches)
        made = count(layer, masks, (6, 2, 4), zeros=zeros)
        assert made.active_macs == pytest.approx(wanted, abs=1e-6) and made.active_flops == 2 * made.active_macs
        assert replace(made, active_macs=0, layers={}) == replace(count(layer, masks, 12), active_macs=0, layers={})
    assert made.active_macs < made.nonzero_macs and layer.training and not layer._forward_hooks
    assert all(0 <= share.min() and share.max() <= 1 for share in zeros.values())


@pytest.mark.parametrize("width", [3, 256])                           # from there on a direction has a scan of its own
def test_each_layer_and_direction_has_zeros_of_its_own(width):
    torch.manual_seed(0)
    layer, x = HLSTM(5, width, 2, bidirectional=True), torch.randn(4, 2, 5)
    found = zero_shares(layer, [(x,)])
    assert set(found) == {name for name, _ in layer.named_parameters() if name.startswith("weight_gate")}
    assert all(share.shape == (4, width) for share in found.values())
    assert len({tuple(share.flatten().tolist()) for share in found.values()}) == 4
    assert count(layer, zeros=found).active_macs < count(layer).macs


def test_padding_does_not_count_where_lengths_come_by_name():
    class Caller(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.rnn = layer

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)[0]

    layer, x = HLSTM(5, 3), torch.randn(6, 2, 5)
    named = zero_shares(Caller(layer), [(x, torch.tensor([6, 2]))])
    assert named["rnn.weight_gate1_l0"].equal(zero_shares(layer, [(x[:, 0],), (x[:2, 1],)])["weight_gate1_l0"])
    assert zero_shares(layer, [(x, None)])["weight_gate1_l0"].equal(zero_shares(layer, [(x,)])["weight_gate1_l0"])


def test_behind_tanh_nothing_is_zero_and_an_lstm_has_nothing_to_skip():
    layer, x = HLSTM(5, 3, activation="tanh"), torch.randn(4, 2, 5)
    assert count(layer, zeros=zero_shares(layer, [(x,)])).active_macs == count(layer).macs
    for nothing in (nn.Linear(5, 3), HLSTM(5, 3, gate_layers=0)):
        with pytest.raises(ValueError, match="no gate with hidden layers ran"):
            zero_shares(nothing, [(x,)])
    with pytest.raises(ValueError, match="no gate with hidden layers ran"):
        zero_shares(layer, [])
    with pytest.raises(ValueError, match="zeros of rnn.weight_gate1_l0, which is no parameter"):
        count(layer, zeros={"rnn.weight_gate1_l0": torch.zeros(4, 3)})


def test_a_tied_matrix_is_stored_once_and_multiplied_wherever_it_is_used():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    mask = torch.zeros(10, 4, dtype=torch.bool)
    mask[0] = True
    made = count(net, {"0.weight": mask})
    assert (made.params, made.nonzero_params, made.macs, made.nonzero_macs, made.mask_bytes) == (40, 4, 40, 4, 5)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.ones(3, 4)), nn.LayerNorm(4)


def test_what_is_not_known_is_refused_by_name_unless_one_says_how_to_count_it():
    net = nn.Sequential(nn.Linear(4, 4), Scale(), nn.ReLU(), MaskedBatchNorm(4))
    with pytest.raises(ValueError, match=r"1\.w: a Scale is not known.*positions"):
        count(net)
    with pytest.raises(ValueError, match=r"1\.norm\.weight: a LayerNorm is not known"):
        count(net, positions={"1.w": 2})
    with pytest.raises(ValueError, match="in_proj_weight: a MultiheadAttention is not known"):
        count(nn.MultiheadAttention(4, 2))
    made = count(net, positions={"1.w": 2, "1.norm.weight": 1, "1.norm.bias": 0})
    assert made.macs == 16 + 2 * 12 + 4 and made.params == 20 + 12 + 8 + 8
    assert made.layers["3"].elementwise == 8 and made.layers["3"].kind == "MaskedBatchNorm"    # a subclass
    assert count(net, include="0.").macs == 16                     # what is not asked for need not be known


class OfMyOwn(nn.Linear):
    """A subclass that changes nothing."""


def test_the_blind_spots_of_thop():
    """What the chapter says of it."""
    def seen(layer, *x):
        return tuple(map(int, thop.profile(nn.Sequential(layer), x, verbose=False)))
    x, steps = torch.zeros(1, 7), torch.zeros(3, 1, 7)
    linear, conv, lstm = nn.Linear(7, 5), nn.Conv2d(2, 3, (3, 2)), nn.LSTM(7, 5)
    assert seen(linear, x) == (count(linear).macs, count(linear).params) == (35, 40)   # MACs; it calls them FLOPs
    assert seen(conv, torch.zeros(1, 2, 8, 9))[0] == count(conv, positions={"weight": 6 * 8}).macs
    assert seen(OfMyOwn(7, 5), x)[0] == 0 and count(OfMyOwn(7, 5)).macs == 35          # the exact type only
    assert seen(HLSTM(7, 5), steps) == (0, 0)                      # parameters of a module's own
    macs, params = seen(lstm, steps)
    assert params == count(lstm).params == 4 * 5 * (7 + 5 + 2)
    assert thop.profile(lstm, (steps,), verbose=False) == (macs, 0)                    # the same, not in a container
    # It adds 16 of an LSTM's element-wise operations a unit (biases among them, sigmoids not) to its MACs, as one each.
    assert macs == count(lstm, seq_len=3).macs + 3 * 16 * 5
    with torch.no_grad():
        linear.weight.zero_()
    assert seen(linear, x)[0] == 35                                # a zero costs as much as any other weight


def test_the_blind_spots_of_pytorchs_counter():
    x = torch.zeros(3, 1, 7)

    def seen(layer):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        return counter.get_total_flops()
    assert seen(nn.LSTM(7, 5)) == seen(HLSTM(7, 5, gate_layers=0)) == 0
    assert seen(HLSTM(7, 5)) < 0.02 * count(HLSTM(7, 5), seq_len=3).flops        # all but a handful: `scan` is one op
    assert seen(nn.GRU(7, 5)) == count(nn.GRU(7, 5), seq_len=3).flops


@pytest.mark.parametrize("name", ["ds2-lstm5", "ds2-hlstm3-compact"])
def test_kept_records_say_what_is_counted_in_their_models(name):
    kept = [(record, file) for record in records.find("desk", name)
            if (file := records.path_of(name, "desk", record.seed).with_name(record.model.file)).exists()]
    assert kept, "the model of one seed is in the repository"
    for record, file in kept:
        model, masks, _ = experiments.load(file)
        assert experiments.counts(model, masks) == record.model_dump()["counts"]
        frame = benchmarks.Speech.frame(model, masks)
        assert frame.record() == record.counts.model.model_dump()
        bins = 61 * model.stride // 2, 21                          # of the convolutions' outputs, for each frame
        for k, channels in enumerate(m.out_channels for m in model.convolutions):
            convolution, norm = frame.layers[f"convolutions.{k}"], frame.layers[f"norms.{k}"]
            assert convolution.macs == bins[k] * convolution.params and convolution.elementwise == 0
            assert norm.elementwise == 2 * norm.activations == 2 * convolution.activations == 2 * bins[k] * channels


def test_a_plain_recurrent_layer_costs_its_two_matrices():
    for layer in (nn.RNN(7, 5), nn.RNNCell(7, 5)):
        found = count(layer, seq_len=3)
        assert (found.macs, found.params, found.elementwise) == (3 * 5 * (7 + 5), 5 * (7 + 5) + 2 * 5, 3 * 5)
