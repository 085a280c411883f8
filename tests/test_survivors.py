"""Where survivors came from: the seed is drawn again as it was, shares agree with counting, misfits are refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from hlstm_src import experiments, profiles, records, survivors
from hlstm_src.masks import ConnectionMasks, save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Stored models of a run that grew, of one that only pruned, and of a dense one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLSTM_RESULTS", str(tmp_path_factory.mktemp("results")))
        made = {}
        for name, seed in (("toy-gp", 1), ("toy-prune-only", 0), ("toy-dense", 0)):
            experiments.run(name, "smoke", seed, progress=False)
            made[name] = records.path_of(name, "smoke", seed).with_suffix(".safetensors")
        yield made


@pytest.fixture
def drawn(files, tmp_path):
    """The model that grew, as if other connections had survived: of each kind some of the seed's and some woken."""
    model, _, about = experiments.load(files["toy-gp"])
    masks = ConnectionMasks(model, "rnn.weight_*", {"*_ih_*": 0.45, "*": 0.3}, torch.Generator().manual_seed(7))
    save_model(tmp_path / "drawn.safetensors", model, masks, about)
    shutil.copy(files["toy-gp"].with_suffix(".json"), tmp_path / "drawn.json")
    return tmp_path / "drawn.safetensors"


def test_the_seed_is_that_of_the_run(files):
    again, first = survivors.seed_masks(files["toy-gp"]), experiments.trainer("toy-gp", "smoke", 1, progress=False)
    assert set(again) == set(first.masks.masks)
    assert all(torch.equal(mask, first.masks.masks[name]) for name, mask in again.items())
    assert all(0 < survivors.share_of(mask) < 1 for mask in again.values())


def test_shares_are_those_that_counting_gives(files, drawn):
    pruned = files["toy-prune-only"]
    rows = dict(survivors.tab_survivors(drawn, pruned).rows)
    live, other = (experiments.load(file)[1] for file in (drawn, pruned))
    seed = survivors.seed_masks(drawn)
    grown = next(row for row in records.read(drawn.with_suffix(".json")).history if row.phase == "train").densities
    kinds = {"input": "rnn.weight_ih_l0", "state": "rnn.weight_hh_l0", "inside the gates": "rnn.weight_gate1_l0"}
    assert set(kinds.values()) == set(live) and list(rows) == [*kinds, "all"]
    for kind, cells in rows.items():
        counts, lucky, size = {"woken": 0, "both": 0, "alone": 0}, {"woken": 0, "both": 0}, 0
        for name in live if kind == "all" else [kinds[kind]]:
            here = 0
            for alive, before, elsewhere in zip(live[name].flatten().tolist(), seed[name].flatten().tolist(),
                                                other[name].flatten().tolist()):
                here += alive
                counts["woken"] += alive and not before
                counts["both"] += alive and elsewhere
                counts["alone"] += alive and not before and not elsewhere
            size, all_of_it = size + here, live[name].numel()
            had = grown[name] * all_of_it                          # connections when growth had ended
            lucky["woken"] += here * (had - int(seed[name].sum())) / had
            lucky["both"] += here * int(other[name].sum()) / all_of_it
        wanted = [counts["woken"], lucky["woken"], counts["both"], lucky["both"], counts["alone"]]
        assert min(wanted) > 0 and cells == [str(size), *(survivors.density(found / size) for found in wanted)]


def test_a_network_is_its_own_double(files):
    rows = dict(survivors.tab_survivors(files["toy-gp"], files["toy-gp"]).rows)
    assert rows["all"][3] == survivors.density(1.0) and rows["all"][5] == survivors.density(0.0)
    assert len(dict(survivors.tab_survivors(files["toy-gp"]).rows)["all"]) == 3


def test_what_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="seed0.safetensors.*without masks"):
        survivors.seed_masks(files["toy-dense"])
    with pytest.raises(ValueError, match="shapes"):
        survivors.tab_survivors(files["toy-gp"], files["toy-dense"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLSTM_RESULTS", str(tmp_path))
        smoke = profiles.PROFILES["smoke"]
        patch.setattr(profiles, "PROFILES", {"smoke": replace(smoke, toy=replace(smoke.toy, hidden=6))})
        experiments.run("toy-prune-only", "smoke", progress=False)
        narrow = records.path_of("toy-prune-only", "smoke", 0).with_suffix(".safetensors")
    with pytest.raises(ValueError, match="shapes"):
        survivors.tab_survivors(files["toy-gp"], narrow)
