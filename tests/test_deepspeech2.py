"""DeepSpeech2: the spectrogram by hand, and results that know nothing of padding or of neighbours in the batch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hlstm_src.audio import ALPHABET
from hlstm_src.counting import count
from hlstm_src.deepspeech2 import (
    BINS,
    DeepSpeech2,
    MaskedBatchNorm,
    Recurrent,
    ctc_loss,
    disagreement,
    frames,
    spec_augment,
    spectrogram,
)

CELLS = ("lstm", "gru", "hlstm")
LENGTHS = torch.tensor([61, 40, 23, 8])
GATE_LAYERS = {"gate_layers": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(cell: str, **options) -> DeepSpeech2:
    """A small recogniser whose batch normalisation has seen something."""
    model = DeepSpeech2(5, cell, layers=2, hidden=6, channels=3, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.output.weight.data *= 8                                  # outputs that differ from frame to frame
    return model


def speech(lengths=LENGTHS, extra: int = 0) -> torch.Tensor:
    """Spectrograms (B, 161, T) with `extra` frames of padding behind the longest."""
    spec = torch.zeros(len(lengths), BINS, int(lengths.max()) + extra)
    for row, length in zip(spec, lengths):
        row[:, :length] = torch.randn(BINS, int(length), generator=torch.Generator().manual_seed(int(length)))
    return spec


# The spectrogram

def by_hand(wave: np.ndarray) -> np.ndarray:
    """20 ms Hann windows each 10 ms at 16 kHz, magnitudes of their Fourier transforms, log, normalised."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
    starts = range(0, len(wave) - 320 + 1, 160)
    spec = np.log1p(1000 * np.stack([np.abs(np.fft.rfft(wave[s:s + 320] * window)) for s in starts], axis=1))
    return (spec - spec.mean()) / spec.std()


@pytest.mark.parametrize("samples", [320, 479, 480, 5000, 16_000])
def test_the_spectrogram_is_the_one_computed_by_hand(samples):
    wave = 0.1 * torch.randn(samples)
    spec, lengths = spectrogram(wave[None], torch.tensor([samples]))
    expected = by_hand(wave.double().numpy())
    assert spec.shape == (1, 161, 1 + (samples - 320) // 160) and lengths.tolist() == [expected.shape[1]]
    assert frames(samples) == expected.shape[1]
    np.testing.assert_allclose(spec[0], expected, atol=1e-3)


def test_each_utterance_has_mean_0_and_variance_1_and_padding_is_zero():
    lengths = torch.tensor([8000, 3000, 500])
    waves = torch.zeros(3, 9000)
    for k, n in enumerate(lengths):
        waves[k, :n] = torch.randn(n) * 10.0 ** -k
    spec, count_ = spectrogram(waves, lengths)
    for row, n in zip(spec, count_):
        assert abs(row[:, :n].mean()) < 1e-5 and abs(row[:, :n].var(correction=0) - 1) < 1e-4
        assert (row[:, n:] == 0).all()


@pytest.mark.parametrize("sizes, extra", [
    ([4000, 320, 1], 0), ([319, 3000, 481], 1), ([1, 2], 200), ([1600], 1999), ([479, 480, 640, 639], 160)])
def test_the_spectrogram_knows_nothing_of_padding_and_neighbours(sizes, extra):
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    padded = torch.zeros(len(sizes), max(sizes) + extra)
    for row, wave in zip(padded, waves):
        row[:len(wave)] = wave
    together, lengths = spectrogram(padded, torch.tensor(sizes))
    for row, n, wave in zip(together, lengths, waves):
        alone, m = spectrogram(wave[None], torch.tensor([len(wave)]))
        assert n == m[0] == alone.shape[2]
        torch.testing.assert_close(row[:, :n], alone[0], atol=1e-4, rtol=1e-4)


def test_sound_shorter_than_a_window_is_one_frame_padded_with_silence():
    wave = torch.randn(100)
    spec, lengths = spectrogram(wave[None], torch.tensor([100]))
    assert spec.shape == (1, 161, 1) and lengths.tolist() == [1] and frames(100) == 1
    np.testing.assert_allclose(spec[0], by_hand(np.pad(wave.double().numpy(), (0, 220))), atol=1e-3)


def test_silence_is_not_a_number_to_divide_by():
    assert (spectrogram(torch.zeros(1, 2000), torch.tensor([2000]))[0] == 0).all()


# Masking for augmentation

def is_band(blank: torch.Tensor) -> bool:
    """Whether the True entries lie side by side."""
    return int(blank.sum()) == 0 or blank.nonzero().squeeze(1).diff().eq(1).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 60), st.integers(0, 60),
       st.integers(0, 2**31))
