"""Tables of the captioners, from records as in `tables.py`, and what came of the paper's captioning claims.

A record scores greedy captions and, as `cider_beam2` and so on, those of wider beams. Recorded runs were made on two
corpora; `suffix` chooses: "" for UCM-Captions, "-flowers" for Flowers-captions.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from . import paper, records
from .comparison import Column, compare, compression, verdict
from .paper import short
from .profiles import PROFILES
from .records import RunRecord
from .search import BEAMS
from .tables import MISSING, RECORDED, Table, density, factor, spread

CORPORA = {"": "UCM-Captions", "-flowers": "Flowers-captions"}
PLAIN, BASELINE, ACCURATE, COMPACT = "nt-lstm1", "nt-lstm3", "nt-hlstm1-gp", "nt-hlstm1-compact"
BEAM = 2                               # the paper's, where it does not say otherwise
RIVALS = ("one-shot", "prune-only", "gradual", "imp", "set", "rigl", "gp-no-growth", "gp-random", "gp-sized",
          "gp-cycle", "gp-gradual")
ENGINES = ("torch, with all weights", "engine, all weights", "engine")     # those that say what the model says


def at_beam(beam: int) -> Callable[[RunRecord], RunRecord]:
    """What turns a record into one whose plain scores are those of this beam, with `beam` itself among them."""
    def view(record: RunRecord) -> RunRecord:
        found = record.scores | {"beam": beam}
        for name in ("cider", "bleu4", "meteor") if beam > 1 else ():
            found.pop(name, None)
            if (wider := record.scores.get(f"{name}_beam{beam}")) is not None:
                found[name] = wider
        return record.model_copy(update={"scores": found})
    return view


def _score(heading: str, name: str, told: str = "", **options) -> Column:
    digits = 2 if name == "perplexity" else 1
    return Column(heading, told, lambda record, _: record.scores.get(name), lambda value: f"{value:.{digits}f}",
                  seeds=True, **options)


SIZE = Column("cell weights", "params", lambda record, _: record.counts.cell.nonzero_params, short)
COMPRESSION = Column("compression", "compression", compression, factor)
FLOPS = Column("FLOPs a word, each beginning", "flops", lambda record, _: record.counts.cell.nonzero_flops, short)
CIDER, PERPLEXITY = _score("CIDEr", "cider", "cider"), _score("perplexity", "perplexity")


def speeds(root: str | Path | None = None, profile: str = RECORDED) -> dict[tuple[str, str, int], float]:
    """(profile, experiment, beam) -> microseconds a word, pictures one by one on one thread, on the quickest engine.

    From what `bench captions --json results/<profile>/captions.json` wrote: one file, one machine. Those that ran
    `--against` its model stand there by their names.
    """
    path, found = records.folder(profile, root) / "captions.json", {}
    if not path.exists():
        return found
    data = json.loads(path.read_text(encoding="utf-8"))
    words = {(row["case"], row["engine"]): row["words"] for row in data["words"]}
    for row in data["latency"]:
        other = re.fullmatch(r"(nt-[\w-]+), (torch|engine)", row["engine"])
        if other or row["engine"] in ENGINES:
            name = other[1] if other else data.get("experiment") or COMPACT
            key = profile, name, int(row["case"].rpartition(" ")[2])
            time = row["microseconds"] / words[row["case"], row["engine"]]
            found[key] = min(time, found.get(key, time))
    return found


def _time(root: str | Path | None, told: str = "") -> list[Column]:
    """The column of measured times, where any were recorded."""
    found = speeds(root)

    def took(r: RunRecord, _) -> float | None:
        return found.get((r.profile, r.experiment, int(r.scores.get("beam", 1))))
    return [Column(f"µs a word{told}", "", took, "{:.0f}".format, main=False)] if found else []


def _made(name: str, caption: str, rows: list[tuple], columns: list[Column], profile: str, root: str | Path | None,
          suffix: str = "") -> Table:
    """A comparison on one corpus. The paper's figures and the small profiles' runs stand beside UCM's alone."""
    rows = [(row, None if suffix else model, experiment + suffix, *view) for row, model, experiment, *view in rows]
    small = profile in records.LOCAL
    table = compare(name + suffix, f"{caption}, {CORPORA[suffix]}", "neuraltalk", rows, columns,
                    None if suffix and small else profile, root)
    groups = {group for group, _ in table.columns}
    if "paper" in groups:
        table.notes.insert(0, "The paper's figures are for MSCOCO.")
    if small and len(groups - {"paper"}) > 1:
        table.notes.insert(0, f"The runs of the profile {profile} are on the mini corpus of drawn scenes: hold them "
                              "against each other alone.")
    return table


