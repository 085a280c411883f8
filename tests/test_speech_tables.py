"""The recognisers' tables: rows that exist, claims judged by the mean of the seeds, doubts said aloud."""

import json

import numpy as np
import pytest

from hlstm_src import experiments, records, scores
from hlstm_src import speech_tables as st
from hlstm_src.tables import MISSING
from tests.recorded import make


def row(table, start):
    return next(cells for name, cells in table.rows if name.startswith(start))


def store(root, **runs):
    """A folder of records: experiment -> (live weights, WER of each seed)."""
    for name, (live, rates) in runs.items():
        for seed, wer in enumerate(rates):
            record = make(name.replace("_", "-"), "desk", seed, live, scores={"wer": wer, "cer": 5.0})
            record.save(records.path_of(record.experiment, "desk", seed, root))
    return root


def verdicts(root, **runs):
    return [cells[-1] for _, cells in st.tab_ds2_claims(store(root, **runs)).rows]


def test_every_row_is_an_experiment_of_the_catalogue(tmp_path):
    for table in (st.tab_ds2_cells("desk", tmp_path), st.tab_ds2_training("desk", tmp_path)):
        lacking = next(note for note in table.notes if "no record yet" in note).split(": ")[1].split(", ")
        assert len(lacking) == len(table.rows) and set(lacking) <= set(experiments.CATALOGUE)


@pytest.mark.parametrize("live, rates, verdict", [
    (100, [10.0, 10.4], "met"), (100, [10.0, 11.4], "met in the mean; in WER the seeds overlap"),
    (100, [12.0, 12.4], "not met: WER is higher"), (5000, [10.0, 10.4], "not met"), (100, [10.0], "met, by one seed")])
def test_a_smaller_model_meets_a_claim_only_if_it_hears_no_worse(tmp_path, live, rates, verdict):
    found = verdicts(tmp_path, ds2_lstm5=(10_000, [11.0, 12.0]), ds2_hlstm3_compact=(live, rates))
    assert found[:2] == [verdict, verdict] and found[2] == "not recorded yet"


@pytest.mark.parametrize("rates, verdict", [([8.0, 8.6], "met"), ([8.0, 9.0], "met in the mean; not by every seed"),
                                            ([9.0, 9.1], "not met"), ([8.5], "met, by one seed")])
def test_the_error_rate_of_the_accurate_model_is_held_against_the_papers(tmp_path, rates, verdict):
    assert verdicts(tmp_path, ds2_hlstm3_gp=(5000, rates))[2] == verdict


@pytest.mark.parametrize("microseconds, rates, shown, verdict", [
    (25, [10.0, 10.4], "75 % (4.0x)", "met"), (25, [12.0, 12.4], "75 % (4.0x)", "not met: WER is higher"),
    (90, [10.0, 10.4], "10 % (1.1x)", "not met")])
def test_latency_is_that_of_the_quickest_engines(tmp_path, microseconds, rates, shown, verdict):
    store(tmp_path, ds2_lstm5=(10_000, [11.0, 12.0]), ds2_hlstm3_compact=(100, rates))
    assert st.tab_ds2_claims(tmp_path).rows[3][1][-1] == "not measured yet"
    times = {"torch, with all weights": 500, "engine": microseconds, "engine, int8": 1, "ds2-lstm5, torch": 100,
             "ds2-lstm5, engine": 130}
    measured(tmp_path, "grid", "a Xeon", times)
    assert st.speeds(tmp_path) == {"a Xeon": {"ds2-hlstm3-compact": microseconds, "ds2-lstm5": 100}}
    cells = st.tab_ds2_claims(tmp_path).rows[3][1]
    assert cells[1] == f"{shown} on a Xeon" and cells[-1] == verdict
    measured(tmp_path, "later", "another", times | {"engine": 50})
    cells = st.tab_ds2_claims(tmp_path).rows[3][1]
    least, most = sorted([shown, "50 % (2.0x)"])
    assert cells[1] == f"{least} to {most}, 2 timings"


@pytest.mark.parametrize("rates, chosen", [
    ((18.0, 17.0, None, None), "compact-gp-gradual"), ((17.0, 18.0, None, None), "compact"),
    ((18.0, None, None, None), "compact"), ((None, 17.0, None, None), "compact-gp-gradual"),
    ((18.0, 17.0, 16.0, 16.5), "compact-whole"), ((18.0, 17.0, 19.0, None), "compact-gp-gradual"),
    ((18.0, 17.0, 16.0, 15.0), "compact-fast")])
