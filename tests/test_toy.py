"""The interlock: its rules against a reader of one lever at a time, its splits, and a cell that learns it."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src.schedule import Dense
from hlstm_src.toy import Interlock, ToyModel, ToyTask
from hlstm_src.training import Settings, Trainer

CPU = torch.device("cpu")
machines = st.builds(Interlock, levers=st.integers(1, 5), idle=st.integers(0, 2), steps=st.integers(1, 8))


def by_hand(rules, rows):
    """One sequence, T rows of I bits -> T settings of n bits."""
    setting, found = [0] * rules.levers, []
    for row in rows:
        changed = [k for k in range(rules.levers) if row[k] != setting[k]]
        if len(changed) == 1:
            setting = list(setting)
            setting[changed[0]] = row[changed[0]]
        found.append(setting)
    return found


@given(machines, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_setting_is_what_a_reader_of_single_levers_finds(rules, seed):
    bits = rules.draw(4, torch.Generator().manual_seed(seed))
    assert bits.shape == (4, rules.steps, rules.inputs) and set(bits.unique().tolist()) <= {0, 1}
    assert rules.settings(bits).tolist() == [by_hand(rules, rows) for rows in bits.tolist()]


def test_no_linear_gate_decides_whether_the_setting_follows():
    """Over all settings and positions of the levers, least squares finds nothing but the mean."""
    rules = Interlock(idle=0)
    pairs = torch.tensor(list(product((0, 1), repeat=2 * rules.levers)))
    before, levers = pairs.chunk(2, 1)
    follows = ((before != levers).sum(1) == 1).double()
    # The rules agree: from a setting that was reached by single steps, the levers are followed in just these cases.
    for setting, position, expected in zip(before, levers, follows):
        way = torch.stack([setting * (torch.arange(rules.levers) <= k) for k in range(rules.levers)] + [position])
        reached = rules.settings(way[None])[0]
        assert torch.equal(reached[-2], setting)
        assert torch.equal(reached[-1], position if expected else setting)
    inputs = torch.cat([2.0 * pairs - 1, torch.ones(len(pairs), 1)], dim=1).double()
    fitted = inputs @ torch.linalg.lstsq(inputs, follows).solution
    assert torch.allclose(fitted, follows.mean().expand_as(fitted), atol=1e-9) and 0 < follows.mean() < 1


def test_idle_levers_change_nothing():
    rules = Interlock(levers=3, idle=2)
    bits = rules.draw(4, torch.Generator().manual_seed(0))
    other = bits.clone()
    other[..., 3:] = 1 - other[..., 3:]
    assert torch.equal(rules.settings(bits), rules.settings(other))
    other[..., 2] = 1 - other[..., 2]
    assert not torch.equal(rules.settings(bits), rules.settings(other))


@pytest.mark.parametrize("wrong", [{"levers": 0}, {"steps": 0}, {"idle": -1}])
def test_machines_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1 lever"):
        Interlock(**wrong)


def test_other_rules_have_another_hash():
    assert Interlock().sha256 == Interlock().sha256
    assert len({Interlock().sha256, Interlock(steps=9).sha256, Interlock(levers=3).sha256}) == 3


def test_seeds_share_what_is_held_out_and_nothing_else():
    one, other = ToyTask(0, held_out=64), ToyTask(1, held_out=64)
    for split in ("valid", "test"):
        for a, b in zip(one.splits[split], other.splits[split]):
            assert torch.equal(a, b)
    drawn = [one.splits["valid"][0], one.splits["test"][0]]
    for task in (one, other):
        drawn += [task._sequences(64, 1_000_003 * (task.seed + 1) + n)[0] for n in task.batches(0) + task.batches(1)]
    rows = torch.cat(drawn).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows), "a sequence was drawn twice"


def test_epochs_count_their_batches_on():
    task = ToyTask(length=3, held_out=2)
    assert task.batches(0) == [0, 1, 2] and task.batches(4) == [12, 13, 14]


def test_the_loss_is_that_of_the_batch_and_the_same_each_time():
    task, model = ToyTask(seed=2, batch=5, held_out=2), ToyModel(6, 4, hidden=6)
    x, wanted = task._sequences(5, 1_000_003 * 3 + 7)
    p = model(x).sigmoid()
    expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    assert torch.allclose(task.loss(model, 7, CPU), expected, atol=1e-6)
    assert torch.equal(task.loss(model, 7, CPU), task.loss(model, 7, CPU))
    assert task.loss(model, 8, CPU) != task.loss(model, 7, CPU)


class Oracle(torch.nn.Module):
    """Reads by the rules, and on request wrongly at the first step."""

    def __init__(self, rules, wrong=False):
        super().__init__()
        self.rules, self.wrong = rules, wrong

    def forward(self, x):
        logits = 2.0 * self.rules.settings((x > 0).long()) - 1
        if self.wrong:
            logits[:, 0] *= -1
        return logits


def test_the_error_counts_wrongly_read_registers_in_percent():
    task = ToyTask(held_out=32)
    assert task.evaluate(Oracle(task.rules), CPU) == {"error": 0}
    assert task.evaluate(Oracle(task.rules, wrong=True), CPU, "test") == {"error": pytest.approx(100 / 8)}
    assert torch.equal(task.read(Oracle(task.rules), CPU, "test"), task.splits["test"][1])


@pytest.mark.parametrize("cell, weights", [("hlstm", 4 * 6 * (6 + 6 + 6)), ("lstm", 4 * 6 * (6 + 6))])
def test_the_cells_have_the_weights_that_their_names_say(cell, weights):
    model = ToyModel(6, 4, cell, hidden=6)
    assert sum(p.numel() for name, p in model.rnn.named_parameters() if name.startswith("weight")) == weights
    assert model(torch.zeros(2, 5, 6)).shape == (2, 5, 4)


def test_unknown_cells_are_refused():
    with pytest.raises(ValueError, match="'gru': choose"):
        ToyModel(6, 4, "gru")


def test_a_machine_of_one_lever_is_learnt_through_the_trainer():
    """Its setting is where the lever stands: after a few epochs nearly everything is read rightly."""
    torch.manual_seed(0)
    rules = Interlock(levers=1, idle=1, steps=5)
    task, model = ToyTask(0, rules, length=20, held_out=64), ToyModel(rules.inputs, 1, hidden=6)
    before = task.evaluate(model, CPU)["error"]
    trainer = Trainer(model, task, Dense(6), Settings(lr=3e-2, precision="fp32"), progress=False)
    trainer.train()
    assert task.evaluate(model, CPU)["error"] < 2 < before
