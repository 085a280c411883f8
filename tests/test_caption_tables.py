"""Tables of the captioners: every cell a record's or the paper's, and no verdict that the records do not give."""

import json

import pytest

from hlstm_src import caption_tables as ct
from hlstm_src import experiments, paper, rivals, tables
from tests.recorded import cell, make

DESK, LAPTOP = "recorded (desk)", "this run (laptop)"
WEIGHTS = {"nt-lstm3": 4_550_000, "nt-hlstm1-gp": 400_000, "nt-hlstm1-compact": 100_000}      # live, of the cell


def captions(experiment, profile="desk", seed=0, cider=300.0, live=None, **scores):
    scores = {"cider": cider, "cider_beam2": cider + 10, "bleu4": 30.0, "bleu4_beam2": 31.0, "perplexity": 2.5} | scores
    live = WEIGHTS.get(experiment.removesuffix("-flowers"), 1000) if live is None else live
    return make(experiment, profile, seed, live=live, scores=scores)


def three(cider, **others):
    """Seeds of the three experiments that the claims are about; `cider` by experiment, a number a seed."""
    return [captions(name, seed=seed, cider=value, **others)
            for name, values in cider.items() for seed, value in enumerate(values)]


def verdicts(root):
    return {row.partition(":")[0]: cells for row, cells in ct.tab_neuraltalk_claims(root).rows}


def timed(root, experiment=None, **engines):
    """A file of `bench captions`: microseconds a caption of ten words, at beam 1; beam 2 takes twice that."""
    rows = [{"engine": name, "threads": 1, "case": f"a caption, beam {k}", "microseconds": float(k * time)}
            for k in (1, 2) for name, time in engines.items()]
    words = [{"case": row["case"], "engine": row["engine"], "words": 10.0} for row in rows]
    path = root / "results" / "desk" / "captions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": "captions", "experiment": experiment, "latency": rows,
                                "words": words}))


def test_every_row_names_an_experiment_of_the_catalogue():
    for suffix in ct.CORPORA:
        for table in (ct.tab_neuraltalk_cells, ct.tab_neuraltalk_training, ct.tab_neuraltalk_models):
            note = next(n for n in table("desk", "/nowhere", suffix).notes if "no record yet" in n)
            assert set(note.rpartition(": ")[2].split(", ")) <= set(experiments.CATALOGUE)
    notes = ct.tab_neuraltalk_rivals("desk", "/nowhere").notes + ct.tab_activations("desk", {}, "/nowhere").notes
    for note in notes:
        if "no record yet" in note:
            assert set(note.rpartition(": ")[2].split(", ")) <= set(experiments.CATALOGUE)
    assert set(ct.RIVALS) == set(rivals.RIVALS) - {"dense", "small-dense", "gp"}


def test_a_beam_has_its_own_scores_and_lacks_what_was_not_scored():
    record = captions("nt-lstm1", rouge_l=50.0)
    assert ct.at_beam(1)(record).scores == record.scores | {"beam": 1}
    wide = ct.at_beam(2)(record).scores
    assert (wide["cider"], wide["bleu4"], wide["rouge_l"]) == (310.0, 31.0, 50.0)
    assert "cider" not in ct.at_beam(3)(record).scores and record.scores["cider"] == 300.0


def test_cells_are_those_of_records_and_of_the_paper(store):
    root = store(*(captions("nt-lstm3", seed=k, cider=c) for k, c in enumerate((300.0, 306.0))),
                 captions("nt-hlstm1", "laptop", cider=120.0))
    table = ct.tab_neuraltalk_cells("laptop", root)
    assert cell(table, "LSTM x3", DESK, "CIDEr, beam 1") == "303.0 (300.0-306.0), n=2"
    assert cell(table, "LSTM x3", DESK, "CIDEr, beam 2") == "313.0 (310.0-316.0), n=2"
    assert cell(table, "LSTM x3", DESK, "CIDEr, beam 5") == tables.MISSING
    assert cell(table, "LSTM x3", DESK, "perplexity") == "2.50 (2.50-2.50), n=2"
    assert cell(table, "LSTM x3", "paper", "CIDEr, beam 2") == str(paper.claim("neuraltalk.cider_lstm_x3"))
    assert cell(table, "H-LSTM x1", LAPTOP, "CIDEr, beam 1") == "120.0, n=1"
    assert (LAPTOP, "BLEU-4, beam 1") not in table.columns and (DESK, "BLEU-4, beam 1") in table.columns
    assert any("MSCOCO" in note for note in table.notes) and any("mini corpus" in note for note in table.notes)


def test_compression_is_against_the_lstm_of_three_layers(store):
    table = ct.tab_neuraltalk_training("laptop", store(captions("nt-lstm3"), captions("nt-hlstm1-compact")))
    assert cell(table, "grow and prune: compact", DESK, "compression") == "45.5x"
    assert cell(table, "small LSTM, dense", DESK, "CIDEr") == tables.MISSING
    assert any("no record yet in the profile desk" in note and "nt-small-lstm" in note for note in table.notes)


def test_fast_is_the_accurate_model_at_beam_one(store):
    root = store(captions("nt-hlstm1-gp"))
    assert not any(heading == "µs a word" for _, heading in ct.tab_neuraltalk_models("laptop", root).columns)
    timed(root, "nt-hlstm1-gp", **{"torch, with all weights": 900, "engine": 500, "engine, int8": 100})
    table = ct.tab_neuraltalk_models("laptop", root)
    accurate, fast = "accurate", "fast"
    assert [cell(table, row, DESK, "CIDEr") for row in (accurate, fast)] == ["310.0, n=1", "300.0, n=1"]
    assert [cell(table, row, DESK, "µs a word") for row in (accurate, fast)] == ["100", "50"]
    assert cell(table, fast, DESK, "cell weights") == cell(table, accurate, DESK, "cell weights") == "400 K"