def test_which_compact_model_counts_is_decided_on_the_validation_speakers(tmp_path, rates, chosen):
    store(tmp_path, ds2_lstm5=(10_000, [11.0]))
    names = "compact", "compact-gp-gradual", "compact-whole", "compact-fast"
    made = list(zip(names, rates, (200, 100, 50, 40), strict=True))
    for name, wer, live in made:
        if wer is not None:                                                 # the test speakers say the opposite
            record = make(f"ds2-hlstm3-{name}", "desk", 0, live, scores={"wer": 30 - wer, "cer": 5.0},
                          valid_scores={"wer": wer})
            record.save(records.path_of(record.experiment, "desk", 0, tmp_path))
    table = st.tab_ds2_claims(tmp_path)
    assert table.rows[0][1][1] == f"{10_000 / next(live for name, _, live in made if name == chosen):.1f}x"
    assert table.notes[3].endswith(f"and ds2-hlstm3-{chosen}.")


def test_the_mean_of_more_seeds_goes_before_that_of_fewer(tmp_path):
    for name, rates in (("compact", [18.0, 17.0]), ("compact-whole", [19.0, 18.0]), ("compact-fast", [9.0])):
        for seed, wer in enumerate(rates):
            record = make(f"ds2-hlstm3-{name}", "desk", seed, 40, valid_scores={"wer": wer})
            record.save(records.path_of(record.experiment, "desk", seed, tmp_path))
    assert st.preferred(st.COMPACT, tmp_path) == "ds2-hlstm3-compact"


def test_error_rates_are_compared_on_the_same_utterances():
    """Where one is worse by one word in every utterance, no draw of utterances can say otherwise."""
    texts = ["A B C D", "E F G H", "I J K L", "M N O P"]
    base, worse = make("ds2-lstm5", "desk", 0), make("ds2-hlstm3", "desk", 0)
    base.samples = [{"id": str(k), "reference": t, "hypothesis": t} for k, t in enumerate(texts)]
    worse.samples = [s | {"hypothesis": s["reference"][:-2]} for s in base.samples]
    assert st.paired([worse], [base]) == (25.0, 25.0, 25.0) and st.paired([base], [worse])[0] == -25.0
    assert st.paired([base, worse], [base])[0] == 12.5                      # in the mean of the runs
    worse.samples[0]["hypothesis"] = "A B C D"
    gap, low, high = st.paired([worse], [base])
    assert low < gap == 18.75 < high
    turned = base.model_copy(update={"samples": base.samples[::-1]})        # whatever their order
    assert st.paired([turned], [base]) == (0, 0, 0) and st.paired([worse], [turned]) == (gap, low, high)
    again = scores.interval(np.array([0.0, 1, 1, 1]), np.full(4, 4.0), 50_000)
    assert (low, high) == pytest.approx(again, abs=0.5)            # as other draws of the same utterances have it
    worse.samples = worse.samples[1:]
    assert st.paired([worse], [base]) is None and st.paired([], [base]) is None


def measured(root, name, cpu, times, ended="2026-11-01T08:30:00+00:00", **origin):
    """What `bench speech` writes of the compact model on that processor."""
    rows = [{"engine": engine, "microseconds": took} for engine, took in times.items()]
    (records.folder("desk", root) / f"speech-{name}.json").write_text(json.dumps(
        {"experiment": "ds2-hlstm3-compact", "latency": rows, "provenance": {"cpu": cpu, "ended": ended, **origin}}))


