"""Masks: what is dormant is exactly zero, what wakes starts fresh, and files hold only what lives."""

import copy
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hlstm_src import HLSTM, ConnectionMasks, grow, masks, prune
from hlstm_src.growprune import Gradients, prune_to
from hlstm_src.lstm import diagonals
from hlstm_src.masks import (
    allocate,
    keep_,
    live_count,
    load_model,
    load_tensors,
    pack_bits,
    save_model,
    save_tensors,
    scattered,
    seeded,
    unpack_bits,
)

SHAPES = st.lists(st.integers(1, 12), min_size=2, max_size=3).map(torch.Size)


class Net(nn.Module):
    """A recurrent layer, a convolution and normalisation: matrices, a 3-D weight, vectors, buffers."""

    def __init__(self):
        super().__init__()
        self.rnn = HLSTM(5, 6, bidirectional=True, merge="sum")
        self.convolution, self.norm = nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(70_000, 70_006).view(2, 3))

    def forward(self, x):
        return self.norm(self.convolution(self.rnn(x)[0].permute(1, 2, 0)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(8, 5, 5))                       # moves the running means
    return net


# The sparse seed --------------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None)
@given(SHAPES, st.floats(1e-6, 1), st.integers(0, 99))
def test_a_random_mask_has_its_density_and_leaves_nobody_alone(shape, density, seed):
    mask = scattered(shape, live_count(shape, density), torch.Generator().manual_seed(seed))
    flat = mask.flatten(1)
    assert mask.dtype == torch.bool and mask.shape == shape
    assert flat.any(0).all() and flat.any(1).all()
    assert mask.sum() == max(round(density * mask.numel()), *flat.shape)
    assert mask.equal(scattered(shape, live_count(shape, density), torch.Generator().manual_seed(seed)))


def test_random_masks_keep_the_diagonal_and_favour_no_other_place():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([scattered(torch.Size([4, 6]), 12, generator) for _ in range(2000)]).float().mean(0)
    wrapped = torch.tensor([[k % 6 == r or k % 4 == r and k > 3 for k in range(6)] for r in range(4)])
    assert wrapped.sum() == 6 and (drawn[wrapped] == 1).all()
    assert (drawn[~wrapped] - (12 - 6) / (24 - 6)).abs().max() < 0.05


@settings(max_examples=150, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=5), st.floats(1e-6, 1))
def test_erdos_renyi_shares_out_the_same_sum_in_proportion_to_the_dimensions(shapes, density):
    shapes = {f"m{k}": shape for k, shape in enumerate(shapes)}
    live, uniform = allocate(shapes, density, "erdos-renyi-kernel"), allocate(shapes, density)
    assert sum(live.values()) == sum(uniform.values())
    low, high = [], []                                                  # what the constant must then be
    for name, shape in shapes.items():
        least, most = max(shape[0], shape[1:].numel()), shape.numel()
        assert least <= live[name] <= most
        low += [(live[name] - 1) / sum(shape)] if live[name] > least else []
        high += [(live[name] + 1) / sum(shape)] if live[name] < most else []
    assert max(low, default=0) <= min(high, default=1e9) + 1e-9


def test_erdos_renyi_leaves_small_matrices_denser_and_nobody_alone():
    def layers():
        return nn.Sequential(nn.Linear(5, 4), nn.Linear(60, 40), nn.Conv1d(20, 30, 3))
    made = ConnectionMasks(layers(), density=0.1, generator=torch.Generator().manual_seed(0),
                           allocation="erdos-renyi-kernel")
    assert made.count() == ConnectionMasks(layers(), density=0.1).count()
    assert made.density("0.weight") == 1 > made.density("2.weight") > 0       # 9 and 53 for 20 and 1,800
    ratio = made.density("1.weight") / made.density("2.weight")
    assert ratio == pytest.approx((100 / 2400) / (53 / 1800), rel=0.05)
    assert all(mask.flatten(1).any(0).all() and mask.flatten(1).any(1).all() for mask in made.masks.values())


