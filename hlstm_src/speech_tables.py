"""Tables of the recognisers, from records as in `tables.py`, and what came of the paper's claims about speech.

Error rates are of greedy transcripts, as the paper's. `words` is the word error rate of a search among the words of
the training transcripts, which the paper does not do.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np

from . import paper, records
from .comparison import Column, compare, compression, verdict
from .paper import short
from .profiles import PROFILES
from .records import RunRecord
from .scores import word_errors
from .tables import MISSING, RECORDED, Table, factor, percent, spread

BASELINE, DENSE, ACCURATE, COMPACT = "ds2-lstm5", "ds2-hlstm3", "ds2-hlstm3-gp", "ds2-hlstm3-compact"
FAST, MEDIUM = "ds2-hlstm3-fast", "ds2-hlstm3-medium-gp-gradual"
WIDE = "wide"          # the profile whose recognisers are as wide as the paper's
LONG, ALL, LONGER, TWICE = "-long", "-long-all", "-longer", "-twice"   # the ends of the names of those that trained
                    # twice as long, so and on the validation speakers, too, four times as long, or heard all twice
WAYS = {"-gp-gradual": "gradually", "-whole": "gradually, convolutions, too", "-fast": "in blocks"}   # else in rounds

SPEECH = (
    Column("recurrent weights", "params", lambda record, _: record.counts.cell.nonzero_params, short),
    Column("compression", "compression", compression, factor),
    Column("FLOPs a frame", "flops", lambda record, _: record.counts.cell.nonzero_flops, short),
    Column("WER %", "wer", lambda record, _: record.scores.get("wer"), percent, seeds=True),
    Column("CER %", "cer", lambda record, _: record.scores.get("cer"), percent, seeds=True),
)
SIZE, COMPRESSION, FLOPS, WER, CER = SPEECH
WORDS = Column("WER %, words known", "", lambda record, _: record.scores.get("wer_words"), percent, seeds=True,
               main=False)


def tab_ds2_models(profile: str, root: str | Path | None = None) -> Table:
    """The recognisers, the paper's beside ours (`tab-ds2-models`): weights, FLOPs, error rates, time.

    Weights and FLOPs are the live ones of the recurrent layers. Each of our models stands in the row
    of the paper's that it answers to; all are compressed against the LSTM of their own group. How many times less time
    they take than that LSTM is told for the processor on which it is least.
    """
    rows = [
        ("LSTM, the baseline", "baseline", "ds2-lstm5"),
        ("H-LSTM, dense", "hlstm_x3", "ds2-hlstm3"),
        ("H-LSTM, grown, pruned in rounds: accurate", "accurate", "ds2-hlstm3-gp"),
        ("H-LSTM, grown, pruned in rounds: compact", "compact", "ds2-hlstm3-compact"),
        ("H-LSTM, grown, pruned gradually in blocks: fast", None, FAST),
    ]
    caption = "DeepSpeech2 models: live recurrent weights, FLOPs a frame, test errors and time"
    table = _timed(compare("tab-ds2-models", caption, "deepspeech2", rows, [*SPEECH, _quick(root)], profile, root))
    kept = [(title.rpartition(": ")[2], run[0].counts.cell) for title, _, name in rows[2:]
            if (run := records.find(RECORDED, name, root))]
    if kept:
        table.notes.insert(0, "Of the recurrent connections of a dense H-LSTM there live, where recorded: "
                              + "; ".join(f"{word}, {percent(100 * cell.nonzero_params / cell.params)} %"
                                          for word, cell in kept) + ".")
    return table


def _quick(root: str | Path | None) -> Column:
    """How many times less time a network takes than the LSTM x5, on the processor on which it is least."""
    def times(run: RunRecord, _) -> float | None:
        return min(quicker(run.experiment, BASELINE, root, run.profile), default=None)
    return Column("quicker", "", times, factor, main=False)


def _timed(table: Table) -> Table:
    """Says what `quicker` is, where something was timed."""
    places = [place for place, (_, head) in enumerate(table.columns) if head == "quicker"]
    if any(cells[place] != MISSING for _, cells in table.rows for place in places):
        table.notes.insert(0, "Quicker: how many times less time than the LSTM x5, whole utterances one by one on one "
                              "thread, each network on its quickest engine, on the processor on which it is least. "
                              "Dense ones may have been timed untrained: their time depends on their shape alone.")
    return table


def tab_ds2_cells(profile: str, root: str | Path | None = None) -> Table:
    """The paper's grid of dense cells (`tab-ds2-cells`): live recurrent weights, FLOPs a frame, error rates, time;
    recorded runs alone."""
    rows = [(f"{name} x{n}", f"{cell}_x{n}", f"ds2-{cell}{n}")
            for cell, name, layers in (("gru", "GRU", (4, 5)), ("lstm", "LSTM", (4, 5)), ("hlstm", "H-LSTM", (3,)))
            for n in layers]
    columns = [SIZE, FLOPS, WER, CER, WORDS, _quick(root)]
    return _timed(compare("tab-ds2-cells", "Dense recognisers", "deepspeech2", rows, columns,
                          profile if profile in records.KEPT else None, root))


def tab_ds2_training(profile: str, root: str | Path | None = None) -> Table:
    """Ways to a small recogniser (`tab-ds2-training`): dense, prune only, grow and prune, and small but dense;
    recorded runs alone."""
    rows = [("LSTM x5", "lstm_x5", BASELINE), ("H-LSTM x3", "hlstm_x3", DENSE),
            ("prune only: accurate", None, f"{DENSE}-prune"), ("grow and prune: accurate", "accurate", ACCURATE),
            ("prune only: compact", None, f"{COMPACT}-prune"), ("grow and prune: compact", "compact", COMPACT),
            ("pruned gradually: compact", None, f"{COMPACT}-gradual"),
            ("grown, pruned gradually: accurate", None, f"{DENSE}-gp-gradual"),
            ("grown, pruned gradually: compact", None, f"{COMPACT}-gp-gradual"),
            ("the same, convolutions, too: compact", None, f"{COMPACT}-whole"),
            ("the same, in blocks of 16: compact", None, f"{COMPACT}-fast"),
            ("the same, with more weights: fast", None, FAST),
            ("small LSTM, dense", None, "ds2-small-lstm"), ("small H-LSTM, dense", None, "ds2-small-hlstm")]
    return compare("tab-ds2-training", "Ways to a small recogniser", "deepspeech2", rows,
                   [SIZE, COMPRESSION, WER, CER, WORDS], profile if profile in records.KEPT else None, root)


def tab_ds2_wide(root: str | Path | None = None) -> Table:
    """The recognisers that are as wide as the paper's (`tab-ds2-wide`), from the records of the profile `wide`."""
    rows = [("LSTM x5, dense", "baseline", BASELINE),
            ("accurate", "accurate", f"{DENSE}-gp-gradual"), ("compact", "compact", f"{COMPACT}-gp-gradual")]
    rows += [(row + told, model, name + end)
             for end, told in ((LONG, ", trained longer"), (ALL, ", longer and on all")) for row, model, name in rows
             if records.find(WIDE, name + end, root)]
    caption = f"Recognisers {PROFILES[WIDE].speech.hidden} wide; ours were grown, then pruned gradually"
    return compare("tab-ds2-wide", caption, "deepspeech2", rows, [SIZE, COMPRESSION, WER, CER, WORDS], None, root,
                   recorded=WIDE)


