"""The training loop: dormant stays dormant, and a run killed anywhere ends with the bits of one left alone."""

import copy
import itertools
import math
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hlstm_src import training
from hlstm_src.audio import ALPHABET
from hlstm_src.corpora import SpeechCorpus
from hlstm_src.deepspeech2 import DeepSpeech2
from hlstm_src.library import has_bfloat16
from hlstm_src.masks import ConnectionMasks
from hlstm_src.rivals import rival
from hlstm_src.schedule import Dense, GrowPruneSchedule
from hlstm_src.tasks import SpeechTask
from hlstm_src.training import Interrupted, Settings, Trainer, TrainingError, learning_rate
from tests.speech import make_corpus

KEPT, UNDONE = 1000, -1000             # tolerances under which pruning is always, or never, good enough


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return SpeechCorpus(make_corpus(tmp_path_factory.mktemp("tones")))


def dense():
    return Dense(epochs=3)


def grow_and_prune(tolerance=KEPT, **options):
    return GrowPruneSchedule(train_epochs=3, growth_epochs=2, rounds=2, prune_ratio=0.5, retrain_epochs=1,
                             final_epochs=1, tolerance=tolerance, **options)


def trainer(corpus, schedule, checkpoint=None, *, cell="hlstm", precision="fp32", seed=0, key="k", **settings):
    """A small trainer; each call makes the same one. Three batches an epoch."""
    torch.manual_seed(seed)
    model = DeepSpeech2(len(ALPHABET), cell, layers=2, hidden=8, channels=2, dropout=0.2,
                        **({"gate_dropout": 0.2} if cell == "hlstm" else {}))
    masks = None
    if type(schedule) is not Dense:
        masks = ConnectionMasks(model, "rnns.*weight_*", 0.5, torch.Generator().manual_seed(seed))
    settings = Settings(**({"lr": 1e-2, "precision": precision} | settings))
    return Trainer(model, SpeechTask(corpus, batch=4, seed=seed), schedule, settings, masks=masks, seed=seed,
                   checkpoint=checkpoint, key=key, progress=False)


def after_each_step(made, do):
    """Calls `do(made)` after every step of a trainer; returns the trainer."""
    step = made._step

    def stepped(*args):
        value = step(*args)
        do(made)
        return value
    made._step = stepped
    return made


def result(made):
    """What a run came to, apart from the time it took."""
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in made.history]
    masks = {} if made.masks is None else made.masks.masks
    return history, made.phases, made.step, {**made.model.state_dict(), **{f"mask {k}": m for k, m in masks.items()}}


def assert_same(ours, theirs):
    assert ours[:3] == theirs[:3]
    assert ours[3].keys() == theirs[3].keys()
    different = [name for name in ours[3] if not torch.equal(ours[3][name], theirs[3][name])]
    assert not different


def interrupted_run(make, every, number=signal.SIGINT):
    """Runs `make()` with a signal after every so many batches, going on from the checkpoint each time."""
    kills = 0
    while True:
        steps = 0

        def kill(made):
            nonlocal steps
            steps += 1
            if steps == every:
                os.kill(os.getpid(), number)
        made = after_each_step(make(), kill)
        try:
            made.train()
            return made, kills
        except Interrupted:
            kills += 1


# Resuming

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule, cell, every", [
    (dense, "lstm", 2), (dense, "gru", 3), (grow_and_prune, "hlstm", 1),
    (lambda: grow_and_prune(UNDONE), "hlstm", 2)], ids=["lstm", "gru", "grow-and-prune", "undone"])
def test_a_run_killed_again_and_again_ends_with_the_same_bits(corpus, tmp_path, schedule, cell, every, precision):
    options = {"cell": cell, "precision": precision}
    alone = trainer(corpus, schedule(), **options)
    alone.train()
    path = tmp_path / "run.checkpoint"
    broken, kills = interrupted_run(lambda: trainer(corpus, schedule(), path, **options), every)
    assert kills == alone.step // every and kills > 2
    assert_same(result(broken), result(alone))
    assert broken.seconds == pytest.approx(sum(row["seconds"] for row in broken.history))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["set", "rigl", "imp", "gradual", "gp-random", "gp-gradual"])