def test_densities_can_be_given_by_name(net):
    made = ConnectionMasks(net, "*", {"*_hh_*": 0.5, "rnn.*": 0.75, "conv*": 1.0}, torch.Generator().manual_seed(0))
    assert made.density("rnn.weight_hh_l0_reverse") == 0.5 and made.density("convolution.weight") == 1
    assert made.density("rnn.weight_ih_l0") == made.density("rnn.weight_gate1_l0") == 0.75
    with pytest.raises(ValueError, match="no density is given for convolution.weight"):
        ConnectionMasks(net, "*", {"rnn.*": 0.5})
    with pytest.raises(ValueError, match="density 2 of rnn.weight_ih_l0"):
        ConnectionMasks(net, "*", {"*_ih_*": 2, "*": 0.5})
    with pytest.raises(ValueError, match="pattern 'wieght_\\*' matches none of .*convolution.weight"):
        ConnectionMasks(net, "*", {"wieght_*": 0.3, "*": 0.5})
    with pytest.raises(ValueError, match="pattern 'typo\\*'"):
        ConnectionMasks(net, ("rnn.*", "typo*"))
    with pytest.raises(ValueError, match="allocation='random'.*'erdos-renyi-kernel'"):
        ConnectionMasks(net, "*", 0.5, allocation="random")


@pytest.mark.parametrize("options", [dict(gate_width=24), dict(gate_width=5), dict(gate_width=16, gate_layers=2),
                                     dict(gate_width=16, shared_hidden=True), dict(gate_width=(6, 7, 8, 9))])
def test_in_a_sparse_gate_every_hidden_unit_hears_and_is_heard(options):
    """Each stack's block of a layer behind a hidden one meets all its rows and columns, whatever the widths."""
    layer = HLSTM(4, 6, **options)
    fresh = {name: p.detach().clone() for name, p in layer.named_parameters()}
    masks = ConnectionMasks(layer, density=0.02, generator=torch.Generator().manual_seed(0))
    prune_to(masks, 0.02)                                          # asks for no fewer than the seed has
    for name, mask in masks.masks.items():
        blocks = mask.chunk(len(layer.widths)) if name.startswith("weight_gate") and not layer.uneven else [mask]
        assert all(block.any(0).all() and block.any(1).all() for block in blocks)
        assert int(mask.sum()) == live_count(mask.shape, 0.02, len(blocks))
        if name.startswith("weight_gate"):
            w, ones = fresh[name], torch.zeros(mask.shape, dtype=torch.bool)
            ones[diagonals(mask.shape, len(blocks))] = True        # where the layer begins with ones, so has the seed
            bound = 1 / mask.shape[1] ** 0.5
            assert (w[ones] >= 1 - bound).all() and (w[~ones].abs() <= bound).all() and mask[ones].all()


def test_each_of_several_optimisers_is_told():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    masks, optimisers = ConnectionMasks(net), [torch.optim.Adam(layer.parameters()) for layer in net]
    for optimiser in optimisers:
        masks.attach(optimiser)

    def step():
        net.zero_grad()
        net(torch.randn(4, 8)).square().sum().backward()
        masks.mask_gradients_()
        for optimiser in optimisers:
            optimiser.step()
    step()
    prune(masks, 0.5)
    for _ in range(3):
        step()
    for name, p in masks.parameters.items():
        assert (p[~masks.masks[name]] == 0).all() and (~masks.masks[name]).any()
    masks.attach(torch.optim.SGD(net.parameters(), lr=0.1))             # takes the place of both
    assert [type(optimiser) for optimiser in masks.optimisers] == [torch.optim.SGD]


def test_a_parametrised_layer_leaves_no_neuron_unconnected_either():
    layer = HLSTM(4, 4, gate_width=16)
    nn.utils.parametrizations.spectral_norm(layer, "weight_gate1_l0")
    (mask,) = ConnectionMasks(layer, "*weight_gate1*", density=0.05).masks.values()
    assert all(block.any(0).all() and block.any(1).all() for block in mask.chunk(4))


def test_what_masks_cannot_keep_is_refused_by_name():
    table = nn.Embedding(20, 8, sparse=True)
    masks = ConnectionMasks(table, density=0.4)
    table(torch.tensor([1, 2, 3])).sum().backward()
    for act in (masks.mask_gradients_, lambda: Gradients().collect(masks), lambda: prune(masks, 0.5)):
        with pytest.raises(ValueError, match="weight: its gradient is sparse.* sparse=False"):
            act()
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"weight is {dtype}: masks are for real numbers"):
            ConnectionMasks(nn.ParameterDict({"weight": torch.zeros(4, 4, dtype=dtype)}))


