"""Greedy and beam search over any decoder, in numpy and without torch.

A decoder is a function `step(words (N), parents (N), state) -> (log probabilities (N, V), state)`: row n goes on from
row `parents[n]` of the state before, and reads word `words[n]`. Word 0 begins and ends a caption.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

END = 0
BEAMS = (1, 2, 3, 5)                   # what the tables compare; 1 is greedy


def beam_search(step: Callable, state: Any, count: int, beam: int = 1, longest: int = 16,
                length_power: float = 0.0) -> list[list[int]]:
    """The best caption found for each of `count` pictures: ids of words, without marks, at most `longest`.

    A caption scores the sum of its words' log probabilities, that of the end mark included unless it has `longest`
    words, divided by (number of summands) ** length_power. At each word the `beam` best beginnings of a picture stay;
    one that has ended leaves its place and is kept if it is the best so far. No picture sees another. Source:
    NeuralTalk2's search, with the bound that lets it stop as soon as nothing better can come.

    Raises ValueError for a beam or a length below 1, or a negative length_power.
    """
    if beam < 1 or longest < 1 or length_power < 0:
        raise ValueError(f"beam {beam} and longest {longest} must be at least 1, length_power {length_power} "
                         "at least 0")
    rows = np.arange(count)[:, None]
    best, found = np.full(count, -np.inf), [[] for _ in range(count)]
    scores = np.zeros((count, 1))                                  # (B, K): of K beginnings; at first one, empty
    said = np.zeros((count, 1, 0), dtype=np.int64)                 # (B, K, t): their words
    words, parents = np.full(count, END), np.arange(count)
    for t in range(1, longest + 1):
        log_probs, state = step(words, parents, state)             # (B*K, V)
        V, K = log_probs.shape[1], scores.shape[1]
        every = (scores[:, :, None] + np.asarray(log_probs, np.float64).reshape(count, K, V)).reshape(count, K * V)
        top = _largest(every, min(beam, K * V))                    # (B, K'), best first
        scores, parent, word = every[rows, top], top // V, top % V
        said = np.concatenate([said[rows, parent], word[:, :, None]], axis=2)
        ended = (word == END) | (t == longest)
        for b, k in np.argwhere(ended & (scores / t ** length_power > best[:, None])):
            if (score := scores[b, k] / t ** length_power) > best[b]:
                best[b], found[b] = score, said[b, k, :t - int(word[b, k] == END)].tolist()
        scores = np.where(ended, -np.inf, scores)
        if np.all(scores.max(1) / longest ** length_power <= best):    # log probabilities only fall
            break
        words, parents = word.reshape(-1), (rows * K + parent).reshape(-1)
    return found


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the k largest of each row of values (B, n), the largest first, of equals the earlier."""
    if k == 1:
        return values.argmax(1)[:, None]
    found = np.argpartition(-values, k - 1, axis=1)[:, :k]
    least = np.take_along_axis(values, found, 1).min(1)
    for b in np.flatnonzero((values >= least[:, None]).sum(1) > k):        # more equals than places
        more, equal = (np.flatnonzero(at) for at in (values[b] > least[b], values[b] == least[b]))
        found[b] = *more, *equal[:k - len(more)]
    found.sort(axis=1)
    order = np.argsort(-np.take_along_axis(values, found, 1), axis=1, kind="stable")
    return np.take_along_axis(found, order, 1)
