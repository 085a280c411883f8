"""The command line: help, errors of one line, Ctrl-C and going on, scores of stored models."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from hlstm_src import __main__ as command
from hlstm_src import bench, caption_scores, experiments, library, profiles, records
from hlstm_src.corpora import SpeechCorpus
from tests.speech import make_corpus, use_corpus

SIZES = {"epochs": 8, "lr": 2e-2}

# The real command line in a process of its own, with the profile smoke on the corpus named first. In its fourth batch
# it says so with a file and waits, so that a test can press Ctrl-C there.
PROGRAM = f"""
import sys, time
from pathlib import Path
from hlstm_src import __main__ as command, training
from tests.speech import use_corpus
use_corpus(sys.argv.pop(1), **{SIZES!r})
step = training.Trainer._step
def slowly(self, *args):
    value = step(self, *args)
    if self.step == 3 and not Path("training").exists():
        Path("training").touch()
        while not Path("pressed").exists():
            time.sleep(0.05)
    return value
training.Trainer._step = slowly
command.main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("tones"))


@pytest.fixture
def call(corpus, monkeypatch, tmp_path, capsys):
    """Calls the command line in this process: words -> exit code, standard output, standard error."""
    monkeypatch.setattr(profiles, "PROFILES", dict(profiles.PROFILES))
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path / "results"))
    use_corpus(corpus, **SIZES)

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["hlstm", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            command.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err
    return called


def one_line(err: str) -> str:
    """An error on one line, without a traceback."""
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize("words, told", [
    ([], ["run", "evaluate", "report", "doctor"]), (["run"], ["name", "--profile", "--seed", "--force"]),
    (["evaluate"], ["model", "--corpus", "--split", "--limit", "--show"]), (["report"], ["--profile"]),
    (["doctor"], ["Exit code 1"])])
def test_every_command_has_help(words, told):
    terminal = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    shown = CliRunner().invoke(command.app, [*words, "--help"], env=terminal)
    assert shown.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    assert all(word in text for word in told), text


@pytest.mark.parametrize("words, told", [
    (["run", "ds3"], "experiment 'ds3': choose one of ds2-lstm5, ds2-lstm4, ds2-gru4"),
    (["run", "ds2-hlstm3-gp-gradul"], "experiment 'ds2-hlstm3-gp-gradul': did you mean ds2-hlstm3-gp-gradual, "),
    (["run", "ds2-lstm5", "--profile", "huge"], "profile 'huge': choose one of smoke, laptop, desk, wide, paper"),
    (["report", "--profile", "huge"], "choose one of smoke, laptop, desk, wide, paper"),
    (["run", "ds2-lstm5", "--profile", "smoke", "--seed", "-1"], "seed -1: a seed is a whole number from 0 to"),
    (["run", "toy-gp", "--profile", "smoke", "--seed", "99999999999999"], "from 0 to 2147483647"),
    (["bench", "engine", "--quick", "--model", "missing.safetensors"], "missing.safetensors: no such file"),
])
def test_unknown_names_are_one_line_that_lists_the_choices(call, words, told):
    code, out, err = call(*words)
    assert code == 1 and told in one_line(err) and not out


def test_run_lists_the_experiments(call):
    code, out, _ = call("run", "--list")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(experiments.CATALOGUE)
    assert re.fullmatch(r"ds2-lstm5 +DeepSpeech2, LSTM x5, dense", lines[0])


def test_the_module_itself_ends_with_code_1_and_one_line(root):
    done = subprocess.run([sys.executable, "-m", "hlstm_src", "run", "ds3"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "choose one of ds2-lstm5" in one_line(done.stderr) and not done.stdout


@pytest.mark.parametrize("what", ["layer", "masks", "engine", "speech", "training", "captions"])
def test_a_bench_tries_its_file_before_it_measures(call, what, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "interleaved", None)                # to measure would be another error
    code, out, err = call("bench", what, "--json", tmp_path)
    assert code == 1 and f"{tmp_path}: a folder; name a file" in one_line(err) and not out


def test_files_that_are_no_models_are_told_by_name(call, corpus, tmp_path):
    (tmp_path / "text.safetensors").write_text("no model")
    (tmp_path / "empty.safetensors").touch()
    for name, told in (("text.safetensors", "damaged or not"), ("empty.safetensors", "damaged or not"),
                       ("none", "no such file"), (".", "a folder; name a file")):
        code, _, err = call("evaluate", tmp_path / name, "--corpus", corpus)
        assert code == 1 and f"{tmp_path / name}: {told}" in one_line(err)


def test_run_report_and_evaluate_tell_the_same(call, corpus, tmp_path):
    code, out, _ = call("run", "ds2-lstm5", "--profile", "smoke")
    path = records.path_of("ds2-lstm5", "smoke", 0)
    record = records.read(path)
    assert code == 0 and f"wer {record.scores['wer']:.2f} %  cer {record.scores['cer']:.2f} %" in out
    assert f"{record.counts.cell.nonzero_params:,} of {record.counts.cell.params:,}" in out and str(path) in out
    code, again, _ = call("run", "ds2-lstm5", "--profile", "smoke")
    said, _, rest = again.partition("\n")
    assert (code, rest) == (0, out) and "nothing to train" in said and records.read(path) == record

    model = path.with_suffix(".safetensors")
    code, _, err = call("evaluate", model, "--corpus", tmp_path / "nowhere")
    assert code == 1 and "nowhere/corpus.json: no such file" in one_line(err)
    code, out, _ = call("evaluate", model, "--corpus", corpus, "--show", 2)
    assert code == 0 and f"tones test: WER {record.scores['wer']:.4f} %" in out and "5 utterances" in out
    for sample in record.samples[:2]:
        assert f"{sample['id']}\n  said   {sample['reference']}\n  heard  {sample['hypothesis']}\n" in out
    assert record.samples[2]["id"] not in out
    rates, _ = experiments.evaluate(model, SpeechCorpus(corpus), "valid", limit=2)
    code, out, _ = call("evaluate", model, "--corpus", corpus, "--split", "valid", "--limit", 2)
    assert code == 0 and f"tones valid: WER {rates['wer']:.4f} %" in out and "2 utterances" in out
    code, _, err = call("evaluate", model, "--corpus", corpus, "--split", "dev")
    assert code == 1 and "there are: test, train, valid" in one_line(err)

    code, out, _ = call("report", "--profile", "smoke")
    assert code == 0 and "ds2-lstm5" in out and f"{record.scores['wer']:.1f}" in out

    assert call("evaluate", model, "--corpus", corpus, "--show", -1)[0] == 2
    pytest.importorskip("numba")
    packed = tmp_path / "small.compact"
    assert call("pack", model, packed)[0] == 0
    code, _, err = call("pack", packed, tmp_path / "smaller.compact")
    assert code == 1 and f"{packed}: a compact file already" in one_line(err)
    code, _, err = call("pack", model, packed / "below")
    assert code == 1 and f"{packed}: a file stands where a folder is needed" in one_line(err)
    code, _, err = call("evaluate", packed)
    assert code == 1 and f"{packed}: a recogniser is scored on a corpus" in one_line(err)
    code, out, _ = call("evaluate", packed, "--corpus", corpus, "--show", 1)
    assert code == 0 and f"tones test: WER {record.scores['wer']:.4f} %" in out and "5 utterances" in out
    assert f"CER {record.scores['cer']:.4f} %" in out and f"heard  {record.samples[0]['hypothesis']}\n" in out


def test_a_model_that_is_not_the_recorded_one_is_told(call, corpus):
    """One flipped bit of a weight, and the scores would be another's. A file without a record is taken as it is."""
    assert call("run", "ds2-lstm5", "--profile", "smoke")[0] == 0
    model = records.path_of("ds2-lstm5", "smoke", 0).with_suffix(".safetensors")
    data = bytearray(model.read_bytes())
    data[-3] ^= 1
    model.write_bytes(data)
    code, out, err = call("evaluate", model, "--corpus", corpus)
    assert code == 1 and f"{model}: not the model that seed0.json tells of" in one_line(err) and "WER" not in out
    assert "python -m hlstm_src run ds2-lstm5 --profile smoke --seed 0 --force" in err
    alone = model.rename(model.with_name("alone.safetensors"))
    assert call("evaluate", alone, "--corpus", corpus)[0] == 0
    model.with_suffix(".json").unlink()
    alone.rename(model)
    assert call("evaluate", model, "--corpus", corpus)[0] == 0


def test_run_tries_its_place_before_it_trains(call, monkeypatch):
    path = records.path_of("ds2-lstm5", "smoke", 0)
    path.parent.parent.mkdir(parents=True)
    path.parent.touch()
    monkeypatch.setattr(experiments, "Trainer", None)              # to train would be another error
    code, _, err = call("run", "ds2-lstm5", "--profile", "smoke")
    assert code == 1 and f"{path.parent}: a file stands where a folder is needed" in one_line(err)


def test_the_interlock_is_scored_whole(call):
    assert call("run", "toy-gp", "--profile", "smoke")[0] == 0
    model = records.path_of("toy-gp", "smoke", 0).with_suffix(".safetensors")
    for words in (["--limit", 3], ["--show", 1], ["--corpus", model.parent]):
        code, _, err = call("evaluate", model, *words)
        assert code == 1 and "leave out --corpus, --limit and --show" in one_line(err)


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(call, corpus, root, tmp_path):
    """In a real process: it ends with 130 and says how to go on; then it is as if nothing had happened."""
    words = [sys.executable, "-c", PROGRAM, str(corpus), "run", "ds2-lstm5", "--profile", "smoke"]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "training").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        (tmp_path / "pressed").touch()
        err = process.communicate(timeout=300)[1]
    path = records.path_of("ds2-lstm5", "smoke", 0)
    checkpoint = path.with_suffix(".checkpoint")
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert "stopped in epoch 2, batch 1" in last and f"{checkpoint}; the same command goes on from there" in last
    assert [p.name for p in path.parent.iterdir()] == [checkpoint.name] and "Traceback" not in err

    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 1 " not in done.stderr and "epoch 2 " in done.stderr and "epoch 8 " in done.stderr
    resumed = records.read(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["seed0.json", "seed0.safetensors"]
    undisturbed = experiments.run("ds2-lstm5", "smoke", force=True, progress=False)
    assert resumed.model == undisturbed.model and resumed.scores == undisturbed.scores
    assert [row.loss for row in resumed.history] == [row.loss for row in undisturbed.history]


def test_a_terminated_command_unwinds(root, tmp_path):
    """So that it takes along what it started, such as a Java that scores captions."""
    code = ("import time\nfrom hlstm_src import __main__ as command\ndef app():\n    try:\n"
            "        print(1, flush=True)\n        time.sleep(60)\n    finally:\n        print(2, flush=True)\n"
            "command.app = app\ncommand.main()")
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        process.terminate()
        assert process.stdout.readline() == "2\n" and process.wait(30) == 143


def test_file_names_that_are_no_text_are_printed_as_they_are(root, tmp_path):
    code = ("import os\nfrom hlstm_src import __main__ as command\n"
            "command.app = lambda: print(os.fsdecode(b'caf\\xe9.wav'))\ncommand.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, timeout=60,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stdout == b"caf\xe9.wav\n"


def test_doctor_tells_what_is_there_and_what_is_not(call, monkeypatch, tmp_path):
    for folder in (profiles.MINI_SPEECH, profiles.MINI_SCENES, "data/an4", "data/ucm", "data/flowers"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "corpus.json").touch()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setattr(profiles, "PROFILES", {p.name: p for p in map(profiles.PROFILES.get, ("laptop", "desk"))})
    code, out, _ = call("doctor")
    assert code == 0 and "ok       package accelerate" in out and f"torch {torch.__version__}" in out
    assert "missing" not in out and "absent" not in out
    kernels = pytest.importorskip("hlstm_src.compact.kernels")
    for able in (True, False):
        monkeypatch.setattr(caption_scores, "java", lambda able=able: able)
        monkeypatch.setattr(library, "has_bfloat16", lambda able=able: able)
        monkeypatch.setattr(kernels, "cpu_features", lambda able=able: able)
        code, out, _ = call("doctor")
        assert code == 0 and out.count("without  ") == (0 if able else 3)
        assert ("without  products in bfloat16: recipes that ask for it train in float32" in out) is not able

    with monkeypatch.context() as lacking:
        lacking.setattr(importlib.util, "find_spec", lambda name: None if name == "pycocoevalcap" else name)
        code, out, _ = call("doctor")
    assert code == 0 and out.count("absent") == 1
    assert "absent   package pycocoevalcap: for the scores of captions; install it with `pip install '.[scores]'" in out

    (tmp_path / "data/an4/corpus.json").unlink()
    code, out, _ = call("doctor")
    assert code == 0 and "corpus data/an4: `python -m data_prep.an4 --out data/an4` (for the profile desk)" in out

    (tmp_path / "data/ucm/corpus.json").unlink()
    code, out, _ = call("doctor")
    assert code == 0 and "corpus data/ucm: `python -m data_prep.karpathy --archive ARCHIVE --out data/ucm`" in out

    for mini in (profiles.MINI_SPEECH, profiles.MINI_SCENES):
        about = tmp_path / mini / "corpus.json"
        about.rename(tmp_path / "aside")
        code, out, _ = call("doctor")
        assert code == 1 and f"absent   corpus {mini}: it comes with the code" in out
        (tmp_path / "aside").rename(about)

    real = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "jiwer" else real(name))
    code, out, _ = call("doctor")
    assert "missing  package jiwer" in out and "missing: jiwer; install with" in str(code)


def test_what_a_terminal_has_no_sign_for_does_not_stop_a_report(root):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "hlstm_src", "report", "--profile", "smoke"],
                          cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "DeepSpeech2 models" in done.stdout and not done.stderr
