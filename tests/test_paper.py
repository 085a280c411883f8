"""The paper's figures: each has a source, derived ones follow from their formulas, none unverified judges."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hlstm_src import paper

FIGURES = paper.claims()
RAW = yaml.safe_load(Path(paper.__file__).with_name("paper.yml").read_text(encoding="utf-8"))
SOURCES = {"abstract", "derived", "unverified"}


def keys(source):
    return [key for key, figure in FIGURES.items() if figure.source == source]


def test_every_entry_carries_one_of_the_three_sources_and_the_reader_loses_none():
    for name, read in [
        ("figures", FIGURES),
        ("statements", paper.statements()),
        ("exhibits", paper.exhibits()),
    ]:
        assert set(RAW[name]) == set(read) and read
        for key, row in RAW[name].items():
            assert row["source"] in SOURCES, key
            assert read[key].source == row["source"], key
    for key, row in RAW["figures"].items():
        assert FIGURES[key].value == row["value"] and FIGURES[key].note, key


def test_only_what_stands_in_an_abstract_is_said_to_stand_in_the_journals():
    entries = [*FIGURES.values(), *paper.statements().values(), *paper.exhibits().values()]
    assert all(entry.source == "abstract" for entry in entries if entry.journal)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("neuraltalk.params_fewer", "38.7x"),
        ("neuraltalk.flops_fewer", "45.5x"),
        ("neuraltalk.latency_lower", "4.5x"),
        ("neuraltalk.cider_gain", "2.6"),
        ("deepspeech2.params_fewer", "19.4x"),
        ("deepspeech2.flops_fewer", "23.5x"),
        ("deepspeech2.latency_cut", "15.7 %"),
        ("deepspeech2.latency_cut_journal", "37.4 %"),
        ("deepspeech2.wer_baseline", "12.9 %"),
        ("deepspeech2.wer_gp", "8.7 %"),
        ("deepspeech2.wer_gru_x5", "11.60 %†"),
        ("deepspeech2.params_compact", "2.60 M"),
        ("deepspeech2.flops_lstm_x5", "100.8 M"),
        ("neuraltalk.images_train", "113,287†"),
        ("nmt.bleu_gp", "30.98"),
    ],
)
def test_a_figure_prints_its_digits_its_unit_and_its_doubt(key, text):
    assert str(paper.claim(key)) == text


def test_the_dagger_marks_the_unverified_and_nothing_else():
    for key, figure in FIGURES.items():
        assert str(figure).endswith("†") == (figure.source == "unverified"), key
    assert paper.FOOTNOTE.startswith("†") and "not checked against the paper's PDF" in paper.FOOTNOTE


@pytest.mark.parametrize("key", [key for key, figure in FIGURES.items() if figure.formula])
def test_a_figure_follows_from_its_formula_to_the_last_digit_written(key):
    figure = paper.claim(key)
    assert figure.text(paper.compute(key)) == figure.text()


def test_derived_figures_have_a_formula_and_abstract_ones_need_none():
    assert all(paper.claim(key).formula for key in keys("derived"))
    assert not any(paper.claim(key).formula for key in keys("abstract"))


def lstm(inputs, width, gates=4):
    return gates * width * (inputs + width)


def hlstm(inputs, width):
    """One hidden layer in each of four gates, as wide as the state."""
    return 4 * (width * (inputs + width) + width * width)


def test_the_sizes_of_the_recogniser_follow_from_its_shape():
    bins = 16_000 * 20 // 1000 // 2 + 1
    inputs = 32 * (((bins - 41) // 2 + 1 - 21) // 2 + 1)
    assert (
        (bins, inputs)
        == (161, 672)
        == (paper.compute("deepspeech2.bins"), paper.compute("deepspeech2.inputs"))
    )

    def stack(cell, layers):
        return sum(2 * cell(inputs if layer == 0 else 800, 800) for layer in range(layers))

    lstm_x5 = stack(lstm, 5)
    gates_3 = lambda inputs, width: lstm(inputs, width, gates=3)  # noqa: E731
    assert paper.compute("deepspeech2.params_lstm_x5") == lstm_x5 == 50_380_800
    assert paper.compute("deepspeech2.params_lstm_x4") == stack(lstm, 4)
    assert paper.compute("deepspeech2.params_gru_x5") == stack(gates_3, 5)
    assert paper.compute("deepspeech2.params_gru_x4") == stack(gates_3, 4)
    assert paper.compute("deepspeech2.params_hlstm_x3") == stack(hlstm, 3) == 45_260_800
    assert paper.compute("deepspeech2.params_compact") == pytest.approx(lstm_x5 / 19.4)
    assert paper.compute("deepspeech2.flops_lstm_x5") == 2 * lstm_x5
    assert paper.compute("deepspeech2.flops_compact") == pytest.approx(2 * lstm_x5 / 23.5)


def test_the_sizes_of_the_captioner_follow_from_its_shape():
    for layers in (1, 2, 3):
        assert paper.compute(f"neuraltalk.params_lstm_x{layers}") == layers * lstm(512, 512)
    assert paper.compute("neuraltalk.params_hlstm_x1") == hlstm(512, 512)
    assert paper.compute("neuraltalk.params_compact") == pytest.approx(3 * lstm(512, 512) / 38.7)
    assert paper.compute("neuraltalk.flops_compact") == pytest.approx(2 * 3 * lstm(512, 512) / 45.5)
    # What the note says of it: less than a product and a sum for each weight that is left.
    assert paper.compute("neuraltalk.flops_compact") < 2 * paper.compute("neuraltalk.params_compact")


@pytest.mark.parametrize("key", keys("unverified"))
def test_nothing_unverified_can_be_a_goal(key):
    with pytest.raises(ValueError, match=re.escape(key)):
        paper.goal(key)


def test_what_is_checked_can_be_a_goal():
    for key in keys("abstract") + keys("derived"):
        assert paper.goal(key) == paper.claim(key)


def test_no_code_judges_by_a_figure_that_is_not_a_goal():
    """Code that compares a result with the paper asks `goal`; whatever it names must be checked."""
    root = Path(paper.__file__).parent.parent
    files = [
        file for folder in ("hlstm_src", "book") for file in (root / folder).rglob("*") if file.is_file()
    ]
    text = "\n".join(
        file.read_text(encoding="utf-8") for file in files if file.suffix in {".py", ".ipynb", ".md"}
    )
    for key in re.findall(r"goal\(\\?[\"']([\w.]+)\\?[\"']\)", text):
        assert paper.claim(key).source != "unverified", key
    assert not re.search(r"claim\([^()]*\)\.value\s*[<>]|[<>]=?\s*paper\.claim\(", text)


def test_every_cell_of_the_papers_tables_is_a_figure_of_the_list():
    for benchmark, rows in RAW["models"].items():
        read = paper.models(benchmark)
        assert set(read) == set(rows)
        for key, row in rows.items():
            assert {name: figure.key for name, figure in read[key].figures.items()} == row["figures"]
            assert all(name.startswith(f"{benchmark}.") for name in row["figures"].values())
            assert str(row["layers"]) in row["name"] and row["cell"] in row["name"]


@pytest.mark.parametrize(
    ("ask", "near"),
    [
        (lambda: paper.claim("deepspeech2.wer_pg"), "deepspeech2.wer_gp"),
        (lambda: paper.goal("neuraltalk.param_fewer"), "neuraltalk.params_fewer"),
        (lambda: paper.model("deepspeech", "compact"), "deepspeech2"),
        (lambda: paper.model("deepspeech2", "acurate"), "accurate"),
        (lambda: paper.exhibit("tab-ds2-model"), "tab-ds2-models"),
        (lambda: paper.statement("growth"), "grow"),
    ],
)
def test_an_unknown_key_names_its_neighbours(ask, near):
    with pytest.raises(KeyError, match=re.escape(near)):
        ask()


def test_the_lists_given_out_are_copies():
    paper.claims().clear()
    paper.models("deepspeech2").clear()
    assert paper.claims() and paper.models("deepspeech2")


@pytest.mark.parametrize("formula", ["__import__('os')", "deepspeech2.width ** 2", "max(1, 2)", "'a'", "-1"])
def test_a_formula_is_arithmetic_and_nothing_else(formula, monkeypatch):
    figure = paper.claim("deepspeech2.bins").model_copy(update={"formula": formula})
    monkeypatch.setattr(paper, "claim", lambda key: figure)
    with pytest.raises(ValueError, match="no arithmetic"):
        paper.compute("deepspeech2.bins")


@given(value=st.integers(1000, 10**14))
def test_a_short_count_is_right_to_three_digits(value):
    number, prefix = paper.short(value).split(" ")
    shown = float(number) * 1000 ** " KMGT".index(prefix)
    assert abs(shown - value) <= 0.005001 * value
    assert len(number.replace(".", "")) == 3


@given(value=st.integers(0, 999))
def test_a_small_count_is_exact(value):
    assert paper.short(value) == str(value)


def test_a_short_number_is_rounded_before_its_unit_is_chosen():
    assert paper.short(999.4) == "999" and paper.short(999.6) == "1.00 K"
