"""The staircase: its rules against a reader of one bit at a time, its splits, and a cell that learns it."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src.growprune import Dense
from hlstm_src.toy import Staircase, ToyModel, ToyTask
from hlstm_src.training import Settings, Trainer

CPU = torch.device("cpu")
houses = st.builds(Staircase, switches=st.integers(4, 8), lines=st.integers(1, 3), registers=st.integers(1, 4),
                   floors=st.integers(1, 4), steps=st.integers(1, 6))


def by_hand(rules, bits):
    """One sequence, (T, I) lists of bits -> (T, R)."""
    held, found = [0] * rules.registers, []
    for row in bits:
        for k in range(rules.registers):
            up = [row[(k + floor) % rules.switches] for floor in range(rules.floors)]
            if up.count(1) % 2:
                held[k] = row[rules.switches + k % rules.lines]
        found.append(list(held))
    return found


@given(houses, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_registers_hold_what_a_reader_of_single_bits_finds(rules, seed):
    bits = rules.draw(3, torch.Generator().manual_seed(seed))
    assert bits.shape == (3, rules.steps, rules.inputs) and set(bits.unique().tolist()) <= {0, 1}
    assert rules.solve(bits).tolist() == [by_hand(rules, rows) for rows in bits.tolist()]


def test_no_linear_gate_decides_when_a_register_takes_in():
    """Of one register, over all positions of its switches: least squares finds nothing but the mean."""
    rules = Staircase()
    rows = torch.tensor(list(product((0, 1), repeat=rules.switches)))
    taken = rules.taken(torch.nn.functional.pad(rows, (0, rules.lines))[:, None])[:, 0].double()
    inputs = torch.cat([2.0 * rows - 1, torch.ones(len(rows), 1)], dim=1).double()
    fitted = inputs @ torch.linalg.lstsq(inputs, taken).solution
    assert torch.allclose(fitted, torch.full_like(fitted, 0.5), atol=1e-9)


def test_switches_beyond_the_registers_change_nothing():
    rules = Staircase(switches=6, registers=2, floors=3)           # 0 to 3 are used
    bits = rules.draw(4, torch.Generator().manual_seed(0))
    other = bits.clone()
    other[..., 4:6] = 1 - other[..., 4:6]
    assert torch.equal(rules.solve(bits), rules.solve(other))
    other[..., 3] = 1 - other[..., 3]
    assert not torch.equal(rules.solve(bits), rules.solve(other))


@pytest.mark.parametrize("wrong", [{"registers": 9}, {"floors": 9}, {"floors": 0}, {"lines": 0}, {"steps": 0}])
def test_houses_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(ValueError, match="at most `switches`"):
        Staircase(**wrong)


def test_other_rules_have_another_hash():
    assert Staircase().sha256 == Staircase().sha256
    assert len({Staircase().sha256, Staircase(steps=13).sha256, Staircase(floors=2).sha256}) == 3


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
    task, model = ToyTask(seed=2, batch=5, held_out=2), ToyModel(10, 4, hidden=6)
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
        logits = 2.0 * self.rules.solve((x > 0).long()) - 1
        if self.wrong:
            logits[:, 0] *= -1
        return logits


def test_the_error_counts_wrongly_read_registers_in_percent():
    task = ToyTask(held_out=32)
    assert task.evaluate(Oracle(task.rules), CPU) == {"error": 0}
    assert task.evaluate(Oracle(task.rules, wrong=True), CPU, "test") == {"error": pytest.approx(100 / 12)}
    assert torch.equal(task.read(Oracle(task.rules), CPU, "test"), task.splits["test"][1])


@pytest.mark.parametrize("cell, weights", [("hlstm", 4 * 6 * (10 + 6 + 6)), ("lstm", 4 * 6 * (10 + 6))])
def test_the_cells_have_the_weights_that_their_names_say(cell, weights):
    model = ToyModel(10, 4, cell, hidden=6)
    assert sum(p.numel() for name, p in model.rnn.named_parameters() if name.startswith("weight")) == weights
    assert model(torch.zeros(2, 5, 10)).shape == (2, 5, 4)


def test_unknown_cells_are_refused():
    with pytest.raises(ValueError, match="'gru': choose"):
        ToyModel(10, 4, "gru")


def test_an_easy_house_is_learnt_through_the_trainer():
    """One register with one switch: after a few epochs nearly everything is read rightly."""
    torch.manual_seed(0)
    rules = Staircase(switches=2, lines=1, registers=1, floors=1, steps=5)
    task, model = ToyTask(0, rules, length=20, held_out=64), ToyModel(rules.inputs, 1, hidden=6)
    before = task.evaluate(model, CPU)["error"]
    trainer = Trainer(model, task, Dense(6), Settings(lr=3e-2, precision="fp32"), progress=False)
    trainer.train()
    assert task.evaluate(model, CPU)["error"] < 2 < before
