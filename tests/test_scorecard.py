"""The scorecard: no claim of the abstracts is left out, and no verdict is wider than what was measured."""

import json

import pytest

from hlstm_src import caption_tables, paper, records, scorecard
from hlstm_src.tables import MISSING
from tests.recorded import make

CAPTIONS = {"cider": 300.0, "cider_beam2": 300.0}


def save(root, name, live, *scores, profile="desk"):
    for seed, found in enumerate(scores):
        valid = {"wer": found["wer"]} if "wer" in found else {}
        made = make(name, profile, seed, live, scores=found, valid_scores=valid)
        made.save(records.path_of(name, profile, seed, root))


def wer(*rates):
    return [{"wer": rate, "cer": 5.0} for rate in rates]


def verdicts(judged):
    return {claim.key: claim.verdict for claim in judged}


def timed(root, profile="desk", **times):
    rows = [{"engine": f"{name.replace('_', '-')}, engine", "microseconds": took} for name, took in times.items()]
    (records.folder(profile, root) / "speech.json").write_text(json.dumps(
        {"experiment": "ds2-other", "latency": rows, "provenance": {"cpu": "a CPU", "ended": "2026-11-01T08:30"}}))


def test_every_claim_of_the_abstracts_has_a_row_and_none_else(tmp_path):
    held = {claim.key for claim in scorecard.claims(root=tmp_path)}
    told = {key for key, figure in paper.claims().items() if figure.source == "abstract"}
    assert held == {key for key in told if key.split(".")[1] not in scorecard.NO_CLAIM} and len(held) > 10
    assert told - held == {"deepspeech2.models", "neuraltalk.models", "nmt.models", "deepspeech2.wer_baseline",
                           "nmt.bleu_baseline"}


def test_without_records_nothing_was_run(tmp_path):
    judged = scorecard.claims(root=tmp_path)
    assert {claim.kind for claim in judged} == {"not run"} == {claim.kind for claim in scorecard.goals(root=tmp_path)}
    assert scorecard.tally(judged) == f"{len(judged)} not run"
    sizes = [cells for _, cells in scorecard.tab_goals(tmp_path).rows if any(cells)]
    assert len(sizes) == 2 * 4 and all(MISSING in cells for cells in sizes)        # four goals, two sizes


@pytest.mark.parametrize("fast, latency, journal", [(60, "met", "met"), (80, "met", "not met"),
                                                    (90, "not met", "not met")])
def test_the_journals_latency_asks_for_more(tmp_path, fast, latency, journal):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3-compact", 100, *wer(9, 10))
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_compact=fast)
    found = verdicts(scorecard.claims(root=tmp_path))
    assert found["deepspeech2.latency_cut"] == latency and found["deepspeech2.latency_cut_journal"] == journal


def test_a_quick_network_that_hears_worse_meets_neither(tmp_path):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3-compact", 100, *wer(14, 15))
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_compact=10)
    found = verdicts(scorecard.claims(root=tmp_path))
    assert found["deepspeech2.latency_cut"] == found["deepspeech2.latency_cut_journal"] == "not met: WER is higher"
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_compact=80)          # too slow for the journal's claim, too
    assert verdicts(scorecard.claims(root=tmp_path))["deepspeech2.latency_cut_journal"] == "not met"


@pytest.mark.parametrize("ours, points, percent", [(303, "met", "not met"), (309, "met", "met"),
                                                   (302, "not met", "not met")])
def test_the_journal_counts_cider_in_percent(tmp_path, ours, points, percent):
    for name, value in ((caption_tables.BASELINE, 300), (caption_tables.ACCURATE, ours)):
        save(tmp_path, name, 100, *[CAPTIONS | {"cider_beam2": value}] * 2)
    found = verdicts(scorecard.claims(root=tmp_path))
    assert found["neuraltalk.cider_gain"] == points and found["neuraltalk.cider_gain_journal"] == percent


def test_each_size_has_a_verdict_of_its_own(tmp_path):
    for profile, rates in (("desk", (7.0, 8.0)), ("wide", (8.0, 9.0)), ("paper", (9.0, 9.5))):
        save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13), profile=profile)
        save(tmp_path, "ds2-hlstm3-gp", 5_000, *wer(*rates), profile=profile)
    (cells,) = [cells for name, cells in scorecard.tab_scorecard(tmp_path).rows if "word error rate" in name]
    assert cells[-3:] == ["met", "met in the mean; not by every seed", "not met"]
    short = scorecard.tab_scorecard(tmp_path, brief=True)
    (brief,) = [cells for name, cells in short.rows if "word error rate" in name]
    assert brief == [*cells[:2], *cells[-3:]]
    assert [claim.verdict for claim in scorecard.goals("paper", tmp_path)][0] == "not met"
    head, desk, wide = scorecard.tab_goals(tmp_path).rows[:3]
    assert "accurate" in head[0] and not any(head[1]) and desk[1][-1] == "met"
    assert wide == ("\u2003the paper's width", ["ds2-hlstm3-gp", "8.5 %", "-4.0", "2 against 2",
                                                "met in the mean; not by every seed"])
    # Captioners have no third size: theirs are as wide as the paper's anyway.
    (cells,) = [cells for name, cells in scorecard.tab_scorecard(tmp_path).rows if "higher CIDEr:" in name]
    assert cells[-2:] == [MISSING, "not run"] and short.notes[-1].startswith(MISSING)
    assert "rowgroup" in short._repr_html_()                       # the benchmarks head their claims