def test_a_tied_matrix_is_found_by_its_first_name_and_the_error_says_so():
    net = nn.ModuleDict({"e": nn.Embedding(6, 4), "o": nn.Linear(4, 6, bias=False)})
    net["o"].weight = net["e"].weight
    with pytest.raises(ValueError, match="there are: e.weight .one that goes by several names"):
        ConnectionMasks(net, "o.*")


def test_masks_of_a_part_are_refused_even_if_the_whole_has_a_matrix_of_that_name(tmp_path):
    part = nn.Linear(4, 4)
    whole = nn.Linear(5, 4)
    whole.part = part
    with pytest.raises(ValueError, match="masks of weight, .4, 4., which the module lacks"):
        save_model(tmp_path / "model.safetensors", whole, ConnectionMasks(part), {})
    assert not os.listdir(tmp_path)


def test_masks_go_with_an_optimiser_of_their_matrices():
    layer, other = nn.Linear(4, 3), nn.Linear(4, 3)
    masks = ConnectionMasks(layer, density=0.5)
    with pytest.raises(ValueError, match="LBFGS mixes"):
        masks.attach(torch.optim.LBFGS(layer.parameters()))
    with pytest.raises(ValueError, match="none of the masked parameters"):
        masks.attach(torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="newcomers"):
        masks.wake_("weight", torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="weight: a mask of shape"):
        masks.load_state_dict({"weight": torch.zeros(5, dtype=torch.uint8)})


def test_masks_of_a_part_are_not_lost_in_a_file(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="which the module lacks"):
        save_model(tmp_path / "model.safetensors", net, ConnectionMasks(net[0], density=0.5), {})
    assert not list(tmp_path.iterdir())


def test_include_chooses_matrices_by_name(net):
    def names(include):
        return list(ConnectionMasks(net, include).masks)
    matrices = [f"rnn.weight_{part}_l0{way}" for way in ("", "_reverse") for part in ("ih", "hh", "gate1")]
    assert names("rnn.*") == names("rnn.*weight_*") == matrices          # biases are never masked
    assert names("*") == [*matrices, "convolution.weight"]
    assert names(("*_hh_l0", "conv*")) == ["rnn.weight_hh_l0", "convolution.weight"]
    with pytest.raises(ValueError, match="'lstm.*'.*rnn.weight_ih_l0.*convolution.weight"):
        ConnectionMasks(net, "lstm.*")
    for density in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="density"):
            ConnectionMasks(net, density=density)


def test_a_seed_silences_weights_at_once_and_is_counted(net):
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    made = ConnectionMasks(net, "rnn.*", 0.5, torch.Generator().manual_seed(1))
    live = {name: round(0.5 * mask.numel()) for name, mask in made.masks.items()}
    assert made.count() == (sum(live.values()), sum(m.numel() for m in made.masks.values()))
    assert made.density() == made.count()[0] / made.count()[1]
    for name, p in net.named_parameters():
        mask = made.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert p.equal(torch.where(mask, before[name], 0))
        if name in live:
            assert mask.sum() == live[name] and made.density(name) == live[name] / mask.numel()


def test_a_rescaled_seed_gives_a_neuron_as_much_as_the_dense_matrix_would():
    torch.manual_seed(0)
    layer, x = nn.Linear(400, 300, bias=False), torch.randn(50, 400)
    dense, before = layer(x).square().mean(), layer.weight.detach().clone()
    masks = ConnectionMasks(layer, density=0.25, generator=torch.Generator().manual_seed(1))
    assert layer(x).square().mean() < 0.4 * dense
    masks.rescale_()
    assert layer.weight.equal(torch.where(masks.masks["weight"], before * 2, 0))
    assert 0.8 < layer(x).square().mean() / dense < 1.25


# Training ---------------------------------------------------------------------------------------------------

OPTIMISERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),              # whose state does not begin at zero throughout
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)}