def tab_ds2_long(root: str | Path | None = None, profile: str = RECORDED) -> Table:
    """The recognisers that were trained longer or heard twice, with more of the sound blanked (`tab-ds2-long`), beside
    those of the usual recipe: error rates of both, and the difference from the LSTM x5 that was trained likewise."""
    rows = [("LSTM x5", BASELINE), ("H-LSTM x3", DENSE), ("H-LSTM x3, dropout in the gates", f"{DENSE}-dropout"),
            ("accurate", f"{DENSE}-gp-gradual"), ("medium", MEDIUM), ("fast", FAST),
            ("compact", f"{COMPACT}-gp-gradual")]
    usual, longer = "the usual recipe", "longer recipes"
    columns = [(usual, "WER %, validation"), (usual, WER.heading), (longer, "epochs"), (longer, "WER %, validation"),
               (longer, WER.heading), (longer, "against LSTM x5")]

    def rates(runs: list[RunRecord]) -> list[str]:
        return [spread([scores["wer"] for scores in found if "wer" in scores])
                for found in ([r.valid_scores for r in runs], [r.scores for r in runs])]
    lines = []
    for label, name in rows:
        before = rates(records.find(profile, name, root))
        for end in (LONG, ALL, LONGER, TWICE):
            if not (runs := records.find(profile, name + end, root)):
                continue
            apart = paired(runs, records.find(profile, BASELINE + end, root)) if name != BASELINE else None
            told = {ALL: ", on validation speakers, too", TWICE: ", heard twice"}.get(end, "")
            lines.append((label + told, [*before, f"{runs[0].recipe['schedule']['epochs']}", *rates(runs),
                                  f"{apart[0]:+.1f} ({apart[1]:+.1f} to {apart[2]:+.1f})" if apart else MISSING]))
    notes = ["In brackets after a difference from the LSTM x5 of the same recipe: the range that other utterances of "
             "these speakers could give (95 %).",
             "Accurate, medium, fast and compact: H-LSTM x3, grown, then pruned gradually; fast in blocks, "
             "convolutions, too; medium to as many live recurrent weights as the compact network has in the paper's "
             "width. Heard twice: after a quarter of the epochs each of them is twice the work."]
    return Table("tab-ds2-long", "Recognisers trained for longer or heard twice, with more of the sound blanked",
                 "network", columns, lines, notes,
                 missing="no such run, trained on these speakers, or no other LSTM x5 to compare with")