def test_the_tallies_count_the_cells_of_the_table(tmp_path):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3-fast", 100, *wer(11, 12))           # has rows of its own, at this size alone
    said = [cells[-3:] for _, cells in scorecard.tab_scorecard(tmp_path).rows if any(cells)]
    for line, size, column in zip(scorecard.tallies(tmp_path), scorecard.SIZES.values(), zip(*said), strict=True):
        shown = [verdict for verdict in column if verdict != MISSING]
        told = scorecard.tally(scorecard.Claim("", "", verdict=verdict) for verdict in shown)
        assert line == f"- At {size}, of {len(shown)} rows: {told}."


def test_no_lead_is_no_lower_error_rate(tmp_path):
    for name in ("ds2-lstm5", "ds2-hlstm3"):
        save(tmp_path, name, 10_000, *wer(12))
    assert goals(tmp_path)["cell"].verdict == "not met"


def goals(root):
    return {claim.key: claim for claim in scorecard.goals(root=root)}


def test_the_compact_goal_wants_size_errors_and_speed_of_one_network(tmp_path):
    whole = paper.compute("deepspeech2.params_lstm_x5")
    few = round(whole / scorecard.FEWER)
    save(tmp_path, "ds2-lstm5", 5 * few, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3-compact", few + 1000, *wer(9, 10))
    assert goals(tmp_path)["compact"].verdict == "not met"
    save(tmp_path, "ds2-hlstm3-fast", few - 1000, *wer(11, 11.5))       # as the accurate one; hears worse than compact
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_compact=10, ds2_hlstm3_fast=30)
    save(tmp_path, "ds2-hlstm3-gp", 2 * few, *wer(12, 12))
    found = goals(tmp_path)
    assert found["compact"].model == "ds2-hlstm3-fast" and found["compact"].verdict == "met"
    assert found["quick"].recorded == "3.3x" and found["quick"].verdict == "not met"
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_fast=20)
    assert goals(tmp_path)["quick"].verdict == "met"