def moments(optimiser, p) -> list[torch.Tensor]:
    return [t for t in optimiser.state[p].values() if isinstance(t, torch.Tensor) and t.shape == p.shape]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_dormant_connections_are_exactly_zero_through_training_growth_and_pruning(net, kind):
    made = ConnectionMasks(net, ("rnn.*", "conv*"), 0.4, torch.Generator().manual_seed(1))
    optimiser = OPTIMISERS[kind](net.parameters())
    made.attach(optimiser)
    collected, data = Gradients(), torch.Generator().manual_seed(2)

    def check(trained: bool):
        for name, p in made.parameters.items():
            dormant = ~made.masks[name]
            assert dormant.any() and (p[dormant] == 0).all() and (p.grad[dormant] == 0).all()
            for moment in moments(optimiser, p):
                assert (moment[dormant] == 0).all()
                assert not trained or (moment[~dormant] != 0).float().mean() > 0.8

    def train():
        for _ in range(3):
            optimiser.zero_grad()
            x = torch.randn(8, 5, 5, generator=data)
            (net(x) - x[2:, :, :4].permute(1, 2, 0)).square().mean().backward()
            collected.collect(made)
            made.mask_gradients_()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            before = {name: p.detach().clone() for name, p in made.parameters.items()}
            optimiser.step()
            for name, p in made.parameters.items():
                moved, live = p != before[name], made.masks[name]
                assert not (moved & ~live).any() and moved[live].float().mean() > 0.8
            check(trained=True)

    train()
    for _ in range(2):
        before = {name: m.clone() for name, m in made.masks.items()}
        assert grow(made, collected.sums, 0.7) > 0
        for name, p in made.parameters.items():
            woken = made.masks[name] & ~before[name]
            assert woken.any() and (p[woken] == 0).all()
            assert not any(t.any() for t in moments(optimiser, p))      # and the optimiser remembers nothing of them
        check(trained=False)
        train()
        assert prune(made, 0.3) > 0
        check(trained=False)
        train()


