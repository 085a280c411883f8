"""The benchmark of the engine: contestants compute the same layer, with the masks they say; tables are right."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hlstm_src import HLSTM
from hlstm_src import __main__ as command
from hlstm_src.records import LatencyRow

pytest.importorskip("numba")
from hlstm_src import bench_engine as b  # noqa: E402

CASES = [dict(kind="lstm"), dict(kind="hlstm"), dict(kind="lstm", fed_back=True), dict(kind="hlstm", fed_back=True),
         dict(kind="lstm", two_ways=True), dict(kind="hlstm", two_ways=True),
         dict(kind="lstm", two_ways=True, n_threads=2)]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_contestants_compute_the_same(options):
    made = b.case(size=32, steps=7, sparsities=(0.5, 0.95), **options)
    outputs = {name: np.asarray(run()) for name, run in made.runs.items()}
    assert all(y.shape == (7, 16 if "half" in name else 32) for name, y in outputs.items())
    want = outputs["ours, dense"]
    assert np.abs(want).mean() > 0.01
    for name in made.dense:
        np.testing.assert_allclose(outputs[name], want, atol=1e-5, err_msg=name)
    for name in made.runs.keys() - made.dense:
        if "int8" in name and "structured" not in name:
            np.testing.assert_allclose(outputs[name], want, atol=0.05, err_msg=name)
    sparse = outputs["unstructured 95.0%"]
    assert np.abs(sparse - want).max() > 0.01                      # another layer: most of its weights are gone
    for held, most in (("CSR", 1e-5), ("bf16", 0.01), ("int8", 0.02)):
        np.testing.assert_allclose(outputs[f"unstructured 95.0%, {held}"], sparse, atol=most)


def test_masks_do_not_depend_on_those_before(monkeypatch):
    packed = {}

    def ours(layer, x, masks, **options):
        packed.setdefault(len(masks) > 0, []).append((layer, masks))
        return None, 0
    monkeypatch.setattr(b, "_ours", ours)
    together = b.case("lstm", 64, 2, sparsities=(0.975, 0.5), values=False)
    all_masks = [masks for _, masks in packed.pop(True)]
    alone = b.case("lstm", 64, 2, sparsities=(0.5,), values=False)
    for few, many in zip(packed[True], all_masks[1::2], strict=True):
        assert all((few[1][n] == many[n]).all() for n in many)
        assert all((p[~torch.from_numpy(few[1][n])] == 0).all() for n, p in few[0].named_parameters() if n in many)
    assert together.macs == alone.macs == 2 * 256 * 64
    assert together.live["unstructured 97.5%"] == 2 * (2**14 - round(0.975 * 2**14))
    assert all((p != 0).any(1).all() for p in packed[False][0][0].parameters() if p.dim() == 2)


def test_bytes_are_those_of_a_step():
    once, again = b.case("lstm", 32, 8, sparsities=(0.5,)), b.case("lstm", 32, 8, sparsities=(0.5,), fed_back=True)
    matrix = 4 * 128 * 32
    assert once.bytes["torch, layer"] == once.bytes["ONNX Runtime"] == matrix + matrix // 8
    assert once.bytes["torch, cell by cell"] == again.bytes["ONNX Runtime"] == 2 * matrix
    assert again.bytes["ONNX Runtime, int8"] == 2 * matrix // 4
    for made in (once, again):                                     # ours: the places of the columns besides
        assert made.bytes["torch, cell by cell"] > made.bytes["16-row blocks 50.0%"]
    assert matrix + matrix // 8 < once.bytes["ours, dense"] < 1.2 * (matrix + matrix // 8) < again.bytes["ours, dense"]


def test_the_limits_are_measured_on_work_that_is_done():
    room = np.arange(1000, dtype=np.uint64)
    assert b._read(room, 1) == np.bitwise_xor.reduce(room)
    n = b.BESIDE
    first = n * (n - 1) / 2                                        # each sum begins with its number and nears one
    assert b._multiplied(0) == first and b._multiplied(1) == (first + n) / 2 and b._multiplied(100) == n
    found = b.limits()
    assert list(found.bandwidth) == sorted(found.bandwidth) and min(*found.bandwidth.values(), found.macs) > 0


def test_shares_of_the_limits():
    limits = b.Limits({1000: 50.0, 2000: 20.0}, 400.0)
    assert limits.share(500, 100, 20.0) == (0.5, 100 / 20 / 400)
    assert limits.share(2000, 100, 200.0)[0] == limits.share(4000, 100, 400.0)[0] == 0.5


def test_the_table_compares_with_the_best_dense_engine():
    made = b.Case("a layer", 10, 1000)
    for name, dense in (("slow", True), ("quick", True), ("low", False), ("sparse", False)):
        made.add(name, None, 2000, 100, dense)
    rows = [LatencyRow(engine=e, threads=1, case="a layer", microseconds=us)
            for e, us in (("slow", 40), ("quick", 20), ("low", 5), ("sparse", 10))]
    text = b.table([made], rows, b.Limits({4000: 4e8}, 1e8)).splitlines()
    assert "best dense is quick, 20.0 us" in text[0]
    assert text[-1].split() == ["sparse", "10.0", "2.00x", "2", "50%", "10%"]


def test_the_command_prints_a_table_and_writes_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(b, "limits", lambda: b.Limits({1024: 1e9}, 1e9))
    file = tmp_path / "engine.json"
    done = CliRunner().invoke(command.app, ["bench", "engine", "--quick", "--rounds", "1", "--model", "none",
                                            "--json", str(file)])
    assert done.exit_code == 0, done.output
    data = json.loads(file.read_text())
    assert data["bench"] == "engine" and data["limits"] == {"bytes_per_second": {"1024": 1e9}, "macs_per_second": 1e9}
    assert {(row["case"], row["engine"]) for row in data["latency"]} == {
        (c["case"], engine) for c in data["cases"] for engine in c["bytes"]}
    assert len(data["cases"]) == 2 and all(c["case"] in done.output for c in data["cases"])


def test_two_threads_are_told_apart(monkeypatch):
    monkeypatch.setattr(b, "limits", lambda: b.Limits({1024: 1e9}, 1e9))
    made, rows, _ = b.engine(quick=True, rounds=1, n_threads=2)
    assert [c.threads for c in made] == [1, 1, 2, 2] and len({c.name for c in made}) == 4
    assert {(row.case, row.threads) for row in rows} == {(c.name, c.threads) for c in made}


def test_without_numba_the_command_says_what_to_install():
    code = "import sys; sys.modules['numba'] = None; from hlstm_src.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "bench", "engine"], capture_output=True, text=True)
    assert done.returncode == 1 and "numba" in done.stderr and "[compact,bench]" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_trained_layer_keeps_its_own_masks():
    made = b.trained(command.TRAINED, steps=3)
    own = [np.asarray(run()) for name, run in made.runs.items() if name.startswith("its own")]
    for y in own:                                                  # dormant weights are zero: all compute the same
        np.testing.assert_allclose(y, np.asarray(made.runs["torch, layer"]()), atol=1e-4)
    assert len(own) == 3 and 0 < made.live["its own masks, chosen layouts"] < 0.2 * made.macs


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "elu"])
def test_an_onnx_layer_is_the_layer(activation):
    onnx = pytest.importorskip("hlstm_src.bench_onnx")
    layer = HLSTM(5, 8, gate_layers=2, gate_width=6, activation=activation, bidirectional=True, merge="sum").eval()
    x = torch.randn(4, 1, 5)
    got = onnx.runner(onnx.session(onnx.model_of(layer)), x[:, 0].numpy())()
    np.testing.assert_allclose(got, layer(x)[0][:, 0].detach(), atol=1e-6)
