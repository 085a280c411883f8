"""Recipes into records: trained once, anew when recipe or code changes, and scored again to the last digit."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from fnmatch import fnmatch

import pytest
import torch

from hlstm_src import benchmarks, experiments, profiles, records, rivals
from hlstm_src.audio import ALPHABET
from hlstm_src.corpora import CorpusError, SpeechCorpus
from hlstm_src.decoding import WordList, beam_search
from hlstm_src.deepspeech2 import DeepSpeech2, spectrogram
from hlstm_src.files import alone
from hlstm_src.masks import density_of, save_tensors
from hlstm_src.schedule import Dense
from hlstm_src.scores import error_rates
from hlstm_src.tasks import SpeechTask
from hlstm_src.toy import Interlock
from tests.speech import make_corpus, use_corpus

NAMES = "ds2-lstm5", "ds2-hlstm3", "ds2-hlstm3-gp"            # those that are trained here
GRID = tuple(name for name in experiments.CATALOGUE if name.startswith("ds2-"))
TOYS = tuple(name for name in experiments.CATALOGUE if name.startswith("toy-"))
RUNS = [(name, 0) for name in NAMES] + [("ds2-lstm5", 1)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return SpeechCorpus(make_corpus(tmp_path_factory.mktemp("tones")))


@pytest.fixture(autouse=True)
def smoke(monkeypatch, corpus):
    """The profile smoke on the tones, and long enough to learn some of them."""
    monkeypatch.setattr(profiles, "PROFILES", dict(profiles.PROFILES))
    use_corpus(corpus.folder, epochs=8, lr=2e-2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    """The folder of results in which each experiment has been run once, and one with another seed."""
    folder = tmp_path_factory.mktemp("made") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "PROFILES", dict(profiles.PROFILES))
        patch.setenv("HLSTM_RESULTS", str(folder))
        use_corpus(corpus.folder, epochs=8, lr=2e-2)
        for name, seed in RUNS:
            experiments.run(name, "smoke", seed, progress=False)
    return folder


@pytest.fixture
def results(made, tmp_path, monkeypatch):
    """A copy of those results, which a test may spoil."""
    shutil.copytree(made, tmp_path / "results")
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def trainings(monkeypatch):
    """The calls that trained."""
    calls, train = [], experiments.Trainer.train
    monkeypatch.setattr(experiments.Trainer, "train", lambda trainer: calls.append(trainer) or train(trainer))
    return calls


def run(name="ds2-lstm5", seed=0, profile="smoke", **options):
    return experiments.run(name, profile, seed, progress=False, **options)


def flip(file):
    """Damages a model file by one bit of its last weight."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def plain(record):
    """What a record says of the run, apart from when and how fast it was."""
    data = record.model_dump(exclude={"provenance"})
    for row in data["history"]:
        del row["seconds"]
    return data


def test_a_run_writes_a_valid_record_and_a_model_and_leaves_nothing_else(results, corpus):
    names = sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file())
    assert names == sorted(f"local/smoke/{name}/seed{seed}.{end}" for name, seed in RUNS
                           for end in ("json", "safetensors"))
    assert {(r.experiment, r.seed) for r in records.find("smoke")} == set(RUNS)
    for record in records.find("smoke"):
        model = records.path_of(record.experiment, "smoke", record.seed).with_name(record.model.file)
        assert record.model.bytes == model.stat().st_size
        assert record.model.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
        assert record.provenance.corpus == "tones" and record.provenance.corpus_sha256 == corpus.sha256
        assert record.key == experiments.key_of(experiments.recipe(record.experiment, "smoke"), corpus)
        assert record.recipe == json.loads(json.dumps(asdict(experiments.recipe(record.experiment, "smoke"))))
        assert [row.epoch for row in record.history] == list(range(8))
        assert record.provenance.precision == "fp32"
        assert record.provenance.seconds == pytest.approx(sum(row.seconds for row in record.history))
        assert [s["id"] for s in record.samples] == [u.id for u in corpus.split("test")]
        assert record.scores["utterances"] == len(record.samples)


