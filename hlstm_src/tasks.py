"""What training asks of a benchmark: batches, a loss, and a score. The loop knows nothing else of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import corpora, scores
from .corpora import SpeechCorpus, Utterance
from .deepspeech2 import ctc_loss, spec_augment, spectrogram

SPEEDS = (0.9, 1.0, 1.1)       # each utterance is played at one of these (Ko et al., 2015)


class SpeechTask:
    """Speech recognition on a corpus: CTC training with light augmentation, WER on the validation speakers.

    `loss` draws all its randomness from torch's global generator, which the training loop seeds at each step.
    """
    metric, lower_is_better = "wer", True

    def __init__(self, corpus: SpeechCorpus, batch: int = 16, limit: int | None = None, seed: int = 0,
                 augment: bool = True, time_mask: int = 15, frequency_mask: int = 15, masks: int = 1):
        self.corpus, self.batch, self.limit, self.seed, self.augment = corpus, batch, limit, seed, augment
        self.bands = time_mask, frequency_mask, masks
        self.train = corpus.split("train", limit=limit)
        self.valid = corpus.split("valid", limit=limit)
        self._waves: dict[str, Tensor] = {}

    def wave(self, u: Utterance) -> Tensor:
        """Samples of an utterance, (N), read once."""
        if u.id not in self._waves:
            self._waves[u.id] = self.corpus.audio(u)
        return self._waves[u.id]

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices into `train`, in batches of similar length; the order depends on seed and epoch alone."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return corpora.length_batches([u.seconds for u in self.train], self.batch, generator)

    def loss(self, model: nn.Module, indices: list[int], device: torch.device) -> Tensor:
        """CTC loss of a training batch."""
        chosen = [self.train[k] for k in indices]
        waves = [self.wave(u) for u in chosen]
        if self.augment:
            waves = [_played(w, SPEEDS[int(torch.randint(len(SPEEDS), ()))]) for w in waves]
        batch = corpora.collate(waves, [u.transcript for u in chosen]).to(device)
        spec, lengths = spectrogram(batch.waves, batch.lengths)
        if self.augment:
            spec = spec_augment(spec, lengths, *self.bands)
        return ctc_loss(*model(spec, lengths), batch.targets, batch.target_lengths)

    @torch.no_grad()
    def transcribe(self, model: nn.Module, utterances: list[Utterance], device: torch.device) -> list[str]:
        """Greedy transcripts, in the order given."""
        model.eval()
        texts = [""] * len(utterances)
        for indices in corpora.length_batches([u.seconds for u in utterances], self.batch):
            batch = corpora.collate([self.wave(utterances[k]) for k in indices],
                                    [utterances[k].transcript for k in indices]).to(device)
            for k, text in zip(indices, scores.greedy(*model(*spectrogram(batch.waves, batch.lengths)))):
                texts[k] = text
        return texts

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation WER and CER in percent."""
        rates = scores.error_rates([u.transcript for u in self.valid], self.transcribe(model, self.valid, device))
        return {name: rates[name] for name in ("wer", "cer")}


def _played(wave: Tensor, speed: float) -> Tensor:
    """wave (N) at another speed, pitch included: (N / speed)."""
    if speed == 1:
        return wave
    return F.interpolate(wave[None, None], size=int(len(wave) / speed), mode="linear", align_corners=False)[0, 0]
