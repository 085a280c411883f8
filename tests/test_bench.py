"""Timings: contestants take turns, rows and ratios are right, files are whole."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hlstm_src import HLSTM, bench
from hlstm_src import __main__ as command
from hlstm_src.library import has_bfloat16
from hlstm_src.records import LatencyRow

KINDS = ("float32", "bf16")[:1 + has_bfloat16()]              # in which layers are timed here


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    clock, calls, cost = [0.0], [], {"a": [99, 1, 2, 9], "b": [99, 30, 10, 20]}     # seconds, the warm-up first
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def contestant(name):
        def run():
            clock[0] += cost[name][calls.count(name)]
            calls.append(name)
        return run
    assert bench.interleaved({name: contestant(name) for name in cost}, rounds=3) == {"a": 2, "b": 20}
    assert ["".join(calls[k:k + 2]) for k in range(0, 8, 2)] == ["ab", "ba", "ab", "ba"]
    with pytest.raises(ValueError, match="rounds=0"):
        bench.interleaved({}, 0)


def test_threads_are_set_inside_only():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), bench.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_ratios_are_to_the_base_and_by_unit_of_work():
    rows = [*bench.rows_of({"base": 0.002, "ours": 0.003}, "small", 1), *bench.rows_of({"base": 0.004}, "large", 2)]
    head, small, large = (line.split() for line in bench.ratios(rows, "base").splitlines())
    assert head == ["case", "threads", "base", "ms", "ours"]
    assert small == ["small", "1", "2.00", "1.50"] and large == ["large", "2", "4.00", "-"]
    work = {("base", "small"): 10, ("ours", "small"): 20, ("base", "large"): 1}
    assert bench.ratios(rows, "base", work).splitlines()[1].split() == ["small", "1", "2.00", "0.75"]
    with pytest.raises(ValueError, match="large, 2 threads.*'ours'"):
        bench.ratios(rows, "ours")


def test_saved_rows_are_a_records_rows(tmp_path):
    rows = bench.rows_of({"base": 0.002}, "small", 1)
    bench.save(tmp_path / "b.json", "layer", rows, note=[1])
    data = json.loads((tmp_path / "b.json").read_text())
    assert [LatencyRow(**row) for row in data["latency"]] == rows and data["latency"][0]["microseconds"] == 2000
    assert data["bench"] == "layer" and data["note"] == [1] and data["provenance"]["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_peak_memory_is_the_most_at_any_time(capfd):
    def run():
        a = torch.zeros(1000, 1000)                                    # 4 MB, and twice as much for a while
        del a
        b, c = torch.zeros(1000, 1000), torch.zeros(1000, 1000)        # noqa: F841
        del c
        return torch.zeros(1000, 500)
    assert bench.peak_bytes(run) == pytest.approx(8e6, rel=0.01)
    assert bench.peak_bytes(lambda: None) == 0
    assert capfd.readouterr() == ("", "")                              # the profiler is silent


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_rivals_of_the_layer_compute_the_same(bidirectional):
    layer, x = HLSTM(4, 4, bidirectional=bidirectional).double(), torch.randn(5, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(bench.PerStep(layer)(x), layer(x)[0])


def test_the_layers_bench_compares_equal_shapes_by_their_work():
    rows, work, memory = bench.layer([(3, 2, 4), (2, 1, 3)], n_threads=[1], rounds=1)
    cases = {f"T3 B2 H4{way}" for way in ("", " two ways")} | {"T2 B1 H3"}
    assert {row.case for row in rows} == {f"{case} {kind}" for case in cases for kind in KINDS}
    assert {(row.engine, row.case) for row in rows} == set(work) == set(memory)
    assert work["nn.LSTM", "T3 B2 H4 float32"] == 3 * 2 * 8 * 4 * 4
    case = f"T3 B2 H4 two ways {KINDS[-1]}"
    assert work["HLSTM", case] == work["per step", case] == 2 * 6 * 12 * 4 * 4
    for table in (bench.ratios(rows, "nn.LSTM", work), bench.memory_table(memory)):
        assert len(table.splitlines()) == 1 + 3 * len(KINDS)


def test_nothing_is_timed_in_a_precision_that_the_processor_lacks(monkeypatch):
    monkeypatch.setattr(bench, "has_bfloat16", lambda: False)
    rows, _, _ = bench.layer([(2, 1, 3)], n_threads=[1], rounds=1)
    rows += bench.masks([(3, 2, 4)], n_threads=[1], rounds=1)[0]
    assert {row.case.split()[3] for row in rows if "two ways" not in row.case} == {"float32"}


def test_cases_are_chosen_by_a_part_of_their_names():
    rows, _, _ = bench.layer([(3, 2, 4), (2, 1, 3)], n_threads=[1], rounds=1, only="H4 float32")
    assert {row.case for row in rows} == {"T3 B2 H4 float32"}
    with pytest.raises(ValueError, match=f"no case has 'H5'.*such as 'T2 B1 H3 {KINDS[-1]}'"):
        bench.layer([(3, 2, 4), (2, 1, 3)], n_threads=[1], rounds=1, only="H5")


def test_without_a_compiler_the_compiled_step_is_left_out(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C.. compiler.*CXX"):
        rows, work, _ = bench.layer([(3, 2, 4)], n_threads=[1], rounds=1, compiled=True)
    assert {row.engine for row in rows} == {engine for engine, _ in work} == {"nn.LSTM", "HLSTM", "per step"}


def test_the_command_prints_ratios_and_writes_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.layer, "__defaults__", ([(3, 2, 4)], *bench.layer.__defaults__[1:]))
    file = tmp_path / "layer.json"
    done = CliRunner().invoke(command.app, ["bench", "layer", "--threads", "1", "--rounds", "1", "--json", str(file)])
    assert done.exit_code == 0 and f"T3 B2 H4 two ways {KINDS[-1]}" in done.output and "MB" in done.output
    data = json.loads(file.read_text())
    assert len(data["latency"]) == len(data["memory"]) == 6 * len(KINDS)
    assert {row["threads"] for row in data["latency"]} == {1}
    assert CliRunner().invoke(command.app, ["bench", "layer", "--rounds", "0"]).exit_code == 2


def test_the_masks_bench_times_what_training_does():
    rows, copies = bench.masks([(3, 2, 4)], n_threads=[1], rounds=1)
    assert {(row.engine, row.case) for row in rows} == {
        (engine, f"T3 B2 H4 {kind}{plain}") for engine in ("dense", "masks", "growth", "masks alone", "growth alone")
        for kind in KINDS for plain in ("", " plain AdamW")}
    assert copies == (0.25, 1)                              # a byte a connection; one copy of the weights
    made = bench.Training(torch.randn(3, 2, 4), masked=True, growing=True)
    made.step()
    for name, p in made.masks.parameters.items():
        dormant = ~made.masks.masks[name]
        assert dormant.any() and (p[dormant] == 0).all() and (p[~dormant] != 0).any()
        assert (made.gradients.sums[name][dormant] != 0).any()
