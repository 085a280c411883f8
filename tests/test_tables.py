"""Tables: every cell is a figure of a record or of the paper, and what is missing looks missing."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlstm_src import paper, records, speech_tables, tables
from tests.recorded import cell, make

MODELS = ["ds2-lstm5", "ds2-hlstm3", "ds2-hlstm3-gp", "ds2-hlstm3-compact", "ds2-hlstm3-fast"]


class Page(HTMLParser):
    """The rows of the tables of a page, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


COMPACT = "H-LSTM, grown, pruned in rounds: compact"
DESK, LAPTOP = "recorded (desk)", "this run (laptop)"


def test_cells_are_the_figures_of_the_records(store):
    root = store(
        make("ds2-lstm5", "desk", live=4_000_000),
        make("ds2-hlstm3-compact", "desk", live=310_000, scores={"wer": 14.84, "cer": 6.66}),
        make("ds2-lstm5", "laptop", live=80_000, scores={"wer": 50.0, "cer": 20.0}),
        make("ds2-hlstm3-compact", "laptop", live=16_000, scores={"wer": 40.0, "cer": 10.0}),
    )
    table = speech_tables.tab_ds2_models("laptop", root)
    heads = ["recurrent weights", "compression", "FLOPs a frame", "WER %", "CER %"]

    def row(group, name):
        return [cell(table, name, group, head) for head in heads]

    assert row(DESK, "LSTM, the baseline") == ["4.00 M", "1.0x", "8.00 M", "15.1, n=1", "6.8, n=1"]
    assert row(DESK, COMPACT) == ["310 K", "12.9x", "620 K", "14.8, n=1", "6.7, n=1"]
    # Each profile is compressed against its own LSTM.
    assert row(LAPTOP, COMPACT) == ["16.0 K", "5.0x", "32.0 K", "40.0, n=1", "10.0, n=1"]


def test_a_table_names_the_experiments_behind_it(store):
    table = speech_tables.tab_ds2_cells("laptop", store())
    assert table.experiments == ("ds2-gru4", "ds2-gru5", "ds2-lstm4", "ds2-lstm5", "ds2-hlstm3")


def test_the_papers_cells_are_those_of_the_papers_list(store):
    table = speech_tables.tab_ds2_models("laptop", store())
    rows = {"LSTM, the baseline": "baseline", "H-LSTM, dense": "hlstm_x3", COMPACT: "compact"}
    rows["H-LSTM, grown, pruned in rounds: accurate"] = "accurate"
    heads = {"recurrent weights": "params", "compression": "compression", "FLOPs a frame": "flops", "WER %": "wer"}
    own, = {name for name, _ in table.rows} - set(rows)
    assert own.endswith("fast") and cell(table, own, "paper", "recurrent weights") == tables.MISSING
    for row, key in rows.items():
        figures = paper.model("deepspeech2", key).figures
        for head, name in heads.items():
            shown = cell(table, row, "paper", head)
            if name in figures:
                assert shown == str(figures[name]).replace(" %", "")
                assert shown.endswith("†") == (figures[name].source == "unverified")
            else:
                assert shown == tables.MISSING
    assert ("paper", "CER %") not in table.columns  # the paper gives none
    assert paper.FOOTNOTE in table.notes
    assert paper.FOOTNOTE in table.markdown() and "not checked against the paper's PDF" in table._repr_html_()


def test_rivals_are_shown_with_the_spread_of_their_seeds(store):
    row = {"phase": "dense", "loss": 1.0, "lr": 0.1, "seconds": 1.0}
    history = [row | {"epoch": k} for k in range(24)]
    made = [make("toy-gp", "laptop", seed, live=1_000_000, history=history, scores={"error": error})
            for seed, error in enumerate([1.25, 2.5, 3.0])]
    table = tables.tab_rivals("laptop", {"grow and prune": "toy-gp", "one shot": "toy-one-shot"}, store(*made))
    assert table.rows == [("grow and prune", ["24", "10.0 M", "1.00 M", "10.0 %", "2.25 (1.25-3.00), n=3"]),
                          ("one shot", [tables.MISSING] * 5)]
    assert table.notes[-1].endswith("no record yet in the profile laptop: toy-one-shot")


