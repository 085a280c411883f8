"""The search among words: against all paths, over made-up lists of words, and for the sentences it may not spell."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src.audio import ALPHABET
from hlstm_src.decoding import WordList, beam_search, greedy

SIGNS = "_AB "                         # all that the small alphabets here spell with


def rows(seed, frames, sharp=2.0):
    """log probabilities (T, labels): of the four signs alone, drawn from a seed."""
    scores = np.random.default_rng(seed).normal(size=(frames, len(SIGNS))) * sharp
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    made = np.full((frames, len(ALPHABET)), -np.inf)
    made[:, [ALPHABET.index(sign) for sign in SIGNS]] = scores
    return made


def by_hand(log_probs, words, weight):
    """Every path, spelled and summed; then the best sentence of the list."""
    total = {}
    for path in itertools.product([ALPHABET.index(sign) for sign in SIGNS], repeat=len(log_probs)):
        text = "".join(ALPHABET[k] for k, _ in itertools.groupby(path)).replace("_", "")
        if text.startswith(" ") or "  " in text or not all(word in words for word in text.split()):
            continue
        text = text.removesuffix(" ")
        chance = math.exp(sum(row[k] for row, k in zip(log_probs, path)))
        total[text] = total.get(text, 0.0) + chance
    return {text: math.log(chance) + weight * words.price(text) for text, chance in total.items() if chance}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]),
       st.lists(st.text("AB", min_size=1, max_size=3), min_size=1, max_size=5))
def test_a_wide_search_finds_the_best_of_all_sentences(seed, frames, weight, said):
    words, log_probs = WordList(said), rows(seed, frames)
    wanted = by_hand(log_probs, words, weight)
    found = beam_search(log_probs, words, beam=500, weight=weight, least=1e-30)
    assert found in wanted and wanted[found] == pytest.approx(max(wanted.values()), abs=1e-9)


def spoken(text, frames_each=2, sure=0.9):
    """log probabilities in which a text is heard clearly, each letter between blanks."""
    made = []
    for letter in text:
        for k in [ALPHABET.index(letter)] * frames_each + [0]:
            row = np.full(len(ALPHABET), (1 - sure) / (len(ALPHABET) - 1))
            row[k] = sure
            made.append(np.log(row))
    return np.array(made)


def test_what_is_heard_clearly_is_spelled():
    words = WordList(["YES HELLO", "STOP"])
    assert beam_search(spoken("HELLO YES"), words) == "HELLO YES"
    assert beam_search(spoken("STOP "), words) == "STOP"           # silence that looks like a space


def test_a_misheard_letter_gives_way_to_a_word_of_the_list():
    assert beam_search(spoken("HELLI"), WordList(["HELLO", "STOP"])) == "HELLO"


def test_of_two_words_that_sound_alike_the_frequent_one_is_taken():
    log_probs = spoken("A")
    a, b = ALPHABET.index("A"), ALPHABET.index("B")
    log_probs[:, b] = log_probs[:, a]
    assert beam_search(log_probs, WordList(["A", "B B B"]), weight=1.0) == "B"
    assert beam_search(log_probs, WordList(["A A A", "B"]), weight=1.0) == "A"


def test_a_word_costs_the_log_of_its_share_of_all_words():
    words = WordList(["A B A", "A"])
    assert words.price("A") == pytest.approx(math.log(3 / 4)) and words.price("") == 0
    assert words.price("A B B") == pytest.approx(math.log(3 / 4 / 4 / 4))


def test_a_list_of_words_goes_with_its_own_alphabet():
    with pytest.raises(ValueError, match="leave `alphabet` out"):
        beam_search(spoken("STOP"), WordList(["STOP"]), alphabet=ALPHABET.lower())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_texts_that_differ_in_spaces_alone_are_one(seed, frames):
    log_probs, total = rows(seed, frames), {}
    for path in itertools.product([ALPHABET.index(sign) for sign in SIGNS], repeat=frames):
        spelled = "".join(ALPHABET[k] for k, _ in itertools.groupby(path)).replace("_", "")
        text = " ".join(spelled.split())
        total[text] = total.get(text, 0.0) + math.exp(sum(row[k] for row, k in zip(log_probs, path)))
    assert total[beam_search(log_probs, beam=5000, least=1e-30)] == pytest.approx(max(total.values()))


def test_letters_are_capitals_in_any_alphabet():
    log_probs = spoken("STOP YES")
    for read in (greedy, beam_search):
        assert read(log_probs, alphabet=ALPHABET.lower()) == read(log_probs) == "STOP YES"


def test_nothing_is_spelled_where_no_sentence_fits():
    assert beam_search(rows(0, 3), WordList(["XYZ"]), least=1e-30) == ""
    with pytest.raises(ValueError, match="beam=0"):
        beam_search(rows(0, 3), WordList(["A"]), beam=0)
    with pytest.raises(ValueError, match="no word"):
        WordList(["", " "])


def heard(*frames):
    """log probabilities of frames that say how likely some signs are, and no others."""
    made = np.full((len(frames), len(ALPHABET)), -np.inf)
    for row, frame in zip(made, frames):
        row[[ALPHABET.index(sign) for sign in frame]] = np.log(list(frame.values()))
    return made


def test_a_beginning_may_hope_for_the_likeliest_word_that_it_can_become():
    for said in ("AB AB AB AC", "AC AB AB AB"):
        words = WordList([said])
        assert words.hope("") == 0 and words.hope("A") == words.hope("AB") == pytest.approx(math.log(3 / 4))
        assert words.hope("AC") == pytest.approx(math.log(1 / 4)) and words.hope("AC ") == words.price("AC")
        assert words.hope("AC A") == pytest.approx(math.log(1 / 4) + math.log(3 / 4))


def test_a_narrow_search_forgets_what_a_wide_one_keeps():
    """Of two words as frequent, that which begins better goes on worse."""
    log_probs = heard({"A": 0.6, "B": 0.4}, {"C": 0.1, "D": 0.9})
    found = [beam_search(log_probs, WordList(["AC BD"]), beam=beam) for beam in (1, 2)]
    assert found == ["AC", "BD"]


def test_who_stays_in_the_beam_is_decided_by_all_paths_together():
    """"A" is said with or without a blank at the end, by no single one of which it would be among the two best."""
    log_probs = heard({"_": 0.6, "A": 0.3, "B": 0.1}, {"_": 0.5, "A": 0.19, "B": 0.31}, {"_": 1.0})
    assert beam_search(log_probs, beam=2) == beam_search(log_probs, beam=9) == "A"


def test_with_and_without_a_space_at_the_end_it_is_one_sentence():
    """Neither "A" nor "A " is as likely as "BC", but together they are likelier."""
    log_probs = heard({"A": 0.5, "B": 0.5}, {" ": 0.3, "_": 0.3, "C": 0.4})
    assert beam_search(log_probs, WordList(["A BC"])) == "A"


@pytest.mark.parametrize("text, sign", [("yes no", "e"), ("CAFÉ", "É"), ("A1", "1"), ("A _", "_")])
def test_words_are_of_the_alphabet(text, sign):
    with pytest.raises(ValueError, match=f"{sign!r} is no letter"):
        WordList([text])


def test_letters_less_likely_than_asked_are_passed_over():
    row, words = np.full((1, len(ALPHABET)), -np.inf), WordList(["B"])
    row[0, [ALPHABET.index("A"), ALPHABET.index("B")]] = np.log([1 - 3e-4, 3e-4])
    assert beam_search(row, words) == "B" and beam_search(row, words, least=1e-3) == ""


def test_a_letter_behind_a_blank_is_another_one():
    words = WordList(["A", "AA"])
    assert beam_search(spoken("AA", frames_each=1), words, weight=0.0) == "AA"
    assert beam_search(spoken("A", frames_each=3), words, weight=0.0) == "A"
