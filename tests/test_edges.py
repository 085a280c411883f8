"""Edges: where a share is no whole epoch, a store holds too much, a folder has another order, or nothing is there."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hlstm_src import HLSTM, count, records
from hlstm_src.corpora import CaptionCorpus, CorpusError, SpeechCorpus, length_batches
from hlstm_src.counting import zero_shares
from hlstm_src.masks import live_count
from hlstm_src.rivals import Gradual, Rewiring, rival
from hlstm_src.schedule import GrowPruneSchedule
from hlstm_src.toy import Interlock, ToyTask
from tests.recorded import make
from tests.speech import make_corpus
from tests.test_caption_corpus import store as feature_store
from tests.test_growprune import Run, matrices

# Growing and pruning ----------------------------------------------------------------------------------------

def test_a_density_of_one_is_a_goal_and_to_stand_on_the_goal_is_not_to_be_sparser():
    for density, before in ((1, 1.0), (0.5, 0.5)):
        masks, gradients = matrices([(8, 8)], before, seed=1)
        schedule = GrowPruneSchedule(1, 0, rounds=1, retrain_epochs=1, density=density, tolerance=None)
        assert masks.density() == before
        first, second = (schedule.end_epoch(masks, gradients, 1.0) for _ in range(2))
        assert first.note == "before pruning" and first.density == second.density == before and schedule.done


# Rivals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, first, last", [(14, 4, 10), (11, 3, 8), (10, 3, 7), (4, 2, 3), (2, 1, 1)])
def test_gradual_pruning_goes_from_one_epoch_to_another_also_where_the_shares_are_no_whole_epochs(epochs, first, last):
    """Shares of the training are rounded down: the first pruning is after the epoch behind a quarter of it."""
    made = Run(Gradual(epochs, density=0.1), [1.0] * epochs, density=1.0).finish()
    assert [k for k, event in enumerate(made.events, 1) if event] == list(range(first, last + 1))
    assert made.events[last - 1].nonzero == made.masks.count()[0] == sum(
        live_count(mask.shape, 0.1) for mask in made.masks.masks.values())


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_a_frozen_matrix_is_not_rewired_and_stops_nobody(name):
    made = Run(rival(name, epochs=12, density=0.5)[1], [1.0] * 12)
    made.model[0].weight.requires_grad_(False)
    before = {n: m.clone() for n, m in made.masks.masks.items()}
    made.masks.mask_gradients_()
    generator = torch.Generator().manual_seed(0)
    made.gradients.sums = {"2.weight": torch.randn(5, 8, generator=generator)}
    event = made.schedule.end_epoch(made.masks, made.gradients, 1.0)
    assert made.masks.masks["0.weight"].equal(before["0.weight"]) and event.phase == "rewire"
    assert not made.masks.masks["2.weight"].equal(before["2.weight"])


def test_the_event_of_a_rewiring_tells_how_many_moved_in_all_matrices():
    made = Run(Rewiring(12, growth="random"), [1.0] * 12, density=0.5)
    made.step()
    share = made.schedule._moves(1)
    assert made.events[0].note == f"{round(share * 24) + round(share * 20)} connections moved"


# Counting ---------------------------------------------------------------------------------------------------

def test_no_sequence_at_all_costs_nothing():
    made = count(nn.Linear(3, 2), seq_len=torch.tensor([], dtype=torch.long))
    assert (made.macs, made.elementwise, made.activations, made.params) == (0, 0, 0, 8)


def test_a_convolution_or_norm_that_is_the_whole_model_is_counted_at_all_its_positions():
    made = count(nn.Conv1d(2, 3, 4), positions={"weight": 6})
    assert (made.macs, made.activations, made.elementwise) == (6 * 24, 6 * 3, 0)
    made = count(nn.BatchNorm1d(3), positions={"weight": 6})
    assert (made.macs, made.activations, made.elementwise) == (0, 6 * 3, 2 * 6 * 3)


@pytest.mark.parametrize("both", [False, True])
def test_one_gate_may_be_much_wider_than_all_others_together(both):
    layer, x = HLSTM(5, 3, gate_width=(12, 1, 1, 1), bidirectional=both), torch.randn(4, 2, 5)
    found = zero_shares(layer, [(x,)])
    assert {name: tuple(share.shape) for name, share in found.items()} == {
        name: (1, p.shape[1]) for name, p in layer.named_parameters() if name.startswith("weight_gate")}


# Records ----------------------------------------------------------------------------------------------------

def test_a_model_without_a_record_is_taken_as_it_is(tmp_path):
    (tmp_path / "r.safetensors").touch()
    records.check_model(tmp_path / "r.safetensors")


def test_only_the_model_that_a_record_names_is_held_against_it(tmp_path):
    for name in ("r.safetensors", "r.onnx"):
        (tmp_path / name).write_bytes(b"other")
    make("ds2-lstm5", "desk", model={"file": "r.safetensors", "sha256": "0" * 64, "bytes": 1}).save(tmp_path / "r.json")
    records.check_model(tmp_path / "r.onnx")
    with pytest.raises(records.RecordError, match="not the model"):
        records.check_model(tmp_path / "r.safetensors")


def test_seeds_are_whole_numbers_that_every_generator_takes(tmp_path):
    assert records.path_of("a", "desk", 2 ** 31 - 1, tmp_path).name == f"seed{2 ** 31 - 1}.json"
    with pytest.raises(records.RecordError, match="a seed is a whole number from 0 to 2147483647"):
        records.path_of("a", "desk", 2 ** 31, tmp_path)


def test_records_come_by_experiment_and_seed_whatever_the_order_in_their_folder(store, monkeypatch):
    root = store(*(make(name, "desk", seed) for name in ("b", "a", "a-long") for seed in (2, 0, 11, 1)))
    found = Path.glob
    for turn in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "glob", lambda path, pattern, turn=turn: turn(found(path, pattern)))
        assert [(r.experiment, r.seed) for r in records.find("desk", root=root)] == [
            (name, seed) for name in ("a", "a-long", "b") for seed in (0, 1, 2, 11)]
        assert [(r.experiment, r.seed) for r in records.find("desk", "a", root)] == [("a", k) for k in (0, 1, 2, 11)]


def test_a_record_is_not_read_in_the_place_of_another(tmp_path):
    make("ds2-lstm5", "desk", 1).save(records.path_of("ds2-lstm5", "desk", 0, tmp_path))
    with pytest.raises(records.RecordError, match="seed0.json: this record belongs at .*seed1.json"):
        records.read_at("ds2-lstm5", "desk", 0, tmp_path)


def test_what_reads_like_the_head_of_another_file_is_no_other_file_to_the_fingerprint(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a\n")
    two.write_text("b\n")
    both = records.fingerprint({}, "corpus", [one, two])
    for between in ("two.py", "\ntwo.py\n", "\ntwo.py 2\n"):
        one.write_text(f"a\n{between}b\n")
        assert records.fingerprint({}, "corpus", [one]) != both


def test_provenance_tells_of_this_process_and_of_the_locked_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path.resolve())
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(37)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 23)
    taken = records.provenance("an4", "4")
    assert taken.threads == 23 and taken.lock_sha256 == "unknown"
    assert taken.cores == 37 if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert (taken.commit, taken.dirty) == ("unknown", True)            # nobody knows what it was made from
    (tmp_path / "requirements.lock").write_bytes(b"torch==1\n")
    assert records.provenance("an4", "4").lock_sha256 == hashlib.sha256(b"torch==1\n").hexdigest()


# The toy ----------------------------------------------------------------------------------------------------

def test_a_single_lever_that_is_read_wrongly_is_one_error_of_many():
    class Wrong(nn.Module):
        def forward(self, x):
            logits = 2.0 * Interlock().settings((x > 0).long()) - 1
            logits[:, :, 0] *= -1
            return logits
    assert ToyTask(held_out=32).evaluate(Wrong(), torch.device("cpu"), "test") == {"error": pytest.approx(100 / 4)}


def test_what_is_held_out_is_that_of_the_recorded_runs():
    """Records of history were scored on these sequences."""
    task = ToyTask(held_out=5)
    for number, split in enumerate(("valid", "test")):
        bits = task.rules.draw(5, torch.Generator().manual_seed(number))
        assert task.splits[split][0].equal(2.0 * bits - 1) and task.splits[split][1].equal(task.rules.settings(bits))


# Corpora ----------------------------------------------------------------------------------------------------

def test_a_manifest_without_a_hash_vouches_for_nothing(tmp_path):
    folder = make_corpus(tmp_path / "tones")
    manifest, about = folder / "manifest.csv", folder / "corpus.json"
    u = SpeechCorpus(folder).utterances[0]
    manifest.write_text(manifest.read_text().replace(u.sha256, ""), newline="\n")
    about.write_text(json.dumps(json.loads(about.read_text())
                                | {"manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}))
    corpus = SpeechCorpus(folder)
    with pytest.raises(CorpusError, match="SHA-256 differs from the manifest"):
        corpus.audio(corpus.utterances[0])


def test_utterances_of_equal_length_keep_their_order():
    assert length_batches([1.0, 2.0] * 100, 200) == [[*range(0, 200, 2), *range(1, 200, 2)]]


def test_a_store_with_more_features_than_pictures_is_refused(tmp_path):
    from tests.captions import make_corpus as make_pictures
    folder = make_pictures(tmp_path / "squares")
    feature_store(folder, rows=22)
    with pytest.raises(CorpusError, match="22 features for 21 pictures"):
        CaptionCorpus(folder, "vgg16")