def test_several_seeds_give_a_mean_and_a_range(store):
    wers = {0: 14.8, 1: 15.6, 2: 14.9}
    runs = [make("ds2-lstm5", "desk", seed, scores={"wer": wer, "cer": 6.0}) for seed, wer in wers.items()]
    table = speech_tables.tab_ds2_models("laptop", store(*runs))
    assert cell(table, "LSTM, the baseline", DESK, "WER %") == "15.1 (14.8-15.6), n=3"
    assert cell(table, "LSTM, the baseline", DESK, "recurrent weights") == "1.00 K"


def test_a_missing_record_is_shown_as_missing_and_never_as_nought(store):
    for root in (store(), store(make("ds2-hlstm3-compact", "desk", live=310_000))):
        table = speech_tables.tab_ds2_models("laptop", root)
        ours = [place for place, (group, _) in enumerate(table.columns) if group == LAPTOP]
        assert {cells[place] for _, cells in table.rows for place in ours} == {"–"}
        assert any("no record yet" in note and "ds2-lstm5" in note and "laptop" in note for note in table.notes)
    # Without the LSTM there is nothing to compare with; the rest of the row still stands.
    assert cell(table, COMPACT, DESK, "compression") == "–"
    assert cell(table, COMPACT, DESK, "recurrent weights") == "310 K"
    assert any("compact, 3.1 %." in note and "accurate" not in note for note in table.notes)
    assert not any("no record yet" in note and "ds2-hlstm3-compact" in note and "desk" in note for note in table.notes)


def test_a_score_that_a_record_lacks_is_missing(store):
    table = speech_tables.tab_ds2_models("desk", store(make("ds2-lstm5", "desk", scores={"wer": 0.0})))
    group = "recorded (desk), this run"
    assert cell(table, "LSTM, the baseline", group, "WER %") == "0.0, n=1"
    assert cell(table, "LSTM, the baseline", group, "CER %") == "–"


def test_the_recorded_profile_is_not_shown_twice(store):
    groups = {group for group, _ in speech_tables.tab_ds2_models("desk", store()).columns}
    assert groups == {"paper", "recorded (desk), this run"}


def test_with_nothing_missing_no_note_says_so(store):
    root = store(*(make(name, profile) for name in MODELS for profile in ("desk", "laptop")))
    assert not any("no record yet" in note for note in speech_tables.tab_ds2_models("laptop", root).notes)


@given(values=st.lists(st.floats(0, 100), max_size=6))
def test_a_spread_holds_mean_and_range_and_says_how_many(values):
    text = tables.spread(values)
    if not values:
        assert text == tables.MISSING
    elif len(values) == 1:
        assert text == f"{values[0]:.1f}, n=1"
    else:
        mean, low, high, n = re.fullmatch(r"([\d.]+) \(([\d.]+)-([\d.]+)\), n=(\d+)", text).groups()
        assert int(n) == len(values)
        assert (low, high) == (f"{min(values):.1f}", f"{max(values):.1f}")
        assert float(low) <= float(mean) <= float(high)


def test_numbers_are_written_as_the_field_writes_them():
    assert [tables.short(n) for n in (50_380_800, 2_596_948, 162_570, 999)] == ["50.4 M", "2.60 M", "163 K", "999"]
    assert tables.factor(12.94) == "12.9x" and tables.density(0.0666) == "6.7 %"
    assert tables.spread([5, 5], tables.short, seeds=False) == "5"
    assert tables.spread([5, 7], tables.short, seeds=False) == "6 (5-7), n=2"


def test_the_page_shows_the_same_cells_as_the_table_and_the_text(store):
    sizes = 40_000, 50_000, 25_000, 3_000, 9_000
    root = store(*(make(name, "desk", live=n) for name, n in zip(MODELS, sizes, strict=True)))
    table = speech_tables.tab_ds2_models("laptop", root)
    page = Page(table._repr_html_())
    assert page.rows[0] == ["", "paper", DESK, LAPTOP]
    assert page.rows[1] == ["model", *(heading for _, heading in table.columns)]
    assert page.rows[2:] == [[name, *cells] for name, cells in table.rows]
    text = table.markdown()
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    for name, cells in table.rows:
        assert sum((line[1:] for line in lines if line[0] == name), []) == cells


