"""The style of the notebooks: `check` says what is wrong, `fix` mends what a program can mend.

    python -m book.tools.lint check [NOTEBOOK ...]
    python -m book.tools.lint fix [NOTEBOOK ...]

A notebook in git holds no outputs and no traces of a machine, so that a change of a page is a change
of its text. Its cells are called `<name>-01`, `<name>-02`, ... in order, so that a message such as
"cell deepspeech2-07" means the same to everyone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import nbformat

from book.tools.graph import ROOT

LONGEST = 25  # lines of a code cell: more does not fit a slide
WIDEST = 88  # columns of code that readers see, imports aside: more goes on below on the page (see book.css)
HIDDEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
PARAMETERS = "parameters"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What a notebook may say about itself: its kernel, its language, and what the pipeline must prepare.
KEEP_METADATA = ("hlstm", "kernelspec", "language_info")
MACHINE_PATH = re.compile(
    r"""(?<![\w.~/-])/(?:home|root|tmp|work|Users|mnt|media|opt|var|private)/[\w.-]|\b[A-Za-z]:\\\\?\w""")
EXERCISE = re.compile(r"^\s*(?:`{3,}|:{3,})\{exercise(?:-start)?\}|^#+\s+Exercise\b", re.MULTILINE)
SOLUTION_START = re.compile(r"^\s*(?:`{3,}|:{3,})\{solution-start\}", re.MULTILINE)
SOLUTION_END = re.compile(r"^\s*(?:`{3,}|:{3,})\{solution-end\}", re.MULTILINE)
DROPDOWN = re.compile(r"^\s*:class:.*\bdropdown\b", re.MULTILINE)


def notebooks(root: Path = ROOT) -> list[Path]:
    """All notebooks of the book."""
    return sorted(p for p in (root / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def text(cell: dict) -> str:
    """The source of a cell as one string."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    """The tags of a cell."""
    return list(cell.get("metadata", {}).get("tags", ()))


def cell_id(path: Path, number: int) -> str:
    """The name of the `number`-th cell, counted from 1."""
    return f"{re.sub(r'[^a-z0-9]+', '-', path.stem.lower()).strip('-')}-{number:02d}"


def parameter_cells(notebook: dict) -> list[dict]:
    """The code cells tagged `parameters`: the chapter's settings, replaced by the pipeline."""
    return [c for c in notebook["cells"] if c["cell_type"] == "code" and PARAMETERS in tags(c)]


def unsolved(notebook: dict) -> list[str]:
    """The first lines of the exercises that no hidden code cell answers before the next exercise."""
    open_exercise, found, within = None, [], False
    for cell in notebook["cells"]:
        source = text(cell)
        if cell["cell_type"] == "code":
            if within or "hide-cell" in tags(cell):
                open_exercise = None
            continue
        if EXERCISE.search(source):
            if open_exercise:
                found.append(open_exercise)
            open_exercise = source.strip().splitlines()[0]
        if SOLUTION_START.search(source):
            within = bool(DROPDOWN.search(source))
        if SOLUTION_END.search(source):
            within = False
    return found + ([open_exercise] if open_exercise else [])


def problems(path: Path) -> list[str]:
    """What is wrong with a notebook, one line each; empty if it is in order."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        nbformat.validate(notebook)
    except (ValueError, nbformat.ValidationError) as error:
        return [f"not a valid notebook: {str(error).splitlines()[0]}"]
    found = []
    if (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5):
        found.append("the format is not nbformat 4.5 (make fix)")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernelspec is not python3 (make fix)")
    if extra := sorted(set(notebook["metadata"]) - set(KEEP_METADATA)):
        found.append(f"metadata that belongs to one machine: {', '.join(extra)} (make fix)")
    cells = notebook["cells"]
    if not cells or cells[0]["cell_type"] != "markdown" or not text(cells[0]).startswith("# "):
        found.append("the first cell is not the title ('# ...')")
    if (count := len(parameter_cells(notebook))) != 1:
        found.append(f"{count} code cells are tagged {PARAMETERS}; tag the one that sets `profile`")
    for number, cell in enumerate(cells, 1):
        where = f"cell {number}"
        if cell.get("id") != cell_id(path, number):
            found.append(f"{where}: its id is {cell.get('id')!r}, not {cell_id(path, number)!r} (make fix)")
        if set(cell["metadata"]) - {"tags"}:
            found.append(f"{where}: metadata besides tags (make fix)")
        if cell["cell_type"] == "code":
            if cell["outputs"] or cell["execution_count"] is not None:
                found.append(f"{where}: outputs are kept (make fix)")
            if (lines := len(text(cell).splitlines())) > LONGEST:
                found.append(f"{where}: {lines} lines of code, {LONGEST} at most; split it")
            if not HIDDEN & set(tags(cell)):
                found += [f"{where}, line {n}: {len(line)} columns of code, {WIDEST} at most where it is shown"
                          for n, line in enumerate(text(cell).splitlines(), 1)
                          if len(line) > WIDEST and not line.startswith(("from ", "import "))]
            if "raises-exception" in tags(cell):
                found.append(f"{where}: tagged raises-exception, which would hide a failure")
        if match := MACHINE_PATH.search(text(cell)):
            found.append(f"{where}: a path of one machine: {match.group()}...")
    found += [f"no hidden solution to: {exercise}" for exercise in unsolved(notebook)]
    return found


def fixed(path: Path) -> str:
    """The notebook as it should stand in git: no outputs, no counts, cells named in order."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    metadata = {k: v for k, v in notebook.get("metadata", {}).items() if k in KEEP_METADATA}
    metadata |= {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    cells = []
    for number, cell in enumerate(notebook["cells"], 1):
        kept = {"cell_type": cell["cell_type"], "id": cell_id(path, number),
                "metadata": {"tags": tags(cell)} if tags(cell) else {},
                "source": text(cell).rstrip().splitlines(keepends=True)}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        if "attachments" in cell:
            kept["attachments"] = cell["attachments"]
        cells.append(kept)
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def fix(path: Path) -> bool:
    """Write the notebook as it should stand; True if that changed it."""
    new = fixed(path)
    if new == path.read_text(encoding="utf-8"):
        return False
    part = path.with_name(path.name + ".part")
    part.write_text(new, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: in order; 1: something is wrong, printed one line each."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.lint", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("check", "fix"))
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of book/")
    given = parser.parse_args(arguments)
    found = 0
    for path in given.notebooks or notebooks():
        if not path.is_file():
            print(f"{path}: no such notebook; name a file under book/", file=sys.stderr)
            return 1
        if given.what == "fix" and fix(path):
            print(f"{path}: fixed")
        for problem in problems(path):
            found += 1
            print(f"{path}: {problem}", file=sys.stderr)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
