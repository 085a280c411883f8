"""From log probabilities to words, and from words to error rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jiwer
import numpy as np

from . import decoding

if TYPE_CHECKING:                      # whoever reads records needs no torch
    from torch import Tensor

NORMALISATION = ("upper case, letters, apostrophe and single spaces; words split at spaces, "
                 "spelled letters count as words")


def normalise(text: str) -> str:
    """What both sides go through before they are compared: upper case, single spaces."""
    return " ".join(text.upper().split())


def greedy(log_probs: Tensor, lengths: Tensor) -> list[str]:
    """CTC's best path, (B, T, labels) -> B texts: each frame's likeliest label, repeats joined, blanks dropped."""
    return [decoding.greedy(own[:n].detach().float().cpu().numpy()) for own, n in zip(log_probs, lengths.tolist())]


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Words that were exchanged, left out or put in, and words of the reference."""
    return sum(edits([(reference, hypothesis)])), len(reference.split())


def edits(pairs: list[tuple[str, str]], letters: bool = False) -> tuple[int, int, int]:
    """How many words (or `letters` and spaces) were exchanged, left out, put in: in pairs (reference, hypothesis)."""
    found = (jiwer.process_characters if letters else jiwer.process_words)(*map(list, zip(*pairs)))
    return found.substitutions, found.deletions, found.insertions


def interval(errors: np.ndarray, words: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval over utterances of 100 * errors / words, each (N). The same draws every time."""
    draws = np.random.default_rng(0).integers(len(words), size=(resamples, len(words)))
    low, high = np.percentile(100 * errors[draws].sum(1) / words[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)


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
    errors, words = np.array(list(map(word_errors, references, hypotheses))).T
    low, high = interval(errors, words, resamples)
    return {"wer": 100 * float(errors.sum() / words.sum()), "cer": 100 * jiwer.cer(references, hypotheses),
            "wer_low": low, "wer_high": high, "utterances": float(len(words))}
