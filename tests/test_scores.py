"""From log probabilities to texts, and from texts to error rates, against plain Python."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src.audio import ALPHABET, BLANK
from hlstm_src.corpora import encode
from hlstm_src.scores import edits, error_rates, greedy, normalise

TEXTS = st.lists(st.sampled_from(["A", "BE", "ONE", "O'HARA"]), min_size=1, max_size=5).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, len(ALPHABET) - 1), min_size=1, max_size=12), min_size=1, max_size=3))
def test_greedy_joins_repeats_and_drops_blanks_within_each_length(paths):
    size = max(map(len, paths)) + 2
    log_probs = torch.randn(len(paths), size, len(ALPHABET))       # padding says something, which must not be read
    for row, path in zip(log_probs, paths):
        row[range(len(path)), path] = 10
    texts = greedy(log_probs, torch.tensor([len(p) for p in paths]))
    collapsed = [[k for k, _ in itertools.groupby(p) if k != BLANK] for p in paths]
    assert texts == [" ".join("".join(ALPHABET[k] for k in kept).split()) for kept in collapsed]


@given(TEXTS)
def test_a_text_with_blanks_between_its_letters_is_read_back(text):
    labels = [k for label in encode(text).tolist() for k in (BLANK, label)]
    log_probs = torch.nn.functional.one_hot(torch.tensor([labels]), len(ALPHABET)).float()
    assert greedy(log_probs, torch.tensor([len(labels)])) == [text]
    assert greedy(log_probs.bfloat16(), torch.tensor([len(labels)])) == [text]


@pytest.mark.parametrize("references, hypotheses, wer, cer", [
    (["A B C D"], ["A B C D"], 0, 0),
    (["A B C D"], ["A X C"], 50, 100 * 3 / 7),                     # one other word, one missing
    (["ONE"], ["ONE TWO THREE"], 200, 100 * 10 / 3),               # more errors than words
    (["ONE TWO"], [""], 100, 100),
    (["A", "B C D E F G H I J"], ["X", "B C D E F G H I J"], 10, 100 / 18),   # long utterances weigh more
    (["one  two "], ["ONE TWO"], 0, 0),                            # case and spaces do not count
])
def test_error_rates_of_cases_made_by_hand(references, hypotheses, wer, cer):
    rates = error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(wer) and rates["cer"] == pytest.approx(cer)
    assert rates["utterances"] == len(references)


def test_errors_are_told_apart():
    pairs = [("A B C", "A X C"), ("D E", "D"), ("F", "F G H")]
    assert edits(pairs) == (1, 1, 2) and edits(pairs, letters=True) == (1, 2, 4)


def distance(a, b) -> int:
    """Least number of substitutions, deletions and insertions between two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS | st.just("")), min_size=1, max_size=6))
def test_error_rates_are_edit_distances_and_the_interval_holds_the_rate(pairs):
    references, hypotheses = map(list, zip(*pairs))
    rates = error_rates(references, hypotheses, resamples=200)
    errors = sum(distance(r.split(), h.split()) for r, h in pairs)
    assert rates["wer"] == pytest.approx(100 * errors / sum(len(r.split()) for r in references))
    letters = sum(distance(r, h) for r, h in pairs)
    assert (sum(edits(pairs)), sum(edits(pairs, letters=True))) == (errors, letters)
    assert rates["cer"] == pytest.approx(100 * letters / sum(map(len, references)))
    assert rates["wer_low"] <= rates["wer"] + 1e-9 and rates["wer"] - 1e-9 <= rates["wer_high"]
    assert rates == error_rates(references, hypotheses, resamples=200)


def test_the_interval_is_that_of_a_mean_of_many_utterances():
    """Half of 400 one-word utterances wrong: 95 % of the means lie within 1.96 sqrt(1/4/400) of a half."""
    rates = error_rates(["A"] * 400, ["A", "B"] * 200)
    assert rates["wer_low"] == pytest.approx(50 - 4.9, abs=0.8)
    assert rates["wer_high"] == pytest.approx(50 + 4.9, abs=0.8)


@pytest.mark.parametrize("references, hypotheses", [
    (["A"], []), (["A"], ["A", "B"]), ([], []), (["A", " "], ["A", "B"])])
def test_lists_that_cannot_be_compared_are_refused(references, hypotheses):
    with pytest.raises(ValueError, match="references and|reference 1 has no word"):
        error_rates(references, hypotheses)


def test_normalising_twice_changes_nothing():
    assert normalise("  one\ttwo  ") == "ONE TWO" == normalise(normalise("  one\ttwo  "))


def test_long_utterances_weigh_more_in_the_interval_too():
    """Every one-word utterance is wrong, every nine-word one is right: about a tenth of the words."""
    rates = error_rates(["A", "B C D E F G H I J"] * 200, ["X", "B C D E F G H I J"] * 200)
    assert rates["wer"] == 10 and 8 < rates["wer_low"] < 10 < rates["wer_high"] < 12.5


def test_hypotheses_are_normalised_as_references_are_and_resamples_are_as_many_as_asked_for():
    assert error_rates(["ONE TWO"], ["one  two "])["wer"] == error_rates(["ONE TWO"], ["one  two "])["cer"] == 0
    once = error_rates(["A", "B"] * 10, ["A", "C"] * 10, resamples=1)
    assert once["wer_low"] == once["wer_high"]
