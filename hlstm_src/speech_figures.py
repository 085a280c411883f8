"""Pictures of speech: spectrograms, what CTC hears in them and where, and which letters it confuses."""

import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import jiwer
import numpy as np
from matplotlib.ticker import MaxNLocator

from .audio import ALPHABET, BINS, BLANK, HOP, SAMPLE_RATE, WINDOW, convolutions
from .corpora import SpeechCorpus
from .deepspeech2 import GRU, DeepSpeech2, bins_left
from .drawings import INK, _Circuit
from .figures import (
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    LINES,
    PINE,
    RUST,
    VERMILION,
    WIDTH,
    Picture,
    _array,
    _styled,
    told,
)
from .records import LatencyRow
from .scores import word_errors


def _visible(letter: str) -> str:
    return "␣" if letter == " " else letter


def _named(letter: str) -> str:
    """A letter as it is read aloud; `""` stands where there was none."""
    return {" ": "space", "": "nothing"}.get(letter, letter)


def _wrapped(text: str, width: int = 72) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _frame_times(count: int, step: int = 1) -> np.ndarray:
    """Middle of each window, in seconds; `step` is 2 or 4 behind the convolutions, which keep one frame of so many."""
    return (np.arange(count) * step * HOP + WINDOW / 2) / SAMPLE_RATE


def _paint(fig: Picture, ax, spec: np.ndarray) -> None:
    """A spectrogram (161, T) into `ax`, in seconds and kilohertz, with its colour bar."""
    bins, count = spec.shape
    left, hop, bin = (WINDOW - HOP) / 2 / SAMPLE_RATE, HOP / SAMPLE_RATE, SAMPLE_RATE / WINDOW / 1000
    low, high = np.percentile(spec, [1, 99.7])
    image = ax.imshow(spec, origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high,
                      extent=(left, left + count * hop, -bin / 2, (bins - 0.5) * bin))
    ax.set(ylabel="frequency (kHz)", ylim=(0, (bins - 1) * bin))
    ax.grid(False)
    fig.colorbar(image, ax=ax, pad=0.01, label="log magnitude\n(standard deviations)")


@_styled
def spectrogram(spec, seconds: float, transcript: str) -> Picture:
    """A normalised log spectrogram (161, T) of `seconds` of sound."""
    spec = _array(spec)
    frames, bins = 100 * (spec == 0).all(0).mean(), 100 * (spec == 0).all(1).mean()
    blank = f". Blanked out: {frames:.0f} % of the time and {bins:.0f} % of the frequencies." if frames or bins else ""
    fig = Picture(2.9, f"Spectrogram of {seconds:.1f} seconds of speech: {transcript}{blank}")
    ax = fig.subplots()
    _paint(fig, ax, spec)
    ax.set(xlabel="time (s)", xlim=(0, max(seconds, WINDOW / SAMPLE_RATE)), title=_wrapped(transcript))
    return fig


@_styled
def wave_and_spectrogram(wave, spec, transcript: str = "") -> Picture:
    """Sound (N samples in [-1, 1]) above its spectrogram (161, T), along one time axis."""
    wave, spec = _array(wave), _array(spec)
    seconds = len(wave) / SAMPLE_RATE
    fig = Picture(4.2, f"Wave and spectrogram of {seconds:.1f} seconds of speech. {transcript}")
    top, low = fig.subplots(2, sharex=True, height_ratios=(2, 3))
    top.plot(np.arange(len(wave)) / SAMPLE_RATE, wave, color=BLUE, linewidth=0.5)
    loudest = max(float(np.abs(wave).max()) * 1.05, 1e-3)
    top.set(ylabel="amplitude", xlim=(0, max(seconds, WINDOW / SAMPLE_RATE)), ylim=(-loudest, loudest),
            title=_wrapped(transcript))
    _paint(fig, low, spec)
    low.set(xlabel="time (s)")
    return fig


