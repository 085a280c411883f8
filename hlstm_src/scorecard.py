"""What held: every claim of the abstracts, and the goals of this book, judged by records.

The judgements are those of `speech_tables.py` and `caption_tables.py`; here they stand together, beside what was not
run.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from . import caption_tables as ct
from . import paper, records
from . import speech_tables as st
from .comparison import verdict
from .profiles import PROFILES
from .tables import MISSING, RECORDED, Table, factor

BENCHMARKS = {"deepspeech2": "Speech", "neuraltalk": "Captions", "nmt": "Translation"}
SIZES = {"desk": "desk size", st.WIDE: "the paper's width", "paper": "the paper's size"}
NO_CLAIM = ("models", "wer_baseline", "bleu_baseline")     # how many models there are, and what they are held against
FEWER, QUICKER = 40, 5         # our own goals: so many times fewer weights, and less time, than an LSTM x5
NOT_RUN = "not run"
TRAINED = {"": "", st.LONG: ", twice as long", st.ALL: ", twice as long, on validation speakers, too",
           st.LONGER: ", four times as long", st.TWICE: ", heard twice"}       # by the ends of runs' names


@dataclass(frozen=True)
class Claim:
    """A claim, and what came of it in one profile: `key` is that of `paper.yml`, the rest is text to be shown."""

    key: str
    text: str
    model: str = MISSING
    recorded: str = MISSING
    against: str = MISSING         # our score less that of our LSTM
    seeds: str = MISSING
    verdict: str = NOT_RUN

    @property
    def kind(self) -> str:
        """The verdict without its doubts: met, met in part, not met, not run."""
        if self.verdict.startswith("met"):
            return "met" if self.verdict == "met" else "met in part"
        return "not met" if self.verdict.startswith("not met") else NOT_RUN


def claims(profile: str = RECORDED, root: str | Path | None = None) -> list[Claim]:
    """Every claim of the two abstracts, judged by the runs of a profile, in the order of BENCHMARKS.

    The journal's figure for speech is of the first of its models, and we do not know which that is: both of ours are
    held against it.
    """
    found = []
    for benchmark, table in (("deepspeech2", st.tab_ds2_claims(root, profile)),
                             ("neuraltalk", ct.tab_neuraltalk_claims(root, profile))):
        known = {f"{figure.note}: {figure.text()}": key for key, figure in abstract(benchmark).items()}
        own = [Claim(next(key for start, key in known.items() if text.startswith(start)), text, *cells[:4],
                     NOT_RUN if cells[4] == "not recorded yet" else cells[4]) for text, cells in table.rows]
        found += own + [_journal(claim, profile, root) for claim in own
                        if claim.key in ("deepspeech2.latency_cut", "neuraltalk.cider_gain")]
    return found + [Claim(key, f"{figure.note}: {figure.text()}" + " BLEU" * (figure.unit == "BLEU"))
                    for key, figure in abstract("nmt").items()]


def abstract(benchmark: str) -> dict[str, paper.Figure]:
    """The figures of the abstracts that claim something about a benchmark, by key."""
    return {key: figure for key, figure in paper.claims().items() if figure.source == "abstract"
            and key.startswith(benchmark + ".") and key.split(".")[1] not in NO_CLAIM}


def _journal(claim: Claim, profile: str, root: str | Path | None) -> Claim:
    """The same of the figure that the journal's abstract has in its place."""
    goal, said, shown = paper.goal(f"{claim.key}_journal"), claim.verdict, claim.recorded
    if claim.key == "deepspeech2.latency_cut":
        name = st.FAST if "fast" in claim.model else st.preferred(st.COMPACT, root, profile)
        cuts = [100 * (1 - own[name] / own[st.BASELINE]) for own in st.speeds(root, profile).values()
                if {name, st.BASELINE} <= own.keys()]
        if cuts and min(cuts) < goal.value:
            said = "not met"
    else:
        ours, base = ([ct.at_beam(ct.BEAM)(run).scores["cider"] for run in records.find(profile, name, root)]
                      for name in (ct.ACCURATE, ct.BASELINE))
        if ours and base:
            gain = 100 * (statistics.fmean(ours) / statistics.fmean(base) - 1)
            said, shown = verdict(gain, goal.value, ours, base), f"{gain:+.1f} %"
    return replace(claim, key=f"{claim.key}_journal", text=f"{goal.note}: {goal.text()}", recorded=shown, verdict=said)


def tally(judged: Iterable[Claim]) -> str:
    """How many claims are met, met in part, not met, not run: in words for a sentence."""
    found = Counter(claim.kind for claim in judged)
    return ", ".join(f"{found[kind]} {kind}" for kind in ("met", "met in part", "not met", NOT_RUN) if found[kind])


