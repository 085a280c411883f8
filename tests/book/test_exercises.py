"""The list of exercises is what the notebooks say, and a copy to hand out gives nothing away."""

import json

import nbformat
import pytest

from book.tools import exercises, graph, lint

ALL = exercises.every()
TITLED = "```{exercise-start} Half a memory\n:label: ex-half\n```\nHow long?\n```{exercise-end}\n```"
LEADING = "````{exercise}\n:label: ex-lead\n\n*What is lost?* Show it.\n````"
SOLUTION = "```{{solution-start}} {}\n:class: dropdown\n```"
END = "That is why.\n```{solution-end}\n```"


def markdown(source):
    return {"cell_type": "markdown", "id": f"m{abs(hash(source))}", "metadata": {}, "source": source}


def code(source):
    return {"cell_type": "code", "id": f"c{abs(hash(source))}", "metadata": {}, "source": source, "outputs": [],
            "execution_count": None}


@pytest.fixture
def book(tmp_path):
    """A book of one chapter with these cells."""
    def book(*cells):
        (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: book/one\n")
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "book" / "index.md").write_text("# Index\n")
        whole = {"cells": [markdown("# One"), *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "book" / "one.ipynb").write_text(json.dumps(whole))
        return tmp_path
    return book


CELLS = (markdown(TITLED), markdown(SOLUTION.format("ex-half")), code("half = 1"), code("assert half"), markdown(END),
         code("after = 2"), markdown(LEADING), markdown(SOLUTION.format("ex-lead")), code("lost = 0"), markdown(END))


def test_both_ways_to_write_an_exercise_are_read(book):
    first, second = exercises.every(book(*CELLS))
    assert (first.label, first.title, first.solution) == ("ex-half", "Half a memory", ("half = 1", "assert half"))
    assert (second.label, second.title, second.solution) == ("ex-lead", "What is lost?", ("lost = 0",))
    assert first.page == "book/one"


@pytest.mark.parametrize("wrong", [TITLED.replace(":label: ex-half\n", ""), LEADING.replace("*What is lost?* ", "")])
def test_an_exercise_without_label_or_title_is_an_error(book, wrong):
    with pytest.raises(graph.GraphError, match="one.ipynb: an exercise has no label or no title"):
        exercises.every(book(markdown(wrong)))


def test_no_exercise_of_the_book_is_overlooked():
    marks = sum(len(lint.EXERCISE.findall(lint.text(cell))) for path in lint.notebooks()
                for cell in graph.read_notebook(path)["cells"] if cell["cell_type"] == "markdown")
    assert len(ALL) == marks > 40
    assert len({exercise.label for exercise in ALL}) == len(ALL)
    assert all(exercise.solution for exercise in ALL)


def test_the_teachers_page_waits_for_what_it_counts():
    """Its table says how long their runs took: it is made after these, and again when a notebook changes."""
    needs = {chapter.page: chapter for chapter in graph.chapters()}
    counted = {run for exercise in ALL for run in needs[exercise.page].runs}
    assert counted and set(needs["book/teaching"].runs) == counted
    assert {exercise.page + ".ipynb" for exercise in ALL} <= set(needs["book/teaching"].files)


def test_a_copy_to_hand_out_holds_the_exercises_and_no_solution(book, tmp_path):
    path, out = book(*CELLS) / "book" / "one.ipynb", tmp_path / "out.ipynb"
    assert exercises.main([str(path), str(out)]) == 0
    copy = graph.read_notebook(out)
    nbformat.validate(copy)
    shown = [lint.text(cell) for cell in copy["cells"]]
    assert shown == ["# One", TITLED, "", "after = 2", LEADING, ""]
    assert graph.read_notebook(path)["cells"][3]["source"] == "half = 1"


def test_the_program_lists_and_complains(tmp_path, capsys):
    assert exercises.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ALL)
    assert exercises.main([str(tmp_path / "none.ipynb"), str(tmp_path / "out.ipynb")]) == 2
    assert "no such notebook" in capsys.readouterr().err


def test_a_chapter_is_not_written_over_itself_and_a_bad_place_is_one_message(book, tmp_path, capsys):
    chapter = book(*CELLS) / "book" / "one.ipynb"
    before = chapter.read_bytes()
    for out, words in ((chapter, "would lose its solutions"), (tmp_path, "error: "), (chapter / "x.ipynb", "error: ")):
        assert exercises.main([str(chapter), str(out)]) == 2 and words in capsys.readouterr().err
    assert chapter.read_bytes() == before
    assert exercises.main([str(chapter), str(tmp_path / "new" / "out.ipynb")]) == 0
    assert "wrote" in capsys.readouterr().out