@_styled
def corpus_overview(corpus: SpeechCorpus) -> Picture:
    """How long the utterances of each split are, and how often each letter is said in the training split."""
    splits = {name: [u for u in corpus.utterances if u.split == name] for name in ("train", "valid", "test")}
    splits = {name: found for name, found in splits.items() if found}
    said = Counter("".join(u.transcript for u in splits.get("train", corpus.utterances)))
    fig = Picture(4.9, f"Durations and letters of {len(corpus.utterances)} utterances of {corpus.name}. The longest "
                  f"takes {max(u.seconds for u in corpus.utterances):.1f} s; the commonest letters are "
                  + ", ".join(_named(letter) for letter, _ in said.most_common(3)))
    top, low = fig.subplots(2)
    edges = np.linspace(0, max(u.seconds for u in corpus.utterances), 25)
    for (name, found), (colour, line, marker) in zip(splits.items(), LINES):
        share, _ = np.histogram([u.seconds for u in found], edges)
        top.plot((edges[1:] + edges[:-1]) / 2, 100 * share / len(found), line, color=colour, marker=marker,
                 label=f"{name} ({len(found)})")
    top.set(xlabel="length (s)", ylabel="utterances (%)", ylim=(0, None), xlim=(0, None))
    top.legend(title="split (utterances)", title_fontsize=10)
    letters = ALPHABET[2:] + ALPHABET[1]
    shares = [100 * said[letter] / said.total() for letter in letters]
    low.bar(range(len(letters)), shares, color=BLUE)
    low.set_xticks(range(len(letters)), [_visible(letter) for letter in letters])
    low.set(xlabel="letter (␣ is the space between words)", ylabel="share of train (%)",
            xlim=(-0.7, len(letters) - 0.3))
    return fig


def _peaks(log_probs: np.ndarray) -> list[tuple[int, int]]:
    """(frame, label) of each letter on CTC's best path: the likeliest frame of every stretch of one label."""
    found, at = [], 0
    for label, stretch in itertools.groupby(log_probs.argmax(1).tolist()):
        size = len(list(stretch))
        if label != BLANK:
            found.append((at + int(log_probs[at:at + size, label].argmax()), label))
        at += size
    return found


@_styled
def alignment(log_probs, spec, transcript: str, stride: int = 2) -> Picture:
    """Where CTC hears its letters: probabilities from `log_probs` (T', labels) under the spectrogram (161, T).

    One time axis, on which a row of `log_probs` is `stride` columns of the spectrogram; blank in grey, each other label
    with a line of its own, the letters of the best path at their peaks.
    """
    log_probs, spec = _array(log_probs), _array(spec)
    times, probs, peaks = _frame_times(len(log_probs), stride), np.exp(log_probs), _peaks(log_probs)
    heard = " ".join("".join(ALPHABET[label] for _, label in peaks).split())
    fig = Picture(4.6, f"Probabilities of letters over time. Said: {transcript}. Heard: {heard}.")
    upper, ax = fig.subplots(2, sharex=True)
    _paint(fig, upper, spec)
    ax.fill_between(times, probs[:, BLANK], color="#d0d0d0", linewidth=0)
    shown = sorted({label for _, label in peaks} | set((probs.max(0) > 0.3).nonzero()[0]) - {BLANK})
    for label, (colour, line, _) in zip(shown, itertools.cycle(LINES)):
        ax.plot(times, probs[:, label], line, color=colour, linewidth=1.4)
    seconds, before, lift = float(times[-1]) + HOP / SAMPLE_RATE, -9.0, 0
    for frame, label in peaks:                     # neighbours too close for two letters side by side: one goes higher
        near = (times[frame] - before) / seconds * (WIDTH - 1.8) < 0.13
        before, lift = times[frame], (lift + 1) % 3 if near else 0
        ax.annotate(_visible(ALPHABET[label]), (times[frame], 1.02 + 0.12 * lift), ha="center", va="bottom",
                     fontsize=10, annotation_clip=False)
        ax.plot(times[frame], probs[frame, label], "o", color="black", markersize=2.5)
    ax.set(xlabel="time (s)", ylabel="probability\n(grey: blank)", xlim=(0, seconds), ylim=(0, 1.42))
    ax.set_yticks((0, 0.5, 1))
    ax.spines["left"].set_bounds(0, 1)
    upper.set_title(_wrapped(f"said:  {transcript}", 66) + "\n" + _wrapped(f"heard: {heard or '(nothing)'}", 66),
                  family="monospace", fontsize=9.5)
    return fig