def test_times_of_different_processors_are_not_held_against_each_other(tmp_path):
    store(tmp_path, ds2_lstm5=(10_000, [11.0]), ds2_hlstm3_compact=(100, [10.0]), ds2_hlstm3_fast=(200, [10.0]))
    measured(tmp_path, "a", "quick", {"engine": 40, "ds2-lstm5, engine": 50, "ds2-hlstm3-fast, engine": 25})
    measured(tmp_path, "b", "slow", {"engine": 90, "ds2-lstm5, engine": 100})
    compact, fast = st.tab_ds2_claims(tmp_path).rows[3:]                   # the fast one is the most accurate, too
    assert compact[1][:2] == ["compact: in rounds", "10 % (1.1x) to 20 % (1.2x), 2 timings"]
    assert compact[1][-1] == "not met"
    assert fast[1][:2] == ["accurate, fast: in blocks", "50 % (2.0x) on quick"] and fast[1][-1] == "met, by one seed"
    measured(tmp_path, "0", "quick", {"engine": 10, "ds2-lstm5, engine": 20}, "2026-11-02T09:05:00+00:00")
    assert {name: times["ds2-lstm5"] for name, times in st.speeds(tmp_path).items()} == {
        "quick, 2026-11-01 08:30": 50, "quick, 2026-11-02 09:05": 20, "slow": 100}      # two machines of one name
    measured(tmp_path, "c", "slow", {"ds2-lstm5, engine": 70}, instructions=["avx2", "avx512f"])
    assert {"slow": 100, "slow (AVX-512)": 70}.items() <= {
        name: times["ds2-lstm5"] for name, times in st.speeds(tmp_path).items()}.items()


def test_the_table_of_models_tells_the_least_that_time_fell(tmp_path):
    store(tmp_path, ds2_lstm5=(10_000, [11.0]), ds2_hlstm3_compact=(100, [10.0]), ds2_hlstm3_fast=(200, [10.0]))
    measured(tmp_path, "a", "quick", {"engine": 40, "ds2-lstm5, engine": 50, "ds2-hlstm3-fast, engine": 25})
    measured(tmp_path, "b", "slow", {"engine": 80, "ds2-lstm5, engine": 90})
    table = st.tab_ds2_models("desk", tmp_path)
    assert table.columns[-1][1] == "quicker"
    assert [cells[-1] for _, cells in table.rows] == ["1.0x", MISSING, MISSING, "1.1x", "2.0x"]
    store(tmp_path, ds2_gru4=(9_000, [12.0]))
    measured(tmp_path, "cells", "slow", {"ds2-lstm5, torch": 99, "ds2-lstm5, engine": 90, "ds2-gru4, torch": 60})
    assert row(st.tab_ds2_cells("desk", tmp_path), "GRU x4")[-1] == "1.5x"


def test_nothing_is_judged_without_records(tmp_path):
    table = st.tab_ds2_claims(tmp_path)
    assert all(cells[-1] == "not recorded yet" and MISSING in cells for _, cells in table.rows)


def test_recipes_that_were_tried_are_shown_with_their_last_score(tmp_path):
    assert st.tab_ds2_tuning(tmp_path).rows == []
    tried = {"experiment": "ds2-lstm5", "lr": 0.002, "stride": 4, "ordered": 1, "note": "", "epochs": 3,
             "valid_wer": [90.0, 55.04], "valid_cer": [50.0, 30.0]}
    records.folder("desk", tmp_path).mkdir(parents=True)
    (records.folder("desk", tmp_path) / "tuning-speech.json").write_text(json.dumps({"rows": [
        tried, tried | {"note": "dropout 0.2", "valid_wer": [90.0, 8.0, 7.0], "valid_cer": [5.0, 5.0, 4.0]}]}))
    assert st.tab_ds2_tuning(tmp_path).rows == [
        ("ds2-lstm5", ["0.002", "4", "1", MISSING, "2 of 3", MISSING, "55.0", "30.0"]),
        ("ds2-lstm5", ["0.002", "4", "1", "dropout 0.2", "3", "2", "7.0", "4.0"])]
    assert st.tab_ds2_tuning(tmp_path).notes[-1].startswith(MISSING)


def test_wide_networks_are_those_of_their_own_profile(tmp_path):
    for profile, live in (("desk", 3000), ("wide", 9000)):
        for name, part in (("ds2-lstm5", 1), ("ds2-hlstm3-compact-gp-gradual", 30)):
            make(name, profile, 0, live // part, scores={"wer": live / 1000, "cer": 1.0}).save(
                records.path_of(name, profile, 0, tmp_path))
    table = st.tab_ds2_wide(tmp_path)
    assert {group for group, _ in table.columns} == {"paper", "recorded (wide)"}
    shown = {row: dict(zip((head for _, head in table.columns[-5:]), cells[-5:])) for row, cells in table.rows}
    assert shown["LSTM x5, dense"]["WER %"] == "9.0, n=1"
    assert shown["compact"]["compression"] == "30.0x"
    assert set(shown["accurate"].values()) == {"–"} and "compact, trained longer" not in shown
    name = "ds2-hlstm3-compact-gp-gradual-long"
    make(name, "wide", 0, 450, scores={"wer": 0.5, "cer": 1.0}).save(records.path_of(name, "wide", 0, tmp_path))
    assert row(st.tab_ds2_wide(tmp_path), "compact, trained longer")[-4:-2] == ["20.0x", "0.5, n=1"]


