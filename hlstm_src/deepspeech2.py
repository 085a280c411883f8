"""DeepSpeech2 (Amodei et al., 2016) in the size that the paper trains on AN4.

Sound -> log spectrogram (161 bins) -> two convolutions -> bidirectional recurrent layers, directions summed, with
batch normalisation between them -> letters, trained with CTC. Lengths travel with the data: no result depends on
padding or on which other utterances share the batch (in training, batch normalisation sees valid frames only).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import BINS, HOP, WINDOW, convolutions
from .lstm import HLSTM
from .sequences import flip


def frames(samples: Tensor | int) -> Tensor | int:
    """Number of whole windows in so many samples; at least one, since shorter sound is padded with silence."""
    count = 1 + (samples - WINDOW) // HOP
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def spectrogram(waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Log magnitude spectrogram, normalised to mean 0 and variance 1 within each utterance.

    waves (B, N) in [-1, 1] at 16 kHz, padded with zeros; lengths (B) in samples -> (B, 161, T), frames (B).
    """
    if waves.shape[1] < WINDOW:
        waves = F.pad(waves, (0, WINDOW - waves.shape[1]))
    window = torch.hann_window(WINDOW, device=waves.device)
    spec = torch.stft(waves, WINDOW, HOP, window=window, center=False, return_complex=True).abs()
    spec, count = (spec * 1000).log1p(), frames(lengths)           # 1000: ordinary speech spans the curve of log1p
    alive = _alive(count, spec.shape[2])[:, None]                  # (B, 1, T)
    size = count[:, None, None] * BINS
    mean = (spec * alive).sum((1, 2), keepdim=True) / size
    variance = ((spec - mean) ** 2 * alive).sum((1, 2), keepdim=True) / size
    return (spec - mean) / (variance + 1e-8).sqrt() * alive, count