def test_flowers_stand_alone(store):
    root = store(captions("nt-lstm3-flowers", cider=80.0), captions("nt-lstm3", cider=300.0))
    for profile in ("laptop", "desk"):
        table = ct.tab_neuraltalk_cells(profile, root, "-flowers")
        groups = {group for group, _ in table.columns}
        assert groups == ({DESK} if profile == "laptop" else {"recorded (desk), this run"})
        assert cell(table, "LSTM x3", groups.pop(), "CIDEr, beam 1") == "80.0, n=1"
        assert "GRU x1" not in dict(table.rows) and "Flowers" in table.caption


def test_activations_show_the_zeros_that_were_measured_or_recorded(store):
    recorded = captions("nt-hlstm1-relu")
    recorded.scores["zero_units"] = 40.0
    root = store(recorded, captions("nt-hlstm1-relu", seed=1), captions("nt-hlstm1"))
    zeros = {("desk", "nt-hlstm1-relu", 0): 0.9, ("desk", "nt-hlstm1-relu", 1): 0.6}
    table = ct.tab_activations("laptop", zeros, root)
    assert cell(table, "ReLU", DESK, "zero units") == "50.0 % (40.0 %-60.0 %), n=2"
    assert cell(table, "tanh", DESK, "zero units") == tables.MISSING
    assert cell(table, "tanh", DESK, "CIDEr").endswith("n=1")


def test_the_claims_name_what_one_plain_layer_does(store):
    seeds = {"nt-lstm1": (330.0, 340.0), "nt-hlstm1-compact": (331.0, 333.0)}
    assert "one dense layer" not in "".join(ct.tab_neuraltalk_claims(store()).notes)
    (note,) = (n for n in ct.tab_neuraltalk_claims(store(*three(seeds))).notes if "one dense layer of LSTM" in n)
    assert "; compact 3" in note and "n=2" in note and "nt-" not in note


def test_without_records_nothing_is_judged(store):
    for root in (store(), store(captions("nt-hlstm1-compact"), captions("nt-hlstm1-gp"))):
        for cells in verdicts(root).values():
            assert cells[-1] == "not recorded yet"


SEEDS = {"nt-lstm3": (300.0, 302.0), "nt-hlstm1-gp": (310.0, 312.0), "nt-hlstm1-compact": (303.0, 305.0)}
FEWER, FLOPS, TIME, GAIN = ("fewer parameters than the baseline", "fewer FLOPs than the baseline",
                            "lower run-time latency", "higher CIDEr")


def test_what_reaches_its_figure_is_met(store):
    root = store(*three(SEEDS))
    timed(root, **{"engine": 70, "nt-lstm3, engine": 1000, "nt-lstm3, torch": 3000, "nt-hlstm1-gp, engine": 200})
    assert ct.speeds(root)["desk", "nt-hlstm1-compact", 2] == 14.0
    found = verdicts(root)
    assert {row: cells[-1] for row, cells in found.items()} == dict.fromkeys((FEWER, FLOPS, TIME, GAIN), "met")
    assert found[FEWER][1:4] == ["45.5x", "+3.0", "2 against 2"] and found[TIME][1] == "5.0x"
    assert found[GAIN][1] == "+10.0 points"


def test_what_was_not_timed_is_not_judged(store):
    root = store(*three(SEEDS))
    timed(root, **{"nt-hlstm1-gp, engine": 200, "engine, output pruned by 90%": 1})
    assert verdicts(root)[TIME][-1] == "not measured yet"


@pytest.mark.parametrize("compact, verdict", [
    ((290.0, 299.0), "not met: CIDEr is lower"),
    ((301.5, 305.0), "met in the mean; in CIDEr the seeds overlap"),
    ((304.0,), "met, by one seed"),
])
def test_a_small_network_that_captions_worse_meets_nothing(store, compact, verdict):
    found = verdicts(store(*three(SEEDS | {"nt-hlstm1-compact": compact})))
    assert found[FEWER][-1] == found[FLOPS][-1] == verdict


def test_what_falls_short_is_not_met(store):
    runs = three(SEEDS | {"nt-hlstm1-gp": (301.0, 304.0)})
    large = [captions("nt-hlstm1-compact", seed=k, cider=400.0, live=115_000) for k in (0, 1)]     # 39.6 times fewer
    found = verdicts(store(*runs, *large))
    assert (found[FEWER][-1], found[FLOPS][-1], found[GAIN][-1]) == ("met", "not met", "not met")


def test_claims_are_judged_by_figures_of_the_abstract_alone():
    for row, _ in ct.tab_neuraltalk_claims("/nowhere").rows:
        assert any(figure.source == "abstract" and row.startswith(f"{figure.note}: {figure.text()}")
                   for figure in paper.claims().values())


def test_the_report_has_the_captioners(store):
    text = tables.report("laptop", store(captions("nt-lstm3"), captions("nt-hlstm1-gp-flowers", cider=81.5)))
    assert "300.0, n=1" in text and "81.5" not in text.partition("Flowers")[0] and "91.5, n=1" in text
    assert text.count("claims of the abstract") == 1
