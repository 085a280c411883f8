"""The benchmark of whole captioners: contestants say the same, and fresh processes are timed."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hlstm_src import __main__ as command
from hlstm_src import bench_captions
from hlstm_src.corpora import CaptionCorpus
from hlstm_src.masks import ConnectionMasks, save_model, save_tensors
from hlstm_src.neuraltalk import NeuralTalk
from hlstm_src.profiles import MINI_SCENES, MINI_SPEECH, ROOT
from tests.compact.matrices import dense


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    words = CaptionCorpus(ROOT / MINI_SCENES, "tiny").vocabulary
    sizes = {"words": len(words), "features": 8, "encoder": "tiny", "cell": "lstm", "hidden": 16, "embedding": 8}
    made = NeuralTalk(**sizes).eval()
    path = tmp_path_factory.mktemp("model") / "seed0.safetensors"
    save_model(path, made, ConnectionMasks(made, "rnn.weight_*", density=0.2), {
        "format": 1, "benchmark": "captions", "model": sizes, "vocabulary": list(words.words), "longest": 4,
        "encoder": "tiny"})
    return path


def test_the_command_prints_all_contestants_and_writes_rows(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_captions, "starts", lambda *_: {"engine": (1.5, 99.0)})
    done = CliRunner().invoke(command.app, ["bench", "captions", "--corpus", str(ROOT / MINI_SCENES), "--model",
                                            str(model), "--limit", "2", "--rounds", "1", "--json",
                                            str(tmp_path / "rows")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "rows").read_text())
    contestants = {(row["case"], row["engine"]) for row in data["latency"]}
    assert len(contestants) == len(data["latency"]) == 10 and {row["threads"] for row in data["latency"]} == {1}
    assert {case for case, _ in contestants} == {"a caption, beam 1", "a caption, beam 2"}
    assert contestants == {(row["case"], row["engine"]) for row in data["words"]}
    assert data["starts"] == [{"engine": "engine", "seconds": 1.5, "peak_mb": 99}] and data["pictures"] == 2
    assert all(engine in done.output for _, engine in contestants)


@pytest.mark.parametrize("corpus", [MINI_SCENES, MINI_SPEECH])
def test_what_is_no_trained_captioner_is_refused_by_name_whatever_the_corpus(model, tmp_path, corpus):
    packed, speech = tmp_path / "packed", tmp_path / "speech"
    save_tensors(packed, {}, {"kind": "captioner", "benchmark": "captions"})
    save_tensors(speech, {}, {"benchmark": "speech"})
    for file, *also in ((packed,), (speech,), (model, "--against", speech)):
        done = CliRunner().invoke(command.app, ["bench", "captions", "--corpus", str(ROOT / corpus), "--model",
                                                *map(str, (file, *also))])
        assert str(done.exception) == f"{also[1] if also else file}: no trained captioner, as `run` writes it"
        assert isinstance(done.exception, ValueError)


def test_other_captioners_take_part(model):
    features = torch.rand(2, 3, 64, 64)
    timed = bench_captions.captions(model, features, rounds=1, beams=(1,), against=[model])
    words = {name: n for (_, name), n in timed.words.items()}
    assert len(words) == len(timed.rows) == 7
    assert words["seed0, torch"] == words["seed0, engine"] == words["engine"]
    with pytest.raises(ValueError, match="seed0.safetensors: seed0 takes part already"):
        bench_captions.captions(model, features, rounds=1, against=[model, model])


def test_the_pruned_output_has_a_tenth_of_its_weights_and_they_are_the_largest(model):
    pruned = dense(bench_captions._pruned(model).matrices["output"])
    whole = dense(bench_captions.load_compact(model).matrices["output"])
    alive = pruned != 0
    assert alive.mean() == pytest.approx(0.1, abs=0.01) and (pruned[alive] == whole[alive]).all()
    assert np.abs(whole[alive]).min() >= np.abs(whole[~alive]).max()


def test_an_engine_that_says_something_else_is_not_timed(model, monkeypatch):
    monkeypatch.setattr(bench_captions.Captioner, "caption", lambda *_: "something else")
    with pytest.raises(ValueError, match="says something else than torch"):
        bench_captions.captions(model, torch.rand(1, 3, 64, 64))


def test_fresh_processes_have_memory_of_their_own(model):
    mine = np.ones(40_000_000)                                     # 320 MB, which are not theirs
    found = bench_captions.starts(model, torch.rand(3, 64, 64))
    assert min(seconds for seconds, _ in found.values()) > 0
    assert 10 < found["engine"][1] < found["torch, with all weights"][1] and found["engine"][1] < mine.nbytes / 1e6
