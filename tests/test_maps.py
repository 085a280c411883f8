"""Pictures of connections: every connection in exactly one state, shares kept, gates in their order."""

import base64
import io

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hlstm_src import maps
from tests.pictures import drawn
from tests.test_figures import luminance

COLOURS = {state: np.array(matplotlib.colors.to_rgb(colour)) for state, colour in maps.STATES.items()}


def texts(picture) -> str:
    return "\n".join(t.get_text() for t in picture.findobj(matplotlib.text.Text))


def some(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(4 * rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@settings(deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(0, 9))
def test_blocks_keep_the_share_of_live_connections(rows, columns, seed):
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.3
    blocks = maps._blocks(mask)
    assert blocks.shape == (min(rows, 40), min(columns, 40)) and blocks.min() >= 0 and blocks.max() <= 1
    sizes = [np.diff(np.linspace(0, n, min(n, 40) + 1).astype(int)) for n in mask.shape]
    assert (blocks * np.outer(*sizes)).sum() == pytest.approx(mask.sum())


def test_connection_maps_stand_in_the_order_of_the_gates():
    mask = torch.zeros(4 * 64, 100, dtype=torch.bool)
    mask[128:192] = True                                                   # all of gate g, nothing else
    picture = drawn(maps.connection_maps({"weight_hh": mask, "weight_ih": ~mask}))
    panels = [ax for part in picture.subfigs for ax in part.axes if ax.images]
    shares = [float(ax.images[0].get_array().mean()) for ax in panels]
    assert [ax.get_title() for ax in panels][:4] == ["gate i", "gate f", "gate g", "gate o"]
    assert shares == [0, 0, 100, 0, 100, 100, 0, 100]
    assert "weight_hh: 25.0 % of 25,600 alive" in texts(picture)
    assert "weight_hh 25.0 % alive (i 0.0, f 0.0, g 100.0, o 0.0); weight_ih 75.0 % alive" in picture.alt
    drawn(maps.connection_maps({"nothing alive": np.zeros((8, 3), bool)}))
    for wrong in ({}, {"w": np.zeros((6, 3), bool)}, {"w": np.zeros(8, bool)}):
        with pytest.raises(ValueError):
            maps.connection_maps(wrong)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9), st.sampled_from([8, 64]))
def test_every_connection_is_in_one_state_and_its_colour_shows_it(rows, columns, seed, most):
    before, after = (some(rows, columns, 0.4, seed + k).numpy()[:rows] for k in (0, 50))
    states = maps._states(before, after)
    assert (sum(state.astype(int) for state in states.values()) == 1).all()
    assert ((states["alive"] | states["woken"]) == after).all()
    assert ((states["alive"] | states["put to sleep"]) == before).all()
    image = maps._colours(before, after, most)
    assert image.shape == (min(rows, most), min(columns, most), 3)
    if max(rows, columns) <= most:                                         # no blocks, no mixing
        for state, where in states.items():
            np.testing.assert_allclose(image[where], np.broadcast_to(COLOURS[state], image[where].shape))
    first = maps._states(None, after)                                      # nothing before: nothing woke or slept
    assert not first["woken"].any() and not first["put to sleep"].any() and (first["alive"] == after).all()


def test_colours_of_states_differ_for_those_who_see_none():
    light = sorted(luminance(colour) + 0.05 for colour in COLOURS.values())
    assert all(lighter >= 2 * darker for darker, lighter in zip(light, light[1:]))
    assert abs(COLOURS["woken"] - COLOURS["put to sleep"])[2] > 0.5        # blue against orange


@pytest.mark.parametrize("rows, columns, phases", [(1, 1, 1), (32, 32, 3), (80, 20, 4), (256, 256, 3), (16, 300, 6)])
def test_a_column_a_phase_a_row_a_gate(rows, columns, phases):
    masks = {f"phase {k}": {"ih": some(rows, columns, 0.5, k), "hh": some(rows, 7, 0.5, k)} for k in range(phases)}
    picture = drawn(maps.gp_masks(masks, "ih"))
    grid = np.array(picture.axes).reshape(4, phases)
    for column, (phase, found) in enumerate(masks.items()):
        mask = found["ih"].numpy()
        assert grid[0, column].get_title() == f"{phase}\n{100 * mask.mean():.1f} % alive"
        before = None if column == 0 else masks[f"phase {column - 1}"]["ih"].numpy()
        for row, ax in enumerate(grid[:, column]):
            old = None if before is None else before[row * rows:(row + 1) * rows]
            shown = maps._colours(old, mask[row * rows:(row + 1) * rows], 64)
            np.testing.assert_allclose(ax.images[0].get_array(), shown)
            assert ax.images[0].get_extent() == [0, columns, rows, 0]
    assert [ax.get_ylabel().split("\n")[0] for ax in grid[:, 0]] == ["gate i", "gate f", "gate g", "gate o"]
    assert ("block" in "".join(t.get_text() for t in picture.legends[0].findobj(matplotlib.text.Text))
            ) == (max(rows, columns) > 64)
    boxes = [t.get_window_extent() for t in (*picture.legends[0].texts, *(ax.xaxis.label for ax in grid[-1]))]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])


