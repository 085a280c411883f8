"""Counts: the paper's derived sizes, sums done by hand, and PyTorch's own counter agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hlstm_src import HLSTM, ConnectionMasks, HLSTMCell, count, paper
from hlstm_src.counting import convolution_positions
from hlstm_src.deepspeech2 import DeepSpeech2

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
POSITIONS = {"image.weight": 2 * 4, "sound.weight": 6}


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
    assert convolution_positions(net, *picture_and_words()) == POSITIONS
    assert [name for name, m in net.named_modules() if not m.training] == ["norm"]
    assert net.norm.running_mean.equal(mean)
    twice = nn.Sequential(shared := nn.Conv1d(1, 1, 3), nn.ReLU(), shared)
    assert convolution_positions(twice, torch.zeros(1, 1, 10)) == {"0.weight": 8 + 6}
    for missing in POSITIONS:
        with pytest.raises(ValueError, match=f"{missing}.*positions"):
            count(net, positions={name: n for name, n in POSITIONS.items() if name != missing})


def test_looking_for_positions_leaves_no_trace_even_if_it_fails():
    net = Net().train()
    with pytest.raises(RuntimeError):
        convolution_positions(net, torch.zeros(1, 1, 1, 1), picture_and_words()[1])
    assert net.training and not net.image._forward_hooks and not net.sound._forward_hooks
    net.eval()
    convolution_positions(net, *picture_and_words())
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
    assert count(model, positions=convolution_positions(model, x)).flops == counter.get_total_flops() > 0


def test_masks_of_another_model_are_refused():
    net = Net()
    inner = ConnectionMasks(net.rnn, density=0.5)                       # names without "rnn."
    for masks in (inner, inner.masks, {"out.weight": torch.ones(5, 10, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="mask (weight_ih_l0|out.weight) .* fits no parameter"):
            count(net, masks, positions=POSITIONS)