@pytest.mark.parametrize("name, seed", RUNS)
def test_the_stored_model_scores_what_the_record_says(results, corpus, name, seed):
    record = records.read(records.path_of(name, "smoke", seed))
    rates, heard = experiments.evaluate(records.path_of(name, "smoke", seed).with_suffix(".safetensors"), corpus)
    assert rates == record.scores and heard == [s["hypothesis"] for s in record.samples]
    assert any(heard), "it hears nothing, so equal scores say nothing"
    valid, _ = experiments.evaluate(records.path_of(name, "smoke", seed).with_suffix(".safetensors"), corpus, "valid")
    assert {k: valid[k] for k in record.valid_scores} == record.valid_scores


def test_a_network_that_learns_from_everything_has_no_validation_scores(results):
    """The names say what they are, and no table can take them for scores on speakers whom it never heard."""
    record = run("ds2-lstm5-long-all")
    assert record.valid_scores == {} and "wer" in record.scores
    assert {name for row in record.history for name in row.scores} == {"wer_learned", "cer_learned"}


def test_it_is_the_stored_file_that_is_scored(results, monkeypatch):
    """If storing turns the recogniser deaf, the record says so."""
    save = experiments.save_model

    def deafened(file, model, *args):
        model.output.bias.data[0] += 100                           # nothing but blanks
        save(file, model, *args)
        model.output.bias.data[0] -= 100
    monkeypatch.setattr(experiments, "save_model", deafened)
    record = run(force=True)
    assert {s["hypothesis"] for s in record.samples} == {""} and record.scores["wer"] == 100
    assert record.valid_scores == {"wer": 100, "cer": 100}
    assert record.history[-1].scores["cer"] < 100


def test_evaluating_the_first_few_is_evaluating_these(results, corpus):
    file = records.path_of("ds2-lstm5", "smoke", 0).with_suffix(".safetensors")
    _, heard = experiments.evaluate(file, corpus)
    rates, few = experiments.evaluate(file, corpus, limit=2)
    assert few == heard[:2] and rates["utterances"] == 2


def test_a_second_call_returns_the_record_and_does_not_train(results, trainings):
    for name, seed in RUNS:
        path = records.path_of(name, "smoke", seed)
        before = path.read_bytes()
        assert run(name, seed) == records.read(path)
        assert path.read_bytes() == before
    assert not trainings


def test_the_same_seed_gives_the_same_and_another_seed_something_else(results, trainings):
    for name in ("ds2-lstm5", "ds2-hlstm3-gp"):
        before = records.read(records.path_of(name, "smoke", 0))
        assert plain(run(name, force=True)) == plain(before)
    assert len(trainings) == 2
    one, other = (records.read(records.path_of("ds2-lstm5", "smoke", seed)) for seed in (0, 1))
    assert one.key == other.key and one.model.sha256 != other.model.sha256
    assert [row.loss for row in one.history] != [row.loss for row in other.history]


def test_another_recipe_another_corpus_and_changed_code_train_anew(results, trainings, corpus, tmp_path, monkeypatch):
    before = run()
    use_corpus(corpus.folder, epochs=2, lr=2e-2)
    second = run()
    assert len(trainings) == 1 and second.key != before.key and len(second.history) == 2
    assert records.read(records.path_of("ds2-lstm5", "smoke", 0)) == second

    code = [shutil.copy(path, tmp_path / path.name) for path in experiments.CODE]
    monkeypatch.setattr(experiments, "CODE", code)
    assert run().key == second.key and len(trainings) == 1, "the same code elsewhere is the same code"
    with open(code[0], "a") as file:
        file.write("\n# changed\n")
    third = run()
    assert len(trainings) == 2 and third.key != second.key

    use_corpus(make_corpus(tmp_path / "others", seed=1), epochs=2, lr=2e-2)
    assert len(trainings) == 2 and run().key != third.key and len(trainings) == 3


