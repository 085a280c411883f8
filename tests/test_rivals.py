"""The rivals: all end after the same epochs with the same number of connections, and each does what its paper says."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hlstm_src import ConnectionMasks, grow, rivals
from hlstm_src.growprune import Gradients
from hlstm_src.masks import live_count
from hlstm_src.rivals import RIVALS, Gradual, Rewinding, Rewiring, parameters_left, rival, small_width
from hlstm_src.schedule import Dense
from tests.test_growprune import Run, lists, matrices, same

SPARSE = [name for name in RIVALS if "dense" not in name]


def run(name, epochs=12, density=0.25, stop=None, scores=None, **options) -> Run:
    """A scripted run (see Run) of a rival, to its end or to an epoch."""
    seed_density, schedule = rival(name, epochs=epochs, density=density, **options)
    made = Run(schedule, scores or [1.0] * epochs, density=1.0 if seed_density is None else seed_density)
    while not schedule.done and made.epoch != stop:
        made.step()
    return made


# What all have in common ------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(SPARSE), st.integers(2, 14), st.floats(0.01, 0.5),
       st.sampled_from(["matrix", "global"]))
def test_equal_epochs_and_equal_density_whatever_the_scores(data, name, epochs, density, per):
    epochs = max(epochs, 3) if name == "gp-gradual" else epochs             # in one it grows, in one it prunes
    rounds = data.draw(st.integers(1, epochs - 1))
    scores = data.draw(st.lists(st.floats(), min_size=epochs, max_size=epochs))
    made = run(name, epochs, density, scores=scores, rounds=rounds, per=per)
    assert made.epoch == epochs
    shapes = [mask.shape for mask in made.masks.masks.values()]
    assert made.masks.count()[0] == sum(live_count(shape, density) for shape in shapes)
    for mask_name, p in made.masks.parameters.items():
        assert (p[~made.masks.masks[mask_name]] == 0).all()


@pytest.mark.parametrize("name", ["dense", "small-dense"])
def test_the_dense_ones_need_no_masks(name):
    assert rival(name, epochs=9, density=0.1) == (None, Dense(9))


@pytest.mark.parametrize("name", SPARSE)
def test_each_can_be_stopped_and_resumed_after_any_epoch(name):
    whole = run(name)
    for stop in (1, 2, 3, 5, 8, 11):
        first = run(name, stop=stop)
        plain, tensors = first.schedule.state_dict()
        plain, tensors = json.loads(json.dumps(plain)), copy.deepcopy(tensors)
        state, sums = copy.deepcopy(first.state()), copy.deepcopy(first.gradients.sums)
        second = run(name, stop=0, seed=5)
        second.schedule.load_state_dict(plain, tensors)
        second.model.load_state_dict(state["model"])
        second.masks.masks = state["masks"]
        second.gradients.sums, second.epoch = sums, stop
        while not first.schedule.done:                                 # the state is a copy: this changes nothing
            first.step()
        second.finish()
        assert second.events == whole.events[stop:] and second.phases == whole.phases[stop:]
        assert same(second.state(), whole.state())


@pytest.mark.parametrize("name", RIVALS)
def test_gradients_count_with_their_signs_and_over_whole_epochs_unless_asked(name):
    _, schedule = rival(name, epochs=12, density=0.1)
    assert schedule.absolute is False and schedule.growth_batches is None


@pytest.mark.parametrize("name", RIVALS)
def test_epochs_left_counts_down_to_zero(name):
    made = run(name, stop=0)
    for left in range(12, 0, -1):
        schedule = made.schedule
        assert schedule.epochs_left == left and 0 <= schedule.at < schedule.length and not schedule.done
        made.step()
    assert made.schedule.done and made.schedule.epochs_left == 0


def test_rewiring_by_gradient_without_one_is_refused_by_name():
    layer = torch.nn.Linear(4, 4)
    masks, schedule = ConnectionMasks(layer, density=0.5), rival("rigl", epochs=12, density=0.5)[1]
    before = masks.masks["weight"].clone()
    with pytest.raises(ValueError, match="gradients hold nothing for weight; call collect"):
        schedule.end_epoch(masks, Gradients(), 1.0)
    assert masks.masks["weight"].equal(before)


def test_a_seed_changes_what_is_drawn_and_nothing_else():
    for name in SPARSE:
        draws = name in ("set", "gp-random")
        assert same(run(name, seed=0).state(), run(name, seed=1).state()) != draws


@pytest.mark.parametrize("options, words", [
    (dict(name="lottery"), "'lottery': choose one of dense, small-dense"), (dict(density=0), "density 0"),
    (dict(density=1.5), "density 1.5"), (dict(epochs=4, rounds=4), "4 epochs are too few for 4 rounds"),
    (dict(rounds=0), "0 rounds"), (dict(density=0.6), "density 0.5 cannot be pruned to 0.6"),
    (dict(name="imp", epochs=4, rounds=4), "too few"), (dict(name="gradual", epochs=1, rounds=1), "of 1 epochs none"),
        (dict(name="gp", train_share=2), "train_share 2 must lie"), (dict(name="gp", seed_density=2), "seed_density 2"),
    (dict(name="prune-only", density={"*": 0.1}), "prune-only takes one density; only gradual and gp-gradual"),
    (dict(name="gradual", density={"0.*": 0.1, "2.*": 1.1}), "density .* must lie"),
    (dict(name="gp-gradual", density={"0.*": 0.1, "2.*": 0.6}), "density 0.5 cannot be pruned"),
    (dict(name="rigl", structure="row"), "rigl rewires single connections"),
    (dict(name="gp-gradual", epochs=2, rounds=1), "of 2 epochs none .* 1 of growth before them")])
def test_what_cannot_be_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        rival(**dict(name="gp", epochs=12, density=0.25) | options)


@pytest.mark.parametrize("make, words", [
    (lambda: Rewinding(9, rounds=4, rewind=2), "no epoch 2 to rewind to"), (lambda: Rewinding(9, rewind=0), "epoch 0"),
    (lambda: Gradual(1), "of 1 epochs"), (lambda: Gradual(9, first=0.5, last=0.5), "shares 0.5 and 0.5"),
    (lambda: Gradual(9, growth_epochs=6), "6 of growth"), (lambda: Gradual(9, growth_epochs=-1), "growth_epochs -1"),
    (lambda: Gradual(9, growth_ratio=2.0), "growth_ratio 2.0")])
def test_a_schedule_that_cannot_be_is_refused_before_it_starts(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Each for itself --------------------------------------------------------------------------------------------

def test_one_shot_prunes_once_and_prune_only_in_equal_ratios():
    once, often = run("one-shot"), run("prune-only", rounds=3)
    changes = [e.nonzero for e in once.events if e]
    assert changes == [88, 22] and [p[:2] for p in once.phases].count(("prune", 0)) == 1
    live = [e.nonzero for e in often.events if e]
    assert live[0] == 88 and live[-1] == 22
    assert [round(88 * 0.25 ** (k / 3)) for k in range(4)] == pytest.approx(live, abs=1)


def test_grow_and_prune_grows_first_and_without_growth_it_does_not():
    grown, anywhere, still = run("gp"), run("gp-random"), run("gp-no-growth")
    for made in (grown, anywhere):
        events = [e for e in made.events if e]
        assert [e.phase for e in events] == ["grow", "grow", "train"] + ["prune"] * 4
        assert 44 < events[0].nonzero < events[1].nonzero == events[2].nonzero > events[3].nonzero
    assert [e.nonzero for e in still.events if e][0] == 44 and still.phases[0] == ("train", 0, 8)
    assert lists(grown.masks) != lists(anywhere.masks)
    first = [run(name, stop=1).masks.masks for name in ("gp", "gp-random")]
    assert [int(m.sum()) for m in first[0].values()] == [int(m.sum()) for m in first[1].values()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=3), st.floats(0.1, 1),
       st.floats(0, 1), st.sampled_from(["matrix", "global"]), st.integers(0, 10**6))
def test_random_growth_wakes_as_many_in_each_matrix_as_the_gradients_would(shapes, density, ratio, per, seed):
    ours, gradients = matrices(shapes, density, seed)
    theirs, _ = matrices(shapes, density, seed)
    before = {name: mask.clone() for name, mask in ours.masks.items()}
    weights = {name: p.detach().clone() for name, p in ours.parameters.items()}
    woken = grow(theirs, gradients, ratio, per=per)
    assert grow(ours, gradients, ratio, per=per, generator=torch.Generator().manual_seed(seed)) == woken
    for name, mask in ours.masks.items():
        assert mask.sum() == theirs.masks[name].sum() and mask[before[name]].all()
        assert ours.parameters[name].equal(weights[name])


def test_random_growth_favours_no_place():
    times = torch.zeros(6, 7)
    start, gradients = matrices([(6, 7)], 0.4, seed=1)
    dormant, generator = ~start.masks["m0"], torch.Generator().manual_seed(0)
    for _ in range(1500):
        masks, _ = matrices([(6, 7)], 0.4, seed=1)
        woken = grow(masks, gradients, 0.5, generator=generator)
        times += masks.masks["m0"] & dormant
    share = woken / int(dormant.sum())
    assert 0 < share < 1 and (times[dormant] / 1500 - share).abs().max() < 0.06


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_rewiring_moves_the_smallest_weights_and_keeps_every_matrix_as_dense_as_it_was(growth):
    made = Run(Rewiring(12, growth=growth), [1.0] * 12, density=0.3)
    live = {name: int(mask.sum()) for name, mask in made.masks.masks.items()}
    for epoch in range(12):
        assert made.schedule.growing == (growth == "gradient" and epoch + 1 < 9)
        made.step()
        then = made.states[-1]
        share = 0.15 * (1 + math.cos(math.pi * (epoch + 1) / 9)) if epoch + 1 < 9 else 0
        assert (made.events[-1] is None) == (share == 0)
        for place, (name, mask) in zip((0, 4), made.masks.masks.items()):
            assert int(mask.sum()) == live[name]
            generator = torch.Generator().manual_seed(epoch)
            gradient = [torch.randn(p.shape, generator=generator) for p in made.model.parameters()][place].abs()
            weights, before = then["model"][name].abs(), then["masks"][name]
            n = round(share * live[name])
            kept = sorted((w, k) for k, (w, m) in enumerate(zip(weights.flatten(), before.flatten())) if m)[n:]
            stays = torch.zeros(mask.numel(), dtype=torch.bool)
            stays[[k for _, k in kept]] = True
            assert mask.flatten()[stays].all()                          # the larger ones stay, with their weights
            assert made.masks.parameters[name].flatten().equal(then["model"][name].flatten() * stays)
            if growth == "gradient":
                scores = gradient.flatten().masked_fill(stays, -1)
                assert set(mask.flatten().nonzero().flatten().tolist()) == \
                    set(stays.nonzero().flatten().tolist()) | set(scores.argsort(descending=True)[:n].tolist())


def test_where_set_rewires_to_has_nothing_to_do_with_gradients():
    ours, theirs = run("set", stop=0), run("set", stop=0)
    theirs.gradients.sums = {"0.weight": torch.zeros(1)}
    ours.step()
    theirs.step()
    assert lists(ours.masks) == lists(theirs.masks)


def test_gradual_pruning_follows_the_cubic_and_then_rests():
    made = run("gradual", epochs=16)
    live = [int(sum(m.sum() for m in state["masks"].values())) for state in made.states] + [made.masks.count()[0]]
    for epoch, n in enumerate(live):
        passed = min(max((epoch - 4) / 8, 0), 1)
        assert abs(n - 88 * (0.25 + 0.75 * (1 - passed) ** 3)) <= 1, epoch
    assert live[4] == 88 > live[5] and live[-5:] == [22] * 5


def test_gradual_grow_and_prune_grows_as_the_paper_does_and_then_follows_the_cubic_from_there():
    ours, theirs = run("gp-gradual", epochs=16, stop=2, growth_epochs=2), run("gp", epochs=16, stop=2, growth_epochs=2)
    assert lists(ours.masks) == lists(theirs.masks) and ours.masks.count()[0] > 44
    assert [e.phase for e in ours.events] == ["grow", "grow"] and ours.gradients.sums == {}
    top = ours.masks.density()
    while not ours.schedule.done:
        assert not ours.schedule.growing
        ours.step()
        passed = min(max((ours.epoch - 4) / 8, 0), 1)
        assert abs(ours.masks.count()[0] - 88 * (0.25 + (top - 0.25) * (1 - passed) ** 3)) <= 2, ours.epoch


def test_gradual_grow_and_prune_without_growth_keeps_its_seed_until_it_prunes():
    made = run("gp-gradual", epochs=16, stop=4, growth_epochs=0)
    assert made.masks.count()[0] == 44 and made.events == [None] * 4


@pytest.mark.parametrize("name", ["gradual", "gp-gradual"])
def test_the_gradual_ones_take_each_matrix_to_a_density_of_its_own(name):
    made = run(name, epochs=16, density={"0.*": 0.25, "2.*": 0.4})
    assert {n: int(m.sum()) for n, m in made.masks.masks.items()} == {"0.weight": 12, "2.weight": 16}
    before = made.states[6]["masks"]                                        # on the way both have lost something
    assert 12 < before["0.weight"].sum() < 48 and 16 < before["2.weight"].sum() < 40


@pytest.mark.parametrize("name", [name for name in SPARSE if name not in ("set", "rigl")])
def test_a_structure_reaches_every_pruning(name):
    made = run(name, epochs=16, structure="row", rounds=3)
    for state, after, event in zip(made.states, [*made.states[1:], made.state()], made.events):
        for n, mask in after["masks"].items():
            lost = (state["masks"][n] & ~mask).any(1)
            assert event is None or event.phase != "prune" or not mask[lost].any()
    assert any(not mask[row].any() for mask in made.masks.masks.values() for row in range(len(mask)))


def test_rewinding_brings_back_the_early_weights_of_those_who_live_and_a_fresh_optimiser():
    made = run("imp", epochs=11, rounds=4, stop=0)
    assert [k for k in range(4) if made.schedule.length == 3] and made.schedule.rewind == 1
    optimiser = torch.optim.AdamW(made.model.parameters())
    made.masks.attach(optimiser)
    for p in made.model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step()
    lengths = []
    while not made.schedule.done:
        lengths.append(made.schedule.length)
        made.step()
        if made.epoch == 1:
            early = made.state()["model"]
        if made.events[-1] is None:
            continue
        for name, t in made.model.state_dict().items():
            assert t.equal(early[name] * made.masks.masks.get(name, 1))
        assert all((t == 0).all() for state in optimiser.state.values() for t in state.values())
        for p in made.model.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step()
    assert lengths == [3] * 3 + [2] * 8
    live = [e.nonzero for e in made.events if e]
    assert live == pytest.approx([88 * 0.25 ** (k / 4) for k in (1, 2, 3, 4)], abs=1) and live[-1] == 22


# As many parameters -----------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(st.integers(30, 60_000))
def test_the_width_with_the_nearest_number_of_parameters_is_found(parameters):
    def build(width):
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2))
    sizes = {width: sum(p.numel() for p in build(width).parameters()) for width in range(1, 260)}
    found = small_width(build, parameters)
    assert abs(sizes[found] - parameters) == min(abs(size - parameters) for size in sizes.values())


def test_widths_have_their_limits_and_dormant_connections_do_not_count():
    assert small_width(lambda width: nn.Linear(width, 1), 10**9, most=50) == 50
    assert small_width(lambda width: nn.Linear(width, 1), 2) == 1
    assert small_width(lambda width: nn.Linear(9, width), 5) == 1          # twice as large, and not more
    with pytest.raises(ValueError, match="already takes 1010 parameters"):
        small_width(lambda width: nn.Linear(100, 10 * width), 500)
    layer = nn.Linear(10, 10)
    masks = ConnectionMasks(layer, density=0.2, generator=torch.Generator().manual_seed(0))
    assert parameters_left(layer) == 110 and parameters_left(layer, masks) == 30


def test_only_who_prunes_in_rounds_needs_epochs_for_them():
    for name in ("dense", "small-dense", "set", "rigl", "gradual", "gp-gradual"):
        assert rival(name, epochs=6, density=0.1, rounds=8)[1].epochs_left == 6


@pytest.mark.parametrize("make, words", [
    (lambda: Rewiring(4, growth="gradients"), "growth='gradients'"), (lambda: Rewiring(4, share=2), "share 2"),
    (lambda: Gradual(8, density=-1), "density -1"), (lambda: Gradual(8, structure="zzz"), "zzz"),
    (lambda: Rewinding(8, rounds=1, per="zzz"), "zzz"), (lambda: Rewinding(0), "epochs 0")])
def test_a_schedule_that_cannot_be_is_refused_at_once(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["gp", "gp-random", "gp-sized", "gp-gradual"])
def test_the_share_that_grows_is_the_one_asked_for(name):
    woken = [run(name, epochs=16, stop=1, growth_epochs=1, growth_ratio=ratio).masks.count()[0] for ratio in (0.3, 0.9)]
    assert woken[0] > woken[1]


@pytest.mark.parametrize("name", [n for n in ("one-shot", "prune-only", "gradual", "imp", "gp-no-growth", "gp-random",
                                              "gp-sized", "gp", "gp-gradual")])
def test_what_is_pruned_and_grown_over_all_matrices_together_is_not_what_each_would_lose(name):
    """The first matrix has the larger weights, the second the larger gradients: together, each matrix has a share of
    its own."""
    def live(per):
        seed_density, schedule = rival(name, epochs=16, density=0.25, per=per)
        made = Run(schedule, [1.0] * 16, density=seed_density)
        with torch.no_grad():
            made.model[0].weight.mul_(100)
        return [int(m.sum()) for m in made.finish().masks.masks.values()]
    each, together = live("matrix"), live("global")
    assert each == [12, 10] and sum(together) == 22 and together != each


def test_gradual_growth_is_over_all_matrices_together_if_asked_for():
    def woken(per):
        made = Run(Gradual(16, density=0.25, growth_epochs=1, growth_ratio=0.6, per=per), [1.0] * 16, density=0.5)
        before = copy.deepcopy(made.masks)
        made.step()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(p.shape, generator=generator) for p in made.model.parameters()]
        grow(before, {"0.weight": drawn[0], "2.weight": drawn[4]}, 0.6, per=per)
        assert lists(made.masks) == lists(before)
        return lists(made.masks)
    assert woken("matrix") != woken("global")


def test_how_long_growth_and_retraining_take_unless_one_says():
    """A quarter of the first stretch, and of "gp-gradual" an eighth of all epochs; retraining has the rest."""
    for epochs, train, retrain, growth in ((16, 8, 2, 2), (40, 20, 5, 5), (15, 11, 1, 3), (27, 15, 3, 4)):
        schedule = rival("gp", epochs=epochs, density=0.1)[1]
        assert (schedule.train_epochs, schedule.retrain_epochs, schedule.growth_epochs) == (train, retrain, growth)
    gradual = [rival("gp-gradual", epochs=epochs, density=0.1)[1].growth_epochs for epochs in (4, 8, 16, 40)]
    assert gradual == [1, 1, 2, 5]
    assert rival("gp", epochs=16, density=0.1, train_share=0.75)[1].train_epochs == 12


def test_set_draws_other_places_for_each_matrix_epoch_and_seed(monkeypatch):
    drawn, draw = [], rivals.random_scores

    def watched(like, generator):
        scores = draw(like, generator)
        drawn.append(tuple(scores.flatten()[:20].tolist()))
        return scores
    monkeypatch.setattr(rivals, "random_scores", watched)
    for seed in (0, 1):
        run("set", seed=seed)
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 8              # seeds, matrices, epochs in which anyone moves


def test_of_two_widths_as_near_the_smaller_is_taken():
    assert small_width(lambda width: nn.Linear(2, width, bias=False), 5) == 2