def in_rows(root: str | Path | None = None) -> dict[str, list[Claim | None]]:
    """The claims as `tab_scorecard` shows them: for each size what became of each row of desk size, in its order; None
    where the size has no networks of the kind, as for captions in the paper's width."""
    found = {size: _by_place(claims(size, root)) for size in SIZES}
    return {size: [None if size == st.WIDE and not claim.key.startswith("deepspeech2.") else
                   judged.get(place, Claim(claim.key, claim.text)) for place, claim in found[RECORDED].items()]
            for size, judged in found.items()}


def tallies(root: str | Path | None = None) -> list[str]:
    """What became of the claims, a line for each size, of the rows of `tab_scorecard` that it has networks for."""
    judged = {size: list(filter(None, rows)) for size, rows in in_rows(root).items()}
    return [f"- At {SIZES[size]}, of {len(found)} rows: {tally(found)}." for size, found in judged.items()]


def tab_scorecard(root: str | Path | None = None, brief: bool = False) -> Table:
    """All claims (`tab-scorecard`): what we recorded at desk size, the verdict, and those of speech in the paper's
    width and of all at the paper's own size.

    brief: without the columns that say how it was measured.
    """
    others = in_rows(root)
    ours = others.pop(RECORDED)
    heads = ["our model", "recorded", "score against our LSTM", "seeds", "verdict"]
    keep = [0, 1, 4] if brief else range(5)
    lines, before = [], None
    for claim, *beside in zip(ours, *others.values()):
        benchmark = claim.key.split(".")[0]
        if benchmark != before:
            lines.append((BENCHMARKS[benchmark], [""] * (len(keep) + len(others))))
            before = benchmark
        cells = [claim.model, claim.recorded, claim.against, claim.seeds, claim.verdict]
        lines.append(("\u2003" + claim.text, [*(cells[k] for k in keep),
                                              *(MISSING if other is None else other.verdict for other in beside)]))
    columns = [(SIZES[RECORDED], heads[k]) for k in keep] + [(SIZES[size], "verdict") for size in others]
    width = PROFILES[RECORDED].speech.hidden
    notes = [f"Desk size: speech on all of AN4, with cells {width} wide; captions on UCM-Captions instead of MSCOCO, "
             "with cells as wide as the paper's. The paper's width: speech on AN4 in cells "
             f"{PROFILES[st.WIDE].speech.hidden} wide, with twice as much sound in a step and a third of the epochs "
             "that the paper's size allows. Each network is compared with our own LSTM, of five layers for speech and "
             "of three for captions.",
             "The score is WER in percent for speech (lower is better; in brackets the range that other utterances of "
             "these speakers could give, 95 %), and CIDEr for captions (higher is better). A smaller or quicker model "
             "meets a claim only if its score is no worse, in the mean of the seeds."]
    return Table("tab-scorecard", "What the abstracts claim, and what came of it", "claim", columns, lines,
                 notes[:1] if brief else notes, frozenset({"our model", "recorded", "verdict"}),
                 missing="nothing measured; in the paper's width there is speech alone")


def _by_place(judged: Iterable[Claim]) -> dict[tuple[str, int], Claim]:
    """Claims by key and by how often it was met before: two of our models may stand for one claim."""
    seen: Counter[str] = Counter()
    found = {}
    for claim in judged:
        found[claim.key, seen[claim.key]] = claim
        seen[claim.key] += 1
    return found