@pytest.mark.parametrize("spoil", [
    lambda record: record.with_suffix(".safetensors").unlink(),
    lambda record: flip(record.with_suffix(".safetensors")),
    lambda record: record.write_text("{"),
    lambda record: record.write_text(record.read_text().replace('"schema_version": 1', '"schema_version": 0')),
], ids=["no model", "damaged model", "no JSON", "older schema"])
def test_scratch_records_that_cannot_be_used_are_made_anew(results, trainings, spoil):
    path = records.path_of("ds2-lstm5", "smoke", 0)
    before = records.read(path)
    spoil(path)
    assert plain(run()) == plain(before)
    assert len(trainings) == 1 and records.read(path).key == before.key


def test_kept_records_are_history_and_made_anew_on_request_only(results, trainings, tmp_path, corpus):
    use_corpus(corpus.folder, "desk", kept=True, epochs=1)
    first = run(profile="desk")
    path = records.path_of("ds2-lstm5", "desk", 0)
    assert path == results / "desk/ds2-lstm5/seed0.json" and len(trainings) == 1
    use_corpus(tmp_path / "nowhere", "desk", kept=True, epochs=2)  # another recipe, and no corpus at all
    assert run(profile="desk") == first and len(trainings) == 1
    flip(path.with_suffix(".safetensors"))
    with pytest.raises(records.RecordError, match=r"seed0.safetensors: not the model that seed0.json .*--force"):
        run(profile="desk")
    path.with_suffix(".safetensors").unlink()
    assert run(profile="desk") == first and len(trainings) == 1
    use_corpus(corpus.folder, "desk", kept=True, epochs=2)
    again = run(profile="desk", force=True)
    assert len(trainings) == 2 and again.key != first.key and records.read(path) == again
    path.write_text("{")
    with pytest.raises(records.RecordError, match="seed0.json: cannot be read as JSON"):
        run(profile="desk")
    assert path.read_text() == "{" and len(trainings) == 2


def test_a_failed_run_leaves_the_old_record_and_a_checkpoint(results, trainings, corpus, monkeypatch):
    before, path = run(), records.path_of("ds2-lstm5", "smoke", 0)

    def fail(*args):
        raise OSError("the disk is full")
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "save_model", fail)
        with pytest.raises(OSError):
            run(force=True)
    assert records.read(path) == before and path.with_suffix(".checkpoint").exists()
    steps = []
    monkeypatch.setattr(experiments.Trainer, "_step", lambda *args: steps.append(args))
    assert plain(run(force=True)) == plain(before) and not steps, "a finished training was not taken up again"
    assert not path.with_suffix(".checkpoint").exists()


def test_a_run_that_ends_while_it_is_scored_leaves_record_and_model_as_they_were(results, trainings, corpus,
                                                                                 monkeypatch):
    use_corpus(corpus.folder, "desk", kept=True, epochs=1)
    first, path = run(profile="desk"), records.path_of("ds2-lstm5", "desk", 0)
    model = path.with_suffix(".safetensors").read_bytes()
    use_corpus(corpus.folder, "desk", kept=True, epochs=2)

    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks.Speech, "results", stop)
        with pytest.raises(KeyboardInterrupt):
            run(profile="desk", force=True)
    assert run(profile="desk") == first and path.with_suffix(".safetensors").read_bytes() == model
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".checkpoint", ".json", ".safetensors"]
    steps = []
    monkeypatch.setattr(experiments.Trainer, "_step", lambda *args: steps.append(args))
    assert len(run(profile="desk", force=True).history) == 2 and not steps