@_styled
def letter_confusions(samples: Sequence[Mapping[str, str]]) -> Picture:
    """The most frequent letter errors in `samples` (each with `reference` and `hypothesis`), said -> heard."""
    errors = Counter()
    for sample in samples:
        said, heard = sample["reference"], sample["hypothesis"]
        for chunk in jiwer.process_characters(said, heard).alignments[0]:
            if chunk.type != "equal":
                pairs = itertools.zip_longest(said[chunk.ref_start_idx:chunk.ref_end_idx],
                                              heard[chunk.hyp_start_idx:chunk.hyp_end_idx], fillvalue="")
                errors.update(pairs)
    top = errors.most_common(15)[::-1]
    fig = Picture(1.3 + 0.24 * max(len(top), 2), "Most frequent letter errors: " + ", ".join(
        f"{_named(a)} heard as {_named(b)} {n} times" for (a, b), n in top[::-1]))
    ax = fig.subplots()
    kinds = ((lambda a, b: a and b, BLUE, None, "another letter"), (lambda a, b: not b, VERMILION, "///", "left out"),
             (lambda a, b: not a, GREEN, "...", "put in"))
    for fits, colour, hatch, label in kinds:
        rows = [(y, n) for y, ((a, b), n) in enumerate(top) if fits(a, b)]
        if rows:
            ax.barh(*zip(*rows), color=colour, hatch=hatch, edgecolor="white", label=label)
    ax.set_yticks(range(len(top)), [f"{_visible(a) or '–'} → {_visible(b) or '–'}" for (a, b), _ in top])
    ax.set(xlabel=f"times, of {errors.total()} letter errors in {len(samples)} utterances", ylabel="said → heard",
           title="" if top else "no errors")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    if top:
        fig.legend(loc="outside lower center", ncols=3)
    return fig


LENGTHS = ((1, 1, "1"), (2, 4, "2–4"), (5, 7, "5–7"), (8, 999, "8+"))      # words in an utterance


def _groups(samples: Sequence[Mapping[str, str]]) -> tuple[dict[str, list], dict[str, list]]:
    """(errors, words) of each utterance, by speaker and by how many words were said."""
    speakers, lengths = {}, {text: [] for _, _, text in LENGTHS}
    for sample in samples:
        errors, words = word_errors(sample["reference"], sample["hypothesis"])
        speakers.setdefault(sample["speaker"], []).append((errors, words))
        lengths[next(text for low, high, text in LENGTHS if low <= words <= high)].append((errors, words))
    return speakers, {text: pairs for text, pairs in lengths.items() if pairs}