def tab_neuraltalk_cells(profile: str, root: str | Path | None = None, suffix: str = "") -> Table:
    """The dense cells (`tab-neuraltalk-cells`): weights, scores by beam, perplexity, time of a word at beam 1."""
    rows = [(f"LSTM x{n}", f"lstm_x{n}", f"nt-lstm{n}") for n in (1, 2, 3)]
    rows += [] if suffix else [("GRU x1", None, "nt-gru1")]
    rows += [("H-LSTM x1", "hlstm_x1", "nt-hlstm1")]
    beams = [_score("CIDEr, beam 1", "cider"),
             *(_score(f"CIDEr, beam {k}", f"cider_beam{k}", "cider" if k == BEAM else "", main=k == BEAM)
               for k in BEAMS[1:])]
    others = [_score("BLEU-4, beam 1", "bleu4", main=False), _score("METEOR, beam 1", "meteor", main=False),
              PERPLEXITY]
    return _made("tab-neuraltalk-cells", "Dense captioners", rows,
                 [SIZE, *beams, *others, *_time(root, ", beam 1")], profile, root, suffix)


def tab_neuraltalk_training(profile: str, root: str | Path | None = None, suffix: str = "") -> Table:
    """Ways to a small cell (`tab-neuraltalk-training`): dense, prune only, grow and prune, and small but dense."""
    rows = [("LSTM x3", "lstm_x3", BASELINE), ("H-LSTM x1", "hlstm_x1", "nt-hlstm1"),
            *([] if suffix else [("prune only: accurate", None, "nt-hlstm1-prune")]),
            ("grow and prune: accurate", "accurate", ACCURATE), ("grow and prune: compact", "compact", COMPACT),
            ("small LSTM, dense", None, "nt-small-lstm"), ("small H-LSTM, dense", None, "nt-small-hlstm"),
            *([] if suffix else [("small LSTM, recipe its own", None, "nt-small-lstm-fitted"),
                                 ("small H-LSTM, recipe its own", None, "nt-small-hlstm-fitted")])]
    rows = [(*row, at_beam(BEAM)) for row in rows]
    return _made("tab-neuraltalk-training", f"Ways to a small captioner (beam {BEAM})", rows,
                 [SIZE, COMPRESSION, CIDER, PERPLEXITY], profile, root, suffix)


def tab_neuraltalk_rivals(profile: str, root: str | Path | None = None) -> Table:
    """Rivals of grow-and-prune that end as small as the compact model, after as many epochs; recorded runs alone."""
    rows = [("LSTM x3, dense", None, BASELINE), ("grow and prune", None, COMPACT),
            *((name, None, f"nt-compact-{name}") for name in RIVALS)]
    rows = [(*row, at_beam(BEAM)) for row in rows]
    table = compare("tab-neuraltalk-rivals", f"Rivals at the compact size (beam {BEAM}), {CORPORA['']}", "neuraltalk",
                    rows, [SIZE, COMPRESSION, CIDER, PERPLEXITY], profile if profile in records.KEPT else None, root)
    table.corner = "method"
    return table


def tab_neuraltalk_tuned(profile: str, root: str | Path | None = None) -> Table:
    """With the encoder as it came, and trained on together with the decoder; recorded runs alone."""
    rows = [(f"{title}{', encoder trained on' if end else ''}", None, name + end, at_beam(BEAM))
            for title, name in (("LSTM x1", PLAIN), ("compact", COMPACT)) for end in ("", "-tuned")]
    return compare("tab-neuraltalk-tuned", f"The encoder trained on (beam {BEAM}), {CORPORA['']}", "neuraltalk", rows,
                   [SIZE, CIDER, PERPLEXITY], profile if profile in records.KEPT else None, root)


def tab_neuraltalk_models(profile: str, root: str | Path | None = None, suffix: str = "") -> Table:
    """The three models against the baselines (`tab-neuraltalk-models`): weights, FLOPs, time, CIDEr."""
    rows = [(f"LSTM x{n}", f"lstm_x{n}", f"nt-lstm{n}", at_beam(BEAM)) for n in (3, 2, 1)]
    rows += [("accurate", "accurate", ACCURATE, at_beam(BEAM)), ("fast", "fast", ACCURATE, at_beam(1)),
             ("compact", "compact", COMPACT, at_beam(BEAM))]
    columns = [SIZE, COMPRESSION, FLOPS, *_time(root), CIDER, PERPLEXITY]
    return _made("tab-neuraltalk-models", f"Three models against LSTMs (beam {BEAM}, fast: beam 1)", rows, columns,
                 profile, root, suffix)