def test_a_checkpoint_that_outlived_its_record_is_not_gone_on_with(results, trainings, capsys):
    """A run may be killed when its record is written and its checkpoint not yet removed."""
    path = records.path_of("ds2-lstm5", "smoke", 0)
    before, checkpoint = records.read(path), path.with_suffix(".checkpoint")
    steps, step = [], experiments.Trainer._step
    experiments.trainer("ds2-lstm5", "smoke", checkpoint=checkpoint, key=before.key, progress=False).train()
    os.utime(checkpoint, ns=(0, 0))
    trainings.clear()
    assert run() == before and not trainings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.Trainer, "_step", lambda *args: steps.append(args) or step(*args))
        assert plain(run(force=True)) == plain(before) and steps
    assert "older than the record; set aside as seed0.old" in capsys.readouterr().err
    assert not checkpoint.exists()


def test_the_record_of_another_seed_is_not_taken_for_ones_own(results, trainings, corpus):
    path = records.path_of("ds2-lstm5", "smoke", 0)
    for end in (".json", ".safetensors"):
        shutil.copy(path.with_suffix(end), path.with_name(f"seed7{end}"))
    assert run(seed=7).seed == 7 and len(trainings) == 1
    use_corpus(corpus.folder, "desk", kept=True, epochs=1)
    run(profile="desk")
    kept = records.path_of("ds2-lstm5", "desk", 0)
    shutil.copy(kept, kept.with_name("seed7.json"))
    with pytest.raises(records.RecordError, match="seed7.json: this record belongs at .*seed0.json"):
        run(profile="desk", seed=7)


def test_two_processes_do_not_train_one_run(results, trainings):
    path = records.path_of("ds2-lstm5", "smoke", 0)
    with alone(path):
        run()                                                      # to read what there is disturbs nobody
        with pytest.raises(experiments.TrainingError, match="ds2-lstm5 smoke seed 0: another process is training it"):
            run(force=True)
        assert not trainings
    before = records.read(path)
    assert plain(run(force=True)) == plain(before) and len(trainings) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        f"seed{seed}.{kind}" for name, seed in RUNS if name == "ds2-lstm5" for kind in ("json", "safetensors"))


def test_growing_and_pruning_leave_a_sparse_model_and_a_record_of_it(results):
    record = records.read(records.path_of("ds2-hlstm3-gp", "smoke", 0))
    model, masks, about = experiments.load(records.path_of("ds2-hlstm3-gp", "smoke", 0).with_suffix(".safetensors"))
    assert about["experiment"] == "ds2-hlstm3-gp" and about["seed"] == 0 and not model.training
    parameters = dict(model.named_parameters())
    assert masks.keys() == {name for name in parameters if name.startswith("rnns.") and ".weight_" in name}
    assert all((parameters[name][~mask] == 0).all() for name, mask in masks.items())
    live, total = (sum(int(f(m)) for m in masks.values()) for f in (torch.Tensor.sum, torch.Tensor.numel))
    assert (record.counts.cell.nonzero_params, record.counts.cell.params) == (live, total) and live == total / 2
    assert record.phases[-1].nonzero == live and record.phases[-1].density == live / total
    assert record.history[-1].density == live / total and len(record.history[-1].densities) == len(masks)
    assert [row.phase for row in record.phases] == ["grow", "train", "prune"]


def test_dense_records_count_every_weight(results):
    """Bidirectional layers, 16 wide, behind convolutions of 4 channels: 21 bands * 4 inputs."""
    first, later = 2 * 4 * 16 * (84 + 16), 2 * 4 * 16 * (16 + 16)
    weights = {"ds2-lstm5": first + 4 * later, "ds2-hlstm3": first + 2 * later + 3 * 2 * 4 * 16 * 16}
    for name, expected in weights.items():
        record = records.read(records.path_of(name, "smoke", 0))
        cell, model = record.counts.cell, record.counts.model
        assert cell.params == cell.nonzero_params == cell.macs == expected and cell.flops == 2 * expected
        # A frame of 40 ms: twice 61 bands of the first convolution, 21 of the second, and the letters.
        assert model.macs == expected + 2 * 61 * 4 * 41 * 11 + 21 * 4 * 4 * 21 * 11 + 29 * 16
        assert not record.phases and record.history[0].density is None