def tab_ds2_precision(root: str | Path | None = None, profile: str = RECORDED) -> Table:
    """Runs of one recipe and seed whose products were in bfloat16 and in single precision (`tab-ds2-precision`): as the
    records tell, which name the precision that the processor had."""
    lines = []
    for label, name in (("LSTM x5", BASELINE), ("GRU x4", "ds2-gru4")):
        for run in (r for each in (name, f"{name}-fp32") for r in records.find(profile, each, root) if r.seed == 0):
            hours = f"{run.provenance.seconds / 3600:.1f}"
            lines.append((label, [str(run.provenance.precision or "bf16, by its recipe"), run.provenance.cpu, hours,
                                  *(percent(scores["wer"]) if "wer" in scores else MISSING
                                    for scores in (run.valid_scores, run.scores))]))
    heads = [("", head) for head in ("products", "processor", "hours", "WER %, validation", WER.heading)]
    return Table("tab-ds2-precision", "One recipe in two precisions, seed 0", "network", heads, lines,
                 ["Hours on one thread, with other work beside: no comparison of speeds."],
                 frozenset({"products", "processor"}), missing="not recorded")


def tab_ds2_tuning(root: str | Path | None = None, profile: str = RECORDED) -> Table:
    """Recipes tried for the grid and what each came to on the validation speakers, from `tuning-speech.json`; and how
    many epochs it took until half of the words were heard."""
    path, lines = records.folder(profile, root) / "tuning-speech.json", []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []:
        run, half = len(row["valid_wer"]), next((k for k, wer in enumerate(row["valid_wer"], 1) if wer < 50), None)
        lines.append((row["experiment"], [
            row["lr"], row["stride"], row["ordered"], row["note"] or MISSING,
            str(run) if run == row["epochs"] else f"{run} of {row['epochs']}",
            half or MISSING, *(percent(row[key][-1]) for key in ("valid_wer", "valid_cer"))]))
    heads = [("", head) for head in ("peak learning rate", "windows a frame", "ordered epochs", "else", "epochs",
                                     "until WER < 50 %", "WER %", "CER %")]
    notes = ["Of the validation speakers, greedy, after the last epoch that was trained; seed 0.",
             "Windows a frame: how many windows, 10 ms apart, make one frame of the recurrent layers. Ordered epochs: "
             "so many at the start go from short utterances to long ones."]
    return Table("tab-ds2-tuning", "Recipes tried", "experiment", heads,
                 [(name, [str(cell) for cell in cells]) for name, cells in lines], notes, frozenset({"else"}),
                 missing="nothing else was changed, or WER never fell below 50 %")


def speeds(root: str | Path | None = None, profile: str = RECORDED) -> dict[str, dict[str, float]]:
    """Processor -> experiment -> microseconds a second of speech, utterances one by one on one thread, on the quickest
    engine.

    From what `bench speech --json results/<profile>/speech-....json` wrote, of its model and of those `--against` it.
    Times of different files are never held against each other: processors may bear one name and yet differ. Where
    several files are of one name, the time of the measurement stands behind it.
    """
    files = [json.loads(path.read_text(encoding="utf-8"))
             for path in sorted(records.folder(profile, root).glob("speech*.json"))]
    files.sort(key=lambda data: (records.processor(data["provenance"]), data["provenance"]["ended"]))
    seen, found = Counter(records.processor(data["provenance"]) for data in files), {}
    for data in files:
        cpu, ended = records.processor(data["provenance"]), datetime.fromisoformat(data["provenance"]["ended"])
        times = found[f"{cpu}, {ended:%Y-%m-%d %H:%M}" if seen[cpu] > 1 else cpu] = {}
        for row in data["latency"]:
            other = re.fullmatch(r"(ds2-[\w-]+), (torch|engine)", row["engine"])
            own = data.get("experiment") if row["engine"] in ("torch, with all weights", "engine") else None
            if name := other[1] if other else own:
                times[name] = min(row["microseconds"], times.get(name, row["microseconds"]))
    return found


