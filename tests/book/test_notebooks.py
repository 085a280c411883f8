"""Every notebook of the book is in order, and the program that says so finds what is not."""

import json
from contextlib import nullcontext

import pytest

from book.tools import execute, graph, lint

NOTEBOOKS = lint.notebooks()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_is_in_order(path):
    assert lint.problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_fixing_it_again_changes_nothing(path):
    assert lint.fixed(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_its_profile_is_laptop_unless_told(path):
    (cell,) = lint.parameter_cells(graph.read_notebook(path))
    names = {}
    exec(lint.text(cell), names)
    assert names["profile"] == "laptop"


def test_every_notebook_is_a_page():
    pages = {graph.source(page) for page in graph.pages()}
    assert set(NOTEBOOKS) <= pages


# --- the program itself, on notebooks made wrong ---------------------------------------------------

def markdown(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, *tags):
    return {"cell_type": "code", "metadata": {"tags": list(tags)} if tags else {}, "source": source,
            "outputs": [], "execution_count": None}


EXERCISE = "```{exercise}\n:label: ex-one\nHow many?\n```"
SOLUTION = "````{solution-start} ex-one\n:class: dropdown\n````"
SHOWN = "````{solution-start} ex-one\n````"
END = "````{solution-end}\n````"


@pytest.fixture
def write(tmp_path):
    """Writes a notebook of the given cells behind a title and a parameters cell, and fixes it."""
    def write(*cells, change=None):
        path = tmp_path / "Some_Chapter.ipynb"
        whole = {"cells": [markdown("# Title"), code('profile = "laptop"', "parameters"), *cells],
                 "metadata": {"hlstm": {"runs": ["ds2-lstm5"]}, "papermill": {"version": "2"}},
                 "nbformat": 4, "nbformat_minor": 4}
        path.write_text(json.dumps(whole))
        lint.fix(path)
        if change:
            whole = json.loads(path.read_text())
            change(whole)
            path.write_text(json.dumps(whole))
        return path
    return write


def test_fix_strips_names_and_keeps_what_the_pipeline_needs(write):
    path = write(code("1 + 1\n\n"), change=lambda n: n["cells"][2].update(
        outputs=[{"output_type": "stream", "name": "stdout", "text": "2"}], execution_count=7, id="elsewhere"))
    assert len(lint.problems(path)) == 2
    assert lint.fix(path) and not lint.fix(path)
    assert lint.problems(path) == []
    notebook = json.loads(path.read_text())
    assert [cell["id"] for cell in notebook["cells"]] == ["some-chapter-01", "some-chapter-02", "some-chapter-03"]
    assert notebook["metadata"]["hlstm"] == {"runs": ["ds2-lstm5"]} and "papermill" not in notebook["metadata"]
    assert "".join(notebook["cells"][2]["source"]) == "1 + 1"


@pytest.mark.parametrize("change, message", [
    (lambda n: n["cells"][1]["metadata"].clear(), "0 code cells are tagged parameters"),
    (lambda n: n["cells"][2]["metadata"].update(tags=["parameters"]), "2 code cells are tagged parameters"),
    (lambda n: n["metadata"]["kernelspec"].update(name="julia"), "kernelspec"),
    (lambda n: n["metadata"].update(widgets={}), "one machine: widgets"),
    (lambda n: n.update(nbformat_minor=2), "not a valid notebook"),
    (lambda n: n["cells"][0].update(source="Title"), "not the title"),
    (lambda n: n["cells"][2].update(source="x = 1\n" * 26), "26 lines of code"),
    (lambda n: n["cells"][2].update(source="y = 2\nx = '" + "a" * 83 + "'"), "line 2: 89 columns of code, 88 at most"),
    (lambda n: n["cells"][2].update(source="open('/home/me/data.csv')"), "a path of one machine: /home/m"),
    (lambda n: n["cells"][2].update(source=r"open('C:\data\x.csv')"), "a path of one machine"),
    (lambda n: n["cells"][2]["metadata"].update(collapsed=True), "metadata besides tags"),
    (lambda n: n["cells"][2]["metadata"].update(tags=["raises-exception"]), "would hide a failure"),
])
def test_check_finds(write, capsys, change, message):
    path = write(code("x = 1"), change=change)
    assert message in "\n".join(lint.problems(path))
    assert lint.main(["check", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("source, tags", [("from a import " + "b" * 99, []), ("x = '" + "a" * 82 + "'", []),
                                          ("x = '" + "a" * 99 + "'", ["hide-input"])])
def test_code_is_as_wide_as_the_page_where_it_is_shown(write, source, tags):
    assert lint.problems(write(code(source), change=lambda n: n["cells"][2]["metadata"].update(tags=tags))) == []


@pytest.mark.parametrize("source", ["x = a/tmp/b", "see https://example.org/home/x", "./tmp/x", "N: width"])
def test_what_only_looks_like_a_path_of_one_machine_passes(write, source):
    assert lint.problems(write(markdown(source))) == []


@pytest.mark.parametrize("cells, unsolved", [
    ([markdown(EXERCISE)], 1),
    ([markdown(EXERCISE), code("answer = 42")], 1),
    ([markdown(EXERCISE), markdown(SHOWN), code("answer = 42"), markdown(END)], 1),
    ([markdown(EXERCISE), markdown(SOLUTION), markdown("42"), markdown(END)], 1),
    ([markdown("### Exercise 1"), markdown("### Exercise 2"), code("answer = 42", "hide-cell")], 1),
    ([markdown(EXERCISE), code("answer = 42", "hide-cell")], 0),
    ([markdown(EXERCISE), markdown(SOLUTION), code("answer = 42"), markdown(END)], 0),
    ([markdown("Exercise is healthy.")], 0),
])
def test_an_exercise_needs_a_hidden_solution_that_runs(write, cells, unsolved):
    assert len(lint.unsolved(graph.read_notebook(write(*cells)))) == unsolved


def test_a_notebook_that_is_not_there_is_an_error(tmp_path, capsys):
    assert lint.main(["check", str(tmp_path / "none.ipynb")]) == 1
    assert "no such notebook" in capsys.readouterr().err


@pytest.mark.parametrize("deaths, message, calls", [
    (2, "Kernel died before replying to kernel_info", 3), (3, "Kernel died before replying to kernel_info", 3),
    (1, "Kernel died", 1)])
def test_a_kernel_that_dies_at_its_start_is_started_again(monkeypatch, tmp_path, deaths, message, calls):
    seen = []

    def run(*args, **options):
        seen.append(args)
        if len(seen) <= deaths:
            raise RuntimeError(message)
    monkeypatch.setattr(execute.papermill, "execute_notebook", run)
    with nullcontext() if deaths < calls else pytest.raises(RuntimeError, match=message):
        execute._run(tmp_path / "in.ipynb", tmp_path / "out.ipynb", "smoke")
    assert len(seen) == calls
