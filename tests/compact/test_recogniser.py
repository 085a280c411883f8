"""The recogniser without torch: the same probabilities and texts as the model that it was packed from."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.an4 import prepare
from hlstm_src import experiments, load_compact, records, scores
from hlstm_src.__main__ import QUICK, RECOGNISER, app
from hlstm_src.audio import ALPHABET, SAMPLE_RATE
from hlstm_src.compact.pack import pack, sizes
from hlstm_src.corpora import SpeechCorpus
from hlstm_src.decoding import beam_search, greedy
from hlstm_src.deepspeech2 import DeepSpeech2
from hlstm_src.errors import UserError
from hlstm_src.growprune import prune
from hlstm_src.masks import ConnectionMasks, load_tensors, save_model, save_tensors
from tests import recorded

ROOT = Path(__file__).parents[2]
KINDS = {"lstm": {"cell": "lstm"}, "gru": {"cell": "gru"}, "hlstm": {"cell": "hlstm", "activation": "tanh"},
         "deep": {"cell": "hlstm", "gate_layers": 2, "activation": "elu"},
         "uneven": {"cell": "hlstm", "gate_width": [3, 4, 5, 6], "activation": "leaky_relu"},
         "shared": {"cell": "hlstm", "shared_hidden": True}, "coarse": {"cell": "lstm", "stride": 4},
         "pruned": {"cell": "hlstm", "channels": 19}}


def wave(seconds: float = 1.3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model files as training writes them, with batch normalisation that is not the identity."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in KINDS.items():
        torch.manual_seed(0)
        made = {"labels": len(ALPHABET), "layers": 2, "hidden": 20, "channels": 3} | options
        model = DeepSpeech2(**made).eval()
        with torch.no_grad():
            for key, t in model.state_dict().items():
                if "norm" in key and t.is_floating_point():
                    t.uniform_(0.5, 1.5)
        masks = ConnectionMasks(model, "[rc]*.weight*" if name == "pruned" else "rnns.*weight_*", density=0.3)
        if name == "pruned":
            prune(masks, 0.5, structure="block16")
        save_model(folder / f"{name}.safetensors", model, masks,
                   {"format": 1, "benchmark": "speech", "model": made, "alphabet": ALPHABET})
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_and_text_are_those_of_torch(folder, name):
    path = folder / f"{name}.safetensors"
    model, _, _ = experiments.load(path)
    for seconds in (0.001, 0.33, 1.3):
        theirs = experiments.log_probs(model, torch.from_numpy(wave(seconds)))
        for options in ({}, {"kind": "csr"}, {"kind": "dense"}, {"threads": 2}):
            ours = load_compact(path, **options)
            np.testing.assert_allclose(ours.log_probs(wave(seconds)), theirs, atol=1e-4)
        text = scores.greedy(theirs[None], torch.tensor([len(theirs)]))[0]
        assert ours.transcribe(wave(seconds)) == text


def test_of_a_pruned_convolution_only_live_blocks_are_multiplied(folder):
    path = folder / "pruned.safetensors"
    masks, model = experiments.load(path)[1], load_compact(path)
    for k, convolution in enumerate(model.convolutions):
        mask = masks[f"convolutions.{k}.weight"].flatten(1)
        blocks = [block.any(0).sum() for block in mask.split(16)]
        assert convolution.matrix.slots == sum(blocks) < 0.8 * 2 * mask.shape[1]


def test_a_stride_that_no_recogniser_has_is_refused(folder, tmp_path):
    tensors, metadata = load_tensors(folder / "coarse.safetensors")
    save_tensors(tmp_path / "odd", tensors, metadata | {"model": metadata["model"] | {"stride": 3}})
    with pytest.raises(UserError, match="odd: .*stride 3 is neither 2 nor 4"):
        load_compact(tmp_path / "odd")


def test_a_packed_file_says_the_same_and_is_smaller(folder, tmp_path):
    source = folder / "hlstm.safetensors"
    for values, exact in (("fp32", 0), ("fp16", 0), ("int8", 0.5)):
        size = pack(source, tmp_path / values, values)
        assert size == (tmp_path / values).stat().st_size
        difference = np.abs(load_compact(tmp_path / values).log_probs(wave()) - load_compact(source).log_probs(wave()))
        assert difference.max() <= exact and (difference.max() > 0 or values != "int8")
    found = sizes(source)
    assert found["compact int8"] < found["compact fp16"] < found["compact fp32"] < found["fp32, zeros too"]
    assert list(folder.glob("*.part")) == [] and list(folder.glob(".*")) == []


def test_a_packed_file_says_where_it_comes_from_and_only_scores_that_are_its_own(folder, tmp_path):
    source = shutil.copy(folder / "lstm.safetensors", tmp_path / "seed3.safetensors")
    record = recorded.make("ds2-lstm5", "smoke", 3)
    for known in (False, True):
        if known:
            record.save(source.with_suffix(".json"))
        for values in ("fp32", "fp16", "int8"):
            pack(source, tmp_path / values, values)
            about = load_tensors(tmp_path / values)[1]
            assert about["provenance"]["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
            assert about["provenance"].get("commit") == (record.provenance.commit if known else None)
            # Eight bits round once more: the record's scores are not those of that file.
            assert about.get("scores") == (record.scores if known and values != "int8" else None)
    assert pack(source, tmp_path / "usual") == (tmp_path / "fp16").stat().st_size


def test_what_cannot_be_packed_is_refused_and_nothing_written(folder, tmp_path):
    with pytest.raises(ValueError, match="a folder; name the file to write in it"):
        pack(folder / "lstm.safetensors", tmp_path)
    source = shutil.copy(folder / "lstm.safetensors", tmp_path / "model")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(ValueError, match="take the place of the trained model"):
        pack(source, tmp_path / "link")
    toy = experiments.recipe("toy-dense", "smoke")
    save_model(tmp_path / "toy", experiments.ToyModel(**toy.model), None,
               {"benchmark": "toy", "model": toy.model, "task": toy.task})
    with pytest.raises(ValueError, match="toy: neither a recogniser nor a captioner"):
        pack(tmp_path / "toy", tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "toy"]


def test_neither_loading_nor_transcribing_imports_torch(folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", wave(), SAMPLE_RATE)
    code = ("import sys; from hlstm_src import load_compact; load_compact(sys.argv[1]).transcribe(sys.argv[2])\n"
            "print([m for m in ('torch', 'pandas', 'matplotlib', 'pydantic') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, folder / "gru.safetensors", tmp_path / "a.wav"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 999))
def test_a_search_that_keeps_all_prefixes_finds_the_likeliest_text(frames, labels, seed):
    """Against all paths, each of which is one text: the text whose paths are likeliest together."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(labels), frames)
    total = {}
    for path in itertools.product(range(labels), repeat=frames):
        kept = tuple(k for k, _ in itertools.groupby(path) if k)
        total[kept] = total.get(kept, 0) + np.prod([probs[t, k] for t, k in enumerate(path)])
    best = max(total, key=total.get)
    found = beam_search(np.log(probs), beam=4 ** frames, least=1e-300)
    assert found == "".join(ALPHABET[k] for k in best)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(0, 999))