def quicker(name: str, base: str, root: str | Path | None = None, profile: str = RECORDED) -> list[float]:
    """How many times less time an experiment takes than the dense LSTM x5 `base`, in each of `speeds` that has both.

    Where no LSTM x5 that was trained longer was timed, the usual one stands for it: it is as large, and all alive."""
    both = ((own.get(base, own.get(BASELINE)), own.get(name)) for own in speeds(root, profile).values())
    return [whole / took for whole, took in both if whole and took]


def heard_best(names: Iterable[str], root: str | Path | None = None, profile: str = RECORDED) -> str | None:
    """Of the experiments with the most seeds, as the mean of few is luck, the one that has the lowest mean validation
    WER; None if none is recorded."""
    rates = {name: [run.valid_scores.get("wer", 100.0) for run in runs]
             for name in names if (runs := records.find(profile, name, root))}
    return min(rates, key=lambda name: (-len(rates[name]), statistics.fmean(rates[name])), default=None)


def preferred(name: str, root: str | Path | None = None, profile: str = RECORDED) -> str:
    """The experiment, or of its like that was grown and pruned gradually, its convolutions, too, or in blocks, the one
    that is `heard_best`."""
    own = name.removesuffix("-gp")
    return heard_best((name, *(own + way for way in WAYS)), root, profile) or name