def test_log_probabilities_for_a_picture_are_the_models(results, corpus):
    model, _, _ = experiments.load(records.path_of("ds2-lstm5", "smoke", 0).with_suffix(".safetensors"))
    wave = corpus.audio(corpus.split("test")[0])
    found = experiments.log_probs(model, wave)
    with torch.no_grad():
        expected, lengths = model(*spectrogram(wave[None], torch.tensor([len(wave)])))
    assert found.shape == (int(lengths[0]), 29) and torch.equal(found, expected[0])


@pytest.mark.parametrize("about", [{}, {"model": {"labels": 3, "width": 1}}, {"model": {"labels": 3, "cell": "rnn"}},
                                   {"model": {"labels": 3, "layers": 1, "hidden": 4, "channels": 2}},
                                   {"model": []}, {"benchmark": "captions", "model": []},
                                   {"benchmark": "toy", "model": {"inputs": 2, "outputs": 2, "hidden": 10 ** 9}},
                                   {"benchmark": "toy", "model": {"inputs": 2, "outputs": 2, "hidden": 2}}])
def test_files_that_hold_no_model_are_refused_by_name(tmp_path, about):
    file = tmp_path / "other.safetensors"
    save_tensors(file, {"a": torch.zeros(2)}, about)
    with pytest.raises(ValueError, match="other.safetensors: "):
        experiments.load(file)
    if about.get("benchmark") == "captions":
        with pytest.raises(ValueError, match="other.safetensors: "):
            experiments.open_corpus(file, tmp_path)


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="'ds3': choose one of ds2-lstm5, ds2-lstm4, ds2-gru4"):
        experiments.run("ds3", "smoke")
    with pytest.raises(ValueError, match="'huge': choose one of smoke, laptop, desk, wide, paper"):
        experiments.run("ds2-lstm5", "huge")


def test_a_missing_corpus_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path / "results"))
    use_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="nowhere/corpus.json: no such file"):
        run()
    assert not (tmp_path / "results").exists()


def test_a_corpus_that_a_kept_profile_lacks_is_not_replaced_by_another():
    with pytest.raises(ValueError, match="paper has no second caption corpus"):
        experiments.run("nt-lstm1-flowers", "paper")


def test_what_needs_no_caption_scores_runs_without_their_package(root):
    code = "import sys; sys.modules['pycocoevalcap'] = None; from hlstm_src.__main__ import main; main()"

    def called(*words):
        return subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True)
    assert called("run", "nothing", "--profile", "smoke").stderr.startswith("error: experiment 'nothing': choose one")
    assert called("report", "--profile", "smoke").returncode == 0
    from hlstm_src import caption_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
        with pytest.raises(ModuleNotFoundError, match="pycocoevalcap"):
            caption_scores.cider([["a"]], ["a"])


# --- the interlock ---------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder of results, and no corpus."""
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path / "results"))
    use_corpus(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["toy-gp", "toy-dense", "toy-lstm"])