@_styled
def errors_by_speaker_and_length(runs: Mapping[str, Sequence[Mapping[str, str]]]) -> Picture:
    """Word error rates of each speaker, and of short and long utterances; samples by the name in the legend.

    All runs must have read the same utterances. Speakers stand in the order of their errors in all runs together.
    Raises ValueError without a run, or for runs over different utterances.
    """
    if not runs or len({tuple(sample["id"] for sample in samples) for samples in runs.values()}) > 1:
        raise ValueError("errors_by_speaker_and_length needs runs over the same utterances")
    groups = {name: _groups(samples) for name, samples in runs.items()}

    def rate(pairs: Sequence[tuple[int, int]]) -> float:
        return 100 * sum(e for e, _ in pairs) / sum(w for _, w in pairs)
    speakers, lengths = (next(iter(groups.values()))[k] for k in (0, 1))
    order = sorted(speakers, key=lambda who: sum(rate(found[0][who]) for found in groups.values()))
    fig = Picture(4.0, "Word error rates by speaker and by length, in percent. " + "; ".join(
        f"{name}: {rate(found[0][order[0]]):.1f} for {order[0]} to {rate(found[0][order[-1]]):.1f} for {order[-1]}"
        for name, found in groups.items()))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(max(len(order), 3), len(lengths) + 1))
    for (name, found), (colour, _, marker) in zip(groups.items(), itertools.cycle(LINES)):
        left.plot(range(len(order)), [rate(found[0][who]) for who in order], marker, color=colour, label=name)
        right.plot(range(len(lengths)), [rate(pairs) for pairs in found[1].values()], marker, color=colour)
    left.set_xticks(range(len(order)), [f"{who}\n{sum(w for _, w in speakers[who])}" for who in order],
                    rotation=0 if len(order) < 8 else 90)
    right.set_xticks(range(len(lengths)), [f"{text}\n{sum(w for _, w in pairs)}" for text, pairs in lengths.items()])
    left.set(xlabel="speaker, and words said", ylabel="word error rate (%)", ylim=(0, None))
    right.set(xlabel="words in an utterance,\nand words in all")
    left.margins(x=0.06)
    right.margins(x=0.12)
    fig.legend(loc="outside lower center", ncols=min(len(runs), 3))
    return fig


def frequencies() -> np.ndarray:
    """Middle of what each frequency behind the convolutions sees, in kilohertz."""
    middle, step = 0.0, 1
    for kF, _, sF, _ in convolutions():
        middle, step = middle + step * (kF - 1) / 2, step * sF
    return (middle + step * np.arange(bins_left())) * SAMPLE_RATE / WINDOW / 1000


@_styled
def survivors_by_frequency(masks: Mapping[str, object]) -> Picture:
    """Where the first layer listens: share of live connections from each frequency behind the convolutions.

    masks: by the name in the legend, of input matrices (rows, channels * frequencies). Raises ValueError without one,
    or where the columns are no multiple of the frequencies.
    """
    if not masks or any(_array(mask).shape[1] % bins_left() for mask in masks.values()):
        raise ValueError(f"survivors_by_frequency needs masks with {bins_left()} columns a channel")
    middle, shares = frequencies(), {
        name: 100 * _array(mask).astype(float).mean(0).reshape(-1, bins_left()).mean(0) for name, mask in masks.items()}
    fig = Picture(3.1, "Share of live connections by frequency. " + "; ".join(
        f"{name}: most, {share.max():.1f} %, at {middle[share.argmax()]:.1f} kHz, least, {share.min():.1f} %, at "
        f"{middle[share.argmin()]:.1f} kHz" for name, share in shares.items()))
    ax = fig.subplots()
    for (name, share), (colour, line, marker) in zip(shares.items(), itertools.cycle(LINES)):
        ax.plot(middle, share, line, color=colour, marker=marker, label=name)
        ax.axhline(share.mean(), color=colour, linewidth=0.8, linestyle=":")
    field = (1 + sum((kF - 1) * step for (kF, *_), step in zip(convolutions(), (1, convolutions()[0][2])))) / BINS * 100
    ax.set(xlabel=f"middle of what a unit of the convolutions sees (kHz)\n(each sees {field:.0f} % of all frequencies)",
           ylabel="live connections (%)\n(dotted: mean)", ylim=(0, None))
    ax.legend()
    return fig


