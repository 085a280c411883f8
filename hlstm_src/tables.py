"""Tables made from records: how they look, how numbers are shown, and what all chapters show of runs.

A `Table` shows itself in a notebook (`_repr_html_`), gives a pandas Styler (`styler`) and prints as
text (`markdown`). `stamp` and `player` give what stands beside tables. Nothing here trains, and no cell
holds a number that neither a record nor `paper.yml` holds.
"""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import records
from .paper import short
from .records import RunRecord

if TYPE_CHECKING:
    import numpy as np
    from pandas.io.formats.style import Styler

SCORES = {"wer": "WER %", "cer": "CER %", "error": "error %", "cider": "CIDEr"}        # what they are called in a table
MISSING = "–"
RECORDED = "desk"
STICKY = "position: sticky; left: 0; display: inline-block; max-width: 85vw"  # captions and sections stay in sight


@dataclass(frozen=True)
class Html:
    """A piece of a page that also has a plain form: `str()` of it."""

    text: str
    html: str = field(repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


@dataclass
class Table:
    """A finished table: every cell is text.

    `columns` are (group, heading) pairs, the group empty where there are none; `rows` are pairs of a
    row's name and its cells, and a name whose cells are all empty heads the rows below it; `notes` stand
    under the table, and with them what a dash means, `missing`, where a cell is one; `experiments` are
    those whose runs it shows.
    """

    name: str
    caption: str
    corner: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]
    notes: list[str] = field(default_factory=list)
    words: frozenset[str] = frozenset()  # headings of columns that hold words, set flush left
    experiments: tuple[str, ...] = ()
    missing: str = ""

    def __post_init__(self) -> None:
        if self.missing and any(MISSING in cells for _, cells in self.rows):
            self.notes = [*self.notes, f"{MISSING} {self.missing}"]

    @property
    def styler(self) -> Styler:
        """The table as a pandas Styler, without its notes."""
        import pandas as pd  # slow to import, and text does not need it

        heads = [head for _, head in self.columns]
        if self._grouped:
            heads = pd.MultiIndex.from_tuples(self.columns)
        names = [name for name, _ in self.rows]
        longest = min(8, max(map(len, [*names, *self.corner.split()]), default=0))     # letters
        frame = pd.DataFrame([cells for _, cells in self.rows], index=names, columns=heads, dtype=object)
        styles = [
            {"selector": "", "props": "border-collapse: collapse"},
            {"selector": "caption", "props": "caption-side: top; text-align: left; color: inherit"},
            {"selector": "caption span, th[scope=rowgroup] span", "props": STICKY},
            {"selector": "th", "props": "text-align: left; vertical-align: bottom"},
            {"selector": "th.row_heading", "props": f"min-width: min({longest}em, 35vw); vertical-align: top"},
            {"selector": "th, td", "props": "padding: 0.2em 0.5em"},
            {"selector": "td", "props": "text-align: right; white-space: nowrap; vertical-align: top"},
            {"selector": "th.col_heading", "props": "text-align: right"},
            {"selector": "th.corner", "props": "text-align: left"},
            {"selector": "th[scope=colgroup]", "props": "text-align: center"},
        ]
        for place, (group, head) in enumerate(self.columns):
            cells = f"th.col{place}, td.col{place}"
            if head in self.words:
                styles.append({"selector": cells, "props": "text-align: left; white-space: normal; min-width: 7em"})
            if place and group != self.columns[place - 1][0]:
                styles.append({"selector": cells, "props": "border-left: 1px solid"})
        styled = frame.style.format(_broken).set_caption(f"<span>{html.escape(self.caption)}</span>")
        for axis in ("index", "columns"):
            styled = styled.format_index(escape="html", axis=axis)
        return styled.set_table_styles(styles).set_uuid(re.sub(r"[^\w-]", "-", self.name))

    @property
    def _grouped(self) -> bool:
        return any(group for group, _ in self.columns)

    def _repr_html_(self) -> str:
        """The table in a box that scrolls by itself where the screen is narrow, notes below."""
        body = self.styler.to_html()
        # pandas leaves out what a screen reader goes by: the reach of each heading, the rows' own, and that an
        # empty one heads nothing.
        body = re.sub(r'<th (id="\S+" class="col_heading[^>]*colspan)', r'<th scope="colgroup" \1', body)
        body = re.sub(r'<th (id="\S+" class="(col|row)_heading)', r'<th scope="\2" \1', body)
        corner = f'<th scope="col" class="col_heading corner">{html.escape(self.corner)}</th>'
        body = re.sub(rf'<th class="blank level{int(self._grouped)}" >&nbsp;</th>', lambda _: corner, body)
        body = body.replace('<th class="blank level0" >&nbsp;</th>', "<td></td>")
        body = re.sub(r'<th scope="\w+" (id="\S+" class="col_heading[^>]*)></th>', r"<td \1></td>", body)
        # A row of empty cells heads those below it, up to the next such row.
        section = rf'<tr><th scope="rowgroup" colspan="{1 + len(self.columns)}"\1><span>\2</span></th></tr>'
        body = re.sub(r'<tr>\s*<th scope="row"([^>]*)>([^<]*)</th>(?:\s*<td [^>]*></td>)+\s*</tr>',
                      f"</tbody>\n<tbody>\n{section}", body)
        body = re.sub(r"<tbody>\s*</tbody>\n", "", body)
        # An indented row is so in all of its lines; a number and its percent sign are apart, but not on two lines.
        body = re.sub(r'(<th scope="row"[^>]*)>\u2003', r'\1 style="padding-left: 1.6em">', body)
        body = re.sub(r"(?<=\d) %", "\u00a0%", body)
        body = re.sub(r"<t[dh][^<]*", lambda cell: re.sub(r"(?<=\d)%", "\u00a0%", cell[0]), body)
        label = html.escape(self.caption, quote=True)
        box = f'<div style="overflow-x: auto" role="region" tabindex="0" aria-label="{label}">\n{body}</div>'
        notes = "<br>\n".join(html.escape(note, quote=False) for note in self.notes)
        return f"{box}\n" + (f"<p><small>{notes}</small></p>\n" if notes else "")

    def markdown(self) -> str:
        """The table as text: one pipe table a column group, so that it fits a terminal."""
        parts = []
        for group in dict.fromkeys(group for group, _ in self.columns):
            places = [place for place, column in enumerate(self.columns) if column[0] == group]
            heads = [self.columns[place][1] for place in places]
            lines = [[self.corner, *heads]]
            lines += [[name, *(cells[place] for place in places)] for name, cells in self.rows]
            parts.append(f"{self.caption}: {group}" if group else self.caption)
            parts.append(_pipes(lines, {0, *(k for k, head in enumerate(heads, 1) if head in self.words)}))
        return "\n\n".join([*parts, *self.notes])


