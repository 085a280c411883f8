"""What comparisons rest on: how many times fewer, whether a claim is met, and how sure a difference of seeds is."""

import pytest

from hlstm_src import paper
from hlstm_src.comparison import Column, compare, compression, difference, verdict
from hlstm_src.tables import MISSING
from tests.recorded import make


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