def test_the_interlock_needs_no_corpus_and_its_file_scores_what_the_record_says(here, trainings, name):
    record = run(name, seed=1)
    file = records.path_of(name, "smoke", 1).with_suffix(".safetensors")
    assert sorted(path.name for path in file.parent.iterdir()) == ["seed1.json", "seed1.safetensors"]
    rates, read = experiments.evaluate(file)
    assert rates == record.scores and experiments.evaluate(file, split="valid")[0] == record.valid_scores
    assert read[0] == [[int(bit) for bit in row] for row in record.samples[0]["hypothesis"]]
    with pytest.raises(ValueError, match="split 'train': the interlock has valid and test"):
        experiments.evaluate(file, split="train")
    rules = Interlock(**record.recipe["task"]["rules"])
    levers = torch.tensor([[int(bit) for bit in row] for row in record.samples[0]["inputs"]])
    wanted = [[int(bit) for bit in row] for row in record.samples[0]["reference"]]
    assert rules.settings(levers[None])[0].tolist() == wanted
    assert record.provenance.corpus == "interlock" and record.provenance.corpus_sha256 == rules.sha256
    assert run(name, seed=1) == record and len(trainings) == 1
    model, masks, about = experiments.load(file)
    assert experiments.counts(model, masks) == record.model_dump()["counts"] and about["benchmark"] == "toy"


def test_a_run_that_is_watched_is_the_recorded_one(here):
    record, seen = run("toy-gp"), []
    watched = experiments.trainer("toy-gp", "smoke", 0, progress=False,
                                  after_epoch=lambda t: seen.append((t.epoch, t.masks.density())))
    watched.train()
    assert [row["loss"] for row in watched.history] == [row.loss for row in record.history]
    assert [epoch for epoch, _ in seen] == list(range(len(record.history)))
    assert [density for _, density in seen[:-1]] == [row.density for row in record.history[1:]]
    assert seen[-1][1] == record.phases[-1].density