def _broken(cell: str) -> str:
    """A cell as HTML, the range of the seeds, or of chance, on a line of its own, so that wide tables fit a page."""
    return re.sub(r" (\([^()]+-[^()]+\), n=\d+|\([+-]?[\d.]+ to [+-]?[\d.]+\))", r" <br><small>\1</small>",
                  html.escape(cell))


def _pipes(lines: list[list[str]], left: set[int]) -> str:
    """Rows of cells, the heading first, as an aligned Markdown table."""
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if k in left else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    sides = [str.ljust if k in left else str.rjust for k in range(len(widths))]
    laid = [[side(*pair) for side, *pair in zip(sides, line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [laid[0], rule, *laid[1:]])


def percent(value: float) -> str:
    """A number that is already in percent, to a tenth."""
    return f"{value:.1f}"


def factor(value: float) -> str:
    """A compression factor: 12.9x."""
    return f"{value:.1f}x"


def density(share: float) -> str:
    """A density between 0 and 1, in percent."""
    return percent(100 * share) + " %"


def spread(values: Iterable[float], show: Callable[[float], str] = percent, *, seeds: bool = True) -> str:
    """Mean and range of several seeds: "15.1 (14.8-15.6), n=3".

    A single seed: "15.1, n=1". `seeds=False` is for what does not depend on the seed: the number stands
    alone where all runs agree. No value at all is an en dash.
    """
    values = list(values)
    if not values:
        return MISSING
    mean, low, high = show(statistics.fmean(values)), show(min(values)), show(max(values))
    if not seeds and low == high:
        return mean
    if len(values) == 1:
        return f"{mean}, n=1"
    return f"{mean} ({low}-{high}), n={len(values)}"


def tab_rivals(profile: str, rows: Mapping[str, str], root: str | Path | None = None) -> Table:
    """Rivals on one benchmark: epochs, weights, live weights, density and test error, mean and range over the seeds.

    `rows` maps the name of each row to its experiment. Weights are those of the recurrent matrices.
    """
    lines = []
    for name, experiment in rows.items():
        runs = records.find(profile, experiment, root)
        cells = [run.counts.cell for run in runs]
        lines.append((name, [
            spread([len(run.history) for run in runs], short, seeds=False),
            spread([cell.params for cell in cells], short, seeds=False),
            spread([cell.nonzero_params for cell in cells], short, seeds=False),
            spread([cell.nonzero_params / cell.params for cell in cells], density, seeds=False),
            spread([run.scores["error"] for run in runs if "error" in run.scores], lambda value: f"{value:.2f}"),
        ]))
    heads = [("", head) for head in ("epochs", "weights", "live weights", "density", "test error %")]
    notes = ["Test error: mean (lowest-highest), n seeds."]
    if lacking := [rows[name] for name, cells in lines if MISSING in cells]:
        notes.append(f"{MISSING} no record yet in the profile {profile}: {', '.join(lacking)}")
    return Table("tab-rivals", f"Rivals at equal epochs and equal density ({profile})", "method", heads, lines, notes)


def tab_runs(profile: str, experiments: Iterable[str] | None = None, root: str | Path | None = None) -> Table:
    """The runs that a page shows, the recorded ones and this profile's: when, where, how long, which code."""
    wanted = None if experiments is None else set(experiments)
    lines = []
    for shown in dict.fromkeys((RECORDED, profile)):
        for run in records.find(shown, root=root):
            if wanted is None or run.experiment in wanted:
                made = run.provenance
                cells = [run.profile, str(run.seed), made.ended[:10], machine(run), precision(run),
                         f"{made.seconds / 60:.1f}", commit(run)]
                lines.append((run.experiment, cells))
    heads = ["profile", "seed", "date", "machine", "products", "minutes", "commit"]
    notes = [] if lines else [f"No record yet in {' and '.join(dict.fromkeys((RECORDED, profile)))}."]
    words, columns = frozenset({"profile", "date", "machine", "products", "commit"}), [("", head) for head in heads]
    return Table(f"tab-runs-{profile}", "Runs behind this page", "experiment", columns, lines, notes, words)


def tab_phases(record: RunRecord) -> Table:
    """Growth and pruning, event by event: density, live weights, validation scores, kept or not."""
    scores = list(dict.fromkeys(name for row in record.phases for name in row.scores))
    lines = []
    for number, row in enumerate(record.phases, 1):
        measured = [f"{row.scores[name]:.2f}" if name in row.scores else MISSING for name in scores]
        cells = [row.phase, str(row.epoch + 1), density(row.density), short(row.nonzero), *measured]
        lines.append((str(number), [*cells, "yes" if row.kept else "no", row.note]))
    heads = ["phase", "epoch", "density", "live weights", *(f"validation {SCORES.get(name, name)}" for name in scores)]
    columns = [("", head) for head in [*heads, "kept", "note"]]
    caption = f"Growing and pruning in {record.experiment}, {record.profile}, seed {record.seed}"
    name = f"tab-phases-{record.experiment}-{record.profile}-{record.seed}"
    words = frozenset({"phase", "kept", "note"})
    return Table(name, caption, "event", columns, lines, words=words, missing="not measured")


def _cpu(name: str, cores: int) -> str:
    return f"{name}, {cores} core{'s' * (cores != 1)}"


def machine(record: RunRecord) -> str:
    """GPU or CPU of a run."""
    return record.provenance.gpu or _cpu(record.provenance.cpu, record.provenance.cores)


def precision(record: RunRecord) -> str:
    """Of the matrix products in training: what the recipe asks for, not every processor has."""
    return record.provenance.precision or "not noted"


def commit(record: RunRecord) -> str:
    """Short commit of a run; a tree with changes that were not committed says so."""
    made = record.provenance
    if not re.fullmatch(r"[0-9a-f]{40,64}", made.commit):
        return made.commit
    return made.commit[:10] + (" with local changes" if made.dirty else "")


def stamp(profile: str, record: RunRecord | None = None) -> Html:
    """Which profile, machine and date made a page, or a record where one is given."""
    if record is None:
        where, when = _cpu(*records.machine()), records.now()[:10]
    else:
        profile, where, when = record.profile, machine(record), record.provenance.ended[:10]
    what = "This page was made" if record is None else f"{record.experiment}, seed {record.seed}, was run"
    text = f"{what} with the profile {profile} on {where}, on {when} (UTC)."
    return Html(text, f'<p class="stamp"><small>{html.escape(text)}</small></p>')


def player(sound: np.ndarray, rate: int, label: str, *, normalize: bool = True) -> Html:
    """What plays a sound (N), under a name that a screen reader tells; `normalize` as of IPython's Audio."""
    from IPython.display import Audio  # comes with notebooks, and nothing else here needs it

    name = f"Recording: {label}"
    tag = f'<audio aria-label="{html.escape(name)}" '
    return Html(name, Audio(sound, rate=rate, normalize=normalize)._repr_html_().replace("<audio ", tag, 1))


def report(profile: str, root: str | Path | None = None) -> str:
    """The recognisers' and captioners' tables of a profile as text, for the command line."""
    from . import caption_tables as captions  # made from this file, as is the other
    from . import speech_tables as speech

    tables = [tab(profile, root) for tab in (speech.tab_ds2_models, speech.tab_ds2_cells, speech.tab_ds2_training)]
    tables += [speech.tab_ds2_wide(root), speech.tab_ds2_tuning(root), speech.tab_ds2_claims(root),
               captions.tab_neuraltalk_claims(root)]
    for suffix in captions.CORPORA:
        for tab in (captions.tab_neuraltalk_cells, captions.tab_neuraltalk_training, captions.tab_neuraltalk_models):
            tables.append(tab(profile, root, suffix))
    tables += [captions.tab_neuraltalk_rivals(profile, root), captions.tab_neuraltalk_tuned(profile, root),
               tab_runs(profile, root=root)]
    return "\n\n".join(table.markdown() for table in tables) + "\n"