def test_augmentation_blanks_one_band_each_way_and_no_more_than_a_quarter(sizes, time, frequency, seed):
    lengths = torch.tensor(sizes)
    spec = speech(lengths) + (speech(lengths) == 0)                # nowhere zero
    blanked = spec_augment(spec, lengths, time, frequency, 1, torch.Generator().manual_seed(seed))
    again = spec_augment(spec, lengths, time, frequency, 1, torch.Generator().manual_seed(seed))
    assert torch.equal(blanked, again)
    for before, after, length in zip(spec, blanked, lengths):
        gone = after == 0
        rows, columns = gone.all(1), gone.all(0)
        assert torch.equal(gone, rows[:, None] | columns), "something outside two bands was blanked"
        assert torch.equal(after[~gone], before[~gone])
        assert is_band(rows) and rows.sum() <= min(frequency, BINS // 4)
        assert is_band(columns) and columns.sum() <= min(time, length // 4) and not columns[length:].any()


def test_augmentation_does_blank_and_follows_the_global_seed():
    spec, lengths = torch.ones(8, BINS, 100), torch.full((8,), 100)
    torch.manual_seed(3)
    first = spec_augment(spec, lengths, 20, 20, 2)
    torch.manual_seed(3)
    assert torch.equal(first, spec_augment(spec, lengths, 20, 20, 2))
    assert not torch.equal(first, spec_augment(spec, lengths, 20, 20, 2))
    blank = first == 0
    assert blank.all(1).any() and blank.all(2).any(), "no band in time, or none in frequency"
    assert torch.equal(spec_augment(spec, lengths, 20, 20, 0), spec)


# Batch normalisation

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.booleans(), st.booleans())
def test_masked_batch_norm_is_batch_norm_of_the_valid_rows(sizes, bands, training):
    lengths, shape = torch.tensor(sizes), (len(sizes), max(sizes) + 2) + ((4, 3) if bands else (3,))
    alive = torch.arange(shape[1]) < lengths[:, None]
    ours, theirs = MaskedBatchNorm(3).train(training), nn.BatchNorm1d(3).train(training)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, 0.5)
        norm.running_mean.fill_(0.25)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(sizes))).requires_grad_()
    rows = x.detach()[alive].requires_grad_()
    y, z = ours(x, alive), theirs(rows.transpose(1, -1)).transpose(1, -1)             # theirs has channels first
    assert (y[~alive] == 0).all()
    y.square().sum().backward()
    z.square().sum().backward()
    assert (x.grad[~alive] == 0).all()
    for a, b in ((y[alive], z), (x.grad[alive], rows.grad), (ours.weight.grad, theirs.weight.grad),
                 (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)):
        torch.testing.assert_close(a, b)


# The network

