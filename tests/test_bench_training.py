"""The benchmark of training: parts belong to the step, weights stay, rows and table are right."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hlstm_src import __main__ as command
from hlstm_src import bench_training, experiments, training
from hlstm_src.bench import rows_of
from hlstm_src.library import has_bfloat16

PARTS = ["sound", "convolutions", "recurrent layers", "letters and CTC", "update"]


def test_batches_are_spread_evenly_and_none_comes_twice():
    assert bench_training.spread_out(range(12), 3) == [2, 6, 10]
    assert bench_training.spread_out(range(12), 1) == [6]
    assert bench_training.spread_out(range(3), 9) == [0, 1, 2]


@pytest.mark.parametrize("name", ["ds2-lstm5", "ds2-hlstm3-gp"])
def test_timing_a_step_and_its_parts_leaves_the_weights_as_they_were(name):
    made = experiments.trainer(name, "smoke", precision="fp32", progress=False)
    before = {key: p.detach().clone() for key, p in made.model.named_parameters()}
    runs = bench_training.parts(made, made.task.batches(0)[0])
    assert list(runs) == [bench_training.WHOLE, *PARTS]
    for run in runs.values():
        run()
    assert all(torch.equal(p, before[key]) for key, p in made.model.named_parameters())


def test_the_command_writes_a_row_for_each_part_and_prints_shares(tmp_path):
    file = tmp_path / "rows"
    done = CliRunner().invoke(command.app, ["bench", "training", "--profile", "smoke", "--name", "ds2-lstm5", "--name",
                                            "ds2-hlstm3-gp", "--batches", "1", "--rounds", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    data = json.loads(file.read_text())
    kinds = ("fp32", "bf16")[:1 + has_bfloat16()]
    engines = [f"{name} {kind}" for name in ("ds2-lstm5", "ds2-hlstm3-gp") for kind in kinds]
    assert [(row["engine"], row["case"]) for row in data["latency"]] == \
        [(engine, case) for engine in engines for case in (bench_training.WHOLE, *PARTS)]
    assert data["bench"] == "training" and data["profile"] == "smoke" and data["batch"] == 4 and data["steps"] == 3
    assert all(engine in done.output for engine in engines)


def test_a_precision_that_the_processor_lacks_is_an_error_when_asked_for(monkeypatch):
    monkeypatch.setattr(training, "has_bfloat16", lambda: False)
    monkeypatch.setattr(bench_training, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="bf16: this processor lacks"):
        bench_training.training(["ds2-lstm5"], "smoke", ["bf16"], batches=1, rounds=1)
    rows, _ = bench_training.training(["ds2-lstm5"], "smoke", batches=1, rounds=1)
    assert {row.engine for row in rows} == {"ds2-lstm5 fp32"}


def test_the_table_gives_utterances_and_shares():
    rows = rows_of({"a": 2.0}, bench_training.WHOLE, 1) + rows_of({"a": 0.5}, "sound", 1)
    shown = bench_training.exhibit(rows, {"batch": 16, "steps": 30}, "A step")
    assert shown.caption == "A step" and "one batch of 16" in shown.notes[0]
    ((name, cells),) = shown.rows
    text = bench_training.table(rows, {"batch": 16, "steps": 30}).split()
    assert [*name.split(), *cells] == text[-len(cells) - len(name.split()):]
    head, line = bench_training.table(rows, {"batch": 16, "steps": 30}).splitlines()
    assert head.split()[-1] == "sound" and line.split() == ["a", "2.000", "8.0", "1.00", "25%"]


def test_only_recognisers_are_timed():
    with pytest.raises(ValueError, match="'toy-gp': only recognisers"):
        bench_training.training(["toy-gp"], "smoke")