def test_tables_are_accessible_and_scroll_by_themselves(store):
    root = store(make("ds2-lstm5", "laptop"))
    for table in (speech_tables.tab_ds2_models("laptop", root), tables.tab_runs("laptop", root=root)):
        page = Page(table._repr_html_())
        assert any(tag == "caption" for tag, _ in page.tags)
        assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
        (box,) = [attributes for tag, attributes in page.tags if tag == "div"]
        assert "overflow-x: auto" in box["style"] and box["tabindex"] == "0"
        assert box["aria-label"] == table.caption
        assert set(re.findall(r"color:\s*(\w+)", table._repr_html_())) == {"inherit"}      # legible on light and dark
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))


def test_a_row_without_cells_heads_the_rows_below_it():
    rows = [("Speech", ["", ""]), ("a", ["1", ""]), ("Captions", ["", ""]), ("b", ["2", "3"])]
    made = tables.Table("tab-a", "A table", "claim", [("", "x"), ("", "y")], rows)._repr_html_()
    heads = [(attributes["scope"], attributes.get("colspan")) for tag, attributes in Page(made).tags if tag == "th"]
    assert heads == [*[("col", None)] * 3, *[("rowgroup", "3"), ("row", None)] * 2]
    assert Page(made).rows[1:] == [["Speech"], ["a", "1", ""], ["Captions"], ["b", "2", "3"]]
    assert [len(re.findall("<tr", body)) for body in re.findall(r"<tbody>(.*?)</tbody>", made, re.DOTALL)] == [2, 2]


def test_columns_without_a_group_have_no_empty_heading():
    columns = [("", "a"), ("", "b"), ("c", "d"), ("c", "e"), ("", "f")]
    page = Page(tables.Table("tab-a", "A table", "g", columns, [("h", list("12345"))])._repr_html_())
    top = [(tag, attributes.get("scope"), attributes.get("colspan")) for tag, attributes in page.tags if "level0" in
           attributes.get("class", "") and "col_heading" in attributes["class"]]
    assert top == [("td", None, "2"), ("th", "colgroup", "2"), ("td", None, None)]


def test_a_dash_is_explained_where_there_is_one():
    def notes(cell):
        return tables.Table("tab-a", "A table", "b", [("", "c")], [("d", [cell])], ["A note."], missing="not run").notes
    assert notes("1") == ["A note."] and notes(tables.MISSING) == ["A note.", f"{tables.MISSING} not run"]


def test_tables_of_one_page_have_names_of_their_own():
    phases = [{"phase": "grow", "epoch": 2, "density": 0.75, "nonzero": 750, "kept": True}]
    made = [tables.tab_phases(make("ds2-hlstm3-compact", profile, phases=phases)) for profile in ("desk", "laptop")]
    made += [tables.tab_runs(profile, []) for profile in ("wide", "laptop")]
    assert len({table.name for table in made}) == 4


def test_a_player_tells_what_it_plays():
    pytest.importorskip("IPython")
    player = tables.player(np.linspace(-1, 1, 160), 16_000, 'NO "YES"')
    (audio,) = [attributes for tag, attributes in Page(player._repr_html_()).tags if tag == "audio"]
    assert audio["aria-label"] == str(player) == 'Recording: NO "YES"' and "controls" in audio
    assert "base64" not in repr(player)                        # which a notebook keeps beside the page's form


def test_numbers_stand_flush_right_and_words_flush_left(store):
    table = tables.tab_runs("laptop", root=store(make("ds2-lstm5", "laptop")))
    styles = re.findall(r"#T_tab-runs-laptop (td[^{,]*) \{\s*([^}]*)\}", table.styler.to_html().replace(",\n", "\n"))
    text = table.styler.to_html()
    assert any(selector == "td" and "text-align: right" in rule for selector, rule in styles)
    for place, (_, heading) in enumerate(table.columns):
        flush_left = re.search(rf"td\.col{place} \{{\s*text-align: left", text) is not None
        assert flush_left == (heading not in ("seed", "minutes")), heading


def test_the_same_records_give_the_same_page(store):
    root = store(make("ds2-lstm5", "desk"))
    assert len({speech_tables.tab_ds2_models("laptop", root)._repr_html_() for _ in range(2)}) == 1


def test_what_a_record_says_cannot_break_the_page():
    bad = "</td><script>alert(1)</script> a | b"
    phase = {"phase": "prune", "epoch": 3, "density": 0.25, "nonzero": 10, "kept": False, "note": bad}
    table = tables.tab_phases(make("ds2-hlstm3-compact", "desk", phases=[phase]))
    page = Page(table._repr_html_())
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.rows[-1][-1] == bad
    assert len(set(line.replace(r"\|", "").count("|") for line in table.markdown().splitlines()[2:])) == 1


