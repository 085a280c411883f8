"""Where survivors came from: the seed is drawn again as it was, shares agree with counting, misfits are refused."""

import pytest
import torch

from hlstm_src import experiments, records, survivors


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Stored models of a run that grew, of one that only pruned, and of a dense one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLSTM_RESULTS", str(tmp_path_factory.mktemp("results")))
        made = {}
        for name in ("toy-gp", "toy-prune-only", "toy-dense"):
            experiments.run(name, "smoke", progress=False)
            made[name] = records.path_of(name, "smoke", 0).with_suffix(".safetensors")
        yield made


def test_the_seed_is_that_of_the_run(files):
    again, first = survivors.seed_masks(files["toy-gp"]), experiments.trainer("toy-gp", "smoke", progress=False)
    assert set(again) == set(first.masks.masks)
    assert all(torch.equal(mask, first.masks.masks[name]) for name, mask in again.items())
    assert all(0 < survivors.share_of(mask) < 1 for mask in again.values())


def test_shares_are_those_that_counting_gives(files):
    grown, pruned = files["toy-gp"], files["toy-prune-only"]
    table = survivors.tab_survivors(grown, pruned)
    live, other = (experiments.load(file)[1] for file in (grown, pruned))
    seed = survivors.seed_masks(grown)
    size = sum(int(mask.sum()) for mask in live.values())
    counts = {"woken": 0, "both": 0, "alone": 0}
    for name, mask in live.items():
        for alive, before, elsewhere in zip(mask.flatten().tolist(), seed[name].flatten().tolist(),
                                            other[name].flatten().tolist()):
            counts["woken"] += alive and not before
            counts["both"] += alive and elsewhere
            counts["alone"] += alive and not before and not elsewhere
    cells = dict(table.rows)["all"]
    assert [cells[k] for k in (1, 3, 5)] == [survivors.density(counts[key] / size)
                                             for key in ("woken", "both", "alone")]


def test_a_network_is_its_own_double(files):
    rows = dict(survivors.tab_survivors(files["toy-gp"], files["toy-gp"]).rows)
    assert rows["all"][3] == survivors.density(1.0) and rows["all"][5] == survivors.density(0.0)
    assert len(dict(survivors.tab_survivors(files["toy-gp"]).rows)["all"]) == 3


def test_what_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="seed0.safetensors.*without masks"):
        survivors.seed_masks(files["toy-dense"])
    with pytest.raises(ValueError, match="shapes"):
        survivors.tab_survivors(files["toy-gp"], files["toy-dense"])
