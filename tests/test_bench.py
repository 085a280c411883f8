"""Timings: contestants take turns, rows and ratios are right, files are whole."""

import json

import pytest
import torch

from hlstm_src import bench
from hlstm_src.records import LatencyRow


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


def test_the_layers_bench_compares_equal_shapes_by_their_work():
    rows, work = bench.layer([(3, 2, 4)], n_threads=[1], rounds=1)
    assert {row.case for row in rows} == {f"T3 B2 H4{way} {kind}" for way in ("", " two ways")
                                          for kind in ("float32", "bf16")}
    assert work["nn.LSTM", "T3 B2 H4 float32"] == 3 * 2 * 8 * 4 * 4
    assert work["HLSTM", "T3 B2 H4 two ways bf16"] == work["per step", "T3 B2 H4 two ways bf16"] == 2 * 6 * 12 * 4 * 4
    assert bench.ratios(rows, "nn.LSTM", work)
