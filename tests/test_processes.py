"""Steps shared: batches accumulated, and two processes under accelerate, come to what one large batch comes to."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from hlstm_src import HLSTM, ConnectionMasks, GrowPruneSchedule
from hlstm_src.rivals import rival
from hlstm_src.schedule import Dense
from hlstm_src.training import Settings, Trainer, TrainingError

MASKED = ("rnn.weight_*", "out.weight")


class Echo:
    """A task: the sum of a sequence's inputs, (T 5, 3) -> (2). Only the first process may be asked for a score."""
    metric = "error"

    def __init__(self, batch: int, batches: int = 4):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch * batches, 5, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(1)[:, :2] + 0.1 * self.x[:, 0, 1:]
        self.batch, self.scored = batch, True

    def batches(self, epoch):
        return list(torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch)).split(self.batch))

    def loss(self, model, batch, device):
        dtype = next(model.parameters()).dtype
        return (model(self.x[batch].to(dtype)) - self.y[batch].to(dtype)).square().mean()

    def evaluate(self, model, device):
        assert self.scored, "a second process was asked for a score"
        with torch.no_grad():
            return {"error": self.loss(model.eval(), torch.arange(len(self.x)), device).item()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = HLSTM(3, 6, batch_first=True), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1 + x.mean()                                  # as a running mean does
        return self.out(self.rnn(x)[0][:, -1])


def grow_and_prune(**options):
    return GrowPruneSchedule(**dict(train_epochs=3, growth_epochs=2, rounds=2, prune_ratio=0.3, retrain_epochs=1,
                                    final_epochs=1, tolerance=10) | options)


def trained(task, schedule, seed=0, double=True, masked=True, **settings):
    """A run to its end: (trainer, the accumulated gradients that each growth saw)."""
    torch.manual_seed(seed)
    net = Net().double() if double else Net()
    masks = ConnectionMasks(net, MASKED, 0.5) if masked else None
    settings = Settings(**dict(lr=0.02, precision="fp32", clip=0.5) | settings)
    made, seen = Trainer(net, task, schedule, settings, masks=masks, progress=False), []
    step, end_epoch = made._step, schedule.end_epoch

    def watched_step(*args):
        value = step(*args)
        for name, p in masks.parameters.items():
            moments = [t for t in made.optimiser.state[p].values() if t.shape == p.shape]
            for tensor in (p, p.grad, *moments):
                assert len(moments) == 2 and (tensor[~masks.masks[name]] == 0).all()
                assert (tensor[masks.masks[name]] != 0).any()
        return value

    def watched_end(masks, gradients, score):
        seen.append({name: t.clone() for name, t in gradients.sums.items()})
        return end_epoch(masks, gradients, score)
    if masked:
        made._step, schedule.end_epoch = watched_step, watched_end
    made.train()
    return made, seen


def outcome(made, seen) -> dict:
    moments = {f"moment {k} {name}": t for k, p in enumerate(made.parameters)
               for name, t in made.optimiser.state[p].items()}
    return {"tensors": {**made.model.state_dict(), **made.masks.state_dict(), **moments}, "seen": seen,
            "masks": dict(made.masks.masks), "weights": {k: p.detach() for k, p in made.model.named_parameters()},
            "history": [{k: v for k, v in row.items() if k != "seconds"} for row in made.history],
            "phases": made.phases}


def assert_close(ours: dict, theirs: dict) -> None:
    """The same run up to rounding, with the same masks."""
    assert all(m.equal(theirs["masks"][name]) for name, m in ours["masks"].items())
    torch.testing.assert_close(ours["weights"], theirs["weights"])
    assert [{**row, "scores": None} for row in ours["phases"]] == [{**row, "scores": None} for row in theirs["phases"]]
    for a, b in zip(ours["seen"], theirs["seen"], strict=True):
        torch.testing.assert_close(a, b)
    assert [row["loss"] for row in ours["history"]] == pytest.approx([row["loss"] for row in theirs["history"]])


# Accumulating batches ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [grow_and_prune, lambda: rival("rigl", epochs=5, density=0.3)[1]],
                         ids=["gp", "rigl"])
def test_batches_accumulated_are_one_large_batch(schedule):
    parts, whole = (outcome(*trained(Echo(batch, batches), schedule(), accumulate=n))
                    for batch, batches, n in ((3, 8, 4), (12, 2, 1)))
    assert_close(parts, whole)
    assert parts["seen"][0] and parts["phases"]


