"""From log probabilities to words, and from words to error rates."""

import jiwer
import numpy as np
from torch import Tensor

from .audio import ALPHABET, BLANK

NORMALISATION = ("upper case, letters, apostrophe and single spaces; words split at spaces, "
                 "spelled letters count as words")


def normalise(text: str) -> str:
    """What both sides go through before they are compared: upper case, single spaces."""
    return " ".join(text.upper().split())


def greedy(log_probs: Tensor, lengths: Tensor) -> list[str]:
    """CTC's best path, (B, T, labels) -> B texts: each frame's likeliest label, repeats joined, blanks dropped."""
    texts = []
    for best, length in zip(log_probs.argmax(-1).tolist(), lengths.tolist()):
        best = best[:length]
        kept = [k for t, k in enumerate(best) if k != BLANK and (t == 0 or k != best[t - 1])]
        texts.append(normalise("".join(ALPHABET[k] for k in kept)))
    return texts


def error_rates(references: list[str], hypotheses: list[str], resamples: int = 1000) -> dict[str, float]:
    """Word and letter error rates in percent (jiwer), with a 95 % bootstrap interval of the WER over utterances.

    Errors of all utterances over words of all utterances, so that long utterances weigh more; above 100 % is
    possible. Raises ValueError if the lists differ in length or are empty, or a reference has no word.
    """
    if len(references) != len(hypotheses) or not references:
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses")
    references, hypotheses = [normalise(r) for r in references], [normalise(h) for h in hypotheses]
    if not all(references):
        raise ValueError(f"reference {references.index('')} has no word to compare with")
    pairs = [jiwer.process_words(r, h) for r, h in zip(references, hypotheses)]
    errors = np.array([p.substitutions + p.deletions + p.insertions for p in pairs])
    words = np.array([len(r.split()) for r in references])
    draws = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
    low, high = np.percentile(100 * errors[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    return {"wer": 100 * float(errors.sum() / words.sum()), "cer": 100 * jiwer.cer(references, hypotheses),
            "wer_low": float(low), "wer_high": float(high), "utterances": float(len(pairs))}