@cache
def _draws(n: int, resamples: int = 100_000) -> np.ndarray:
    """How often each of n utterances is drawn: (resamples, n). With so many draws the first digit behind the point, and
    what is below zero, are no longer a matter of luck; the same draws every time."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)


def paired(ours: list[RunRecord], base: list[RunRecord]) -> tuple[float, float, float] | None:
    """By how many points the word error rate of some runs lies above that of others, and the 95 % interval of that over
    utterances (bootstrap; both are given the same ones, since what is hard is hard for both). Errors are means over the
    runs of each. None where the records do not hold the same utterances."""
    heard = [[sorted(run.samples, key=lambda s: s.get("id", "")) for run in group] for group in (ours, base)]
    said = [[(s.get("id"), s["reference"]) for s in samples] for group in heard for samples in group]
    if not (ours and base) or not said[0] or said[0][0][0] is None or any(each != said[0] for each in said):
        return None
    (mine, words), (theirs, _) = (
        np.mean([[word_errors(s["reference"], s["hypothesis"]) for s in samples] for samples in group], axis=0).T
        for group in heard)
    draws, apart = _draws(len(words)), mine - theirs
    rates = 100 * (draws @ apart.astype(np.float32)) / (draws @ words.astype(np.float32))
    low, high = (round(float(end), 4) + 0.0 for end in np.percentile(rates, [2.5, 97.5]))       # float32 is not exact
    return 100 * float(apart.sum() / words.sum()), low, high


def tab_ds2_claims(root: str | Path | None = None, profile: str = RECORDED) -> Table:
    """The abstract's claims about speech beside the recorded runs on AN4, each against our own LSTM x5.

    A claim is met where the mean of the seeds reaches its figure; of latency, on every processor. Of a model that is
    smaller or quicker it also takes a mean word error rate no higher than that of the LSTM x5, or any network would do.
    Of the networks of each size, grown and pruned in one way or another, the one counts that was trained most often and
    that validation speakers prefer; as the accurate one also the fast one, which has fewer weights.
    """
    accurate, compact = (preferred(name, root, profile) for name in (ACCURATE, COMPACT))
    ours = {}
    for name, label in ((accurate, "accurate"), (compact, "compact"), (FAST, "fast")):
        ours[name] = f"{ours[name]}, {label}" if name in ours else label
    ours = {name: f"{label}: {next((how for way, how in WAYS.items() if name.endswith(way)), 'in rounds')}"
            for name, label in ours.items()}
    runs = {name: records.find(profile, name, root) for name in (BASELINE, *ours)}
    rates = {name: [run.scores["wer"] for run in group] for name, group in runs.items()}
    base, lines, times = runs[BASELINE], [], speeds(root, profile)

    def fewer(of: Callable[[RunRecord], float]) -> dict[str, float]:
        """How many times less the compact model has."""
        if not (base and runs[compact]):
            return {}
        whole, left = (statistics.fmean(map(of, group)) for group in (base, runs[compact]))
        return {"": whole / left}

    def cut(name: str) -> dict[str, float]:
        """By how many percent its latency is lower, on each processor."""
        both = {cpu: own for cpu, own in times.items() if {name, BASELINE} <= own.keys()}
        return {cpu: 100 * (1 - own[name] / own[BASELINE]) for cpu, own in both.items()}

    def cut_text(value: float) -> str:
        return f"{value:.0f} % ({factor(1 / (1 - value / 100))})"
    claims = [("params_fewer", compact, fewer(lambda run: run.counts.cell.nonzero_params), factor),
              ("flops_fewer", compact, fewer(lambda run: run.counts.cell.nonzero_flops), factor),
              ("wer_gp", accurate, {"": statistics.fmean(rates[accurate])} if rates[accurate] else {},
               "{:.1f} %".format),
              ("latency_cut", compact, cut(compact), cut_text)]
    if runs[FAST]:
        claims.append(("latency_cut", FAST, cut(FAST), cut_text))
    for key, name, found, show in claims:
        goal, values = paper.goal(f"deepspeech2.{key}"), found.values()
        told = [show(value) + (f" on {cpu}" if cpu else "") for cpu, value in found.items()]
        if len(told) > 1:
            told = [f"{show(min(values))} to {show(max(values))}, {len(told)} timings"]
        gain = statistics.fmean(rates[name]) - statistics.fmean(rates[BASELINE]) if rates[name] and base else None
        drawn = paired(runs[name], base)
        judged = (rate_verdict(rates[name], goal.value) if key == "wer_gp" else
                  verdict(min(values, default=None), goal.value, rates[name], rates[BASELINE], "WER", better=-1))
        if drawn and drawn[1] <= 0 and judged.endswith("WER is higher"):
            judged += ", within chance"
        lines.append((f"{goal.note}: {goal.text()}", [
            ours[name], ", ".join(told) or MISSING,
            MISSING if gain is None else f"{gain:+.1f}" + (f" ({drawn[1]:+.1f} to {drawn[2]:+.1f})" if drawn else ""),
            f"{len(rates[name])} against {len(base)}" if rates[name] and base else MISSING, judged]))
    heads = [("", head) for head in ("our model", "recorded", "WER against LSTM x5", "seeds", "verdict")]
    width = PROFILES[profile].speech.hidden
    notes = [f"Recorded ({profile}) on AN4 with cells {width} wide, greedy; the paper's are "
             f"{paper.claim('deepspeech2.width')} wide ({paper.FOOTNOTE}).",
             "A smaller or quicker model meets a claim only if its word error rate is no higher, in the mean of seeds.",
             "In brackets: the range that other utterances of these speakers could give the difference (95 %; both "
             "networks hear the same ones); \"within chance\" where it reaches down to zero.",
             "Accurate and compact: of the networks pruned in rounds, gradually, with their convolutions or in blocks, "
             "those with most seeds, and among these the ones that hear the validation speakers best: "
             f"{accurate} and {compact}.",
             "Time: whole utterances, one by one on one thread, each network on its quickest engine; of several "
             "timings the least gain and the greatest, and the least is judged."]
    for cell in ("LSTM", "H-LSTM"):
        if small := records.find(profile, f"ds2-small-{cell.replace('-', '').lower()}", root):
            notes.append(f"For comparison, WER in percent of a dense {cell} as small as the compact model: "
                         + spread([run.scores["wer"] for run in small]) + ".")
    return Table("tab-ds2-claims", "The abstract's claims about speech", "claim", heads, lines, notes,
                 frozenset({"our model", "verdict"}), missing="not recorded")


def rate_verdict(rates: list[float], goal: float) -> str:
    """Whether the error rates of all seeds, or their mean, are as low as a figure of the paper's."""
    if not rates:
        return "not recorded yet"
    if statistics.fmean(rates) > goal:
        return "not met"
    if len(rates) < 2:
        return "met, by one seed"
    return "met" if max(rates) <= goal else "met in the mean; not by every seed"
