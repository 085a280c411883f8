"""From log probabilities to letters, by CTC and without torch: each frame by itself, or the likeliest text.

Greedy decoding asks each frame by itself and spells whatever comes out. To the search, the probability of a text is the
sum over all its paths, as in training; with a list of words, times how often these are said, and no others are spelled.
It keeps the likeliest beginnings (prefix beam search: Graves, 2012; with words, Hannun et al., 2014).
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

    Made from texts, of which every word counts. Raises ValueError for texts without a word, or with a sign that the
    alphabet lacks.
    """

    def __init__(self, texts: Iterable[str]):
        counts = Counter(word for text in texts for word in text.split())
        if not counts:
            raise ValueError("no word in these texts")
        if strange := set("".join(counts)) - set(ALPHABET[1:]):
            raise ValueError(f"{sorted(strange)[0]!r} is no letter of this alphabet; bring the texts to capitals first")
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


def greedy(log_probs: np.ndarray, alphabet: str = ALPHABET) -> str:
    """CTC's best path, log_probs (T, labels) -> text: each frame's likeliest label, repeats joined, blanks dropped."""
    best = log_probs.argmax(1)
    kept = best[(best != BLANK) & (np.diff(best, prepend=BLANK) != 0)]
    return " ".join("".join(alphabet[k] for k in kept).upper().split())


def beam_search(log_probs: np.ndarray, words: WordList | None = None, beam: int = 32, weight: float = 0.5,
                least: float = 1e-4, alphabet: str = ALPHABET) -> str:
    """The likeliest text, of words in the list where there is one: log_probs (T, labels) of one utterance -> text.
    Texts that differ in spaces at their ends, or in how many stand between two words, are one.

    beam: beginnings that are kept; weight: of the words' own probabilities, chosen on AN4's validation speakers; least:
    letters less likely than this are passed over in a frame; alphabet: a letter for each label. "" where no sentence of
    the list fits. Raises ValueError for a beam below 1, and for words with another alphabet than theirs.
    """
    if beam < 1:
        raise ValueError(f"beam={beam} must be at least 1")
    if words is not None and alphabet != ALPHABET:
        raise ValueError(f"a list of words is spelled in the alphabet {ALPHABET!r}; leave `alphabet` out")
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
            put(text, either + row[BLANK], letter + row[alphabet.index(text[-1])] if text else NEVER)
            start = text.rpartition(" ")[2]
            for k in likely:
                if words is None or k in words.follows.get(start, ()) or (k == SPACE and start in words):
                    again = text and alphabet[k] == text[-1]       # a double letter needs a blank in between
                    put(text + alphabet[k], NEVER, (blank if again else either) + row[k])
        best = sorted(found, key=lambda text: -_add(*found[text]) - (weight * words.hope(text) if words else 0))
        kept = {text: found[text] for text in best[:beam]}
    ends: dict[str, float] = {}
    for text, both in kept.items():
        text = " ".join(text.split())                              # silence may look like a space, or like several
        if words is None or all(word in words for word in text.split()):
            ends[text] = _add(ends.get(text, NEVER), _add(*both))
    best = max(ends, key=lambda text: ends[text] + (weight * words.price(text) if words else 0), default="")
    return best.upper()