@pytest.mark.parametrize("cell, stride", [(cell, 2) for cell in CELLS] + [("lstm", 4)])
def test_an_utterance_is_heard_the_same_alone_padded_and_in_any_batch(cell, stride):
    model = small(cell, dropout=0.5, stride=stride, **({"gate_dropout": 0.5} if cell == "hlstm" else {})).eval()
    spec = speech(extra=17)
    with torch.no_grad():
        together, lengths = model(spec, LENGTHS)
        turned, _ = model(spec.flip(0), LENGTHS.flip(0))
        assert lengths.tolist() == [math.ceil(n / stride) for n in LENGTHS]
        torch.testing.assert_close(together.exp().sum(-1), torch.ones(together.shape[:2]))
        for k, (n, m) in enumerate(zip(LENGTHS, lengths)):
            alone, lone_length = model(spec[k:k + 1, :, :n], LENGTHS[k:k + 1])
            assert lone_length[0] == m == alone.shape[1]
            torch.testing.assert_close(together[k, :m], alone[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(turned[len(LENGTHS) - 1 - k, :m], alone[0], atol=1e-5, rtol=0)
            assert alone.std(1).mean() > 0.05, "the outputs say nothing, so their equality does not either"


@pytest.mark.parametrize("cell", CELLS)
def test_training_knows_nothing_of_the_amount_of_padding(cell):
    model, results = small(cell).double(), []                      # double, to see past rounding
    for extra in (0, 1, 30):
        trained = copy.deepcopy(model).train()
        loss = ctc_loss(*trained(speech(extra=extra).double(), LENGTHS), torch.tensor([1, 2, 3, 3, 1, 4, 2]),
                        torch.tensor([3, 2, 1, 1]))
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in trained.named_parameters()}
                       | dict(trained.named_buffers()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_reach_every_parameter(cell):
    model = small(cell, **(GATE_LAYERS if cell == "hlstm" else {})).train()
    ctc_loss(*model(speech(), LENGTHS), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 1, 1, 1])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # A bias in front of batch normalisation has no part in the result; there is none here.
    assert not without


def test_both_directions_are_summed_and_both_are_heard():
    model = small("lstm").eval()
    spec, lengths = speech(torch.tensor([40])), torch.tensor([40])
    with torch.no_grad():
        whole = model(spec, lengths)[0][0]
        for name, p in model.rnns.named_parameters():
            if name.endswith("_reverse"):
                p.zero_()
        forward_only = model(spec, lengths)[0][0]
        late = spec.clone()
        late[:, :, 30:] = 0
        changed = (model(late, lengths)[0][0] - forward_only).abs().amax(1)
    assert not torch.allclose(whole, forward_only)
    assert changed[:8].max() == 0 and changed[15:].max() > 0, "without the way back, the past hears the future"


@pytest.mark.parametrize("cell, layers, millions", [
    ("lstm", 5, 50.4), ("lstm", 4, 40.1), ("gru", 5, 37.8), ("gru", 4, 30.1), ("hlstm", 3, 45.3)])
def test_recurrent_weights_are_those_derived_from_the_paper(cell, layers, millions):
    with torch.device("meta"):
        model = DeepSpeech2(29, cell, layers, 800, 32)
    inputs = [672] + [800] * (layers - 1)
    each = {"lstm": lambda n: 4 * 800 * (n + 800), "gru": lambda n: 3 * 800 * (n + 800),
            "hlstm": lambda n: 4 * 800 * (n + 800) + 4 * 800 * 800}[cell]
    counted = count(model, include="rnns.", weights_only=True).params
    assert counted == 2 * sum(map(each, inputs))
    assert round(counted / 1e6, 1) == millions


def test_an_unknown_cell_or_stride_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'rnn': choose lstm, gru or hlstm"):
        DeepSpeech2(5, "rnn", 1, 4, 2)
    with pytest.raises(ValueError, match="stride 3: choose 2 or 4"):
        DeepSpeech2(5, "lstm", 1, 4, 2, stride=3)


# CTC

def enumerated(probs: np.ndarray, target: list[int]) -> float:
    """-log of the sum over all paths (T', labels) that read as `target` once repeats and blanks are gone."""
    total = 0.0
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        if [k for k, _ in itertools.groupby(path) if k != 0] == target:
            total += math.prod(probs[t, k] for t, k in enumerate(path))
    return -math.log(total)


def test_the_loss_is_the_sum_over_all_alignments():
    log_probs = torch.randn(3, 6, 3).log_softmax(-1)
    lengths, targets = [6, 4, 3], [[1, 2, 2], [1], [2, 2]]
    loss = ctc_loss(log_probs, torch.tensor(lengths), torch.tensor(sum(targets, [])),
                    torch.tensor([len(t) for t in targets]))
    expected = [enumerated(p[:n].exp().double().numpy(), t) / len(t) for p, n, t in zip(log_probs, lengths, targets)]
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_an_utterance_too_short_for_its_text_costs_nothing():
    scores = torch.randn(2, 4, 3, requires_grad=True)
    loss = ctc_loss(scores.log_softmax(-1), torch.tensor([4, 2]), torch.tensor([1, 2, 2]), torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite() and (scores.grad[1] == 0).all() and scores.grad[0].abs().max() > 0


def test_two_hearings_cost_what_each_lacks_of_the_other():
    """The divergence by its definition, frame by frame; padding counts nothing, and the other one stands still."""
    scores = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    frames, letters = torch.tensor([6, 4, 6, 4]), torch.tensor([2, 0, 2, 0])
    log_probs = scores.log_softmax(-1)
    loss = disagreement(log_probs, frames, letters)
    fixed, p, expected = log_probs.detach(), log_probs.detach().exp(), 0.0
    for own, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        for t in range(int(frames[own])):
            expected += sum(float(p[other, t, k] * (fixed[other, t, k] - fixed[own, t, k]))
                            for k in range(3)) / max(1, int(letters[own])) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    slope = (p - p.roll(2, 0)) / letters.clamp(min=1)[:, None, None] / 4      # of a cross-entropy to the other
    slope[1, 4:], slope[3, 4:] = 0, 0
    torch.testing.assert_close(scores.grad, slope)
    same = torch.randn(2, 6, 3).log_softmax(-1)
    assert disagreement(same.repeat(2, 1, 1), frames, letters) == 0


def test_dropout_comes_behind_the_normalisation_and_changes_no_mean_that_is_learnt():
    block = Recurrent("lstm", 6, 4, norm=True, dropout=0.5).train()
    x = torch.randn(8, 50, 6) + 3
    block(x, torch.full((8,), 50), torch.ones(8, 50, dtype=torch.bool))
    torch.testing.assert_close(block.norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(block.norm.running_var, 0.9 + 0.1 * x.flatten(0, 1).var(0))


def test_bands_are_as_wide_as_asked_for_and_lie_anywhere():
    spec, lengths = torch.ones(2000, BINS, 40), torch.full((2000,), 40)
    blank = spec_augment(spec, lengths, 3, 4, 1, torch.Generator().manual_seed(0)) == 0
    rows, columns = blank.all(2), blank.all(1)
    assert rows.sum(1).unique().tolist() == [0, 1, 2, 3, 4] and columns.sum(1).unique().tolist() == [0, 1, 2, 3]
    assert rows.any(0).all() and columns.any(0).all()              # to the first and the last one


def test_convolutions_give_nothing_below_0_and_nothing_above_20():
    model = DeepSpeech2(len(ALPHABET), "lstm", 1, 8, 2).eval()
    for norm in model.norms:
        norm.weight.data *= 1000
    x, _, _ = model.convolve(torch.randn(1, BINS, 60), torch.tensor([60]))
    assert x.min() == 0 and x.max() == 20


@pytest.mark.parametrize("cell", ["lstm", "gru", "hlstm"])
def test_a_recurrent_block_is_silent_behind_the_end(cell):
    lengths = torch.tensor([5, 9])
    alive = torch.arange(9) < lengths[:, None]
    y = Recurrent(cell, 6, 4, norm=True)(torch.randn(2, 9, 6), lengths, alive)
    assert (y[~alive] == 0).all() and (y[alive] != 0).all()