def test_a_rest_that_does_not_fill_a_step_makes_a_step_of_its_own():
    made, _ = trained(Echo(2, batches=7), Dense(2), masked=False, accumulate=3)
    assert made.step == 2 * 3
    losses = []
    task = Echo(2, batches=7)
    real = task.loss
    task.loss = lambda *args: losses.append(real(*args)) or losses[-1]
    made, _ = trained(task, Dense(1), masked=False, accumulate=3)
    assert made.history[0]["loss"] == pytest.approx(sum(loss.item() for loss in losses[:7]) / 7)


def gradients_of_each(task) -> list[torch.Tensor]:
    """A list to which the task, from now on, adds the gradient of each batch by itself."""
    real, found = task.loss, []

    def loss(model, batch, device):
        value = real(model, batch, device)
        if model.training:
            found.append(torch.autograd.grad(value, model.out.weight, retain_graph=True)[0])
        return value
    task.loss = loss
    return found


@pytest.mark.parametrize("batches, seen", [(None, 6), (1, 1), (4, 4), (99, 6)])
def test_growth_looks_at_the_last_steps_of_an_epoch(batches, seen):
    task = Echo(2, batches=6)
    epoch = gradients_of_each(task)
    schedule = grow_and_prune(growth_batches=batches)
    _, gradients = trained(task, schedule)
    torch.testing.assert_close(gradients[0]["out.weight"], sum(epoch[6 - seen:6]))
    torch.testing.assert_close(gradients[1]["out.weight"], sum(epoch[12 - seen:12]))
    assert not any(gradients[2:])


@pytest.mark.parametrize("absolute", [False, True])
def test_the_schedule_says_whether_signs_count(absolute):
    _, gradients = trained(Echo(2), grow_and_prune(absolute=absolute))
    assert all((t >= 0).all() for t in gradients[0].values()) == absolute


# Two processes ----------------------------------------------------------------------------------------------

def work(rank: int, port: int, folder) -> None:
    """One of two processes: each starts from weights and masks of its own; the first one's must win."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found = {}
    for name, options in CASES.items():
        task = Echo(3, batches=8)
        task.scored = rank == 0
        found[name] = outcome(*trained(task, options["schedule"](), seed=rank, **options["settings"]))
    few = Echo(3, batches=1)
    with pytest.raises(TrainingError, match="1 batches an epoch are too few for 2 processes"):
        trained(few, Dense(1), masked=False)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


CASES = {
    "gp": {"schedule": grow_and_prune, "settings": {}},
    "gp, batches accumulated": {"schedule": grow_and_prune, "settings": {"accumulate": 2}},
    "undone": {"schedule": lambda: grow_and_prune(tolerance=-10, patience=1), "settings": {"accumulate": 2}},
    "set": {"schedule": lambda: rival("set", epochs=5, density=0.3)[1], "settings": {}},
    "bf16": {"schedule": grow_and_prune, "settings": {"precision": "bf16", "double": False}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_hold_the_same_bits_and_took_the_same_turns(two, case):
    first, second = (found[case] for found in two)
    assert first["tensors"].keys() == second["tensors"].keys()
    assert not [name for name, t in first["tensors"].items() if not t.equal(second["tensors"][name])]
    for a, b in zip(first["seen"], second["seen"], strict=True):
        assert a.keys() == b.keys() and all(t.equal(b[name]) for name, t in a.items())
    assert first["history"] == second["history"] and first["phases"] == second["phases"]
    densities = {row["density"] for row in first["phases"]}
    assert len(densities) > 1 or case == "set", "it neither grew nor was pruned"


@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16"])
def test_two_processes_come_to_what_one_comes_to_on_the_data_of_both(two, case):
    options = CASES[case]
    alone = {"accumulate": 2 * options["settings"].get("accumulate", 1)}
    one = outcome(*trained(Echo(3, batches=8), options["schedule"](), seed=0, **alone))
    assert_close(two[0][case], one)
    if case != "set":
        assert one["seen"][0] and len(one["seen"]) >= 5


def test_a_rest_is_a_step_too_when_growth_looks_at_the_last_ones():
    task = Echo(2, batches=7)
    epoch = gradients_of_each(task)
    _, gradients = trained(task, grow_and_prune(growth_batches=1), accumulate=3)
    torch.testing.assert_close(gradients[0]["out.weight"], epoch[6])