def test_networks_trained_longer_are_held_against_an_lstm_trained_as_long(tmp_path):
    def said(wrong):
        """Ten utterances of two words, of which so many have one error."""
        return [{"id": str(k), "speaker": "s", "reference": "A B", "hypothesis": "A C" if k < wrong else "A B"}
                for k in range(10)]
    for name, wer, wrong in (("ds2-lstm5", 30.0, 6), ("ds2-lstm5-long", 20.0, 4), ("ds2-hlstm3-long", 10.0, 2)):
        record = make(name, "desk", scores={"wer": wer}, valid_scores={"wer": wer + 1}, samples=said(wrong))
        record.recipe["schedule"] = {"epochs": 8}
        record.save(records.path_of(name, "desk", 0, tmp_path))
    table = st.tab_ds2_long(tmp_path)
    assert [name for name, _ in table.rows] == ["LSTM x5", "H-LSTM x3"]            # those that were trained longer
    assert row(table, "LSTM x5") == ["31.0, n=1", "30.0, n=1", "8", "21.0, n=1", "20.0, n=1", MISSING]
    assert table.notes[-1].startswith(MISSING)
    cells = row(table, "H-LSTM x3")
    assert cells[:5] == [MISSING, MISSING, "8", "11.0, n=1", "10.0, n=1"] and cells[5].startswith("-10.0 (-")
    longer = make("ds2-hlstm3-longer", "desk", scores={"wer": 5.0}, valid_scores={"wer": 6.0}, samples=said(1))
    longer.recipe["schedule"] = {"epochs": 16}
    longer.save(records.path_of("ds2-hlstm3-longer", "desk", 0, tmp_path))
    *_, (name, cells) = st.tab_ds2_long(tmp_path).rows             # no LSTM was trained as long as that
    assert name == "H-LSTM x3" and cells[2:] == ["16", "6.0, n=1", "5.0, n=1", MISSING]
    whole = make("ds2-lstm5-long-all", "desk", scores={"wer": 15.0}, valid_scores={}, samples=said(3))
    whole.recipe["schedule"] = {"epochs": 8}
    whole.save(records.path_of("ds2-lstm5-long-all", "desk", 0, tmp_path))
    assert row(st.tab_ds2_long(tmp_path), "LSTM x5, on validation speakers, too")[2:] == [
        "8", MISSING, "15.0, n=1", MISSING]
    for name, wer, wrong in (("ds2-lstm5-twice", 25.0, 5), ("ds2-hlstm3-twice", 20.0, 4)):
        twice = make(name, "desk", scores={"wer": wer}, valid_scores={"wer": wer}, samples=said(wrong))
        twice.recipe["schedule"] = {"epochs": 4}
        twice.save(records.path_of(name, "desk", 0, tmp_path))
    cells = row(st.tab_ds2_long(tmp_path), "H-LSTM x3, heard twice")
    assert cells[2:5] == ["4", "20.0, n=1", "20.0, n=1"] and cells[5].startswith("-5.0 (")       # from its like
    assert set(st.tab_ds2_long(tmp_path / "none").rows) == set()


def test_two_precisions_of_one_seed_stand_together(tmp_path):
    for name, seed, precision in (("ds2-lstm5", 0, None), ("ds2-lstm5", 1, "bf16"), ("ds2-lstm5-fp32", 0, "fp32")):
        record = make(name, "desk", seed, scores={"wer": 10.0 + seed}, valid_scores={"wer": 12.0})
        record.provenance.precision = precision
        record.save(records.path_of(name, "desk", seed, tmp_path))
    table = st.tab_ds2_precision(tmp_path)
    assert [cells[0] for _, cells in table.rows] == ["bf16, by its recipe", "fp32"]
    assert [cells[2:] for _, cells in table.rows] == [["0.0", "12.0", "10.0"]] * 2
