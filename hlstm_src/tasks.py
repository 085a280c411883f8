"""What training asks of a benchmark: batches, a loss, and a score. The loop knows nothing else of it."""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import corpora, scores
from .caption_scores import cider
from .corpora import CaptionCorpus, Picture, SpeechCorpus, Utterance
from .decoding import greedy
from .deepspeech2 import ctc_loss, disagreement, spec_augment, spectrogram
from .masks import seeded
from .neuraltalk import NeuralTalk, caption_loss, collate

SPEEDS = (0.9, 1.0, 1.1)       # each utterance is played at one of these (Ko et al., 2015)


class SpeechTask:
    """Speech recognition on a corpus: CTC training with light augmentation, WER on the validation speakers.

    In the first `ordered` epochs the batches go from short to long (Amodei et al., 2016: SortaGrad), later in random
    order. From epoch `harder` on, if there is one, more of the spectrogram is blanked: at once it would keep a network
    from learning where the letters are. With `agree` above 0 the network hears each utterance twice from then on,
    blanked in other places, in batches of half as many: so much of their `disagreement` joins the loss
    (consistency-regularised CTC: Yao et al., 2025, whose weight is 0.2). With `everything` the validation speakers are
    learned from, too, and scores of them are named so, `wer_learned`: they measure nothing. `loss` draws all its
    randomness from torch's global generator, which the training loop seeds at each step.
    """
    metric, lower_is_better = "wer", True
    bands = 15, 15, 1                  # blanked by `spec_augment`: frames, frequencies, how many of each
    more_bands = 20, 20, 3             # from epoch `harder` on

    def __init__(self, corpus: SpeechCorpus, batch: int = 16, limit: int | None = None, seed: int = 0,
                 augment: bool = True, ordered: int = 0, harder: int | None = None, everything: bool = False,
                 agree: float = 0.0):
        if not agree >= 0:
            raise ValueError(f"agree {agree} must be at least 0")
        if agree and (harder is None or not augment):
            raise ValueError(f"agree {agree}: two hearings differ only from epoch `harder` on, and with `augment`")
        self.corpus, self.batch, self.limit, self.seed, self.augment = corpus, batch, limit, seed, augment
        self.ordered, self.harder, self.agree, self.epoch = ordered, harder, agree, 0
        self.valid, self.everything = corpus.split("valid", limit=limit), everything
        self.train = corpus.split("train", limit=limit) + (self.valid if everything else [])
        self.metric += "_learned" if everything else ""
        self._waves: dict[str, Tensor] = {}

    def wave(self, u: Utterance) -> Tensor:
        """Samples of an utterance, (N), read once."""
        if u.id not in self._waves:
            self._waves[u.id] = self.corpus.audio(u)
        return self._waves[u.id]

    @property
    def _later(self) -> bool:
        """Is this an epoch from `harder` on?"""
        return self.harder is not None and self.epoch >= self.harder

    @property
    def _twice(self) -> bool:
        """Is each utterance heard twice in this epoch?"""
        return self.agree > 0 and self._later

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices into `train`, in batches of similar length; the order depends on seed and epoch alone."""
        self.epoch, generator = epoch, seeded(self.seed, epoch)
        seconds = [u.seconds for u in self.train]
        size = max(1, self.batch // 2) if self._twice else self.batch
        batches = corpora.length_batches(seconds, size, generator)
        return sorted(batches, key=lambda batch: max(seconds[k] for k in batch)) if epoch < self.ordered else batches

    def sounds(self, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor, corpora.Batch]:
        """A training batch as the model reads it: spectrograms (B, 161, T), frames (B), and the batch; all of it twice,
        one after the other, while two hearings have to agree."""
        chosen = [self.train[k] for k in indices]
        waves = [self.wave(u) for u in chosen]
        if self.augment:
            waves = [_played(w, SPEEDS[int(torch.randint(len(SPEEDS), ()))]) for w in waves]
        batch = corpora.collate(waves, [u.transcript for u in chosen]).to(device)
        spec, lengths = spectrogram(batch.waves, batch.lengths)
        if self._twice:
            spec, lengths, batch = torch.cat([spec, spec]), torch.cat([lengths, lengths]), batch.twice()
        if self.augment:
            spec = spec_augment(spec, lengths, *(self.more_bands if self._later else self.bands))
        return spec, lengths, batch

    def loss(self, model: nn.Module, indices: list[int], device: torch.device) -> Tensor:
        """CTC loss of a training batch and, once there are two hearings, `agree` times what they differ by."""
        spec, lengths, batch = self.sounds(indices, device)
        log_probs, frames = model(spec, lengths)
        loss = ctc_loss(log_probs, frames, batch.targets, batch.target_lengths)
        if self._twice:
            loss = loss + self.agree * disagreement(log_probs, frames, batch.target_lengths)
        return loss

    @torch.no_grad()
    def log_probs(self, model: nn.Module, utterances: list[Utterance], device: torch.device) -> list[Tensor]:
        """What the model hears in each utterance, in the order given: log probabilities (T', labels)."""
        model.eval()
        heard = [torch.empty(0)] * len(utterances)
        for indices in corpora.length_batches([u.seconds for u in utterances], self.batch):
            batch = corpora.collate([self.wave(utterances[k]) for k in indices],
                                    [utterances[k].transcript for k in indices]).to(device)
            for k, own, length in zip(indices, *model(*spectrogram(batch.waves, batch.lengths))):
                heard[k] = own[:length].cpu()
        return heard

    def transcribe(self, model: nn.Module, utterances: list[Utterance], device: torch.device) -> list[str]:
        """Greedy transcripts, in the order given."""
        return spelled(self.log_probs(model, utterances, device))

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Validation WER and CER in percent; with `everything` as `wer_learned` and `cer_learned`."""
        rates = scores.error_rates([u.transcript for u in self.valid], self.transcribe(model, self.valid, device))
        return {name + self.metric.removeprefix("wer"): rates[name] for name in ("wer", "cer")}


def spelled(heard: list[Tensor]) -> list[str]:
    """Greedy transcripts of what `log_probs` gave."""
    return [greedy(own.numpy()) for own in heard]


def _played(wave: Tensor, speed: float) -> Tensor:
    """wave (N) at another speed, pitch included: (N / speed)."""
    if speed == 1:
        return wave
    return F.interpolate(wave[None, None], size=int(len(wave) / speed), mode="linear", align_corners=False)[0, 0]


class CaptionTask:
    """Captioning on a corpus opened with an encoder: cross-entropy on single captions, CIDEr on validation pictures.

    Validation CIDEr is of greedy captions and prepared words, which takes a second; perplexity is over all validation
    captions. `longest` words are said at most.
    """
    metric, lower_is_better = "cider", False

    def __init__(self, corpus: CaptionCorpus, batch: int = 64, limit: int | None = None, seed: int = 0,
                 java: bool = True):
        self.corpus, self.batch, self.limit, self.seed = corpus, batch, limit, seed
        self.java = java                                           # may it score at the end?
        self.train = corpus.split("train", limit=limit)
        self.valid = corpus.split("valid", limit=limit)
        self.longest = corpus.vocabulary.longest
        self.pairs = self._pairs(self.train)
        self._features = None if corpus.pixels else corpus.features(self.train)    # (N, D), or pixels of `tiny`

    def _pairs(self, pictures: list[Picture]) -> list[tuple[int, list[int]]]:
        """(number of the picture, ids of the words) of each caption."""
        return [(k, self.corpus.vocabulary.encode(caption)) for k, p in enumerate(pictures) for caption in p.captions]

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices into `pairs`, in batches of similar length; the order depends on seed and epoch alone."""
        generator = seeded(self.seed, epoch)
        if self._features is None:                                 # the encoder takes long: a picture's captions go
            together = max(1, self.batch * len(self.train) // len(self.pairs))         # together, so it runs once
            order, of = torch.randperm(len(self.train), generator=generator).tolist(), defaultdict(list)
            for k, (number, _) in enumerate(self.pairs):
                of[number].append(k)
            return [[k for number in order[start:start + together] for k in of[number]]
                    for start in range(0, len(order), together)]
        return corpora.length_batches([len(words) + 1 for _, words in self.pairs], self.batch, generator)

    def loss(self, model: nn.Module, indices: list[int], device: torch.device) -> Tensor:
        """Cross-entropy of a training batch, in nats a word."""
        pictures, captions = zip(*(self.pairs[k] for k in indices))
        inputs, targets = collate(list(captions))
        if self._features is None:
            seen, which = torch.tensor(pictures).unique(return_inverse=True)
            pixels = self.corpus.features([self.train[k] for k in seen.tolist()])
            logits = model(pixels.to(device), inputs.to(device), which.to(device))
        else:
            logits = model(self._features[list(pictures)].to(device), inputs.to(device))
        return caption_loss(logits, targets.to(device))

    @torch.no_grad()
    def features(self, model: NeuralTalk, pictures: list[Picture], device: torch.device, batch: int = 64) -> Tensor:
        """What the decoder reads of pictures, (N, D): stored, or made by the model's own encoder."""
        model.eval()
        return torch.cat([model.encode(self.corpus.features(pictures[k:k + batch]).to(device))
                          for k in range(0, len(pictures), batch)])

    def captions(self, model: NeuralTalk, pictures: list[Picture], device: torch.device, beam: int = 1,
                 batch: int = 256) -> list[str]:
        """A caption of each picture, in the order given; greedy by default."""
        said, features = [], self.features(model, pictures, device)
        for k in range(0, len(pictures), batch):
            said += model.caption(features[k:k + batch], beam, self.longest)
        return [self.corpus.vocabulary.decode(ids) for ids in said]

    @torch.no_grad()
    def perplexity(self, model: NeuralTalk, pictures: list[Picture], device: torch.device, batch: int = 256) -> float:
        """exp of the mean surprise at each word and end mark of all captions, in nats."""
        total, count, pairs, features = 0.0, 0, self._pairs(pictures), self.features(model, pictures, device)
        for k in range(0, len(pairs), batch):
            numbers, captions = zip(*pairs[k:k + batch])
            inputs, targets = collate(list(captions))
            words = sum(len(caption) + 1 for caption in captions)
            logits = model(features[list(numbers)], inputs.to(device))
            total, count = total + words * caption_loss(logits, targets.to(device)).item(), count + words
        return math.exp(total / count)

    def unpadded(self, model: NeuralTalk, pictures: list[Picture]) -> Iterator[tuple[Tensor, Tensor]]:
        """The captions of pictures in batches of equal length, as the model's decoder reads them: features, inputs."""
        pairs, features = self._pairs(pictures), self.features(model, pictures, torch.device("cpu"))
        for length in sorted({len(words) for _, words in pairs}):
            numbers, captions = zip(*(pair for pair in pairs if len(pair[1]) == length))
            yield features[list(numbers)], collate(list(captions))[0]

    def evaluate(self, model: NeuralTalk, device: torch.device) -> dict[str, float]:
        """Validation CIDEr in percent, and perplexity."""
        said = self.captions(model, self.valid, device)
        return {"cider": float(cider(tokens(self.valid), said).mean()),
                "perplexity": self.perplexity(model, self.valid, device)}


def tokens(pictures: list[Picture]) -> list[list[str]]:
    """The references of each picture as words joined by spaces."""
    return [[" ".join(caption) for caption in p.captions] for p in pictures]