def test_a_recogniser_is_not_scored_without_a_corpus(results):
    with pytest.raises(ValueError, match="seed0.safetensors: a recogniser is scored on a corpus"):
        experiments.evaluate(records.path_of("ds2-lstm5", "smoke", 0).with_suffix(".safetensors"))


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_the_rivals_have_equal_epochs_and_meet_at_one_density(profile, monkeypatch):
    monkeypatch.undo()                                             # the profiles as they are
    sizes, left = profiles.PROFILES[profile].toy, {}
    for name in TOYS:
        trainer = experiments.trainer(name, profile, progress=False)
        assert trainer.schedule.epochs_left == sizes.epochs
        left[name] = sum(p.numel() for p in trainer.model.parameters())
        settings = trainer.settings.lr, len(trainer.task.batches(0)), trainer.task.batch
        assert settings == (sizes.lstm_lr if name == "toy-lstm" else sizes.lr, sizes.length, sizes.batch)
    assert {left[name] for name in TOYS if name not in ("toy-lstm", "toy-small-dense")} == {left["toy-dense"]}
    assert abs(left["toy-lstm"] / left["toy-dense"] - 1) < 0.1
    sparse = experiments.trainer("toy-set", profile, progress=False)
    kept = rivals.parameters_left(sparse.model, sparse.masks)
    assert abs(left["toy-small-dense"] / kept - 1) < 0.25


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_recognisers_train_for_equal_epochs_and_the_small_ones_are_alike(profile, monkeypatch):
    monkeypatch.undo()
    sizes, cells, live = profiles.PROFILES[profile].speech, {}, {}
    for name in GRID:
        made = experiments.recipe(name, profile)
        with torch.device("meta"):
            network = DeepSpeech2(**made.model)
        masked = {n: p.numel() for n, p in network.named_parameters() if fnmatch(n, made.masked) and p.dim() > 1}
        cells[name] = sum(masked.values())
        density, schedule = None, Dense(**made.schedule) if "rival" not in made.schedule else None
        if schedule is None:
            density, schedule = rivals.rival(made.schedule["rival"], **{k: v for k, v in made.schedule.items()
                                                                        if k != "rival"})
        times = {"long": 2, "longer": 4}.get(name.removesuffix("-all").rsplit("-", 1)[1], 1)
        assert schedule.epochs_left == sizes.epochs * times
        assert made.task.get("everything", False) == name.endswith("-all")
        twice = name.endswith("-twice")
        assert made.task.get("harder") == (schedule.epochs_left // 4 if times > 1 or twice else None)
        assert made.task.get("agree") == (0.2 if twice else None)
        assert (density is None) == (type(schedule) is Dense)
        live[name] = sum(n * density_of(m, made.schedule.get("density", 1)) for m, n in masked.items()
                         if m.startswith("rnns."))
    most = cells["ds2-lstm5"] / (40 if profile == "wide" else 23.5)                # the paper's factor of FLOPs
    for name in GRID:
        if "compact" in name:
            assert (0.8 if profile == "smoke" else 0.9) * most < live[name] <= most       # blocks are large there
        elif "small" in name and profile not in ("smoke", "laptop"):      # there a unit more or less is a large step
            assert abs(cells[name] / most - 1) < 0.05
    assert live["ds2-hlstm3-medium-gp-gradual-long"] <= cells["ds2-hlstm3"] * sizes.accurate
    if profile == "desk":
        assert abs(50_380_800 / live["ds2-hlstm3-medium-gp-gradual-long"] - 40) < 0.001        # the paper's LSTM x5
    assert live["ds2-hlstm3-gp"] == live["ds2-hlstm3-prune"] == cells["ds2-hlstm3"] * sizes.accurate
    fast = experiments.recipe("ds2-hlstm3-fast", profile)
    assert fast.schedule["structure"] == "block16" and cells["ds2-hlstm3-fast"] > cells["ds2-hlstm3"]
    assert fast.schedule["density"] == {"rnns.*": sizes.fast, "convolutions.*": sizes.convolutions}
    assert profiles.PROFILES[profile].kept == (profile in ("desk", "wide", "paper"))


def test_no_two_recipes_share_a_key(corpus, monkeypatch):
    monkeypatch.undo()
    keys = {experiments.key_of(experiments.recipe(name, profile), corpus) for name in GRID
            for profile in profiles.PROFILES}
    assert len(keys) == len(GRID) * len(profiles.PROFILES)
    keys = {experiments.key_of(experiments.recipe(name, profile), corpus) for name in TOYS
            for profile in ("smoke", "laptop")}
    assert len(keys) == 2 * len(TOYS)


def test_the_paper_profile_is_the_papers_size():
    models = {name: experiments.recipe(name, "paper").model for name in NAMES}
    assert {m["hidden"] for m in models.values()} == {800} and {m["channels"] for m in models.values()} == {32}
    assert [models[name]["layers"] for name in NAMES] == [5, 3, 3]
    assert {m["stride"] for m in models.values()} == {2}


def test_the_search_knows_the_words_of_all_training_transcripts_whatever_the_limit(corpus, monkeypatch):
    torch.manual_seed(0)
    model, task, known = DeepSpeech2(len(ALPHABET), "lstm", 1, 8, 2).eval(), SpeechTask(corpus, limit=2), []
    model.output.weight.data *= 20                                 # so that it hears something
    monkeypatch.setattr(benchmarks, "WordList", lambda texts: known.append(WordList(texts)) or known[0])
    test = corpus.split("test")
    heard, found = benchmarks.Speech.scored(model, task, test)
    words = WordList(u.transcript for u in corpus.split("train"))
    assert known[0].log_prob == words.log_prob and heard == task.transcribe(model, test, torch.device("cpu"))
    said = [beam_search(own.numpy(), words) for own in task.log_probs(model, test, torch.device("cpu"))]
    assert said != heard and found["wer_words"] == error_rates([u.transcript for u in test], said)["wer"]


def test_a_sparse_seed_is_rescaled_before_the_first_step():
    sparse, dense = (experiments.trainer(name, "smoke", progress=False) for name in ("toy-set", "toy-dense"))
    drawn = dict(dense.model.named_parameters())
    for name, p in sparse.masks.parameters.items():
        mask, share = sparse.masks.masks[name], sparse.masks.density(name)
        assert 0 < share < 1
        torch.testing.assert_close(p, torch.where(mask, drawn[name] / share ** 0.5, 0))
