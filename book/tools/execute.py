"""Run one chapter through papermill.

    python -m book.tools.execute book/deepspeech2.ipynb OUT.ipynb --profile laptop

The executed copy appears at OUT only when every cell has run. After a failing cell it is left beside
it as OUT.failed.ipynb, one block says which cell failed and why, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from book.tools.graph import PROFILES, ROOT
from book.tools.lint import parameter_cells

KERNEL = "python3"
ARROW = re.compile(r"^-+>\s*(\d+)\s+(.*?)\s*$", re.MULTILINE)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Refused(Exception):
    """The chapter cannot be run as it stands; the one-line message names the file and the remedy."""


def check(path: Path) -> nbformat.NotebookNode:
    """Read a chapter and refuse it before anything runs if papermill could not run it rightly."""
    if not path.is_file():
        raise Refused(f"{path}: no such notebook; _toc.yml lists the chapters")
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises whatever the parser under it raised
        raise Refused(f"{path}: not a notebook ({str(error).splitlines()[0]}); restore it from git") from None
    if (name := notebook.metadata.get("kernelspec", {}).get("name")) != KERNEL:
        raise Refused(f"{path}: its kernelspec is {name or 'missing'}, not {KERNEL}; run: make fix")
    if (count := len(parameter_cells(notebook))) != 1:
        raise Refused(f"{path}: {count} code cells are tagged 'parameters'; "
                      "tag the one cell that sets `profile`")
    try:
        KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        raise Refused(f"{path}: this environment has no kernel {KERNEL}; "
                      "run: pip install ipykernel") from None
    return notebook


def execute(path: Path, out: Path, profile: str, root: Path = ROOT) -> bool:
    """Run the chapter in its own folder; True if every cell ran."""
    source = check(path)
    failed = out.with_name(out.stem + ".failed.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in (out, failed):
        old.unlink(missing_ok=True)
    # A page reads the same wherever it is run: with this checkout's code, whatever else is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # a progress bar in plain text will do
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        _run(path, failed, profile)
    except PapermillExecutionError as error:
        say(explain(error, source, path, failed))
        return False
    except DeadKernelError:
        raise Refused(f"{path}: its kernel died, perhaps for want of memory; {failed} shows how far it came, "
                      "and JOBS=1 needs less") from None
    os.replace(failed, out)
    return True


def _run(path: Path, out: Path, profile: str, tries: int = 3) -> None:
    """papermill. Two kernels that start at once may choose the same port, and one of them dies; it starts again."""
    for left in reversed(range(tries)):
        try:
            papermill.execute_notebook(
                str(path), str(out), parameters={"profile": profile}, kernel_name=KERNEL, language="python",
                cwd=str(path.parent), progress_bar=sys.stderr.isatty(), log_output=False, start_timeout=120,
                # Between the kernel and us: encrypted where the kernel can, so that it has nothing to warn of.
                config=Config({"KernelManager": {"transport_encryption": "auto"}}))
            return
        except RuntimeError as error:
            if "Kernel died before replying" not in str(error) or not left:
                raise


def say(text: str) -> None:
    """Print in one piece: other chapters may be printing too."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def explain(error: PapermillExecutionError, source: nbformat.NotebookNode, path: Path, left: Path) -> str:
    """The one block that says which cell of which chapter failed, why, and where to look."""
    number, name = 0, "?"
    executed = nbformat.read(left, as_version=4)
    culprit = next((c for c in executed.cells if c.cell_type == "code"
                    and any(o.output_type == "error" for o in c.outputs)), None)
    for position, cell in enumerate(source.cells, 1):
        if culprit is not None and cell.get("id") == culprit.get("id"):
            number, name = position, cell.id
    # The first arrow of the traceback points into the cell; later ones into what it called.
    arrow = ARROW.search(ESCAPE.sub("", "\n".join(error.traceback)))
    rows = [("chapter", path), ("cell", f"{number} (id {name})"),
            ("line", arrow and f"{arrow[1]}: {arrow[2]}"),
            ("error", f"{error.ename}: {error.evalue}"), ("look at", left)]
    body = "\n".join(f"  {key:<8} {value}" for key, value in rows if value)
    bar = "=" * 100
    return f"\n{bar}\nA cell failed; the book was not built.\n{body}\n{bar}\n"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: executed; 1: a cell failed; 2: refused."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.execute", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    say(f"chapter {given.notebook} ({given.profile}): running")
    try:
        done = execute(given.notebook, given.out, given.profile)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"chapter {given.notebook} ({given.profile}): stopped")
        return 130
    if done:
        seconds = time.monotonic() - started
        say(f"chapter {given.notebook} ({given.profile}): done in {seconds:.0f} s")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