def goals(profile: str = RECORDED, root: str | Path | None = None, ending: str = "") -> list[Claim]:
    """The goals that this book set itself on AN4, judged by the runs of a profile, or by those that were trained
    otherwise: their names have the `ending` of `TRAINED`.

    The compact network is the one that validation speakers prefer among those of ours that are small enough; it has
    to be quick as well. Smaller is against the paper's width; errors and time are against the LSTM x5 that we trained.
    """
    def rates(name: str) -> list[float]:
        return [run.scores["wer"] for run in records.find(profile, name, root)]

    def judged(key: str, text: str, name: str, shown: str, said: str) -> Claim:
        ours, drawn = rates(name), st.paired(*(records.find(profile, each, root) for each in (name, lstm)))
        if not ours or said == "not recorded yet":
            return Claim(key, text, verdict=NOT_RUN if said == "not recorded yet" else said)
        if not base:
            return Claim(key, text, name, shown, seeds=f"{len(ours)} against none", verdict=said)
        against = f"{statistics.fmean(ours) - statistics.fmean(base):+.1f}"
        if drawn:
            against += f" ({drawn[1]:+.1f} to {drawn[2]:+.1f})"
            said += ", within chance" if said.endswith("WER is higher") and drawn[1] <= 0 else ""
        return Claim(key, text, name, shown, against, f"{len(ours)} against {len(base)}", said)

    def best(*names: str) -> str:
        return st.heard_best(names, root, profile) or names[0]
    if ending:
        lstm, dense, accurate, *smaller = (f"{name}{ending}" for name in (
            st.BASELINE, st.DENSE, f"{st.DENSE}-gp-gradual", st.MEDIUM, st.FAST, f"{st.COMPACT}-gp-gradual"))
        dense = best(dense, f"{st.DENSE}-dropout{ending}")
        accurate = best(accurate, st.MEDIUM + ending, st.FAST + ending)
    else:
        lstm, dense, accurate, *smaller = st.BASELINE, st.DENSE, *(
            st.preferred(name, root, profile) for name in (st.ACCURATE, st.COMPACT))
    base, whole = rates(lstm), paper.compute("deepspeech2.params_lstm_x5")
    target, wide = paper.goal("deepspeech2.wer_gp"), paper.claim("deepspeech2.width")
    fewer = {name: whole / statistics.fmean(run.counts.cell.nonzero_params for run in runs)
             for name in (accurate, *smaller) if (runs := records.find(profile, name, root))}
    small = [name for name, times in fewer.items() if times >= FEWER] or smaller[-1:]
    compact = min(small, key=lambda name: statistics.fmean([run.valid_scores.get("wer", 100.0) for run in records.find(
        profile, name, root)] or [100.0]))
    few, good, whole_cells = rates(compact), rates(accurate), rates(dense)
    quick = st.quicker(compact, lstm, root, profile)
    gain = statistics.fmean(base) - statistics.fmean(whole_cells) if base and whole_cells else None
    sizes = fewer.get(compact)
    return [
        judged("accurate", f"accurate: word error rate at most {target.text()}", accurate,
               f"{statistics.fmean(good):.1f} %" if good else MISSING, st.rate_verdict(good, target.value)),
        judged("compact", f"compact: at least {FEWER}x fewer live recurrent weights than the LSTM x5, {wide} wide, at "
               "a word error rate no higher than our LSTM x5's", compact, factor(sizes) if sizes else MISSING,
               verdict(sizes, FEWER, few, base, "WER", better=-1)),
        judged("quick", f"the same network: a latency at least {QUICKER}x lower than our LSTM x5's", compact,
               ", ".join(map(factor, quick)) or MISSING,
               verdict(min(quick, default=None), QUICKER, few, base, "WER", better=-1)),
        judged("cell", "dense H-LSTM x3: a word error rate below that of the LSTM x5, by more than the seeds differ",
               dense, MISSING if gain is None else f"{-gain:+.1f} points",
               "not met" if gain is not None and gain <= 0 else
               verdict(gain, 0, whole_cells, base, "WER", better=-1).replace("met in the mean; in WER", "not met:"))]


def tab_goals(root: str | Path | None = None) -> Table:
    """Our own goals on AN4 (`tab-goals`), at desk size and in the paper's width; of other recipes what there is."""
    heads = ["our network", "recorded", "WER against LSTM x5", "seeds", "verdict"]
    found = {SIZES[size] + told: goals(size, root, ending)
             for size in (RECORDED, st.WIDE) for ending, told in TRAINED.items()}
    lines = []
    for k, goal in enumerate(found[SIZES[RECORDED]]):
        lines.append((goal.text, [""] * len(heads)))
        lines += [(f"\u2003{size}", [own.model, own.recorded, own.against, own.seeds, own.verdict])
                  for size, each in found.items() if (own := each[k]).model != MISSING or size in SIZES.values()]
    columns = [("", head) for head in heads]
    notes = ["Weights are compared with those of the LSTM x5 in the paper's width; errors and times with those of our "
             "own LSTM x5 of the same size and recipe.",
             "Validation speakers decide which network is judged: as the accurate one, of the accurate, the medium and "
             "the fast ones, among those with most seeds; as the compact one, of the medium, the fast and the compact "
             f"ones, among those that are at least {FEWER}x smaller. In brackets: the range that other "
             "utterances of these speakers could give the difference (95 %). Times are of whole utterances, one by one "
             "on one thread, each network on its quickest engine.", paper.FOOTNOTE]
    return Table("tab-goals", "Our own goals for AN4", "goal", columns, lines, notes,
                 frozenset({"our network", "recorded", "verdict"}), missing="not run, or nothing to compare with")
