"""Lay the executed chapters and the text pages side by side and build the HTML book from them.

    python -m book.tools.render --profile laptop

Reads `_build/executed/<profile>/` and builds in `_build/site/<profile>/`. Warnings are errors. The
folder is laid out afresh each time, because a second build on old ground repeats no warning about the
pages that it does not read again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from book.tools.graph import NOT_PAGES, PROFILES, ROOT, GraphError, pages, source

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
TOP = ("_config.yml", "_toc.yml", "references.bib")


def lay_out(profile: str, root: Path = ROOT) -> Path:
    """Fill the staging folder; returns it. Raises GraphError if a page or a chapter is missing."""
    stage = root / "_build" / "site" / profile
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for name in TOP:
        shutil.copyfile(root / name, stage / name)
    # Pictures and the like lie in folders beside the pages; the style belongs to the whole site.
    for folder in sorted(p for p in (root / "book").iterdir() if p.is_dir()):
        if folder.name == "_static":
            shutil.copytree(folder, stage / "_static")
        elif folder.name not in NOT_PAGES:
            shutil.copytree(folder, stage / "book" / folder.name)
    for page in pages(root):
        path = source(page, root)
        target = stage / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(held(path.read_text(encoding="utf-8")), encoding="utf-8")
            continue
        executed = root / "_build" / "executed" / profile / path.relative_to(root)
        if not executed.is_file():
            raise GraphError(f"{executed.relative_to(root)}: not there; run: make book PROFILE={profile}")
        nbformat.write(dressed(nbformat.read(executed, as_version=4)), target)
    return stage


def held(prose: str) -> str:
    """Prose in which a percent sign stays with its number: no line begins with one."""
    return re.sub(r"(?<=\d) %", "\u00a0%", prose)


def dressed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The page shows the profile that was run: the default stays in the source, out of sight. Its prose is `held`."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = held(cell.source)
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "text/markdown" in data:
                data["text/markdown"] = held(data["text/markdown"])
        labels = cell.metadata.setdefault("tags", [])
        if "parameters" in labels:
            labels.append("remove-cell")
        if "injected-parameters" in labels:
            cell.source = cell.source.removeprefix("# Parameters\n")
    notebook.metadata.pop("papermill", None)
    return notebook


def build(stage: Path) -> int:
    """Run jupyter-book; returns its exit code. What it says goes to build.log."""
    # The command by way of this Python, so that a moved environment does not matter.
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()",
               "build", ".", "-W", "--keep-going"]
    with open(stage / "build.log", "wb") as log:
        done = subprocess.run(command, cwd=stage, stdout=log, stderr=subprocess.STDOUT, check=False)
    return done.returncode


def complaints(log: Path) -> str:
    """The warnings and errors of a build, or the end of its log if there are none."""
    lines = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    found = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    return "\n".join(found or lines[-30:])


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: built without a warning."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.render", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    profile = parser.parse_args(arguments).profile
    try:
        stage = lay_out(profile)
    except GraphError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"book ({profile}): building", flush=True)
    code = build(stage)
    if code or not (stage / "_build" / "html" / "index.html").is_file():
        log = stage / "build.log"
        print(complaints(log))
        print(f"error: jupyter-book ended with exit code {code}, and its warnings are errors; "
              f"all it said is in {log.relative_to(ROOT)}", file=sys.stderr)
        return code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