def test_gp_masks_say_what_is_wrong():
    one, two = {"ih": some(4, 4, 0.5, 0)}, {"ih": some(4, 4, 0.5, 0), "hh": some(4, 4, 0.5, 1)}
    assert "ih" in texts(maps.gp_masks({"seed": one}))                     # the only matrix need not be named
    with pytest.raises(ValueError, match="which matrix.*ih, hh"):
        maps.gp_masks({"seed": two})
    with pytest.raises(KeyError):
        maps.gp_masks({"seed": two}, "weight")
    with pytest.raises(ValueError, match="one matrix in several shapes"):
        maps.gp_masks({"seed": one, "grown": {"ih": some(4, 5, 0.5, 0)}})
    with pytest.raises(ValueError, match="seed: ih.*no four gates"):
        maps.gp_masks({"seed": {"ih": torch.ones(6, 2, dtype=torch.bool)}})
    with pytest.raises(ValueError, match="at least one"):
        maps.gp_masks({})


@pytest.fixture(scope="module")
def moving():
    """Two matrices over five frames: seed, two growths, two prunings."""
    masks, frames = {name: some(20, width, 0.4, width) for name, width in (("ih", 12), ("hh", 20))}, []
    for k, phase in enumerate(("seed", "growth 1", "growth 2", "pruning 1", "pruning 2")):
        new = {name: some(20, mask.shape[1], 0.3, 10 + k) for name, mask in masks.items()}
        if k:
            masks = {name: mask | new[name] if k < 3 else mask & new[name] for name, mask in masks.items()}
        frames.append((phase, masks))
    return frames, maps.animation(frames, seconds=0.3)


def test_an_animation_has_a_frame_for_each_moment_and_then_rests(moving):
    frames, shown = moving
    gif = Image.open(io.BytesIO(shown.gif))
    assert gif.format == "GIF" and gif.n_frames == len(frames) and gif.info["loop"] == 0
    durations, pictures = [], []
    for k in range(gif.n_frames):
        gif.seek(k)
        durations.append(gif.info["duration"])
        pictures.append(np.asarray(gif.convert("RGB")).astype(int))
    assert durations == [300] * 4 + [2500]
    for before, after in zip(pictures, pictures[1:]):
        assert (abs(after - before).max(2) > 60).mean() > 0.01             # something moved
    assert (abs(pictures[0] - pictures[1]).max(2)[:30] > 60).any()         # the title too
    last = np.asarray(Image.open(io.BytesIO(shown.last)).convert("RGB")).astype(int)
    assert np.median(abs(last - pictures[-1]).max(2)) < 8


def test_an_animation_colours_what_woke_and_what_fell_asleep(moving):
    gif = Image.open(io.BytesIO(moving[1].gif))

    def maps_show(frame: int, state: str) -> bool:
        gif.seek(frame)
        image = np.asarray(gif.convert("RGB"))[60:-190] / 255              # below the title, above the densities
        return bool((abs(image - COLOURS[state]).max(2) < 0.05).mean() > 0.01)
    assert [maps_show(k, "woken") for k in range(5)] == [False, True, True, False, False]
    assert [maps_show(k, "put to sleep") for k in range(5)] == [False, False, False, True, True]


def test_an_animation_shows_itself_without_network_or_program(moving):
    frames, shown = moving
    page = shown._repr_mimebundle_()
    assert base64.b64decode(page["image/png"]) == shown.last
    assert base64.b64encode(shown.gif).decode() in page["text/html"]
    still, asked = page["text/html"].split("<details>")                      # nothing moves before one opens it
    assert page["image/png"] in still and "image/gif" not in still
    assert "<summary>Play" in asked and asked.endswith("</details>")
    assert page["text/html"].count('tabindex="0"') == page["text/html"].count("min-width: 36rem") == 2
    assert "http" not in page["text/html"] and "<script" not in page["text/html"]
    live = sum(int(mask.sum()) for mask in frames[1][1].values()) / sum(m.numel() for m in frames[1][1].values())
    assert f"growth 1 {100 * live:.1f} %" in shown.alt and shown.alt in page["text/html"]
    assert len(maps.animation([("<seed>", {"w": some(2, 2, 0.5, 0)})]).gif) < 100_000


def test_an_animation_keeps_to_its_limit(moving):
    noise = [(f"phase {k}", {"w": some(64, 64, 0.5, k)}) for k in range(3)]
    free = maps.animation(noise)
    tight = maps.animation(noise, limit=len(free.gif) - 1)                 # coarser blocks
    assert len(tight.gif) < len(free.gif) and Image.open(io.BytesIO(tight.gif)).n_frames == 3
    with pytest.raises(ValueError, match="3 frames take .* show fewer"):
        maps.animation(noise, limit=1000)


def test_an_animation_says_what_is_wrong(moving):
    (_, masks), *_ = moving[0]
    with pytest.raises(ValueError, match="at least one"):
        maps.animation([])
    with pytest.raises(ValueError, match="different matrices"):
        maps.animation([("seed", masks), ("grown", {"ih": masks["ih"]})])
    with pytest.raises(ValueError, match="several shapes"):
        maps.animation([("seed", {"w": some(4, 4, 0.5, 0)}), ("grown", {"w": some(4, 5, 0.5, 0)})])
    with pytest.raises(ValueError, match="no four gates"):
        maps.animation([("seed", {"w": torch.ones(5, 2, dtype=torch.bool)})])