def test_rivals_killed_within_their_epochs_end_with_the_same_bits(corpus, tmp_path, name):
    def make(checkpoint=None):
        schedule = rival(name, epochs=4, density=0.3, rounds=1)[1]
        if name == "rigl":
            schedule.growth_batches = 2
        return trainer(corpus, schedule, checkpoint, cell="lstm", fused=True)
    alone = make()
    alone.train()
    broken, kills = interrupted_run(lambda: make(tmp_path / "run.checkpoint"), 2)
    assert kills == alone.step // 2 == 6 and alone.phases
    assert_same(result(broken), result(alone))


def test_the_end_of_a_process_is_as_good_as_ctrl_c(corpus, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    made, kills = interrupted_run(lambda: trainer(corpus, dense(), tmp_path / "a.checkpoint"), 4, signal.SIGTERM)
    alone = trainer(corpus, dense())
    alone.train()
    assert kills == 2 and signal.getsignal(signal.SIGTERM) == before
    assert_same(result(made), result(alone))


def test_a_finished_run_taken_up_again_trains_no_more(corpus, tmp_path):
    path = tmp_path / "a.checkpoint"
    first = trainer(corpus, dense(), path)
    first.train()
    again = after_each_step(trainer(corpus, dense(), path), lambda made: pytest.fail("it trains"))
    again.train()
    assert_same(result(again), result(first))


def test_ctrl_c_says_where_the_checkpoint_is_or_that_there_is_none(corpus, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    for path, words in ((tmp_path / "a.checkpoint", "a.checkpoint; the same command goes on from there"),
                        (None, "no checkpoint was asked for")):
        made = after_each_step(trainer(corpus, dense(), path), lambda made: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=f"stopped in epoch 1, batch 1; .*{words}"):
            made.train()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_stops_at_once(corpus):
    def twice(made):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        after_each_step(trainer(corpus, dense()), twice).train()


def test_training_in_a_thread_works_without_signals(corpus):
    made = trainer(corpus, Dense(epochs=1))
    thread = threading.Thread(target=made.train)
    thread.start()
    thread.join()
    assert len(made.history) == 1


def test_a_checkpoint_of_another_recipe_is_set_aside(corpus, tmp_path, capsys):
    path = tmp_path / "a.checkpoint"
    trainer(corpus, dense(), path, key="old", seed=5).train()
    old = path.read_bytes()
    made, alone = trainer(corpus, dense(), path, key="new"), trainer(corpus, dense())
    made.train()
    alone.train()
    assert_same(result(made), result(alone))
    assert (tmp_path / "a.old").read_bytes() == old
    assert (f"{path}: of another recipe, model, corpus or code, or of training in another way; set aside as a.old"
            in capsys.readouterr().err)


@pytest.mark.parametrize("schedule, settings", [(Dense(epochs=2), {}), (dense(), dict(lr=2e-2)),
                                                (grow_and_prune(), {}), (dense(), dict(cell="gru")),
                                                (dense(), dict(seed=1))])
def test_a_checkpoint_of_another_schedule_settings_or_model_is_set_aside(corpus, tmp_path, schedule, settings, capsys):
    path = tmp_path / "a.checkpoint"
    trainer(corpus, dense(), path).train()
    made, alone = (trainer(corpus, copy.deepcopy(schedule), each, **settings) for each in (path, None))
    made.train()
    alone.train()
    assert_same(result(made), result(alone))
    assert "set aside as a.old" in capsys.readouterr().err


def test_a_checkpoint_knows_masks_precision_and_processes(corpus, monkeypatch):
    """What else decides the next step: taken up in another way, a run would be neither the one nor the other."""
    made = [trainer(corpus, grow_and_prune(), precision="bf16").asked]
    monkeypatch.setattr(training, "has_bfloat16", lambda: not has_bfloat16())
    made.append(trainer(corpus, grow_and_prune(), precision="bf16").asked)
    monkeypatch.undo()
    monkeypatch.setattr(training.Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(training, "broadcast", lambda tensors: tensors)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made.append(trainer(corpus, grow_and_prune(), precision="bf16").asked)
    assert made[0][4] and all(a != b for a, b in itertools.combinations(made, 2))


def test_processes_that_do_not_know_of_each_other_are_refused(corpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each knows of 1: .*ACCELERATE_USE_CPU=true"):
        trainer(corpus, dense())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_last_epoch_is_scored_is_not_lost(corpus, tmp_path, number):
    path, alone = tmp_path / "a.checkpoint", trainer(corpus, dense())
    alone.train()
    made = trainer(corpus, dense(), path)
    score = made.task.evaluate
    made.task.evaluate = lambda *args: (made.epoch == 2 and os.kill(os.getpid(), number), score(*args))[1]
    with pytest.raises(Interrupted, match="stopped behind the last epoch; a checkpoint is in .*a.checkpoint"):
        made.train()
    again = trainer(corpus, dense(), path)
    again._step = None                                             # nothing is left to train
    again.train()
    assert_same(result(again), result(alone))


def test_masks_must_be_the_models_own(corpus):
    def made(schedule, masks):
        return Trainer(model, SpeechTask(corpus, batch=4), schedule, Settings(precision="fp32"), masks=masks(model))
    model = DeepSpeech2(len(ALPHABET), layers=2, hidden=8, channels=2)
    with pytest.raises(ValueError, match="those of the whole model"):
        made(grow_and_prune(), lambda model: ConnectionMasks(model.rnns))
    with pytest.raises(ValueError, match="GrowPruneSchedule grows or prunes, and so takes masks"):
        made(grow_and_prune(), lambda model: None)


@pytest.mark.parametrize("options, words", [(dict(precision="float64"), "'float64': choose one of bf16, fp32"),
                                            (dict(accumulate=0), "accumulate 0"),
                                            (dict(decay_epochs=0), "decay_epochs 0")])
def test_settings_that_cannot_be_are_refused(corpus, options, words):
    with pytest.raises(ValueError, match=words):
        trainer(corpus, dense(), **options)


def test_patience_tells_of_the_masks_that_there_are(corpus):
    torch.manual_seed(0)
    model = DeepSpeech2(len(ALPHABET), layers=2, hidden=8, channels=2)
    masks = ConnectionMasks(model, "rnns.*weight_*", 0.5, torch.Generator().manual_seed(0))
    made = Trainer(model, SpeechTask(corpus, batch=4), dense(), Settings(precision="fp32", patience=1), masks=masks,
                   progress=False)
    made.train()
    assert (made.phases[-1]["density"], made.phases[-1]["nonzero"]) == (masks.density(), masks.count()[0])


def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(corpus, tmp_path):
    path = tmp_path / "a.checkpoint"
    trainer(corpus, Dense(epochs=1), path).train()
    for data in (path.read_bytes()[:-10], path.read_bytes()[:20], b""):
        path.write_bytes(data)
        with pytest.raises(TrainingError, match="a.checkpoint: damaged.*; delete it to start anew"):
            trainer(corpus, dense(), path).train()
        assert path.read_bytes() == data


@pytest.mark.parametrize("seconds, left, told", [
    (100.0, 2, "at most 3 min left"), (10.0, 3, "less than a minute left"), (10.0, 0, "100 s")])
def test_each_epoch_says_for_how_long_it_may_go_on(corpus, capsys, seconds, left, told):
    made = trainer(corpus, dense())
    made.progress, made.seconds, made.schedule = True, seconds, SimpleNamespace(epochs_left=left)
    made.history = [{"epoch": 0, "phase": "dense", "loss": 1.0, "seconds": 100.0}]
    made._report({"wer": 50.0}, None)
    assert capsys.readouterr().err.strip().endswith(told)


# What a step does

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dormant_weights_gradients_and_moments_are_zero_at_every_step(corpus, precision):
    densities = set()

    def check(made):
        for name, p in made.masks.parameters.items():
            dormant = ~made.masks.masks[name]
            moments = [t for t in made.optimiser.state[p].values() if t.shape == p.shape]
            assert len(moments) == 2 and dormant.any()
            for tensor in (p, p.grad, *moments):
                assert (tensor[dormant] == 0).all(), name
            assert (p[~dormant] != 0).any() and (p.grad[~dormant] != 0).any()
        densities.add(round(made.masks.density(), 4))
    made = after_each_step(trainer(corpus, grow_and_prune(), precision=precision), check)
    made.train()
    assert made.step == 3 * 6 and len(densities) >= 4, "it neither grew nor was pruned"
    assert [row["phase"] for row in made.phases] == ["grow", "grow", "train", "prune", "prune", "final"]
    seed, grown, again = 0.5, made.phases[0]["density"], made.phases[1]["density"]
    assert seed < grown < again
    assert made.phases[4]["density"] == pytest.approx(again / 4, rel=0.02)
    assert [row["phase"] for row in made.history] == ["grow", "grow", "train", "prune", "prune", "final"]


def test_gradients_of_dormant_connections_are_seen_while_growing_and_only_then(corpus):
    made = trainer(corpus, grow_and_prune())
    seen = []

    def look(made):
        dormant = {name: ~mask for name, mask in made.masks.masks.items()}
        seen.append({k: float(g[dormant[k]].abs().sum()) for k, g in made.gradients.sums.items()})
    after_each_step(made, look).train()
    growing = 2 * 3
    assert all(len(sums) == len(made.masks.masks) and min(sums.values()) > 0 for sums in seen[:growing])
    assert not any(seen[growing:])


def test_pruning_that_costs_too_much_is_undone(corpus):
    kept = {}
    made = trainer(corpus, grow_and_prune(UNDONE))
    end_epoch = made.schedule.end_epoch

    def watched(masks, gradients, score):
        before = made.schedule.phase
        event = end_epoch(masks, gradients, score)
        if before == "train":
            kept["mask"] = {k: m for k, m in made.schedule._good.items()}
        if before == "prune":
            kept["restored"] = {f"weight.{k}": t.clone() for k, t in made.model.state_dict().items()}
        return event
    made.schedule.end_epoch = watched
    made.train()
    assert [(row["phase"], row["kept"]) for row in made.phases][2:4] == [("train", True), ("prune", False)]
    assert all(torch.equal(t, kept["mask"][name]) for name, t in kept["restored"].items())
    assert made.phases[-1]["density"] == made.phases[2]["density"] == made.masks.density()


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    rates = [learning_rate(2.0, k / 1000, 0.15) for k in range(1001)]
    assert rates[0] == pytest.approx(0.08) and rates[-1] == pytest.approx(0.02)
    assert max(rates) == rates[150] == pytest.approx(2.0)
    assert rates[:151] == sorted(rates[:151]) and rates[150:] == sorted(rates[150:], reverse=True)
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.02, "it jumps"
    assert rates[75] == pytest.approx(2 * (0.04 + 0.96 / 2)) and rates[575] == pytest.approx(2 * 0.505)
    assert learning_rate(1.0, 0, 0) == pytest.approx(1.0)


def test_each_stretch_has_its_own_cycle_and_retraining_half_the_peak(corpus):
    made, rates = trainer(corpus, grow_and_prune(), lr=1e-2, warmup=0.2), []
    after_each_step(made, lambda made: rates.append(made.optimiser.param_groups[0]["lr"])).train()
    stretches = [rates[:9], rates[9:12], rates[12:15], rates[15:]]
    assert rates[:9] == [learning_rate(1e-2, k / 9, 0.2) for k in range(9)]
    for stretch in stretches[1:]:
        assert stretch == [learning_rate(5e-3, k / 3, 0.2) for k in range(3)]
    assert [row["lr"] for row in made.history] == [rates[k] for k in (2, 5, 8, 11, 14, 17)]


def test_without_restarts_one_cycle_runs_over_growth_pruning_and_retraining(corpus):
    made, rates = trainer(corpus, grow_and_prune(restarts=False), lr=1e-2, warmup=0.2), []
    after_each_step(made, lambda made: rates.append(made.optimiser.param_groups[0]["lr"])).train()
    assert rates == pytest.approx([learning_rate(1e-2, k / 18, 0.2) for k in range(18)], rel=1e-12)
    twin, seen = trainer(corpus, grow_and_prune(restarts=False), lr=1e-2, decay=0.5, decay_epochs=2), []
    after_each_step(twin, lambda made: seen.append(made.optimiser.param_groups[0]["lr"])).train()
    assert seen == [1e-2 * 0.5 ** (k // 6) for k in range(18)]         # three steps an epoch


SCORES = [50.0, 40.0, 45.0, 41.0, 40.0, 30.0]      # better in epochs 2 and 6


def patient(corpus, patience, checkpoint=None, seen=None):
    """A dense run of at most six epochs with validation scores `SCORES`; `seen` gets the weights of each epoch."""
    made = trainer(corpus, Dense(epochs=6), checkpoint, patience=patience)
    made.task.evaluate = lambda model, device: (
        seen is not None and seen.append({n: t.clone() for n, t in model.state_dict().items()}),
        {"wer": SCORES[made.epoch]})[1]
    return made


@pytest.mark.parametrize("patience, epochs, best", [(1, 3, 1), (2, 4, 1), (3, 5, 1), (4, 6, 5)])
def test_patience_ends_a_run_and_brings_the_best_weights_back(corpus, patience, epochs, best):
    seen = []
    made = patient(corpus, patience, seen=seen)
    made.train()
    assert len(made.history) == epochs and made.schedule.done
    assert all(torch.equal(t, seen[best][name]) for name, t in made.model.state_dict().items())
    assert [(row["epoch"], row["kept"]) for row in made.phases] == [(epochs - 1, True)]
    assert f"epoch {best + 1} " in made.phases[0]["note"]


def test_a_patient_run_killed_again_and_again_ends_with_the_same_bits(corpus, tmp_path):
    alone = patient(corpus, 2)
    alone.train()
    resumed, kills = interrupted_run(lambda: patient(corpus, 2, tmp_path / "run.checkpoint"), every=2)
    assert kills > 2
    assert_same(result(resumed), result(alone))


def test_patience_is_for_dense_runs(corpus):
    with pytest.raises(ValueError, match="patience ends dense training"):
        trainer(corpus, grow_and_prune(), patience=2)


def test_the_rate_can_fall_in_steps_instead_of_a_cycle(corpus):
    made, rates = trainer(corpus, Dense(epochs=5), decay=0.5, decay_epochs=2, lr=8e-3), []
    after_each_step(made, lambda made: rates.append(made.optimiser.param_groups[0]["lr"])).train()
    assert rates == [rate for rate in (8e-3, 8e-3, 4e-3, 4e-3, 2e-3) for _ in range(3)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_a_weight(corpus, value):
    made = trainer(corpus, dense())
    real, before = made.task.loss, []

    def loss(model, batch, device):
        if made.step == 4:
            before.extend(p.clone() for p in model.parameters())
        return real(model, batch, device) * (value if made.step == 4 else 1)
    made.task.loss = loss
    with pytest.raises(TrainingError, match=f"loss became {value} in epoch 2; lower the learning rate"):
        made.train()
    assert before and all(torch.equal(a, b) for a, b in zip(before, made.model.parameters()))


def test_gradients_are_clipped(corpus):
    norms = []

    def norm(made):
        norms.append(torch.stack([p.grad.norm() for p in made.model.parameters()]).norm().item())
    after_each_step(trainer(corpus, Dense(epochs=1), clip=1e-3), norm).train()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_seed_and_precision_change_the_result_and_nothing_else_does(corpus):
    def losses(**options):
        made = trainer(corpus, Dense(epochs=1), **options)
        torch.rand(made.step + 7)                                  # randomness drawn elsewhere
        made.train()
        return made.history[0]["loss"]
    first = losses()
    assert first == losses() and len({first, losses(seed=1)}) == 2
    assert losses(precision="bf16") == pytest.approx(first, rel=0.05)
    assert (losses(precision="bf16") != first) == has_bfloat16()


def test_a_processor_without_bfloat16_trains_in_float32_and_says_so(corpus, monkeypatch):
    assert trainer(corpus, dense(), precision="bf16").precision == ("bf16" if has_bfloat16() else "fp32")
    monkeypatch.setattr(training, "has_bfloat16", lambda: False)
    without, single = (trainer(corpus, dense(), precision=precision) for precision in ("bf16", "fp32"))
    without.train()
    single.train()
    assert without.precision == single.precision == "fp32"
    assert_same(result(without), result(single))


def test_it_learns(corpus):
    made = trainer(corpus, Dense(epochs=12), cell="lstm", lr=2e-2)
    made.train()
    losses = [row["loss"] for row in made.history]
    assert losses[-1] < 0.6 * losses[0]
    assert [row["epoch"] for row in made.history] == list(range(12)) and made.schedule.done
    assert made.seconds == pytest.approx(sum(row["seconds"] for row in made.history))


def test_each_step_draws_anew(corpus):
    made, drawn = trainer(corpus, Dense(epochs=2)), []
    real = made.task.loss
    made.task.loss = lambda *args: drawn.append(torch.rand(()).item()) or real(*args)
    made.train()
    assert len(set(drawn)) == len(drawn) == made.step


def test_gradients_of_dormant_connections_do_not_count_when_the_others_are_clipped(corpus):
    norms = []

    def norm(made):
        norms.append(torch.stack([p.grad.norm() for p in made.parameters]).norm().item())
    after_each_step(trainer(corpus, grow_and_prune(), clip=1e-3), norm).train()
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)


def test_the_optimiser_is_the_one_that_was_set(corpus):
    for decay, fused in ((0.0, False), (0.3, True)):
        made = trainer(corpus, dense(), weight_decay=decay, fused=fused)
        (group,) = made.optimiser.param_groups
        assert group["weight_decay"] == decay and bool(group["fused"]) == fused
        assert {id(p) for p in group["params"]} == {id(p) for p in made.model.parameters()}


@pytest.mark.parametrize("lower", [True, False])
def test_patience_knows_whether_less_is_better(corpus, lower):
    made = trainer(corpus, Dense(epochs=6), patience=2)
    made.task.lower_is_better = lower
    made.task.evaluate = lambda model, device: {"wer": SCORES[made.epoch] * (1 if lower else -1)}
    made.train()
    assert len(made.history) == 4 and made.best == (SCORES[1] * (1 if lower else -1), 1)


def test_a_rate_that_falls_in_steps_begins_anew_with_each_stretch(corpus):
    made, rates = trainer(corpus, grow_and_prune(), decay=0.5, decay_epochs=2, lr=8e-3), []
    after_each_step(made, lambda made: rates.append(made.optimiser.param_groups[0]["lr"])).train()
    assert rates[::3] == [8e-3, 8e-3, 4e-3, 4e-3, 4e-3, 4e-3]


def test_a_first_score_that_is_no_number_is_not_the_best(corpus):
    made = trainer(corpus, Dense(epochs=6), patience=2)
    made.task.evaluate = lambda model, device: {"wer": [math.nan, 40.0, 30.0, 31.0, 32.0, 5.0][made.epoch]}
    made.train()
    assert made.best == (30.0, 2) and len(made.history) == 5


def test_a_floor_knows_which_way_the_tasks_score_goes(corpus):
    with pytest.raises(ValueError, match="lower_is_better=False: of the task's wer it is not so"):
        trainer(corpus, GrowPruneSchedule(4, lower_is_better=False))
    trainer(corpus, GrowPruneSchedule(4, lower_is_better=False, tolerance=None))                # looks at no score


def test_a_seed_may_be_numpys_and_a_checkpoint_a_text(corpus, tmp_path):
    path = tmp_path / "run.checkpoint"
    for checkpoint, seed in ((str(path), np.int64(3)), (path, 3)):      # the second goes on where the first ended
        made = trainer(corpus, dense(), checkpoint, seed=seed)
        made.train()
        assert len(made.history) == 3 and path.exists()


def test_a_model_whose_state_no_checkpoint_can_hold_is_refused_before_it_trains(corpus):
    class Counting(DeepSpeech2):
        def get_extra_state(self):
            return {"calls": 1}
    model = Counting(len(ALPHABET), "lstm", layers=1, hidden=8, channels=2)
    with pytest.raises(ValueError, match="state holds _extra_state, which no checkpoint can"):
        Trainer(model, SpeechTask(corpus, batch=4), dense(), Settings(precision="fp32"))


class Lines:
    """A task of five batches: the squared errors of a line."""
    metric, lower_is_better = "error", True

    def batches(self, epoch):
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(5)]

    def loss(self, model, batch, device):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(self, model, device):
        return {"error": 1.0}


def test_growth_looks_at_the_last_batches_of_an_epoch():
    model, seen = nn.Linear(3, 4), []
    masks = ConnectionMasks(model, density=0.5)
    trainer = Trainer(model, Lines(), GrowPruneSchedule(1, 1, rounds=0, growth_batches=2), Settings(precision="fp32"),
                      masks=masks, progress=False)
    collect = trainer.gradients.collect
    trainer.gradients.collect = lambda masks: seen.append(trainer.batch) or collect(masks)
    trainer.train()
    assert seen == [3, 4]