def test_runs_name_profile_date_machine_precision_time_and_commit(store):
    dirty = make("b", "laptop", 3)
    dirty.provenance.precision, dirty.recipe = "fp32", {"settings": {"precision": "bf16"}}
    dirty.provenance.dirty, dirty.provenance.gpu = True, "A GPU"
    other = make("c", "smoke")
    gitless = make("d", "laptop")
    gitless.recipe = {"settings": {"precision": "bf16"}}
    gitless.provenance.commit = "unknown"
    root = store(make("a", "desk"), dirty, other, gitless)
    rows = tables.tab_runs("laptop", root=root).rows
    assert rows == [
        ("a", ["desk", "0", "2026-02-01", "A CPU, 2 cores", "not noted", "1.5", "abcdef0123"]),
        ("b", ["laptop", "3", "2026-02-01", "A GPU", "fp32", "1.5", "abcdef0123 with local changes"]),
        ("d", ["laptop", "0", "2026-02-01", "A CPU, 2 cores", "not noted", "1.5", "unknown"]),
    ]
    assert [name for name, _ in tables.tab_runs("laptop", ["b"], root).rows] == ["b"]
    assert [name for name, _ in tables.tab_runs("desk", root=root).rows] == ["a"]


def test_no_run_at_all_still_makes_a_page(store):
    table = tables.tab_runs("laptop", root=store())
    assert table.rows == [] and "No record yet" in table.notes[0]
    assert "No record yet" in table._repr_html_() and "No record yet" in table.markdown()


def test_phases_show_each_event_of_the_record_counting_epochs_from_one():
    phases = [
        {"phase": "grow", "epoch": 2, "density": 0.75, "nonzero": 750, "scores": {"wer": 30.0}, "kept": True},
        {"phase": "prune", "epoch": 5, "density": 0.1, "nonzero": 100, "kept": False, "note": "below the floor"},
    ]
    assert [cells for _, cells in tables.tab_phases(make("ds2-hlstm3-compact", "desk", phases=phases)).rows] == [
        ["grow", "3", "75.0 %", "750", "30.00", "yes", ""],
        ["prune", "6", "10.0 %", "100", "–", "no", "below the floor"],
    ]


def test_the_stamp_names_profile_machine_and_date():
    record = make("ds2-lstm5", "desk", 2)
    text = str(tables.stamp("laptop", record))
    assert all(part in text for part in ("ds2-lstm5", "seed 2", "desk", "A CPU, 2 cores", "2026-02-01"))
    assert "laptop" not in text
    page = tables.stamp("smoke")
    assert "smoke" in str(page) and records.machine()[0] in str(page) and re.search(r"\d{4}-\d\d-\d\d", str(page))
    assert str(page) in page._repr_html_()


def test_the_report_holds_every_table_and_needs_no_record(store):
    assert "no record yet" in tables.report("smoke", store())
    text = tables.report("laptop", store(make("ds2-lstm5", "laptop", live=4_000_000)))
    assert "4.00 M" in text and "15.1, n=1" in text and "abcdef0123" in text and text.endswith("\n")


def test_a_number_and_its_percent_sign_stand_apart_on_one_line():
    table = tables.Table("tab-x", "Shares", "kind", [("", "share")],
                  [("95 %", ["4.7%"]), ("b", ["5 % (1% to 9.5%)"]), ("c%", ["WER % 3"])])
    text = table._repr_html_()
    for shown in (">95\u00a0%<", ">4.7\u00a0%<", ">5\u00a0% (1\u00a0% to 9.5\u00a0%)<", ">c%<", ">WER % 3<"):
        assert shown in text


@pytest.mark.parametrize("corner, name, width", [
    ("event", "1", 5), ("k", "1", 1), ("g", "abc", 3), ("recognisers", "1", 8)])
def test_the_column_of_names_is_as_wide_as_its_heading_and_names_ask_for(corner, name, width):
    text = tables.Table("tab-x", "A table", corner, [("", "a")], [(name, ["2"])])._repr_html_()
    assert f"min-width: min({width}em, 35vw)" in text
