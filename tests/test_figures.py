"""Figures: drawn from the smallest runs and from long ones, nothing cut off, nothing invented."""

import base64
import io
import itertools

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hlstm_src import drawings, figures, scores, speech_figures
from hlstm_src.audio import ALPHABET, BINS, BLANK, HOP, SAMPLE_RATE, WINDOW
from hlstm_src.corpora import LABELS, SpeechCorpus
from hlstm_src.deepspeech2 import DeepSpeech2, spectrogram
from hlstm_src.profiles import MINI_SPEECH, ROOT
from hlstm_src.records import RunRecord
from tests.pictures import drawn

# (phase, density, WER) by epoch, and the events between them, as a run writes them.
SMOKE = [("grow", 0.5, 130.0), ("train", 0.6, 120.0), ("prune", 0.3, 101.0), ("final", 0.3, 100.0)]
LONG = ([("grow", 0.5 + 0.05 * k, 100.0 - k) for k in range(4)] + [("train", 0.7, 60.0 - 2 * k) for k in range(18)]
        + [("prune", 0.7 * 0.6 ** (1 + k // 4), 25.0 + k / 4) for k in range(24)] + [("final", 0.033, 24.5)] * 6)


def record(epochs, masks=True, events=True) -> RunRecord:
    """A run of these epochs; an event closes each growing epoch and each stretch of the others."""
    history, phases = [], []
    for k, (phase, density, wer) in enumerate(epochs):
        row = {"epoch": k, "phase": phase if masks else "dense", "loss": 3 / (1 + k), "lr": 1e-3, "seconds": 1.0,
               "scores": {"wer": wer, "cer": wer / 2}}
        more = {"density": density, "densities": {"ih": density * 0.9, "hh": density}} if masks else {}
        history.append(row | more)
        ends = k + 1 == len(epochs) or phase == "grow" or epochs[k + 1][:2] != (phase, density)
        if masks and events and ends:
            phases.append({"phase": phase, "epoch": k, "density": density, "nonzero": 1, "scores": row["scores"],
                           "kept": wer <= 30 or phase != "prune"})
    counts = dict.fromkeys(("params", "nonzero_params", "macs", "nonzero_macs", "flops", "nonzero_flops"), 1)
    when = "2026-01-31T12:00:00+00:00"
    return RunRecord.model_validate({
        "experiment": "ds2-hlstm3-compact", "profile": "smoke", "seed": 0, "title": "A run", "key": "0" * 64,
        "recipe": {}, "history": history, "phases": phases, "scores": {"wer": 20.0},
        "normalisation": "upper case", "counts": {"cell": counts, "model": counts},
        "provenance": {"commit": "unknown", "dirty": False, "lock_sha256": "2" * 64, "versions": {}, "corpus": "an4",
                       "corpus_sha256": "3" * 64, "cpu": "A CPU", "gpu": None, "cores": 2, "threads": 1,
                       "started": when, "ended": when, "seconds": 9.0, "command": "run"}})


def texts(picture) -> str:
    return "\n".join(t.get_text() for t in picture.findobj(matplotlib.text.Text))


def linear(colour) -> np.ndarray:
    """Red, green and blue light of a colour, in [0, 1]."""
    values = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour) -> float:
    """Relative luminance as the Web Content Accessibility Guidelines define it."""
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one, other) -> float:
    """The guidelines' ratio of contrast, from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def seen_by_deuteranopes(colour) -> np.ndarray:
    """Lightness and hue (CIELAB) left without the receptors for green (Machado, Oliveira and Fernandes 2009)."""
    seen = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]) @ linear(colour)
    xyz = np.array([[0.412, 0.358, 0.180], [0.213, 0.715, 0.072], [0.019, 0.119, 0.950]]) @ np.clip(seen, 0, 1)
    x, y, z = np.cbrt(xyz / [0.950, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture(scope="module")
def corpus():
    return SpeechCorpus(ROOT / MINI_SPEECH)


@pytest.fixture(scope="module")
def sound(corpus):
    """An utterance with its wave (N) and spectrogram (161, T)."""
    u = corpus.split("test")[0]
    wave = corpus.audio(u)
    return u, wave, spectrogram(wave[None], torch.tensor([len(wave)]))[0][0]


def test_a_picture_shows_itself_with_words_for_those_who_cannot_see_it(sound):
    picture = speech_figures.spectrogram(sound[2], sound[0].seconds, 'A "B" <C')
    shown = picture._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(shown["image/png"])))
    assert image.format == "PNG" and image.width > 100 * figures.WIDTH
    assert shown["image/png"] in shown["text/html"] and "&lt;C" in shown["text/html"] and "<C" not in shown["text/html"]
    assert shown["text/plain"] == picture.alt


def test_words_for_a_picture_are_one_line_without_the_marks_of_formulas():
    picture = figures.Picture(1.0, "Gates of $h$.\nLast: LSTM,\n$b_f = 3$ 0.25\n")
    assert picture.alt == "Gates of h. Last: LSTM, b_f = 3 0.25"
    assert "$" not in drawings.gradient_flow({"LSTM, $c$, $b_f = 3$": [1.0, 0.5]}).alt


@pytest.mark.parametrize("alt, topic", [("Errors of 2.5 s & more: many", "Errors of 2.5 s &amp; more"),
                                        ("Two circuits. Left: x", "Two circuits"), ("", "figure")])
def test_a_picture_keeps_a_legible_width_and_the_keyboard_can_scroll_it(alt, topic):
    shown = figures.Picture(1.0, alt)._repr_mimebundle_()["text/html"]
    assert "min-width: 36rem" in shown and "overflow-x: auto" in shown         # 8.2 pt of 7 in are 9.4 px of 36 rem
    assert f'tabindex="0" role="group" aria-label="{topic}"' in shown


def test_letters_have_contrast_enough_to_be_read():
    written = [figures.RUST, figures.PINE, figures.PLUM, figures.BLUE, figures.GREY, drawings.INK,
               *(colour for _, colour in drawings.GATES.values())]
    assert all(contrast(colour, "white") >= 4.5 for colour in written)
    assert contrast(figures.GREEN, "white") == pytest.approx(3.42, abs=0.01)   # so fills alone


def test_lines_stand_out_from_what_lies_behind_them_and_from_each_other():
    colours = [colour for colour, _, _ in figures.LINES]
    for behind in ("white", *figures.TINTS.values()):
        assert all(contrast(colour, behind) >= 3 for colour in colours)
    lightness = [seen_by_deuteranopes(colour)[0] for colour in colours[:3]]
    assert all(abs(a - b) > 6 for a, b in itertools.combinations(lightness, 2))     # the three that meet most
    seen = [seen_by_deuteranopes(colour) for colour in colours]
    assert all(np.linalg.norm(a - b) > 15 for a, b in itertools.combinations(seen, 2))
    assert len({(line, marker) for _, line, marker in figures.LINES}) == len(figures.LINES)


def test_drawing_leaves_no_trace(sound):
    import matplotlib.pyplot as plt
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31}):
        assert speech_figures.spectrogram(sound[2], 1.0, "A").axes[0].title.get_size() < 15     # not the caller's style
        assert matplotlib.rcParams["font.size"] == 31
    assert dict(matplotlib.rcParams) == before and not plt.get_fignums()


def test_sound_and_spectrogram_share_their_time(sound):
    u, wave, spec = sound
    top, low, _ = drawn(speech_figures.wave_and_spectrogram(wave, spec, u.transcript)).axes
    assert top.get_xlim() == low.get_xlim() == (0, len(wave) / SAMPLE_RATE)
    left, right, bottom, above = low.images[0].get_extent()
    # Each frame is painted around the middle of its window, each bin around its frequency.
    assert (right - left) / spec.shape[1] == pytest.approx(HOP / SAMPLE_RATE)
    assert left + HOP / SAMPLE_RATE / 2 == pytest.approx(WINDOW / SAMPLE_RATE / 2)
    assert (bottom + above) / 2 * 1000 == pytest.approx(SAMPLE_RATE / 4)


def test_words_for_a_spectrogram_tell_what_is_blanked_out(sound):
    spec = sound[2].clone()
    assert "Blanked" not in speech_figures.spectrogram(spec, 1.0, "A").alt
    spec[:40] = spec[:, :spec.shape[1] // 2] = 0
    assert "Blanked out: 50 % of the time and 25 % of the frequencies" in speech_figures.spectrogram(spec, 1.0, "A").alt


@pytest.mark.parametrize("frames", [1, 7])
def test_the_shortest_sounds_can_be_drawn(frames):
    drawn(speech_figures.spectrogram(np.ones((BINS, frames)), 0.0, "A"))
    drawn(speech_figures.wave_and_spectrogram(np.zeros(WINDOW + HOP * (frames - 1)), np.zeros((BINS, frames))))


def test_the_corpus_overview_counts_what_is_in_the_corpus(corpus):
    picture = drawn(speech_figures.corpus_overview(corpus))
    top, low = picture.axes
    for line, split in zip(top.lines, ("train", "valid", "test")):
        assert sum(line.get_ydata()) == pytest.approx(100)
        assert f"{split} ({len(corpus.split(split))})" in texts(picture)
    said = "".join(u.transcript for u in corpus.split("train"))
    heights = {label.get_text(): bar.get_height() for label, bar in zip(low.get_xticklabels(), low.patches)}
    assert sum(heights.values()) == pytest.approx(100)
    assert heights["␣"] == pytest.approx(100 * said.count(" ") / len(said))


@pytest.mark.parametrize("epochs", [SMOKE[:1], SMOKE[:2], SMOKE, LONG], ids=["one", "two", "smoke", "long"])
def test_learning_curves_show_every_epoch(epochs):
    runs = {"dense": record(epochs, masks=False), "grown and pruned": record(epochs)}
    top, low = drawn(figures.learning_curves(runs)).axes
    for line, run in zip(low.lines, runs.values()):
        assert list(line.get_ydata()) == [row.scores["wer"] for row in run.history]
        assert list(line.get_xdata()) == [row.epoch + 1 for row in run.history]
    assert list(top.lines[0].get_ydata()) == [row.loss for row in runs["dense"].history]


def test_words_for_learning_curves_tell_where_each_one_ends():
    runs = {"LSTM, wide": record(LONG, masks=False), "H-LSTM": record(SMOKE)}
    runs["H-LSTM"].history[-1].scores.clear()                                  # not scored after the last epoch
    assert figures.learning_curves(runs).alt.endswith("ends at: LSTM, wide 24.5; H-LSTM 101.0.")


def test_learning_curves_name_the_phases_and_say_what_is_cut_off():
    picture = figures.learning_curves({"H-LSTM": record(SMOKE)})
    assert picture.axes[1].get_ylim()[1] == pytest.approx(104) and "above 100 %" in texts(picture)
    names = [a.get_text() for a in picture.axes[0].texts]
    assert len(names) == 4 and all(a.startswith(b[:4]) for a, b in zip(names, ("growth", "training", "prune")))
    calm = figures.learning_curves({"H-LSTM": record(LONG[4:])})
    assert calm.axes[1].get_ylim()[1] < 100 and "above 100 %" not in texts(calm)
    worst = figures.learning_curves({"H-LSTM": record(SMOKE[:3])})         # nothing would be left of it
    assert worst.axes[1].get_ylim()[1] > 130 and "above 100 %" not in texts(worst)
    with pytest.raises(ValueError, match="at least one"):
        figures.learning_curves({})


@pytest.mark.parametrize("epochs", [SMOKE, LONG], ids=["smoke", "long"])
def test_phase_names_do_not_touch(epochs):
    picture = drawn(figures.learning_curves({"a run": record(epochs)}))
    boxes = [a.get_window_extent() for a in picture.axes[0].texts]
    assert len(boxes) > 1 and all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("epochs", [SMOKE, LONG], ids=["smoke", "long"])
def test_the_flow_has_a_bar_for_the_seed_and_one_for_each_event(epochs):
    run = record(epochs)
    picture = drawn(figures.gp_flow(run))
    bars = picture.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [100 * run.history[0].density, *(100 * event.density for event in run.phases)])
    assert [bool(bar.get_hatch()) for bar in bars] == [False, *(not event.kept for event in run.phases)]
    low, high = (f(bar.get_height() for bar in bars) for f in (min, max))
    for part in (f"({run.profile}, seed {run.seed})", f"between {low:.1f} and {high:.1f} %",
                 f"From 50.0 % the density goes to {100 * epochs[-1][1]:.1f} %", f"is {epochs[-1][2]:.1f}."):
        assert part in picture.alt
    written = [a.get_text() for a in picture.axes[1].texts]
    assert written == [f"{event.scores['wer']:.1f}" for event in run.phases]


def test_cider_is_no_percentage_and_is_never_cut_off():
    run = record(SMOKE)
    for row in [*run.history, *run.phases]:
        row.scores = {"cider": row.scores["wer"], "perplexity": 3.0}
    low = drawn(figures.learning_curves({"a run": run})).axes[1]
    assert low.get_ylabel() == "validation CIDEr" and low.get_ylim()[1] > 130 and "cut off" not in texts(low)
    assert list(low.lines[0].get_ydata()) == [130, 120, 101, 100]
    assert drawn(figures.gp_flow(run)).axes[1].get_ylabel() == "validation CIDEr"


def test_a_dense_run_has_no_growth_to_show():
    with pytest.raises(ValueError, match="ds2-hlstm3-compact"):
        figures.gp_flow(record(SMOKE, masks=False))
    with pytest.raises(ValueError, match="no growth or pruning"):
        figures.gp_flow(record(SMOKE[:2], events=False))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(ALPHABET) - 1), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_labelled_peaks_are_what_greedy_decoding_reads(best, random):
    log_probs = torch.tensor([[random.uniform(-9, -1) for _ in ALPHABET] for _ in best])
    log_probs[range(len(best)), best] = torch.tensor([random.uniform(-0.5, 0) for _ in best])
    peaks = speech_figures._peaks(log_probs.numpy())
    read = scores.normalise("".join(ALPHABET[label] for _, label in peaks))
    assert [read] == scores.greedy(log_probs[None], torch.tensor([len(best)]))
    assert all(best[frame] == label != BLANK for frame, label in peaks)


@pytest.mark.parametrize("text", ["", "O O", "SEPTEMBER TWENTY FOURTH NINETEEN SEVENTY"])
def test_an_alignment_writes_each_letter_at_its_time(sound, text):
    spec = np.random.default_rng(0).normal(size=(BINS, 2 * max(len(text), 5) + 20))
    log_probs = torch.full((spec.shape[1] // 2, len(ALPHABET)), -6.0)
    log_probs[:, BLANK] = 3
    for k, letter in enumerate(text):
        log_probs[5 + k, LABELS[letter]] = 9
    picture = drawn(speech_figures.alignment(log_probs.log_softmax(-1), spec, "SAID"))
    low = picture.axes[1]
    assert "".join(a.get_text() for a in low.texts) == text.replace(" ", "␣").replace("EE", "E")
    times = [a.xy[0] for a in low.texts]
    assert times == sorted(times) and all(0 < t < low.get_xlim()[1] for t in times)
    assert ("(nothing)" in texts(picture)) == (not text)
    boxes = [a.get_window_extent() for a in low.texts]
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


def test_letter_errors_are_counted_by_kind():
    samples = [{"reference": "A B", "hypothesis": "A P"}, {"reference": "GO", "hypothesis": "G"},
               {"reference": "NO", "hypothesis": "NOS"}, {"reference": "B", "hypothesis": "P"},
               {"reference": "YES", "hypothesis": ""}]
    ax = drawn(speech_figures.letter_confusions(samples)).axes[0]
    counted = {label.get_text(): bar.get_width() for bar in ax.patches
               for label, y in zip(ax.get_yticklabels(), ax.get_yticks()) if abs(bar.get_y() + 0.4 - y) < 0.1}
    assert counted == {"B → P": 2, "O → –": 1, "– → S": 1, "Y → –": 1, "E → –": 1, "S → –": 1}
    assert "7 letter errors in 5 utterances" in ax.get_xlabel()
    silence = speech_figures.letter_confusions([{"reference": "A B", "hypothesis": "AB"}])
    assert silence.alt.endswith("space heard as nothing 1 times")
    drawn(speech_figures.letter_confusions([{"reference": "A", "hypothesis": "A"}]))


def test_rivals_are_a_dot_a_seed_and_a_bar_at_the_mean():
    scores = {"grow and prune": [1.0, 2.0, 6.0], "alone": [4.0]}
    fig = figures.rivals(scores, "test error (%)")
    ax, = fig.axes
    dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    means = [line.get_xdata() for line in ax.lines if line.get_marker() == "None"]
    assert [list(values) for values in dots] == list(scores.values())
    assert [list(mean) for mean in means] == [[3.0, 3.0], [4.0, 4.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(scores) and ax.yaxis_inverted()
    assert "test error (%)" in ax.get_xlabel() and "alone 4.00" in fig.alt and ax.get_xlim()[0] == 0
    low, high = figures.rivals({"one": [330.0, 340.0], "other": [280.0]}, "CIDEr").axes[0].get_xlim()
    assert 270 < low < 280 and 340 < high < 350
    for nothing in ({}, {"alone": []}):
        with pytest.raises(ValueError, match="at least one score"):
            figures.rivals(nothing, "error")


def test_a_run_that_is_judged_by_another_score_says_so_on_its_axes():
    epochs = [(phase, density, rate / 20) for phase, density, rate in SMOKE]
    toy = record(epochs).model_dump()
    for row in toy["history"] + toy["phases"]:
        row["scores"] = {"error": row["scores"]["wer"]}
    toy = RunRecord.model_validate(toy)
    for fig in (figures.gp_flow(toy), figures.learning_curves({"toy": toy})):
        assert fig.axes[1].get_ylabel() == "validation error (%)" and "error" in fig.alt
    assert figures.gp_flow(record(SMOKE)).axes[1].get_ylabel() == "validation WER (%)"
    heights = figures.learning_curves({"toy": toy}).axes[1].lines[0].get_ydata()
    assert list(heights) == [rate for _, _, rate in epochs]


def test_word_errors_are_grouped_by_speaker_and_length():
    heard = [("a", "YES", "YES"), ("a", "NO NO NO", "NO YES"), ("b", "GO", "GO ON"), ("b", "A B C D E F G H", "A B")]
    samples = [{"id": str(k), "speaker": who, "reference": said, "hypothesis": text}
               for k, (who, said, text) in enumerate(heard)]
    found = [scores.word_errors(each["reference"], each["hypothesis"]) for each in samples]
    assert found == [(0, 1), (2, 3), (1, 1), (6, 8)]
    left, right = drawn(speech_figures.errors_by_speaker_and_length({"one": samples})).axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["a\n4", "b\n9"]
    assert left.lines[0].get_ydata().tolist() == pytest.approx([50, 700 / 9])
    assert [label.get_text() for label in right.get_xticklabels()] == ["1\n2", "2–4\n3", "8+\n8"]
    assert right.lines[0].get_ydata().tolist() == pytest.approx([50, 200 / 3, 75])
    with pytest.raises(ValueError, match="the same utterances"):
        speech_figures.errors_by_speaker_and_length({"one": samples, "other": samples[1:]})


def test_survivors_are_counted_at_the_frequency_that_their_unit_sees():
    middle = speech_figures.frequencies()
    assert len(middle) == 21 and middle[0] == pytest.approx(2) and middle[-1] == pytest.approx(6)  # of 161, to 8 kHz
    mask = torch.zeros(10, 2 * 21, dtype=torch.bool)
    mask[:5, 3] = mask[:, 21 + 3] = mask[:2, 20] = True              # channel 0 and 1 at frequency 3; channel 0 at 20
    ax = drawn(speech_figures.survivors_by_frequency({"forward": mask})).axes[0]
    share = ax.lines[0].get_ydata()
    assert share[3] == pytest.approx(75) and share[20] == pytest.approx(10) and share.sum() == pytest.approx(85)
    alt = speech_figures.survivors_by_frequency({"forward": mask}).alt
    assert "forward: most, 75.0 %, at 2.6 kHz, least, 0.0 %, at 2.0 kHz" in alt
    with pytest.raises(ValueError, match="21 columns"):
        speech_figures.survivors_by_frequency({"wrong": mask[:, :40]})


@pytest.mark.parametrize("cell, layers, kind", [("hlstm", 3, "H-LSTM"), ("lstm", 5, "LSTM"), ("gru", 1, "GRU")])
def test_the_recogniser_is_drawn_with_its_true_shapes(cell, layers, kind):
    with torch.device("meta"):
        model = DeepSpeech2(29, cell, layers, 800, 32)
    picture = drawn(speech_figures.architecture(model))
    said = texts(picture)
    for shape in ("161 × T", "32 × 61 × T/2", "32 × 21 × T/2", "29 × T/2"):
        assert shape in said
    assert [f"{kind} {n + 1}\n{672 if n == 0 else 800} → 800" in said for n in range(layers)] == [True] * layers
    assert f"{layers} {kind} layers 800 wide" in picture.alt


@pytest.mark.parametrize("size", [(1920, 1080), (640, 480), (300, 900)])
def test_a_slide_holds_the_whole_picture_as_large_as_fits(tmp_path, size):
    picture = figures.rivals({"a": [1.0, 2.0], "b": [3.0]}, "error (%)")
    picture.set_facecolor("#ff0000")                       # where it lies on the white slide
    page = Image.open(figures.slide(picture, tmp_path / "deep" / "slide.png", size))
    assert page.size == size
    painted = (np.asarray(page) == (255, 0, 0)).all(2)
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    filled = [(size[1], rows), (size[0], columns)]
    assert any(places[0] == 0 and places[-1] >= room - 2 for room, places in filled)       # it fills one direction
    assert all(abs(places[0] - (room - 1 - places[-1])) <= 2 for room, places in filled)   # and is centred in both
    ratio = (columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1)
    assert ratio == pytest.approx(np.divide(*picture.get_size_inches()), rel=0.02)


def test_a_slide_is_a_vector_picture_on_request_and_nothing_else(tmp_path):
    picture = figures.rivals({"a": [1.0]}, "error (%)")
    assert "<svg" in figures.slide(picture, tmp_path / "slide.svg").read_text(encoding="utf-8")
    assert figures.slide(picture, str(tmp_path / "slide.pdf")).read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="slide.jpg"):
        figures.slide(picture, tmp_path / "slide.jpg")
    assert not (tmp_path / "slide.jpg").exists()
