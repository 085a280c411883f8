"""Beam search against the list of all captions, and against itself in other company."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlstm_src.search import BEAMS, END, _largest, beam_search


def decoder(seed, V=4, size=3, sharpness=2.0):
    """A small random recurrent decoder: (its step, states (B, size) of B pictures)."""
    rng = np.random.default_rng(seed)
    reads, keeps, says = rng.normal(size=(V, size)), rng.normal(size=(size, size)), rng.normal(size=(size, V))

    def step(words, parents, state):
        state = np.tanh(state[parents] @ keeps + reads[words])
        logits = sharpness * state @ says
        return logits - np.log(np.exp(logits).sum(1, keepdims=True)), state
    return step, rng.normal(size=(5, size))


def score(step, state, caption, longest, power):
    """What a caption scores, word by word."""
    total, reads = 0.0, [END, *caption]
    says = [*caption, END][:longest]
    for word, wanted in zip(reads, says):
        log_probs, state = step(np.array([word]), np.array([0]), state)
        total += log_probs[0, wanted]
    return total / len(says) ** power


def every_caption(V, longest):
    return [list(c) for n in range(longest + 1) for c in product(range(1, V), repeat=n)]


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
@given(seed=st.integers(0, 2**32 - 1), longest=st.integers(1, 4))
def test_a_beam_wide_enough_finds_the_best_of_all_captions(power, seed, longest):
    step, states = decoder(seed)
    found = beam_search(step, states, len(states), 4 ** longest, longest, power)
    for state, caption in zip(states, found):
        scores = [score(step, state[None], c, longest, power) for c in every_caption(4, longest)]
        assert score(step, state[None], caption, longest, power) == pytest.approx(max(scores))


@given(seed=st.integers(0, 2**32 - 1), longest=st.integers(1, 8))
def test_a_beam_of_one_takes_the_likeliest_word_each_time(seed, longest):
    step, states = decoder(seed)
    for state, caption in zip(states, beam_search(step, states, len(states), 1, longest)):
        said, state, word = [], state[None], END
        while len(said) < longest:
            log_probs, state = step(np.array([word]), np.array([0]), state)
            word = int(log_probs[0].argmax())
            if word == END:
                break
            said.append(word)
        assert caption == said


@pytest.mark.parametrize("beam", BEAMS)
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_picture_gets_the_same_caption_in_any_company(beam, power):
    step, states = decoder(7, V=9, size=6)
    together = beam_search(step, states, 5, beam, 7, power)
    assert together == [beam_search(step, s[None], 1, beam, 7, power)[0] for s in states]
    assert together[::-1] == beam_search(step, states[::-1], 5, beam, 7, power)
    assert len({tuple(c) for c in together}) > 1


def readable(beam, step, state, longest, power):
    """The same search of one picture, with lists, and without stopping early."""
    live, best = [(0.0, [], END, state)], (-np.inf, [])
    for t in range(1, longest + 1):
        longer = []
        for total, said, word, state in live:
            log_probs, new = step(np.array([word]), np.array([0]), state)
            longer += [(total + p, said, w, new) for w, p in enumerate(log_probs[0])]
        live = []
        for total, said, word, state in sorted(longer, key=lambda c: -c[0])[:beam]:
            words = said + [word] * (word != END)
            if word == END or t == longest:
                best = max(best, (total / t ** power, words), key=lambda c: c[0])
            else:
                live.append((total, words, word, state))
    return best[1]


@given(seed=st.integers(0, 2**32 - 1), beam=st.sampled_from(BEAMS), power=st.sampled_from([0.0, 0.5, 1.5]))
def test_narrow_beams_are_those_of_the_readable_search(seed, beam, power):
    step, states = decoder(seed, V=6)
    assert beam_search(step, states, 5, beam, 6, power) == [readable(beam, step, s[None], 6, power) for s in states]


def test_it_stops_when_nothing_better_can_come():
    calls = []

    def step(words, parents, state):
        calls.append(words.tolist())
        return np.log(np.tile([0.8, 0.1, 0.1], (len(words), 1))), state
    assert beam_search(step, None, 2, 3, longest=50) == [[], []]
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{"beam": 0}, {"longest": 0}, {"length_power": -1}])
def test_impossible_searches_are_refused(options):
    step, states = decoder(0)
    with pytest.raises(ValueError, match="at least"):
        beam_search(step, states, 5, **options)


def test_the_largest_come_first():
    assert _largest(np.array([[1, 3, 2, 3], [0, -1, -2, -3]]), 3).tolist() == [[1, 3, 2], [0, 1, 2]]


@given(st.integers(1, 5), st.integers(5, 60), st.integers(0, 10**6))
def test_of_equals_the_earlier_are_the_largest(k, n, seed):
    """Words tie where an output row is pruned away; the compiled search of the engine decides alike."""
    values = np.random.default_rng(seed).integers(0, 3, (4, n)).astype(float)
    values[values == 0] = -np.inf
    assert (_largest(values, k) == np.argsort(-values, axis=1, kind="stable")[:, :k]).all()


def test_of_two_that_are_equal_the_one_that_ends_first_is_said():
    def step(words, parents, state):
        return np.log(np.full((len(words), 3), 1 / 3)), state
    assert beam_search(step, None, 1, 2, longest=1) == [[]]