def test_networks_trained_longer_are_judged_among_themselves(tmp_path):
    few = round(paper.compute("deepspeech2.params_lstm_x5") / scorecard.FEWER)
    save(tmp_path, "ds2-lstm5", 10_000, *wer(7, 7))
    for name, live, rate in (("lstm5", 5 * few, 10), ("hlstm3", 4 * few, 12), ("hlstm3-dropout", 4 * few, 9),
                             ("hlstm3-gp-gradual", 2 * few, 8), ("hlstm3-medium-gp-gradual", few - 100, 9.5),
                             ("hlstm3-compact-gp-gradual", few // 5, 11)):
        save(tmp_path, f"ds2-{name}-long", live, *wer(rate))
    found = {claim.key: claim for claim in scorecard.goals(root=tmp_path, ending="-long")}
    assert [found[key].model for key in ("accurate", "compact", "quick", "cell")] == [
        f"ds2-hlstm3-{name}-long" for name in ("gp-gradual", "medium-gp-gradual", "medium-gp-gradual", "dropout")]
    assert [found[key].verdict for key in ("accurate", "compact", "cell")] == ["met, by one seed"] * 3
    assert found["cell"].recorded == "-1.0 points" and found["quick"].verdict == "not measured yet"
    for name, profile in (("ds2-hlstm3-gp-gradual-longer", "desk"), ("ds2-hlstm3-gp-gradual-long", "wide")):
        save(tmp_path, name, 2 * few, *wer(7), profile=profile)                    # and no LSTM as long as these
    rows = [(size.strip(), cells) for size, cells in scorecard.tab_goals(tmp_path).rows][1:6]
    assert [size for size, _ in rows] == ["desk size", "desk size, twice as long", "desk size, four times as long",
                                          "the paper's width", "the paper's width, twice as long"]
    assert rows[2][1] == ["ds2-hlstm3-gp-gradual-longer", "7.0 %", MISSING, "1 against none",
                                           "met, by one seed"]
    save(tmp_path, "ds2-hlstm3-fast-long", few - 200, *wer(7.5))
    found = {claim.key: claim for claim in scorecard.goals(root=tmp_path, ending="-long")}
    assert {found[key].model for key in ("accurate", "compact", "quick")} == {"ds2-hlstm3-fast-long"}
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_fast_long=20)     # the usual LSTM, as large as a longer trained one
    (quick,) = [claim for claim in scorecard.goals(root=tmp_path, ending="-long") if claim.key == "quick"]
    assert (quick.recorded, quick.verdict) == ("5.0x", "met, by one seed")
    timed(tmp_path, ds2_lstm5=100, ds2_lstm5_long=80, ds2_hlstm3_fast_long=20)
    assert scorecard.goals(root=tmp_path, ending="-long")[2].recorded == "4.0x"


@pytest.mark.parametrize("rates, verdict", [((9.0, 9.5), "met"), ((9.0, 12.5), "not met: the seeds overlap"),
                                            ((9.0,), "met, by one seed"), ((14.0, 15.0), "not met")])
def test_the_cell_goal_wants_seeds_that_do_not_overlap(tmp_path, rates, verdict):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3", 10_000, *wer(*rates))
    assert goals(tmp_path)["cell"].verdict == verdict


@pytest.mark.parametrize("said, kind", [("met", "met"), ("met, by one seed", "met in part"), ("not run", "not run"),
                                        ("not met: WER is higher, within chance", "not met"),
                                        ("not measured yet", "not run")])
def test_verdicts_fall_into_four_kinds(said, kind):
    assert scorecard.Claim("a.b", "text", verdict=said).kind == kind
    assert scorecard.tally([scorecard.Claim("a.b", "text", verdict=said)] * 2) == f"2 {kind}"


def test_the_compact_goal_is_chosen_by_validation_speakers(tmp_path):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    for name, live, valid, test in (("ds2-hlstm3-fast", 100, 9.0, 15.0), ("ds2-hlstm3-compact", 90, 10.0, 5.0)):
        made = make(name, "desk", 0, live, scores={"wer": test, "cer": 5.0}, valid_scores={"wer": valid})
        made.save(records.path_of(name, "desk", 0, tmp_path))
    assert next(goal.model for goal in scorecard.goals(root=tmp_path) if goal.key == "compact") == "ds2-hlstm3-fast"


def test_time_is_judged_on_the_processor_that_gains_least(tmp_path):
    save(tmp_path, "ds2-lstm5", 10_000, *wer(12, 13))
    save(tmp_path, "ds2-hlstm3-compact", 100, *wer(9, 10))
    timed(tmp_path, ds2_lstm5=100, ds2_hlstm3_compact=10)
    file = records.folder("desk", tmp_path) / "speech.json"
    other = json.loads(file.read_text())
    other["provenance"]["cpu"], other["latency"][1]["microseconds"] = "another", 70
    file.with_name("speech-other.json").write_text(json.dumps(other))
    assert next(goal.verdict for goal in scorecard.goals(root=tmp_path) if goal.key == "quick") == "not met"
    assert verdicts(scorecard.claims(root=tmp_path))["deepspeech2.latency_cut_journal"] == "not met"


def test_a_gain_in_percent_is_one_over_the_baseline(tmp_path):
    for name, score in ((caption_tables.BASELINE, 100.0), (caption_tables.ACCURATE, 110.0)):
        save(tmp_path, name, 100, {"cider": score, "cider_beam2": score})
    shown = {claim.key: claim.recorded for claim in scorecard.claims(root=tmp_path)}
    assert shown["neuraltalk.cider_gain_journal"] == "+10.0 %"


@pytest.mark.parametrize("worse_in, verdict", [
    ((0, 1, 2, 3), "not met: WER is higher"), ((0, 1, 2), "not met: WER is higher, within chance")])
def test_a_difference_that_other_utterances_could_turn_is_within_chance(tmp_path, worse_in, verdict):
    """The LSTM errs in the last utterance alone, or in none."""
    texts, few = ["A B", "C D", "E F", "G H"], round(paper.compute("deepspeech2.params_lstm_x5") / scorecard.FEWER) - 1
    for name, live, wrong in (("ds2-lstm5", 5 * few, () if len(worse_in) == 4 else (3,)),
                              ("ds2-hlstm3-compact", few, worse_in)):
        samples = [{"id": str(k), "reference": text, "hypothesis": text[0] if k in wrong else text}
                   for k, text in enumerate(texts)]
        rate = 100 * len(wrong) / 8
        scores = {"wer": rate, "cer": 5.0}
        made = make(name, "desk", 0, live, scores=scores, valid_scores=scores, samples=samples)
        made.save(records.path_of(name, "desk", 0, tmp_path))
    assert goals(tmp_path)["compact"].verdict == verdict
