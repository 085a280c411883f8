"""Growth, pruning and their schedule, held against plain loops over lists and against scripted scores."""

import copy
import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hlstm_src import ConnectionMasks, GrowPruneSchedule, grow, prune
from hlstm_src.growprune import STRUCTURES, Gradients, best_dormant, prune_to
from hlstm_src.masks import live_count
from hlstm_src.schedule import Dense

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=3)
RATIOS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.8, 1.0]))


def matrices(shapes, density, seed) -> tuple[ConnectionMasks, dict[str, torch.Tensor]]:
    """Masked matrices whose weights and gradients are few eighths, so that many are equal and many zero."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.ParameterDict({f"m{k}": nn.Parameter(torch.randint(-4, 5, shape, generator=generator) / 8)
                               for k, shape in enumerate(shapes)}).double()
    gradients = {name: torch.randint(-3, 4, p.shape, generator=generator) / 8
                 for name, p in module.named_parameters()}
    return ConnectionMasks(module, density=density, generator=generator), gradients


def lists(masks: ConnectionMasks) -> dict[str, list[list[bool]]]:
    return {name: mask.tolist() for name, mask in masks.masks.items()}


def groups(names, per) -> list[list[str]]:
    return [[name] for name in names] if per == "matrix" else [list(names)]


def cells(table) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(table)) for j in range(len(table[0]))]


# Growth -----------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0.05, 1), RATIOS, st.sampled_from(["matrix", "global"]), st.integers(0, 10**6))
def test_growth_wakes_who_a_plain_loop_would_wake(shapes, density, ratio, per, seed):
    masks, gradients = matrices(shapes, density, seed)
    expected, woken = lists(masks), 0
    for names in groups(expected, per):
        ranked = sorted(abs(g) for name in names for row in gradients[name].tolist() for g in row)
        below = math.floor(ratio * len(ranked) + 1e-9)             # of the ratio as it is written
        for name in names:
            for i, j in cells(expected[name]):
                g = abs(gradients[name][i, j].item())
                if below < len(ranked) and g >= ranked[below] and g > 0 and not expected[name][i][j]:
                    expected[name][i][j] = True
                    woken += 1
    weights = {name: p.detach().clone() for name, p in masks.parameters.items()}
    assert grow(masks, gradients, ratio, per=per) == woken
    assert lists(masks) == expected
    assert all(p.equal(weights[name]) for name, p in masks.parameters.items())        # they wake at zero


def test_a_ratio_is_meant_as_it_is_written():
    """0.29 times 100 is a little less than 29 to a computer."""
    layer = nn.Linear(10, 10, bias=False)
    masks = ConnectionMasks(layer, density=1.0)
    masks.masks["weight"][:] = False
    assert grow(masks, {"weight": torch.arange(1.0, 101).view(10, 10)}, 0.29) == 71


def test_without_ties_growth_wakes_the_share_above_the_quantile():
    masks, _ = matrices([(10, 10)], 0.2, seed=0)
    masks.masks["m0"].zero_()
    gradient = (1 + torch.randperm(100).view(10, 10)) * torch.tensor([1.0, -1.0]).repeat(5)
    assert grow(masks, {"m0": gradient}, 0.83) == 17 == masks.count()[0]
    assert (gradient.abs() >= gradient.abs().flatten().sort().values[83]).equal(masks.masks["m0"])


def test_growth_can_start_a_weight_down_its_gradient():
    masks, gradients = matrices([(6, 7), (3, 5)], 0.4, seed=1)
    before, weights = lists(masks), {name: p.detach().clone() for name, p in masks.parameters.items()}
    assert grow(masks, gradients, 0.3, init="gradient", step=0.5) > 0
    for name, p in masks.parameters.items():
        woken = masks.masks[name] & ~torch.tensor(before[name])
        assert woken.any() and p.equal(torch.where(woken, -0.5 * gradients[name].double(), weights[name]))


def test_growth_can_start_weights_as_large_as_the_others():
    masks, gradients = matrices([(6, 7), (3, 5)], 0.4, seed=1)
    before, weights = lists(masks), {name: p.detach().clone() for name, p in masks.parameters.items()}
    assert grow(masks, gradients, 0.3, init="sized") > 0
    for name, p in masks.parameters.items():
        old = torch.tensor(before[name])
        woken, size = masks.masks[name] & ~old, weights[name][old].abs().mean()
        torch.testing.assert_close(p.detach(), torch.where(woken, -size * gradients[name].sign(), weights[name]),
                                   check_dtype=False)
    empty, gradients = matrices([(6, 7)], 0.4, seed=1)
    empty.masks["m0"].zero_()
    empty.apply_()
    assert grow(empty, gradients, 0.3, init="sized") > 0 and not empty.parameters["m0"].any()


@pytest.mark.parametrize("init", ["zero", "gradient", "sized"])
def test_growth_may_be_given_the_gradients_where_they_lie(init):
    masks, gradients = matrices([(6, 7)], 0.4, seed=1)
    twin, _ = matrices([(6, 7)], 0.4, seed=1)
    for name, p in masks.parameters.items():
        p.grad = gradients[name].double()
    where = {name: p.grad for name, p in masks.parameters.items()}
    assert grow(masks, where, 0.5, init=init, per="global", step=0.5) > 0
    grow(twin, gradients, 0.5, init=init, per="global", step=0.5)
    assert lists(masks) == lists(twin) and masks.parameters["m0"].equal(twin.parameters["m0"])


@pytest.mark.parametrize("absolute", [False, True])
def test_gradients_add_up_over_batches_dormant_connections_included(absolute):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    masks, gradients, total = ConnectionMasks(layer, density=0.5), Gradients(absolute), torch.zeros(3, 4)
    gradients.collect(masks)                                            # no gradients yet
    assert gradients.sums == {}
    for _ in range(3):
        layer.zero_grad()
        layer(torch.randn(5, 4)).sin().sum().backward()
        total += layer.weight.grad.abs() if absolute else layer.weight.grad
        gradients.collect(masks)
        masks.mask_gradients_()
    torch.testing.assert_close(gradients.sums, {"weight": total})
    assert (gradients.sums["weight"][~masks.masks["weight"]] != 0).all()
    gradients.clear()
    assert gradients.sums == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_sums_go_on_growing(dtype):
    layer = nn.Linear(4, 3).to(dtype)
    masks, gradients = ConnectionMasks(layer, density=0.5), Gradients()
    for _ in range(600):                                                # 600 * 200 is more than float16 has
        layer.weight.grad = torch.full((3, 4), 200, dtype=dtype)
        gradients.collect(masks)
    assert gradients.sums["weight"].eq(600 * 200).all()
    layer.weight.grad.zero_()                                           # the sum is a copy
    assert gradients.sums["weight"].all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_decides_nothing(value):
    masks, gradients = matrices([(6, 7), (3, 5)], 0.4, seed=1)
    before = lists(masks)
    gradients["m1"][0, 0] = value
    with pytest.raises(ValueError, match="gradients of m1 hold infinity or NaN"):
        grow(masks, gradients, 0.3)
    assert lists(masks) == before


def test_in_half_precision_weights_begin_as_large_as_the_others_and_not_infinite():
    layer = nn.Linear(512, 512, bias=False).half()
    nn.init.constant_(layer.weight, 0.5)                                # their sum is more than float16 has
    masks = ConnectionMasks(layer, density=0.9)
    assert grow(masks, {"weight": torch.ones(512, 512).half()}, 0.0, init="sized") > 0
    assert layer.weight.abs().eq(0.5).all()


# Pruning ----------------------------------------------------------------------------------------------------

def asleep_after(masks, ratio, per, structure) -> dict[str, list[list[bool]]]:
    """The masks after pruning, by plain loops over units: the smallest go, as many as come nearest to the share."""
    left = lists(masks)
    weights = {name: p.abs().tolist() for name, p in masks.parameters.items()}
    for names in groups(left, per):
        units = []                                                      # (score, place in line, live connections)
        for place, name in enumerate(names):
            rows, columns = len(left[name]), len(left[name][0])

            def w(i, j, name=name):
                return Fraction(weights[name][i][j]) if left[name][i][j] else Fraction(0)
            if structure is None:
                found = [[(i, j)] for i, j in cells(left[name])]
            elif structure == "row":
                found = [[(i, j) for j in range(columns)] for i in range(rows)]
            elif structure == "column":
                found = [[(i, j) for i in range(rows)] for j in range(columns)]
            elif structure == "block16":
                found = [[(i, j) for i in range(top, min(top + 16, rows))] for top in range(0, rows, 16)
                         for j in range(columns)]
            else:
                panels = [[(i, j) for j in range(start, min(start + 32, columns)) if left[name][i][j]]
                          for i in range(rows) for start in range(0, columns, 32)]
                panels = [sorted(panel, key=lambda ij: (w(*ij), ij)) for panel in panels]
                found = [[panel[-k] for panel in panels if len(panel) >= k] for k in range(32, 0, -1)]
            for k, unit in enumerate(found):
                square = structure in ("row", "column")
                score = sum(w(i, j) ** 2 if square else w(i, j) for i, j in unit)
                score = score / len(unit) if structure == "block16" else score
                score = score / len(panels) if structure == "balanced" else score
                units.append((score, place, k, [(name, i, j) for i, j in unit if left[name][i][j]]))
        units.sort(key=lambda unit: unit[:3])
        target, gone = round(ratio * sum(len(live) for *_, live in units)), 0
        nearest, n, best = abs(target), 0, 0
        for n, (*_, live) in enumerate(units, 1):
            gone += len(live)
            if abs(gone - target) < nearest:
                nearest, best = abs(gone - target), n
        for *_, live in units[:best]:
            for name, i, j in live:
                left[name][i][j] = False
    return left


def check_pruning(masks, ratio, per, structure):
    expected = asleep_after(masks, ratio, per, structure)
    before, weights = masks.count()[0], {name: p.detach().clone() for name, p in masks.parameters.items()}
    for p in masks.parameters.values():
        p.grad = torch.ones_like(p)
    assert prune(masks, ratio, per=per, structure=structure) == before - masks.count()[0]
    assert lists(masks) == expected
    for name, p in masks.parameters.items():
        assert p.equal(weights[name] * masks.masks[name]) and p.grad.equal(masks.masks[name].to(p))


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0.05, 1), RATIOS, st.sampled_from(["matrix", "global"]), st.integers(0, 10**6))
def test_pruning_is_that_of_a_plain_loop(shapes, density, ratio, per, seed):
    masks, _ = matrices(shapes, density, seed)
    live = {name: int(mask.sum()) for name, mask in masks.masks.items()}
    check_pruning(masks, ratio, per, None)
    if per == "matrix":                                                 # exactly the share of every matrix
        assert all(live[name] - int(mask.sum()) == round(ratio * live[name]) for name, mask in masks.masks.items())
    else:
        assert sum(live.values()) - masks.count()[0] == round(ratio * sum(live.values()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 37), st.integers(1, 4)), min_size=1, max_size=2), st.floats(0.05, 1), RATIOS,
       st.sampled_from(["matrix", "global"]), st.sampled_from(["block16", "row", "column"]), st.integers(0, 10**6))
def test_blocks_rows_and_columns_go_as_a_whole(shapes, density, ratio, per, structure, seed):
    masks, _ = matrices(shapes, density, seed)
    before = lists(masks)
    check_pruning(masks, ratio, per, structure)
    height, dim = {"block16": (16, 0), "row": (1, 1), "column": (99, 0)}[structure]
    for name, mask in masks.masks.items():
        parts = zip(mask.split(height), torch.tensor(before[name]).split(height))
        for now, then in parts:
            assert ((now == then).all(dim) | ~now.any(dim)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 70)), min_size=1, max_size=2), st.floats(0.05, 1), RATIOS,
       st.sampled_from(["matrix", "global"]), st.integers(0, 10**6))
def test_balanced_pruning_leaves_equal_numbers(shapes, density, ratio, per, seed):
    masks, _ = matrices(shapes, density, seed)
    before = {name: mask.clone() for name, mask in masks.masks.items()}
    check_pruning(masks, ratio, per, "balanced")
    for name, mask in masks.masks.items():
        now, then = (torch.stack([panel.sum(1) for panel in m.split(32, dim=1)]) for m in (mask, before[name]))
        if not now.equal(then):
            assert now.equal(then.clamp(max=int(now.max())))            # the same number, unless it had fewer


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.floats(0.05, 1), st.floats(0, 1), st.sampled_from(["matrix", "global"]), st.integers(0, 10**6))
def test_pruning_to_a_density_meets_the_count_of_a_random_seed_and_prunes_as_ever(shapes, density, goal, per, seed):
    ours, _ = matrices(shapes, density, seed)
    theirs, _ = matrices(shapes, density, seed)
    live = {name: int(mask.sum()) for name, mask in ours.masks.items()}
    counts = {name: live_count(mask.shape, goal) for name, mask in ours.masks.items()}
    slept = prune_to(ours, goal, per=per)
    for names in groups(counts, per):
        left, wanted = sum(live[n] for n in names), sum(counts[n] for n in names)
        assert sum(int(ours.masks[n].sum()) for n in names) == min(left, wanted)
    assert slept == sum(live.values()) - ours.count()[0]
    if per == "global":                                                 # the same, called by its ratio
        prune(theirs, slept / sum(live.values()), per=per)
        assert lists(ours) == lists(theirs)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.lists(st.floats(0, 1), min_size=3, max_size=3), st.integers(0, 10**6))
def test_each_matrix_is_pruned_to_the_density_of_the_first_pattern_that_fits(shapes, goals, seed):
    ours, _ = matrices(shapes, 1.0, seed)
    named = {"m0": goals[0], "m1": goals[1], "m*": goals[2], "m2": 0.123}
    prune_to(ours, {name: goal for name, goal in named.items() if name in (*ours.masks, "m*")})
    for name, mask in ours.masks.items():
        goal = goals[min(int(name[1:]), 2)]
        assert int(mask.sum()) == live_count(mask.shape, goal)


def test_structures_on_a_dense_convolution_reach_the_share():
    """Weights of three and more dimensions are seen as (rows, the rest)."""
    torch.manual_seed(0)
    for structure in STRUCTURES:
        masks = ConnectionMasks(nn.Conv2d(4, 32, (4, 4)))
        slept = prune(masks, 0.5, structure=structure)
        assert slept == 32 * 64 // 2 and masks.masks["weight"].shape == (32, 4, 4, 4)
        live = masks.masks["weight"].flatten(1)
        if structure == "balanced":
            assert (live.view(32, 2, 32).sum(2) == 16).all()
        if structure == "block16":
            assert live.view(2, 16, 64).sum(1).unique().tolist() == [0, 16]
        if structure == "row":
            assert live.sum(1).unique().tolist() == [0, 64]
        if structure == "column":
            assert live.sum(0).unique().tolist() == [0, 32]
        assert prune(masks, 1, structure=structure) == 32 * 64 // 2 and masks.count()[0] == 0
        assert prune(masks, 0.5, structure=structure) == 0              # nobody left to send to sleep


@pytest.mark.parametrize("call, words", [
    (lambda m, g: grow(m, g, 1.1), "growth ratio 1.1"), (lambda m, g: grow(m, g, float("nan")), "growth ratio nan"),
    (lambda m, g: grow(m, g, 0.5, per="row"), "per='row'.*'matrix' or 'global'"),
    (lambda m, g: grow(m, g, 0.5, init="random"), "init='random'"),
    (lambda m, g: grow(m, {}, 0.5), r"\(2, 3\) for m0"),
    (lambda m, g: grow(m, {"m0": torch.zeros(3, 2)}, 0.5), r"\(2, 3\) for m0"),
    (lambda m, g: grow(m, {"m0": None}, 0.5), r"\(2, 3\) for m0; call backward first"),
    (lambda m, g: prune(m, -0.1), "pruning ratio -0.1"), (lambda m, g: prune(m, 0.5, per="all"), "per='all'"),
    (lambda m, g: prune(m, 0.5, structure="block4"), "structure='block4'.*'block16', 'balanced', 'row' or 'column'"),
    (lambda m, g: prune_to(m, 1.1), "density 1.1"), (lambda m, g: prune_to(m, {"*": 1.1}), "density 1.1"),
    (lambda m, g: prune_to(m, {"rnn.*": 0.1, "out*": 0.2}), r"density of m0: no pattern of rnn.*, out\* matches")])
def test_bad_arguments_are_refused_by_name_and_change_nothing(call, words):
    masks, gradients = matrices([(2, 3)], 0.5, seed=0)
    before = lists(masks)
    with pytest.raises(ValueError, match=words):
        call(masks, gradients)
    assert lists(masks) == before


# The schedule -----------------------------------------------------------------------------------------------

class Run:
    """A training loop with scripted scores: each epoch moves every live weight and the running mean."""

    def __init__(self, schedule, scores=(), density=0.5):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.masks = ConnectionMasks(self.model, density=density, generator=torch.Generator().manual_seed(0))
        self.schedule, self.gradients, self.scores = schedule, Gradients(), list(scores)
        self.epoch, self.events, self.phases, self.states = 0, [], [], []

    def state(self) -> dict:
        return {"model": copy.deepcopy(self.model.state_dict()), "masks": copy.deepcopy(self.masks.masks)}

    def step(self):
        generator = torch.Generator().manual_seed(self.epoch)
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        if self.schedule.growing:
            self.gradients.collect(self.masks)
        self.masks.mask_gradients_()
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.1 * p.grad
            self.model[1].running_mean += 1
        self.phases.append((self.schedule.phase, self.schedule.at, self.schedule.length))
        self.states.append(self.state())
        self.events.append(self.schedule.end_epoch(self.masks, self.gradients, self.scores[self.epoch]))
        self.epoch += 1

    def finish(self) -> "Run":
        while not self.schedule.done:
            self.step()
        return self

    def happened(self) -> list[tuple]:
        return [(e.phase, e.kept) if e else None for e in self.events]


def same(a: dict, b: dict) -> bool:
    return all(x.equal(b[part][name]) for part in a for name, x in a[part].items())


STORY = dict(train_epochs=3, growth_epochs=2, growth_ratio=0.6, prune_ratio=0.25, retrain_epochs=2, rounds=5,
             tolerance=1, final_epochs=2)
# The floor is 10 + 1; scores in the middle of a stretch decide nothing.
SCORES = [30, 20, 10, 99, 10.5, 99, 11, 8, 11.5, 99, 10.9]
LIVE_SEED = 44                                                          # half of 8*6 + 5*8


def test_the_whole_story():
    run = Run(GrowPruneSchedule(**STORY), SCORES).finish()
    assert run.happened() == [("grow", True), ("grow", True), ("train", True), None, ("prune", True), None,
                              ("prune", True), None, ("prune", False), None, ("final", True)]
    assert run.phases == [("grow", 0, 3), ("grow", 1, 3), ("train", 2, 3), *[("prune", k, 2) for k in (0, 1)] * 3,
                          ("final", 0, 2), ("final", 1, 2)]
    events = [e for e in run.events if e]
    live = [e.nonzero for e in events]
    assert LIVE_SEED < live[0] < live[1] == live[2] and all(e.density == e.nonzero / 88 for e in events)
    first = live[2]                                                     # each matrix loses a quarter in each round
    assert abs(live[3] - first * 0.75) <= 1 and abs(live[4] - first * 0.75 ** 2) <= 2 > abs(live[5] - first * 0.42)
    assert live[6] == live[4] and run.masks.count() == (live[4], 88)
    assert "worse than the floor" in events[5].note and "woken" in events[0].note


def test_after_a_broken_floor_the_last_good_network_comes_back_exactly():
    run = Run(GrowPruneSchedule(**STORY), SCORES)
    for _ in range(9):
        run.step()
    assert run.schedule.phase == "final" and not same(run.state(), run.states[8])
    assert same(run.state(), run.states[6])                             # as it was scored at the end of round 2
    assert run.model[1].running_mean[0] == 7                            # buffers too
    for name, p in run.masks.parameters.items():
        assert (p[~run.masks.masks[name]] == 0).all() and (p.grad[~run.masks.masks[name]] == 0).all()
    run.finish()
    assert same(run.state(), run.states[10])                            # the last stretch made it better: kept


@pytest.mark.parametrize("good, last, kept", [(11, 10.9, True), (11, 11, True), (11, 11.1, False),
                                              (11, float("nan"), False), (10.5, 10.6, False)])
def test_a_last_stretch_that_made_it_worse_than_the_last_good_round_is_undone(good, last, kept):
    run = Run(GrowPruneSchedule(**STORY), [*SCORES[:6], good, *SCORES[7:-1], last]).finish()
    assert run.happened()[-1] == ("final", kept) and same(run.state(), run.states[10 if kept else 6])


def test_a_first_round_that_breaks_the_floor_leaves_the_network_before_pruning():
    run = Run(GrowPruneSchedule(**STORY | dict(final_epochs=0)), [30, 20, 10, 99, 11.01]).finish()
    assert run.happened()[-1] == ("prune", False) and run.epoch == 5 and same(run.state(), run.states[2])


def test_a_score_that_is_no_number_breaks_the_floor():
    run = Run(GrowPruneSchedule(**STORY | dict(final_epochs=0)), [30, 20, 10, 99, float("nan")]).finish()
    assert run.happened()[-1] == ("prune", False) and same(run.state(), run.states[2])


@pytest.mark.parametrize("final", [0, 2])
def test_if_every_round_is_good_all_are_kept(final):
    run = Run(GrowPruneSchedule(**STORY | dict(final_epochs=final)), [10] * 15).finish()
    assert run.happened()[4:13:2] == [("prune", True)] * 5 and run.epoch == 13 + final
    assert same(run.state(), run.states[-1]) and run.happened()[-1] == ("final" if final else "prune", True)
    assert abs(run.masks.count()[0] - run.events[2].nonzero * 0.75 ** 5) <= 4
    assert [e.nonzero for e in run.events[4:13:2]] == [int(sum(m.sum() for m in run.states[k]["masks"].values()))
                                                       for k in range(4, 13, 2)]


PATIENT = STORY | dict(patience=2)
# Round 1 holds, round 2 breaks the floor twice and holds with a quarter of the ratio; so do rounds 3 and 4; 5 breaks.
TRIES = [30, 20, 10, 99, 10.5, 99, 50, 99, 12, 99, 11, 99, 11, 99, 11, 99, 11.5, 99, 10.9]


def test_with_patience_a_broken_floor_is_tried_again_from_the_last_good_network_with_half_the_ratio():
    run = Run(GrowPruneSchedule(**PATIENT), TRIES)
    while run.epoch < 7:
        run.step()
    good = copy.deepcopy(run.masks)                                     # undone, and pruned again at once
    good.module.load_state_dict(run.states[4]["model"])
    good.masks = copy.deepcopy(run.states[4]["masks"])
    good.module.load_state_dict(run.states[4]["model"])
    assert run.schedule.phase == "prune" and run.schedule.at == 0 and run.schedule.round == 2
    prune(good, 0.125)
    assert lists(run.masks) == lists(good) and same({"model": good.module.state_dict()}, run.state())
    run.finish()
    assert run.happened()[4::2] == [("prune", True), ("prune", False), ("prune", False)] + [("prune", True)] * 3 + \
        [("prune", False), ("final", True)]
    live = [e.nonzero for e in run.events[4::2] if e]
    first, ratio = live[0], 1 - 0.25 / 4
    assert live[3:6] == pytest.approx([first * ratio ** k for k in (1, 2, 3)], abs=2) and live[-1] == live[5]
    assert [e.note[:7] for e in run.events[6::2] if e][:3] == ["round 2"] * 3


def test_after_an_undone_round_the_optimiser_begins_anew_with_every_parameter():
    for patience, phase in ((0, "final"), (1, "prune")):
        run = Run(GrowPruneSchedule(**STORY | dict(patience=patience)), [30, 20, 10, 99, 50])
        optimiser = torch.optim.AdamW(run.model.parameters())
        run.masks.attach(optimiser)
        for _ in range(5):
            run.step()
            optimiser.step()
            counts = [optimiser.state[p]["step"].item() for p in run.model.parameters()]
        assert run.schedule.phase == phase and counts == [1] * 6


def test_for_higher_scores_everything_is_mirrored():
    lower = Run(GrowPruneSchedule(**STORY), SCORES).finish()
    higher = Run(GrowPruneSchedule(**STORY, lower_is_better=False), [-s for s in SCORES]).finish()
    assert higher.happened() == lower.happened() and same(higher.state(), lower.state())
    assert [e.nonzero for e in higher.events if e] == [e.nonzero for e in lower.events if e]


def test_without_growth_it_starts_with_training():
    schedule = GrowPruneSchedule(**STORY | dict(growth_epochs=0))
    assert schedule.phase == "train" and not schedule.growing
    run = Run(schedule, SCORES).finish()
    assert run.happened()[:3] == [None, None, ("train", True)] and run.events[2].nonzero == LIVE_SEED
    assert all(phase != "grow" for phase, _, _ in run.phases)


def test_growth_may_last_to_the_first_pruning():
    run = Run(GrowPruneSchedule(**STORY | dict(growth_epochs=3)), SCORES).finish()
    assert run.happened()[:5] == [("grow", True), ("grow", True), ("train", True), None, ("prune", True)]
    assert run.events[2].nonzero > run.events[1].nonzero and "woken" in run.events[2].note


def test_without_rounds_it_ends_after_training_or_the_last_stretch():
    assert Run(GrowPruneSchedule(**STORY | dict(rounds=0, final_epochs=0)), SCORES).finish().epoch == 3
    run = Run(GrowPruneSchedule(**STORY | dict(rounds=0)), [30, 20, 10, 99, 11]).finish()
    assert run.happened()[-1] == ("final", False) and same(run.state(), run.states[2])


@pytest.mark.parametrize("options", [{}, dict(per="global"), dict(structure="row"),
                                     dict(per="global", structure="balanced")], ids=str)
def test_growth_sees_the_gradients_since_the_last_one_and_both_follow_the_settings(options):
    run, per = Run(GrowPruneSchedule(**STORY, **options), SCORES), options.get("per", "matrix")
    for epoch in range(2):
        twin = copy.deepcopy(run.masks)
        run.step()
        generator = torch.Generator().manual_seed(epoch)
        drawn = [torch.randn(p.shape, generator=generator) for p in run.model.parameters()]
        assert grow(twin, {"0.weight": drawn[0], "2.weight": drawn[4]}, 0.6, per=per) > 0
        assert lists(run.masks) == lists(twin) and run.gradients.sums == {}
    run.step()
    twin.module.load_state_dict(run.states[-1]["model"])                # as it was before the pruning
    assert lists(run.masks) == asleep_after(twin, 0.25, per, options.get("structure")) != lists(twin)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_epochs_left_is_an_upper_bound_that_reaches_zero(data, train, retrain, rounds, final, lower):
    growth, patience = data.draw(st.integers(0, train)), data.draw(st.integers(0, 2))
    schedule = GrowPruneSchedule(train, growth, retrain_epochs=retrain, rounds=rounds, final_epochs=final,
                                 lower_is_better=lower, patience=patience)
    most = train + retrain * (rounds + patience if rounds else 0) + final
    assert schedule.epochs_left == most and schedule.cycle == (0, train)
    once = dataclasses.replace(schedule, restarts=False)               # one cycle of the learning rate over them all
    assert once.cycle == (0, most)
    run = Run(schedule, data.draw(st.lists(st.integers(0, 3), min_size=most, max_size=most)))
    while not schedule.done:
        before = schedule.epochs_left
        once.load_state_dict(dataclasses.asdict(schedule) | {"restarts": False}, {})
        assert schedule.cycle == (schedule.at, schedule.length) and once.cycle == (most - before, most)
        assert 0 <= schedule.at < schedule.length and before > 0
        run.step()
        assert 0 <= schedule.epochs_left <= before - 1
    assert schedule.epochs_left == 0 and run.epoch <= most


@pytest.mark.parametrize("scores, story", [
    (SCORES, STORY), (SCORES[:-1] + [50], STORY), ([10] * 15, STORY), (TRIES, PATIENT),
    (SCORES, STORY | dict(growth="random", seed=3)),
    (SCORES, STORY | dict(init="sized"))], ids=["kept", "undone", "all good", "patient", "random", "sized"])
def test_a_run_can_be_stopped_and_resumed_after_any_epoch(scores, story):
    whole = Run(GrowPruneSchedule(**story), scores).finish()
    for stop in range(whole.epoch):
        first = Run(GrowPruneSchedule(**story), scores)
        for _ in range(stop):
            first.step()
        plain, tensors = first.schedule.state_dict()
        plain, tensors = json.loads(json.dumps(plain)), copy.deepcopy(tensors)
        state, packed, sums = first.state(), copy.deepcopy(first.masks.state_dict()), first.gradients.sums
        second = Run(GrowPruneSchedule(train_epochs=9), scores, density=1)
        second.schedule.load_state_dict(plain, tensors)
        second.model.load_state_dict(state["model"])
        second.masks.load_state_dict(packed)
        second.gradients.sums, second.epoch = dict(sums), first.epoch
        first.finish()                                                  # the state is a copy: this changes nothing
        second.finish()
        assert second.events == whole.events[stop:] and second.phases == whole.phases[stop:]
        assert same(second.state(), whole.state()) and second.epoch == whole.epoch


@pytest.mark.parametrize("options, words", [
    (dict(train_epochs=2, growth_epochs=3), "growth_epochs 3 exceed train_epochs 2"),
    (dict(train_epochs=0, growth_epochs=0), "train_epochs 0"), (dict(train_epochs=4.5), "train_epochs 4.5"),
    (dict(train_epochs=4, retrain_epochs=0), "retrain_epochs 0"),
    (dict(train_epochs=4, growth_epochs=-1), "growth_epochs -1"), (dict(train_epochs=4, rounds=-1), "rounds -1"),
    (dict(train_epochs=4, final_epochs=-1), "final_epochs -1"),
    (dict(train_epochs=4, prune_ratio=1.5), "prune_ratio 1.5"),
    (dict(train_epochs=4, growth_ratio=-1), "growth_ratio -1"), (dict(train_epochs=4, per="layer"), "per='layer'"),
    (dict(train_epochs=4, structure="block"), "structure='block'"),
    (dict(train_epochs=4, init="one"), "init='one'"),
    (dict(train_epochs=4, growth="rigl"), "growth='rigl'"), (dict(train_epochs=4, density=0), "density 0"),
    (dict(train_epochs=4, patience=-1), "patience -1"), (dict(train_epochs=4, patience=1, density=0.5), "choose one"),
    (dict(train_epochs=4, growth_batches=0), "growth_batches 0")])
def test_a_schedule_that_cannot_be_is_refused_before_it_starts(options, words):
    with pytest.raises(ValueError, match=words):
        GrowPruneSchedule(**options)


def test_the_dense_schedule_only_counts_epochs():
    schedule = Dense(3)
    for left in (2, 1, 0):
        assert not schedule.done and not schedule.growing and schedule.length == 3
        assert schedule.end_epoch(None, Gradients(), 5.0) is None and schedule.epochs_left == left
        resumed = Dense(9)
        resumed.load_state_dict(*schedule.state_dict())
        assert resumed == schedule
    assert schedule.done


def test_a_frozen_matrix_grows_nothing_and_stops_nobody():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    net[0].weight.requires_grad_(False)
    masks = ConnectionMasks(net, density=0.5, generator=torch.Generator().manual_seed(0))
    before = masks.masks["0.weight"].clone()
    net(torch.randn(3, 6)).square().sum().backward()
    for per in ("matrix", "global"):
        grow(masks, {n: p.grad for n, p in masks.parameters.items() if p.grad is not None}, 0.1, per=per)
        assert masks.masks["0.weight"].equal(before)
    assert masks.density("1.weight") > 0.5
    net[1].weight.requires_grad_(False)
    assert grow(masks, {}, 0.1, per="global") == 0


@pytest.mark.parametrize("options, words", [
    (dict(rounds=0, density=0.1), "of which there are none"), (dict(tolerance=float("nan")), "tolerance must be"),
    (dict(growth_batches=1.5), "growth_batches 1.5 .* whole"), (dict(train_epochs="4"), "train_epochs 4 must be")])
def test_a_schedule_that_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GrowPruneSchedule(**dict(train_epochs=4) | options)


def test_numbers_of_epochs_may_be_numpys_and_can_be_stored():
    """As they come from a table."""
    count = np.int64(3)
    for schedule in (Dense(count), GrowPruneSchedule(train_epochs=np.int64(4), rounds=count, growth_batches=count)):
        assert json.loads(json.dumps(schedule.state_dict()[0]))


def test_numbers_of_any_kind_may_be_numpys_and_can_be_stored():
    schedule = GrowPruneSchedule(4, growth_ratio=np.float32(0.75), prune_ratio=np.float32(0.5), seed=np.int64(3),
                                 tolerance=np.float32(0.25), density=np.float32(0.125))
    stored = json.loads(json.dumps(schedule.state_dict()[0]))
    assert [stored[name] for name in ("growth_ratio", "prune_ratio", "seed", "tolerance", "density")] == [
        0.75, 0.5, 3, 0.25, 0.125]


def test_a_network_that_is_sparser_than_its_goal_stays_so_and_the_event_tells():
    masks, gradients = matrices([(8, 8)], 0.2, seed=1)
    schedule = GrowPruneSchedule(1, 0, rounds=1, retrain_epochs=1, density=0.5, tolerance=None)
    first, second = (schedule.end_epoch(masks, gradients, 1.0) for _ in range(2))
    assert first.note == "before pruning; sparser than the density to be reached"
    assert first.density == second.density < 0.5 and schedule.done


def test_a_pattern_that_matches_nothing_is_refused_when_pruning_to_a_density():
    masks, _ = matrices([(6, 7)], 0.4, seed=1)
    before = lists(masks)
    with pytest.raises(ValueError, match="pattern 'typo.' matches none of m0"):
        prune_to(masks, {"typo*": 0.1, "*": 0.2})
    assert lists(masks) == before


def test_the_last_good_network_comes_back_with_state_that_is_no_tensor():
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]
    layer = Counting(4, 4)
    masks, schedule = ConnectionMasks(layer), GrowPruneSchedule(1, 0, rounds=1, retrain_epochs=1)
    layer.calls = 5
    schedule.end_epoch(masks, Gradients(), 1.0)
    layer.calls = 9
    schedule.end_epoch(masks, Gradients(), 2.0)                         # worse than the floor
    assert schedule.done and layer.calls == 5 and masks.density() == 1


@pytest.mark.parametrize("epochs", [0, -3, 2.5])
def test_dense_training_takes_whole_epochs(epochs):
    with pytest.raises(ValueError, match=f"epochs {epochs} must be a whole number"):
        Dense(epochs)


def test_where_too_few_are_dormant_all_of_them_are_chosen_and_nobody_else():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert best_dormant(mask, torch.ones(2, 3), 4).equal(~mask)


@pytest.mark.parametrize("structure", ["row", "column", "block16"])
def test_dormant_weights_that_drifted_do_not_save_their_unit(structure):
    """A loop that forgets `mask_gradients_` lets dormant weights drift; for pruning they are zero all the same."""
    masks, _ = matrices([(6, 7)], 0.4, seed=1)
    twin = copy.deepcopy(masks)
    with torch.no_grad():
        masks.parameters["m0"][~masks.masks["m0"]] = torch.randn(int((~masks.masks["m0"]).sum())).double() * 100
    assert prune(masks, 0.5, structure=structure) == prune(twin, 0.5, structure=structure) > 0
    assert lists(masks) == lists(twin)


def test_a_schedule_lets_woken_weights_begin_as_it_was_told():
    begun = {}
    for init in ("zero", "sized", "gradient"):
        made = Run(GrowPruneSchedule(**STORY, init=init), SCORES)
        before = copy.deepcopy(made.masks.masks)
        made.step()
        begun[init] = [bool((p[made.masks.masks[n] & ~before[n]] != 0).all()) for n, p in made.masks.parameters.items()]
    assert begun == {"zero": [False] * 2, "sized": [True] * 2, "gradient": [True] * 2}


def test_random_growth_draws_anew_at_each_epoch(monkeypatch):
    from hlstm_src import schedule
    states, wake = [], schedule.grow

    def watched(*args, generator, **options):
        states.append(tuple(generator.get_state().tolist()))
        return wake(*args, generator=generator, **options)
    monkeypatch.setattr(schedule, "grow", watched)
    for seed in (0, 1):
        made = Run(GrowPruneSchedule(**STORY, growth="random", seed=seed), SCORES)
        made.step()
        made.step()
    assert len(set(states)) == 4