def test_who_wakes_starts_at_zero_even_if_it_was_not_kept_there(net):
    """A loop that forgets `mask_gradients_` lets dormant weights drift; growth wakes them fresh all the same."""
    made = ConnectionMasks(net, "rnn.*", 0.5, torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(net.parameters())
    made.attach(optimiser)
    net(torch.randn(8, 5, 5)).square().sum().backward()
    optimiser.step()
    before = {name: mask.clone() for name, mask in made.masks.items()}
    assert any((p[~made.masks[name]] != 0).any() for name, p in made.parameters.items())
    grow(made, {name: torch.ones_like(p) for name, p in made.parameters.items()}, 0)
    for name, p in made.parameters.items():
        woken = made.masks[name] & ~before[name]
        assert woken.any() and made.masks[name].all()
        assert all((t[woken] == 0).all() for t in [p, p.grad, *moments(optimiser, p)])


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_optimiser_begins_anew_with_a_matrix_that_grew_and_with_no_other(kind):
    torch.manual_seed(0)
    net = nn.ParameterDict({"grown": torch.randn(6, 8), "kept": torch.randn(6, 8)})
    made = ConnectionMasks(net, density=0.5, generator=torch.Generator().manual_seed(1))
    optimiser = OPTIMISERS[kind](net.parameters())
    made.attach(optimiser)

    def train(net, optimiser, steps):
        data = torch.Generator().manual_seed(2)
        for _ in range(steps):
            for name, p in net.items():
                p.grad = torch.randn(p.shape, generator=data).masked_fill_(~made.masks[name], 0)
            optimiser.step()
    train(net, optimiser, 200)
    state = {k: t.clone() for k, t in optimiser.state[net["kept"]].items()}
    assert grow(made, {"grown": torch.randn(6, 8), "kept": torch.zeros(6, 8)}, 0.5) > 0
    assert all(t.equal(state[k]) for k, t in optimiser.state[net["kept"]].items())
    twin = copy.deepcopy(net)
    fresh = OPTIMISERS[kind](twin.parameters())
    for steps in (1, 2, 5):                                             # from here as with an optimiser just made
        train(net, optimiser, steps)
        train(twin, fresh, steps)
        torch.testing.assert_close(net["grown"], twin["grown"])
        assert not torch.allclose(net["kept"], twin["kept"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_keeps_its_bits_and_the_rest_is_zero_whatever_it_was(dtype):
    values = torch.tensor([1.5, -2, float("inf"), -float("inf"), float("nan"), -0.0, 1e-40], dtype=dtype)
    tensor = values.repeat(2, 1).T                                      # not contiguous
    keep_(tensor, torch.tensor([True, False]).expand(7, 2))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert tensor[:, 0].contiguous().view(bits).equal(values.view(bits))
    assert (tensor[:, 1].contiguous().view(bits) == 0).all()


def test_infinite_values_are_put_to_sleep_too(net):
    made = ConnectionMasks(net, "rnn.weight_hh_l0", 0.5)
    p, dormant = net.rnn.weight_hh_l0, ~made.masks["rnn.weight_hh_l0"]
    p.grad = torch.full_like(p, float("inf"))
    made.mask_gradients_()
    assert (p.grad[dormant] == 0).all() and p.grad[~dormant].isinf().all()
    with torch.no_grad():
        p.fill_(float("nan"))
    made.apply_()
    assert (p[dormant] == 0).all() and p[~dormant].isnan().all()


# State dicts ------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_bits_come_back_as_they_were_packed(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    bits = "".join(f"{byte:08b}" for byte in packed.tolist())
    assert [b == "1" for b in bits[:mask.numel()]] == mask.flatten().tolist() and len(packed) == -(-mask.numel() // 8)
    assert unpack_bits(packed, shape).equal(mask)
    for wrong in (torch.cat([packed, packed[:1]]), packed[1:], packed.int()):
        with pytest.raises(ValueError, match="bytes"):
            unpack_bits(wrong, shape)


def test_masks_go_into_a_state_dict_and_back(net):
    first = ConnectionMasks(net, "rnn.*", 0.5, torch.Generator().manual_seed(1))
    state = first.state_dict()
    other = Net()
    second = ConnectionMasks(other, "rnn.*")
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    second.attach(optimiser)
    other(torch.randn(8, 5, 5)).square().sum().backward()
    optimiser.step()
    second.load_state_dict(state)
    for name, p in second.parameters.items():
        assert second.masks[name].equal(first.masks[name])
        assert all((t != 0).equal(second.masks[name]) for t in [p, p.grad, *moments(optimiser, p)])
    prune(second, 0.5)                                                  # the state is a copy
    assert all(state[name].equal(bits) for name, bits in first.state_dict().items())
    first.load_state_dict(state)
    for wrong in ({}, state | {"more": torch.zeros(1, dtype=torch.uint8)},
                  state | {"rnn.weight_hh_l0": torch.zeros(1, dtype=torch.uint8)}):
        with pytest.raises(ValueError):
            first.load_state_dict(wrong)
        assert all(first.state_dict()[name].equal(bits) for name, bits in state.items())


# Files ------------------------------------------------------------------------------------------------------

def test_a_stored_model_comes_back_in_half_precision(net, tmp_path):
    made = ConnectionMasks(net, "rnn.*", 0.3, torch.Generator().manual_seed(1))
    path = tmp_path / "new" / "model.safetensors"
    save_model(path, net, made, {"words": ["ü", 1]})
    other = Net()
    found = load_model(path, other)
    assert found.keys() == made.masks.keys() and all(found[name].equal(mask) for name, mask in made.masks.items())
    for name, t in net.state_dict().items():
        back = other.state_dict()[name]
        expected = t.half().float() if t.dim() >= 2 and t.is_floating_point() else t
        assert back.dtype == t.dtype and back.equal(expected)           # vectors and whole numbers untouched
        if name in found:
            assert (back[~found[name]] == 0).all()
    tensors, metadata = load_tensors(path)
    assert metadata == {"words": ["ü", 1]}
    live, total = made.count()
    stored = [t.nbytes for name, t in tensors.items() if name.endswith((".live", ".mask"))]
    assert sum(stored) == 2 * live + sum(-(-m.numel() // 8) for m in made.masks.values()) < total
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("ratio", [None, 1])
def test_a_dense_model_and_one_with_nobody_awake_can_be_stored(net, tmp_path, ratio):
    made = None if ratio is None else ConnectionMasks(net, "rnn.*")
    if made:
        prune(made, ratio)
    save_model(tmp_path / "model", net, made, {})
    other = Net()
    found = load_model(tmp_path / "model", other)
    assert sorted(found) == (sorted(made.masks) if made else []) and not any(m.any() for m in found.values())
    assert other.rnn.weight_hh_l0.equal(net.rnn.weight_hh_l0.half().float())
    assert (other.rnn.weight_hh_l0 == 0).all() == (made is not None)


def test_what_two_layers_share_is_stored_and_comes_back(tmp_path):
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight, tied["b"].bias = tied["a"].weight, tied["a"].bias
    save_model(tmp_path / "model", tied, None, {})
    save_tensors(tmp_path / "tensors", tied.state_dict(), {})
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    load_model(tmp_path / "model", other)
    assert all(other[k].bias.equal(tied["a"].bias) and other[k].weight.equal(tied["a"].weight.half().float())
               for k in "ab")
    assert all(t.equal(tied.state_dict()[name]) for name, t in load_tensors(tmp_path / "tensors")[0].items())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="no Muon in this PyTorch")
def test_an_optimiser_that_moves_dormant_weights_is_refused():
    layer = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="Muon mixes the entries of a matrix.*AdamW"):
        ConnectionMasks(layer, "*", 0.5).attach(torch.optim.Muon(layer.parameters()))


@pytest.mark.parametrize("dtype, eps, fused", [(torch.float16, 1e-8, False), (torch.float16, 1e-4, False),
                                               (torch.float16, 1e-8, True), (torch.bfloat16, 1e-8, False)])
def test_half_precision_leaves_dormant_weights_at_zero_or_is_refused(dtype, eps, fused):
    layer = nn.Linear(4, 4).to(dtype)
    masks = ConnectionMasks(layer, "*weight", 0.5, torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(layer.parameters(), eps=eps, fused=fused)
    if dtype == torch.float16 and eps == 1e-8 and not fused:
        with pytest.raises(ValueError, match=r"eps=1e-08 of AdamW is zero in torch.float16.*such as 1e-4"):
            masks.attach(optimiser)
        return
    masks.attach(optimiser)
    for _ in range(3):
        layer(torch.ones(1, 4, dtype=dtype)).sum().backward()
        masks.mask_gradients_()
        optimiser.step()
    assert not layer.weight[~masks.masks["weight"]].any() and layer.weight[masks.masks["weight"]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc./", min_size=1, max_size=5), SHAPES, max_size=4), st.integers(0, 9))
def test_tensors_come_back_as_they_were_saved(tmp_path_factory, shapes, seed):
    path = tmp_path_factory.mktemp("tensors") / "file"
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).mT for name, shape in shapes.items()}
    save_tensors(path, tensors, {"seed": seed})
    found, metadata = load_tensors(str(path))
    assert metadata == {"seed": seed} and found.keys() == tensors.keys()
    assert all(found[name].equal(t) for name, t in tensors.items())


def refused(path, module, *words):
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_model(path, module)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message
    assert all(t.equal(before[name]) for name, t in module.state_dict().items())      # nothing half-loaded


def test_damaged_and_foreign_files_are_refused_by_name(net, tmp_path):
    path, bad = tmp_path / "model.safetensors", tmp_path / "bad.safetensors"
    save_model(path, net, ConnectionMasks(net, "rnn.*", 0.5), {})
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    for cut in [0, 1, 7, 8, 9, header, header + 8, len(data) - 1, *range(20, len(data), 997)]:
        bad.write_bytes(data[:cut])
        refused(bad, net, "damaged", "run again")
    for foreign in (b"not a model\n", data[:8] + b"[" + data[9:], np.random.default_rng(0).bytes(4000), data + b"\0"):
        bad.write_bytes(foreign)
        refused(bad, net, "damaged", "run again")
    for metadata in (None, {"other": "{}"}, {"json": "{"}, {"json": "[]"}):
        save_file({"x": torch.zeros(2, 2)}, bad, metadata=metadata)
        refused(bad, net, "not of this project")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_tensors(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path)


def test_files_of_another_model_are_refused_by_tensor(net, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, net, ConnectionMasks(net, "rnn.*", 0.5), {})
    tensors, _ = load_tensors(path)
    hh = "rnn.weight_hh_l0"

    def changed(**changes):
        mixed = {name: changes.get(name.replace(".", "_"), t) for name, t in tensors.items()}
        return {name: t for name, t in mixed.items() if t is not None}
    for mixed, words in [
            (changed(norm_bias=None), "norm.bias"), (changed(norm_bias=torch.zeros(5)), "norm.bias"),
            (changed(rnn_weight_hh_l0_live=None), hh), (changed(rnn_weight_hh_l0_live=torch.zeros(3).half()), hh),
            (changed(rnn_weight_hh_l0_mask=tensors[hh + ".mask"][1:]), hh),
            (changed(rnn_weight_hh_l0_mask=tensors[hh + ".mask"] | 255), hh),
            (tensors | {"extra": torch.zeros(1)}, "extra")]:
        save_tensors(path, mixed, {})
        refused(path, net, words, "another model")


def test_values_that_half_precision_cannot_hold_are_refused(net, tmp_path):
    made = ConnectionMasks(net, "rnn.weight_hh_l0", 0.5)
    with torch.no_grad():
        net.rnn.weight_hh_l0[made.masks["rnn.weight_hh_l0"]] = 70_000
    with pytest.raises(ValueError, match="model.*rnn.weight_hh_l0.*float16"):
        save_model(tmp_path / "model", net, made, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["a full disk", "a failing rename", "metadata that is no JSON"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(net, tmp_path, monkeypatch, failing):
    path = tmp_path / "model.safetensors"
    save_model(path, net, None, {"old": True})
    old = path.read_bytes()

    def full(tensors, part, metadata):
        with open(part, "wb") as file:
            file.write(b"half of it")
        raise SafetensorError("Error while serializing: No space left on device")

    def stuck(*args):
        raise OSError("stuck")
    if failing == "a full disk":
        monkeypatch.setattr(masks, "save_file", full)
    if failing == "a failing rename":
        monkeypatch.setattr(os, "replace", stuck)
    with pytest.raises((OSError, TypeError)) as told:
        save_model(path, net, None, {"new": object() if "JSON" in failing else 1})
    assert failing != "a full disk" or str(told.value).startswith(f"{path}: cannot be written (")
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]
    assert json.dumps(load_tensors(path)[1]) == '{"old": true}'


def test_each_matrix_of_a_seed_is_rescaled_by_its_own_density():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [net[k].weight.detach().clone() for k in (0, 1)]
    masks = ConnectionMasks(net, density={"0.*": 0.25, "1.*": 1.0}, generator=torch.Generator().manual_seed(0))
    masks.rescale_()
    assert net[0].weight.equal(torch.where(masks.masks["0.weight"], before[0] * 2, 0))
    assert net[1].weight.equal(before[1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="no Muon in this PyTorch")
def test_such_an_optimiser_is_refused_in_accelerates_wrapper_too():
    layer = nn.Linear(4, 4, bias=False)
    wrapped = SimpleNamespace(optimizer=torch.optim.Muon(layer.parameters()), state={})
    with pytest.raises(ValueError, match="Muon mixes"):
        ConnectionMasks(layer, "*", 0.5).attach(wrapped)


def test_the_density_of_all_is_that_of_their_connections_not_the_mean_of_the_matrices():
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 40))
    masks = ConnectionMasks(net, density={"0.*": 1.0, "1.*": 0.25}, generator=torch.Generator().manual_seed(0))
    assert masks.density() == (100 + 100) / 500


def test_no_two_pairs_of_seed_and_epoch_share_what_they_draw():
    drawn = {tuple(torch.rand(3, generator=seeded(seed, epoch)).tolist()) for seed in range(4) for epoch in range(50)}
    assert len(drawn) == 4 * 50


def test_stacked_gates_count_in_an_allocation_as_they_do_in_a_uniform_seed():
    shapes, blocks = {"gate": torch.Size([16, 8]), "other": torch.Size([100, 100])}, {"gate": 4}
    assert allocate(shapes, 0.05, "uniform", blocks) == {"gate": 32, "other": 500}
    assert sum(allocate(shapes, 0.05, "erdos-renyi-kernel", blocks).values()) == 532
    assert allocate(shapes, 0.01, "erdos-renyi-kernel", blocks)["gate"] >= 32


def test_a_file_with_more_values_than_connections_is_refused(tmp_path):
    net, path = nn.Linear(4, 4), tmp_path / "model"
    save_model(path, net, ConnectionMasks(net, density=0.5), {})
    tensors, _ = load_tensors(path)
    save_tensors(path, tensors | {"weight.live": torch.cat([tensors["weight.live"]] * 2)}, {})
    with pytest.raises(ValueError, match="16 values for 8 live connections"):
        load_model(path, net)
