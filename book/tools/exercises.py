"""The exercises of the book, read from the notebooks, so that no list of them falls behind the chapters.

    python -m book.tools.exercises                              # list them
    python -m book.tools.exercises book/lstm.ipynb OUT.ipynb    # a copy to hand out, without the solutions
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from book.tools.graph import ROOT, GraphError, pages, read_notebook, source
from book.tools.lint import DROPDOWN, SOLUTION_END, SOLUTION_START, text
from hlstm_src.errors import told
from hlstm_src.files import possible, replacing

START = re.compile(r"^\s*(?P<fence>`{3,}|:{3,})\{exercise(?:-start)?\}(?P<title>[^\n]*)\n(?P<body>.*)",
                   re.MULTILINE | re.DOTALL)
LABEL = re.compile(r"^:label:\s*(\S+)\s*$", re.MULTILINE)
LEADING = re.compile(r"\A[\s`:]*\*([^*]+?)\.?\*\s")      # a title in front of the text: *Count.* Write ...
SOLVES = re.compile(r"\{solution-start\}\s*(\S+)")


@dataclass(frozen=True)
class Exercise:
    """An exercise: the page it stands on, its label and title, and the cells of code that solve it, hidden."""

    page: str
    label: str
    title: str
    solution: tuple[str, ...]


def of_page(page: str, root: Path = ROOT) -> list[Exercise]:
    """The exercises of one page, in their order. Raises GraphError for one that has no label or no title."""
    path = source(page, root)
    cells = read_notebook(path)["cells"] if path.suffix == ".ipynb" else []
    found, answers, solving = [], {}, None
    for cell in cells:
        body = text(cell)
        if cell["cell_type"] == "code":
            answers.setdefault(solving, []).append(body)
            continue
        if start := START.search(body):
            label, rest = LABEL.search(start["body"]), LABEL.sub("", start["body"], count=1)
            title = start["title"].strip() or ((leading := LEADING.match(rest)) and leading[1])
            if not (label and title):
                raise GraphError(f"{path.name}: an exercise has no label or no title: {rest.strip(' `:')[:40]!r}")
            found.append((label[1], title))
        if SOLUTION_START.search(body) and DROPDOWN.search(body):
            solving = SOLVES.search(body)[1]
        if SOLUTION_END.search(body):
            solving = None
    return [Exercise(page, label, title, tuple(answers.get(label, ()))) for label, title in found]


def every(root: Path = ROOT) -> list[Exercise]:
    """All exercises of the book, in the order of its pages."""
    return [exercise for page in pages(root) for exercise in of_page(page, root)]


def without_solutions(notebook: dict) -> dict:
    """A copy of a notebook in which each solution is an empty cell of code."""
    kept, solving = [], False
    for cell in notebook["cells"]:
        starts = cell["cell_type"] == "markdown" and bool(SOLUTION_START.search(text(cell)))
        if starts:
            kept.append({"cell_type": "code", "id": f"{cell['id']}-yours", "metadata": {}, "source": [],
                         "outputs": [], "execution_count": None})
        solving = solving or starts
        if not solving:
            kept.append(cell)
        if cell["cell_type"] == "markdown" and SOLUTION_END.search(text(cell)):
            solving = False
    return notebook | {"cells": kept}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a notebook that is not there or not in order."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.exercises", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path, nargs="?", help="a chapter; without one, all exercises are listed")
    parser.add_argument("out", type=Path, nargs="?", help="where to write it without its solutions")
    given = parser.parse_args(arguments)
    try:
        if given.notebook is None:
            print("\n".join(f"{each.page}: {each.title} ({each.label})" for each in every()))
        elif given.out is None:
            parser.error("say where to write the copy, too")
        elif not given.notebook.is_file():
            raise GraphError(f"{given.notebook}: no such notebook")
        elif given.out.exists() and given.out.samefile(given.notebook):
            raise GraphError(f"{given.out}: the chapter itself, which would lose its solutions; name another file")
        else:
            copy = without_solutions(read_notebook(given.notebook))
            with replacing(possible(given.out)) as part:
                part.write_text(json.dumps(copy, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"wrote {given.out}")
    except (GraphError, OSError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
