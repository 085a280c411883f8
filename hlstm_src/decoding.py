"""From log probabilities to words that exist: CTC's best sentence over a list of words with their frequencies.

Greedy decoding (`scores.greedy`) asks each frame by itself and spells whatever comes out. Here the probability of a
text is the sum over all its paths, as in training, times how often its words are said; only words of the list are
spelled. The search keeps the likeliest beginnings (prefix beam search: Hannun et al., 2014).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from .audio import ALPHABET, BLANK

SPACE = ALPHABET.index(" ")
NEVER = -math.inf


class WordList:
    """Words and how often each is said; log(count / all counts) is its price in a sentence.

    Made from texts, of which every word counts. Raises ValueError for texts without a word.
    """

    def __init__(self, texts: Iterable[str]):
        counts = Counter(word for text in texts for word in text.split())
        if not counts:
            raise ValueError("no word in these texts")
        self.log_prob = {word: math.log(count / counts.total()) for word, count in counts.items()}
        self.follows = defaultdict(set)        # the beginning of a word -> the letters that may come next
        self.best: dict[str, float] = {"": 0}  # the beginning of a word -> log probability of the likeliest such word
        for word, log_prob in self.log_prob.items():
            for k in range(len(word)):
                self.follows[word[:k]].add(ALPHABET.index(word[k]))
                self.best[word[:k + 1]] = max(log_prob, self.best.get(word[:k + 1], NEVER))

    def __contains__(self, word: str) -> bool:
        return word in self.log_prob

    def price(self, text: str) -> float:
        """Log probability of a text as words drawn one by one."""
        return sum(self.log_prob[word] for word in text.split())

    def hope(self, text: str) -> float:
        """The price of a beginning whose last word may still be growing: that of the best that can become of it."""
        done, _, last = text.rpartition(" ")
        return self.price(done) + self.best[last]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))


def beam_search(log_probs: np.ndarray, words: WordList, beam: int = 32, weight: float = 0.5,
                least: float = 1e-4) -> str:
    """The likeliest text of words in the list: log_probs (T, labels) of one utterance -> text.

    beam: beginnings that are kept; weight: of the words' own probabilities, chosen on
    AN4's validation speakers; least: letters less likely than this are
    passed over in a frame. "" where no sentence of the list fits. Raises ValueError for a beam below 1.
    """
    if beam < 1:
        raise ValueError(f"beam={beam} must be at least 1")
    log_probs = np.asarray(log_probs, float)
    # A beginning: its text -> log probability of its paths that end in a blank, and of those that end in a letter.
    kept = {"": (0.0, NEVER)}
    for row in log_probs:
        likely = [k for k in np.flatnonzero(row > math.log(least)).tolist() if k != BLANK]
        found: dict[str, tuple[float, float]] = {}

        def put(text: str, blank: float, letter: float, found=found) -> None:
            before = found.get(text, (NEVER, NEVER))
            found[text] = _add(before[0], blank), _add(before[1], letter)
        for text, (blank, letter) in kept.items():
            either = _add(blank, letter)
            put(text, either + row[BLANK], letter + row[ALPHABET.index(text[-1])] if text else NEVER)
            start = text.rpartition(" ")[2]
            allowed = words.follows.get(start, ())
            for k in likely:
                if k in allowed or (k == SPACE and start in words):
                    again = text and ALPHABET[k] == text[-1]       # a double letter needs a blank in between
                    put(text + ALPHABET[k], NEVER, (blank if again else either) + row[k])
        best = sorted(found, key=lambda text: -_add(*found[text]) - weight * words.hope(text))
        kept = {text: found[text] for text in best[:beam]}
    ends: dict[str, float] = {}
    for text, both in kept.items():
        text = text.removesuffix(" ")                              # silence at the end may look like a space
        if all(word in words for word in text.split()):
            ends[text] = _add(ends.get(text, NEVER), _add(*both))
    return max(ends, key=lambda text: ends[text] + weight * words.price(text), default="")