def tab_activations(profile: str, zeros: Mapping[tuple[str, str, int], float] = MappingProxyType({}),
                    root: str | Path | None = None) -> Table:
    """Activations inside the gates (`tab-activations`): score, and share of hidden units that are exactly zero.

    zeros: that share between 0 and 1, measured by whoever has model and corpus, by (profile, experiment, seed), where a
    record does not have it (`zero_units`, in percent). The run with the profile's own activation is `nt-hlstm1`.
    """
    def share_of(record: RunRecord, _) -> float | None:
        recorded = record.scores.get("zero_units")
        return zeros.get((record.profile, record.experiment, record.seed)) if recorded is None else recorded / 100
    usual = PROFILES[RECORDED].captions.activation
    rows = [(name, None, "nt-hlstm1" if key == usual else f"nt-hlstm1-{key}") for name, key in
            (("ReLU", "relu"), ("leaky ReLU", "leaky_relu"), ("tanh", "tanh"))]
    table = _made("tab-activations", "Activations in the gates of the dense H-LSTM (beam 1)", rows,
                  [CIDER, PERPLEXITY, Column("zero units", "", share_of, density, seeds=True)], profile, root)
    table.corner = "activation"
    return table


def tab_neuraltalk_claims(root: str | Path | None = None, profile: str = RECORDED) -> Table:
    """The abstract's captioning claims beside the recorded runs on UCM-Captions, each against our own LSTM x3.

    A claim is met where the mean of the seeds reaches its figure. Of a model that is smaller or faster it also takes
    a mean CIDEr no lower than that of the LSTM x3 at the same beam, or any network would do.
    """
    runs = {name: records.find(profile, name, root) for name in (BASELINE, ACCURATE, COMPACT)}
    times, lines = speeds(root, profile), []
    for key, model, experiment, beam, of in (
            ("params_fewer", "compact", COMPACT, BEAM, lambda record: record.counts.cell.nonzero_params),
            ("flops_fewer", "compact", COMPACT, BEAM, lambda record: record.counts.cell.nonzero_flops),
            ("latency_lower", "fast", ACCURATE, 1, lambda record: times.get((profile, record.experiment, 1))),
            ("cider_gain", "accurate", ACCURATE, BEAM, None)):
        goal, ours, base = paper.goal(f"neuraltalk.{key}"), runs[experiment], runs[BASELINE]
        scores = [[s for run in group if (s := at_beam(beam)(run).scores.get("cider")) is not None]
                  for group in (ours, base)]
        gain = statistics.fmean(scores[0]) - statistics.fmean(scores[1]) if all(scores) else None
        value = _ratio(base, ours, of) if of else gain
        shown = MISSING if value is None else factor(value) if of else f"{value:+.1f} points"
        seeds = f"{len(ours)} against {len(base)}" if ours and base else MISSING
        lines.append((f"{goal.note}: {goal.text()}{'' if of else ' points'}", [
            f"{model}, beam {beam}", shown, MISSING if gain is None else f"{gain:+.1f}", seeds,
            verdict(value, goal.value, *scores)]))
    heads = [("", head) for head in ("our model", "recorded", "CIDEr against LSTM x3", "seeds", "verdict")]
    notes = [f"Recorded ({profile}) on UCM-Captions; the paper's figures are for MSCOCO. Both networks at one beam.",
             "A smaller or faster model meets a claim only if its CIDEr is no lower, in the mean of the seeds."]
    if plain := records.find(profile, PLAIN, root):     # if one layer does as well, three are no strong baseline
        found = {name: spread([at_beam(BEAM)(run).scores["cider"] for run in group])
                 for name, group in ((PLAIN, plain), ("accurate", runs[ACCURATE]), ("compact", runs[COMPACT]),
                                     ("LSTM x3", runs[BASELINE])) if group}
        size = short(plain[0].counts.cell.nonzero_params)
        notes.append(f"For comparison, CIDEr at beam {BEAM}: one dense layer of LSTM ({size} weights) "
                     + found.pop(PLAIN)
                     + "".join(f"; {name} {text}" for name, text in found.items()) + ".")
    return Table("tab-neuraltalk-claims", "The captioning claims of the abstract", "claim", heads, lines, notes,
                 frozenset({"our model", "verdict"}), missing="not recorded")


def _ratio(base: list[RunRecord], ours: list[RunRecord], of: Callable[[RunRecord], float | None]) -> float | None:
    """How many times less ours has in the mean; None where something is missing."""
    values = [[of(record) for record in group] for group in (base, ours)]
    if not all(values) or any(value is None for group in values for value in group):
        return None
    return statistics.fmean(values[0]) / statistics.fmean(values[1])
