"""Layouts: packed matrices are the matrices, their products are right, and the quickest kind is chosen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import ConnectionMasks, prune

pytest.importorskip("numba")
from hlstm_src.compact import layouts  # noqa: E402
from hlstm_src.compact.cells import padded  # noqa: E402
from hlstm_src.compact.kernels import aligned, product  # noqa: E402
from tests.compact.matrices import dense  # noqa: E402


@st.composite
def matrices(draw):
    """(W, mask), with empty, full and ordinary rows and columns."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 110))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random((rows, columns)) < draw(st.sampled_from([0, 0.02, 0.1, 0.5, 1]))
    for axis, fill in ((0, False), (0, True), (1, False), (1, True)):
        if draw(st.booleans()):
            chosen = rng.integers(mask.shape[axis])
            mask[(chosen, slice(None)) if axis == 0 else (slice(None), chosen)] = fill
    return rng.normal(size=(rows, columns)).astype(np.float32), mask


def multiplied(layout, x):
    """layout @ x for x (columns, k), as the kernels do it, on top of ones."""
    k, rows = x.shape[1], layout.shape[0]
    xs, y = aligned((k, padded(x.shape[0]))), aligned((k, padded(rows)))
    xs[:, :x.shape[0]], y[:, :] = x.T, 1
    product(layout.packed, xs.ctypes.data, xs.shape[1], y.ctypes.data, y.shape[1], k)
    assert (y[:, -(-rows // 16) * 16:] == 1).all()                 # nothing is written behind the last block
    return y[:, :rows].T - 1


@settings(max_examples=60, deadline=None)
@given(matrices(), st.sampled_from(layouts.KINDS), st.sampled_from(list(layouts.VALUES)), st.integers(1, 70))
def test_a_packed_matrix_is_the_matrix(matrix, kind, values, columns):
    W, mask = matrix
    layout = layouts.pack(W, mask, kind, values)
    whole, wanted = dense(layout), np.where(mask, W, 0)
    assert layout.shape == whole.shape == W.shape and whole.dtype == np.float32 and (whole[~mask] == 0).all()
    if values == "fp32":
        assert (whole == wanted).all()
    elif values == "bf16":
        assert (whole == torch.from_numpy(wanted).bfloat16().float().numpy()).all()
    else:                                                          # half a step of 127 to the largest of the row
        most = np.abs(wanted).max(1, keepdims=True)
        assert (np.abs(whole - wanted) <= most / 127 * 0.501).all()
    x = np.random.default_rng(0).normal(size=(W.shape[1], columns)).astype(np.float32)
    # However a sum is ordered, it is rounded once for each term; and the product, its scale, the weight, the one added
    # and the one taken away again can each cost a rounding more.
    exact, sizes = whole.astype(np.float64) @ x, np.abs(whole).astype(np.float64) @ np.abs(x) + 1
    assert (np.abs(multiplied(layout, x) - exact) <= (W.shape[1] + 6) * 2.0 ** -24 * sizes).all()
    assert layout.nbytes == sum(a.nbytes for a in layout.arrays.values())


@pytest.mark.parametrize("structure", [None, "balanced", "block16"])
@pytest.mark.parametrize("rows, columns", [(64, 96), (50, 70)])
def test_pruned_with_a_structure(structure, rows, columns):
    module = torch.nn.Linear(columns, rows)
    masks = ConnectionMasks(module, "weight")
    prune(masks, 0.9, structure=structure)
    W, mask = module.weight.detach().numpy(), masks.masks["weight"].numpy()
    for kind in (None, *layouts.KINDS):
        assert (dense(layouts.pack(W, mask, kind)) == W).all()


def test_equal_counts_leave_no_lane_empty():
    mask = np.zeros((64, 128), bool)
    order = np.random.default_rng(0).random((64, 4, 32)).argsort(2)
    mask.reshape(64, 4, 32)[order < 3] = True                      # three in each row and panel of 32
    assert layouts.pack(np.ones(mask.shape), mask, "gather").slots == 64 // 16 * 4 * 3
    blocks = np.repeat(np.random.default_rng(0).random((4, 128)) < 0.1, 16, axis=0)
    assert layouts.pack(np.ones(blocks.shape), blocks, "block16").slots == blocks[::16].sum()


def test_rows_of_like_length_share_a_slice():
    mask = np.tril(np.ones((64, 64), bool))[np.random.default_rng(0).permutation(64)]
    layout = layouts.pack(np.ones(mask.shape), mask, "sliced")
    assert layout.slots == sum(range(8, 65, 8)) and (dense(layout) == mask).all()
    assert layouts.pack(np.ones((3, 5)), np.zeros((3, 5), bool), "sliced").slots == 0


def test_dense_stores_the_region_only():
    region = np.kron(np.eye(2, dtype=bool), np.ones((32, 20), bool))
    W = np.random.default_rng(0).normal(size=region.shape).astype(np.float32) * region
    layout = layouts.pack(W, region, "dense", region=region)
    assert layout.slots == 4 * 20 and (dense(layout) == W).all()


def test_the_quickest_kind_is_chosen(monkeypatch):
    rng = np.random.default_rng(0)
    scattered, blocks = rng.random((256, 256)) < 0.05, np.repeat(rng.random((16, 256)) < 0.05, 16, axis=0)
    full, single = np.ones((256, 256), bool), np.zeros((256, 256), bool)
    single[3, 5] = True
    for cpu in (True, False):                                      # without AVX-512 there is nothing to fetch with
        monkeypatch.setattr(layouts, "cpu_features", lambda cpu=cpu: cpu)
        for mask, columns, kind in ((scattered, 1, "gather" if cpu else "sliced"), (scattered, 4, "sliced"),
                                    (blocks, 1, "block16"), (blocks, 4, "block16"), (full, 1, "dense"),
                                    (full, 4, "dense"), (single, 1, "block16")):
            chosen, why = layouts.choose(mask, columns=columns)
            assert chosen == kind and f"{mask.mean():.1%} of 65,536" in why
            assert ("gather" in why) == cpu and layouts.pack(full.astype(float), mask).kind in layouts.KINDS


@pytest.mark.parametrize("wrong, told", [({"kind": "ell"}, "ell"), ({"values": "fp8"}, "fp8"),
                                         ({"mask": np.ones((2, 4), bool)}, r"\(3, 4\).*\(2, 4\)")])
def test_bad_input_is_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        layouts.pack(np.ones((3, 4)), **wrong)