@_styled
def training_time(rows: Sequence[LatencyRow], batch: int, names: Mapping[str, str]) -> Picture:
    """Where a training step's time goes: rows of `bench training`, by utterance; `names` gives engines their labels.

    The parts were timed alone, so their sum need not be the whole step, which the diamond marks.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    whole, *parts = cases
    found = {(row.engine, row.case): row.microseconds / 1000 / batch for row in rows}
    engines = [engine for engine in names if (engine, whole) in found][::-1]
    fig = Picture(1.5 + 0.42 * len(engines), "Milliseconds a training step takes for each utterance: " + told(
        {names[e]: found[e, whole] for e in engines[::-1]}))
    ax, left = fig.subplots(), np.zeros(len(engines))
    for part, (colour, *_), hatch in zip(parts, LINES, itertools.cycle(HATCHES)):
        size = np.array([found[e, part] for e in engines])
        ax.barh(range(len(engines)), size, left=left, color=colour, hatch=hatch, edgecolor="white", label=part)
        left += size
    ax.plot([found[e, whole] for e in engines], range(len(engines)), "D", color="black", markersize=6, linestyle="none",
            label=whole)
    ax.set_yticks(range(len(engines)), [names[e] for e in engines])
    ax.set(xlabel="milliseconds an utterance", xlim=(0, None))
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    fig.legend(loc="outside lower center", ncols=3)
    return fig


@_styled
def architecture(model: DeepSpeech2) -> Picture:
    """The recogniser with its true shapes (`fig-ds2-arch`), from sound at the bottom to labels at the top."""
    rnn = model.rnns[0].rnn
    kind = "GRU" if isinstance(rnn, GRU) else "H-LSTM" if rnn.gate_layers else "LSTM"
    H, labels, shown = model.output.in_features, model.output.out_features, 7
    layers, bins, step = [("log spectrogram", f"{BINS} × T", GREY)], BINS, 1
    for convolution in model.convolutions:
        (kF, kT), (sF, sT) = convolution.kernel_size, convolution.stride
        bins, step = (bins - kF) // sF + 1, step * sT
        steps = f"T/{step}" if step > 1 else "T"
        layers.append((f"convolution {kF} × {kT},\nstep {sF} × {sT}",
                       f"{convolution.out_channels} × {bins} × {steps}", PINE))
    fig = Picture(2.2 + 0.72 * (len(layers) + len(model.rnns)),
                  "The recogniser, bottom to top: " + ", ".join(f"{a}: {b}".replace("\n", " ") for a, b, _ in layers)
                  + f", {len(model.rnns)} {kind} layers {H} wide in both directions, summed, {labels} labels")
    ax = fig.subplots()
    pen, left, width = _Circuit(ax), 2.6, 6.0
    ax.axis("off")
    y = 0.0
    for text, shape, colour in layers:
        pen.box(left + width / 2, y, shape, colour, width=width, height=0.6)
        ax.text(left - 0.25, y, text, ha="right", va="center", fontsize=9.5)
        pen.line((left + width / 2, y + 0.3), (left + width / 2, y + 0.72))
        y += 1.05
    places = [left + width * (k + 0.5) / shown for k in range(shown)]
    for n in range(len(model.rnns)):
        size = bins * model.convolutions[-1].out_channels if n == 0 else H
        ax.text(left - 0.25, y + 0.12, f"{kind} {n + 1}\n{size} → {H}", ha="right", va="center", fontsize=9.5)
        for k, x in enumerate(places):
            for up, colour, step in ((0, BLUE, 1), (0.38, RUST, -1)):
                pen.box(x, y + up, "", colour, width=0.5, height=0.26)
                if 0 <= k + step < shown:
                    pen.line((x + step * 0.25, y + up), (places[k + step] - step * 0.25, y + up))
        y += 0.95
        pen.line((left + width / 2, y - 0.4), (left + width / 2, y - 0.2))
    pen.box(left + width / 2, y + 0.1, f"{labels} × {steps}", INK, width=width, height=0.5)
    ax.text(left - 0.25, y + 0.1, "a probability for\neach label", ha="right", va="center", fontsize=9.5)
    for x, sign in zip(places, "_HH_E__"):
        ax.text(x, y + 0.65, sign, ha="center", va="center", family="monospace", fontsize=11)
    ax.text(left - 0.25, y + 0.65, "a path", ha="right", va="center", fontsize=9.5)
    ax.text(left + width + 0.2, 1.05 * len(layers) + 0.38, "back", color=RUST, va="center", fontsize=9.5)
    ax.text(left + width + 0.2, 1.05 * len(layers), "forward", color=BLUE, va="center", fontsize=9.5)
    ax.set(xlim=(0, left + width + 1.2), ylim=(-0.4, y + 0.95), aspect="auto")
    return fig