def spec_augment(spec: Tensor, lengths: Tensor, time: int, frequency: int, masks: int, generator=None) -> Tensor:
    """Blanks `masks` random bands of up to `frequency` bins and `time` frames (Park et al., 2019). (B, 161, T)."""
    def band(limit: Tensor, widest: int, size: int) -> Tensor:     # (B, size), False inside a random band
        width = (torch.rand(len(limit), generator=generator) * (widest + 1)).floor()
        width = torch.minimum(width, limit // 4)                   # never more than a quarter of a short utterance
        start = (torch.rand(len(limit), generator=generator) * (limit - width + 1)).floor()
        t = torch.arange(size)
        return ~((t >= start[:, None]) & (t < (start + width)[:, None]))
    limits = lengths.cpu()
    for _ in range(masks):
        spec = spec * band(torch.full_like(limits, BINS), frequency, BINS)[:, :, None].to(spec.device)
        spec = spec * band(limits, time, spec.shape[2])[:, None].to(spec.device)
    return spec


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over valid frames only: x (B, T, C) or (B, T, F, C), alive (B, T). Padding becomes zero."""

    def forward(self, x: Tensor, alive: Tensor) -> Tensor:
        y, valid = torch.zeros_like(x, dtype=self.weight.dtype), x[alive].to(self.weight.dtype)
        y[alive] = super().forward(valid.flatten(0, -2)).view_as(valid)
        return y


class GRU(nn.Module):
    """One bidirectional GRU layer, directions summed, with `HLSTM`'s way of handling lengths."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.forth, self.back = nn.GRU(input_size, hidden_size), nn.GRU(input_size, hidden_size)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (T, B, I) -> (T, B, H)."""
        return self.forth(x)[0] + flip(self.back(flip(x, lengths))[0], lengths)


class Recurrent(nn.Module):
    """A recurrent layer with batch normalisation of its input: the block that DeepSpeech2 repeats.

    Dropout comes behind the normalisation; before it, it would change the variance that is learnt for evaluation.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, norm: bool, dropout: float = 0.0, **options):
        super().__init__()
        self.norm, self.dropout = MaskedBatchNorm(input_size) if norm else None, dropout
        if cell == "gru":
            self.rnn = GRU(input_size, hidden_size)
        elif cell in ("lstm", "hlstm"):
            options = options if cell == "hlstm" else {"gate_layers": 0}
            self.rnn = HLSTM(input_size, hidden_size, bidirectional=True, merge="sum", **options)
        else:
            raise ValueError(f"cell {cell!r}: choose lstm, gru or hlstm")

    def forward(self, x: Tensor, lengths: Tensor, alive: Tensor) -> Tensor:
        """x (B, T, I), alive (B, T) -> (B, T, H), zero behind each sequence's end."""
        if self.norm is not None:
            x = F.dropout(self.norm(x, alive), self.dropout, self.training)
        x = x.transpose(0, 1)
        y = self.rnn(x, lengths) if isinstance(self.rnn, GRU) else self.rnn(x, lengths=lengths, with_state=False)[0]
        return y.transpose(0, 1) * alive[..., None]


def bins_left() -> int:
    """Frequencies behind the convolutions, for each channel: 161 -> 61 -> 21."""
    bins = BINS
    for kF, _, sF, _ in convolutions():
        bins = (bins - kF) // sF + 1
    return bins


class DeepSpeech2(nn.Module):
    """The recogniser. The paper: layers=5, hidden=800, cell="lstm"; H-LSTM: layers=3, cell="hlstm".

    Args: labels, blank included; cell lstm | gru | hlstm; layers; hidden; channels of the convolutions; dropout
    between recurrent layers; stride, windows of 10 ms for each frame that the recurrent layers read, 2 (the paper's) or
    4; further options go to each `HLSTM` (gate_layers, gate_width, activation, gate_dropout). Raises ValueError for
    another cell or stride.
    """

    def __init__(self, labels: int, cell: str = "lstm", layers: int = 5, hidden: int = 800, channels: int = 32,
                 dropout: float = 0.0, stride: int = 2, **options):
        super().__init__()
        self.stride = stride
        self.convolutions, self.norms, last = nn.ModuleList(), nn.ModuleList(), 1
        for kF, kT, sF, sT in convolutions(stride):
            self.convolutions.append(nn.Conv2d(last, channels, (kF, kT), (sF, sT), (0, kT // 2), bias=False))
            self.norms.append(MaskedBatchNorm(channels))
            last = channels
        size = bins_left() * channels                              # 21 * 32 = 672 at the paper's size
        self.rnns = nn.ModuleList(Recurrent(cell, size if k == 0 else hidden, hidden, k > 0, dropout, **options)
                                  for k in range(layers))
        self.norm, self.output = MaskedBatchNorm(hidden), nn.Linear(hidden, labels)

    def forward(self, spec: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """spec (B, 161, T), lengths (B) in frames -> log probabilities (B, T', labels), lengths (B); T' = T / stride.

        Frames behind an utterance's end must be zero, as `spectrogram` leaves them.
        """
        x, lengths, alive = self.convolve(spec, lengths)
        return self.letters(self.recur(x, lengths, alive), alive), lengths

    def convolve(self, spec: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first recurrent layer reads: x (B, T', C*F), lengths (B), alive (B, T')."""
        x = spec[:, None]                                          # (B, C, F, T)
        for convolution, norm in zip(self.convolutions, self.norms):
            kT, sT = convolution.kernel_size[1], convolution.stride[1]
            x = convolution(x.contiguous(memory_format=torch.channels_last))         # quickest with C last in memory
            lengths = (lengths + 2 * (kT // 2) - kT) // sT + 1
            alive = _alive(lengths, x.shape[3])
            x = F.hardtanh(norm(x.permute(0, 3, 2, 1), alive), 0, 20).permute(0, 3, 2, 1)
        return x.flatten(1, 2).transpose(1, 2), lengths, alive

    def recur(self, x: Tensor, lengths: Tensor, alive: Tensor) -> Tensor:
        """Through all recurrent layers: (B, T', C*F) -> (B, T', H)."""
        for block in self.rnns:
            x = block(x, lengths, alive)
        return x

    def letters(self, x: Tensor, alive: Tensor) -> Tensor:
        """What the last recurrent layer gives, (B, T', H) -> log probabilities (B, T', labels)."""
        return self.output(self.norm(x, alive)).float().log_softmax(-1)


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC (Graves et al., 2006), mean over the batch of each utterance's loss per letter; label 0 is the blank.

    log_probs (B, T', labels), lengths (B), targets (sum of target_lengths). An utterance too short for its text is
    left out of the loss rather than allowed to make it infinite.
    """
    return F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, zero_infinity=True)


def disagreement(log_probs: Tensor, lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """How much two hearings of each utterance differ (CR-CTC: Yao et al., 2025), averaged as `ctc_loss` is.

    log_probs (2B, T', labels) of B utterances and then of the same ones, blanked elsewhere; lengths (2B) in frames,
    target_lengths (2B) in letters. A hearing is charged, over all its frames and for each letter, the Kullback-Leibler
    divergence to it from the other one, through which no gradient flows: each learns from what the other could hear.
    """
    other = log_probs.detach().roll(len(log_probs) // 2, 0)
    apart = F.kl_div(log_probs, other, reduction="none", log_target=True).sum(2)       # (2B, T')
    apart = apart.where(_alive(lengths, apart.shape[1]), 0.0).sum(1)
    return (apart / target_lengths.clamp(min=1)).mean()


def _alive(lengths: Tensor, size: int) -> Tensor:
    """(B) -> (B, size), True within each length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]
