"""What comparisons rest on: how many times fewer, whether a claim is met, and how sure a difference of seeds is."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import paper
from hlstm_src.comparison import Column, chance, compare, compression, difference, verdict
from hlstm_src.tables import MISSING
from tests.recorded import cell, make


def test_compression_is_against_the_mean_of_the_baselines_seeds():
    base = [make("ds2-lstm5", "desk", seed, live) for seed, live in enumerate((1000, 3000))]
    assert compression(make("ds2-hlstm3", "desk", live=500), base) == 4.0
    assert compression(make("ds2-hlstm3", "desk", live=500), []) is None
    assert compression(make("ds2-hlstm3", "desk", live=0), base) is None        # nothing lives: no factor


@pytest.mark.parametrize("better", [1, -1])
def test_a_score_that_is_the_same_is_no_worse_but_seeds_that_touch_are_not_apart(better):
    def judged(ours, base):
        return verdict(41.0, 40.0, [better * x for x in ours], [better * x for x in base], better=better)
    assert judged([5.0], [5.0]) == "met, by one seed"
    assert judged([5.0, 7.0], [3.0, 5.0]) == "met in the mean; in CIDEr the seeds overlap"
    assert judged([5.5, 7.0], [3.0, 5.0]) == "met"
    assert judged([4.5, 5.0], [5.0, 5.0]).startswith("not met: CIDEr is ")


def test_a_difference_has_an_error_from_three_seeds_on():
    a, b = [1.0, 2.0, 3.0], [5.0, 5.0, 7.0, 7.0]
    gap, error = difference(a, b)
    assert gap == -4.0 and error == pytest.approx((1 / 3 + 4 / 3 / 4) ** 0.5)  # variances 1 and 4/3
    assert difference(b, a) == (4.0, pytest.approx(error))
    assert difference(a, b[:2]) == (-3.0, None) and difference(b[:2], a) == (3.0, None)


def test_chance_counts_the_deals_that_lie_as_far_apart():
    """By hand: of the 20 ways to deal six values three and three, 2 lie as far apart as the sorted halves."""
    assert chance([1, 2, 3], [4, 5, 6]) == chance([6, 4, 5], [1, 3, 2]) == pytest.approx(2 / 20)
    assert chance([1, 2, 4], [3, 5, 6]) == pytest.approx(4 / 20)   # sums of 7 and 14; as far apart, and 6 and 15
    assert chance([1, 1], [1, 1]) == chance([5], [7]) == 1
    assert chance([0.1, 0.2, 0.3, 0.4, 0.5], [1.1, 1.2, 1.3, 1.4, 1.5]) == pytest.approx(2 / 252)
    assert chance([1, 2], [10, 11, 12]) == pytest.approx(1 / 10)   # groups of two sizes: each deal once
    with pytest.raises(ValueError, match="both kinds"):
        chance([], [1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_chance_is_fair(seed):
    """Of values that are all of one kind, a share of at most p is given a chance of at most p, over all deals."""
    values = np.random.default_rng(seed).normal(size=6)
    deals = [chance(values[list(own)].tolist(), np.delete(values, own).tolist()) for own in combinations(range(6), 3)]
    assert all(np.mean(np.array(deals) <= p + 1e-9) <= p + 1e-9 for p in deals)


def test_notes_explain_only_what_stands_in_the_table(store):
    root = store(make("ds2-lstm5", "desk"), make("ds2-lstm5", "desk", 1))

    def notes(rows, *, figure="none", seeds=False):
        column = Column("WER %", figure, lambda record, _: record.scores["wer"], "{:.1f}".format, seeds=seeds)
        table = compare("tab-a", "A table", "deepspeech2", rows, [column], None, root)
        return [note.split()[0] for note in table.notes]
    known, lacking = ("LSTM", None, "ds2-lstm5"), ("GRU", None, "ds2-gru4")
    assert notes([known]) == []
    assert notes([known], seeds=True) == ["n:"]
    assert notes([known, lacking]) == [MISSING, MISSING]           # what it means, and which record there is not
    unsure = next(name for name in ("baseline", "hlstm_x3", "accurate", "compact")
                  if (found := paper.model("deepspeech2", name).figures.get("wer")) and found.mark == paper.DAGGER)
    assert notes([("LSTM", unsure, "ds2-lstm5")], figure="wer") == [paper.FOOTNOTE.split()[0]]


def test_without_runs_of_ours_or_of_the_baseline_nothing_is_judged():
    for ours, base in (([5.0], []), ([], [5.0]), ([], [])):
        assert verdict(41.0, 40.0, ours, base) == "not recorded yet"


def test_seeds_are_judged_by_their_mean():
    assert verdict(41.0, 40.0, [0.0, 5.0, 5.0], [4.0, 4.0, 4.0]) == "not met: CIDEr is lower"


def test_a_run_is_compressed_against_the_baseline_of_its_own_group(store):
    root = store(make("ds2-lstm5", "desk", live=1000), make("ds2-hlstm3", "desk", live=100),
                 make("ds2-lstm5", "laptop", live=600), make("ds2-hlstm3", "laptop", live=200))
    column = Column("compression", "", compression, "{:.1f}x".format)
    rows = [("LSTM", None, "ds2-lstm5"), ("H-LSTM", None, "ds2-hlstm3")]
    table = compare("t", "T", "deepspeech2", rows, [column], "laptop", root)
    assert cell(table, "H-LSTM", "recorded (desk)", "compression") == "10.0x"
    assert cell(table, "H-LSTM", "this run (laptop)", "compression") == "3.0x"