def test_greedy_is_the_one_of_training(frames, seed):
    probs = np.random.default_rng(seed).normal(size=(frames, len(ALPHABET))).astype(np.float32)
    probs[:, :1] += 2
    want = scores.greedy(torch.from_numpy(probs)[None], torch.tensor([frames]))[0]
    assert greedy(probs, ALPHABET) == want


def test_transcribe_does_what_it_can_and_says_what_it_could_not(folder, tmp_path):
    good, silent, text = tmp_path / "good.wav", tmp_path / "silent.wav", tmp_path / "text.wav"
    soundfile.write(good, np.stack([wave(seed=3)] * 2, 1), 44_100)
    soundfile.write(silent, np.zeros(8000), 8000)
    text.write_text("no sound")
    model = ["--model", str(folder / "lstm.safetensors")]
    call = CliRunner().invoke
    done = call(app, ["transcribe", *map(str, (good, text, silent, tmp_path / "none.wav")), "--json", *model])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and [row["file"] for row in rows] == [str(p) for p in (good, text, silent,
                                                                                     tmp_path / "none.wav")]
    assert ["error" in row for row in rows] == [False, True, False, True]
    assert rows[0]["text"] == load_compact(folder / "lstm.safetensors").transcribe(good)
    assert call(app, ["transcribe", str(good), *model]).exit_code == 0


def test_sound_of_minutes_is_heard_piece_by_piece(folder):
    recogniser = load_compact(folder / "hlstm.safetensors")
    heard = []
    recogniser.log_probs = lambda samples, real=recogniser.log_probs: heard.append(len(samples)) or real(samples)
    recogniser.transcribe(wave(61))
    assert len(heard) >= 4 and max(heard) <= 20 * SAMPLE_RATE and sum(heard) == 61 * SAMPLE_RATE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_two_threads_go_on_in_a_forked_process(folder):
    """The threads of a pool stay behind when a process is forked."""
    code = ("import os, signal, sys, numpy as np; from hlstm_src import load_compact\n"
            "engine, x = load_compact(sys.argv[1], threads=2), np.ones(8000, np.float32)\n"
            "want = engine.log_probs(x)\n"
            "if not (child := os.fork()):\n"
            "    signal.alarm(60)\n"
            "    os._exit(0 if (engine.log_probs(x) == want).all() else 1)\n"
            "print(os.waitpid(child, 0)[1])")
    done = subprocess.run([sys.executable, "-c", code, folder / "hlstm.safetensors"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip() == "0"


def test_a_search_needs_a_prefix(folder):
    with pytest.raises(ValueError, match="beam=0"):
        load_compact(folder / "lstm.safetensors").transcribe(wave(), beam=0)
    with pytest.raises(UserError, match="^samples: "):
        load_compact(folder / "lstm.safetensors").transcribe(b"sound.wav")      # no path, no samples


def test_the_recogniser_in_the_repository_is_the_one_of_its_record():
    record = records.read(QUICK.with_suffix(".json"))
    found = load_compact(RECOGNISER)
    assert found.metadata["provenance"]["source_sha256"] == record.model.sha256
    assert found.metadata["scores"] == record.scores
    assert found.log_probs(wave()).tobytes() == load_compact(QUICK).log_probs(wave()).tobytes()


@pytest.mark.real
def test_it_transcribes_the_test_set_with_the_error_rate_of_its_record(real_data, tmp_path):
    """From the command line, 130 files; only where the archive is."""
    prepare(tmp_path / "an4", real_data / "an4_sphere.tar.gz")
    test, record = SpeechCorpus(tmp_path / "an4").split("test"), records.read(QUICK.with_suffix(".json"))
    done = subprocess.run([sys.executable, "-m", "hlstm_src", "transcribe", "--json", *(str(u.path) for u in test)],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    heard = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert heard == [sample["hypothesis"] for sample in record.samples]
    assert scores.error_rates([u.transcript for u in test], heard)["wer"] == record.scores["wer"]
