"""What the pipeline has to know about the book: its pages, and what each chapter is made from.

The Snakefile asks this file; nothing here trains, executes or imports torch. Dependencies are read
from the source: a chapter depends on the modules it imports, and on those they import in turn, so
that a change in `figures.py` re-runs the chapters with figures and no training.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hlstm_src", "data_prep")
PROFILES = ("smoke", "laptop", "desk", "wide", "paper")
KEPT = ("desk", "wide", "paper")  # their records are history: never made anew by the pipeline
NOT_PAGES = ("tools", "__pycache__", ".ipynb_checkpoints")  # folders of book/ that are no part of the site
# Where the corpus of each kind lies, by profile; a test holds this to hlstm_src/profiles.py.
CORPORA = {
    "speech": {"smoke": "data_prep/mini/speech", "laptop": "data_prep/mini/speech",
               "desk": "data/an4", "wide": "data/an4", "paper": "data/an4"},
    "captions": {"smoke": "data_prep/mini/scenes", "laptop": "data_prep/mini/scenes",
                 "desk": "data/ucm", "wide": "data/ucm", "paper": "data/coco"},
    "flowers": {"smoke": "data_prep/mini/scenes", "laptop": "data_prep/mini/scenes",
                "desk": "data/flowers", "wide": "data/flowers", "paper": "data/coco"},
}
# The kind of corpus that an experiment is trained on, by the first part of its name; None where there are no files.
TRAINED_ON = {"ds2": "speech", "nt": "captions", "toy": None}
# The seeds that a profile runs an experiment with, by the first part of its name where it is not one.
SEEDS = {"nt": {"desk": (0, 1, 2)},
         "toy": {"smoke": (0,), "laptop": (0, 1, 2, 3, 4), "desk": (0, 1, 2, 3, 4), "wide": (0, 1, 2, 3, 4),
                 "paper": (0, 1, 2, 3, 4)}}


class GraphError(Exception):
    """The book does not hang together; the one-line message names the file and the remedy."""


@dataclass(frozen=True)
class Chapter:
    """A notebook of the book: its page name ("book/deepspeech2"), and what it says it needs."""

    page: str
    runs: tuple[str, ...]
    corpora: tuple[str, ...]
    code: tuple[str, ...]
    files: tuple[str, ...] = ()  # other recorded results that it reads (patterns), those that are there


def pages(root: Path = ROOT) -> list[str]:
    """The pages of `_toc.yml` in their order, as "book/name", without a suffix."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    found = [toc["root"]]

    def walk(entries: Iterable[dict]) -> None:
        for entry in entries:
            if "file" in entry:
                found.append(entry["file"])
            for below in ("chapters", "sections"):
                walk(entry.get(below, ()))

    walk([{"chapters": part.get("chapters", ())} for part in toc.get("parts", ())])
    walk(toc.get("chapters", ()))
    return found


def source(page: str, root: Path = ROOT) -> Path:
    """The file of a page: a notebook or a text page."""
    for suffix in (".ipynb", ".md"):
        if (path := root / (page + suffix)).is_file():
            return path
    raise GraphError(f"_toc.yml: there is no {page}.ipynb or {page}.md; write it, or take it off the list")


def read_notebook(path: Path) -> dict:
    """A notebook as plain JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GraphError(f"{path}: not a notebook ({error}); restore it from git") from None


def code_cells(notebook: dict) -> list[str]:
    """The code of a notebook, a string a cell, IPython's own lines (`%`, `!`) made comments."""
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return ["\n".join("pass  # " + line if line.lstrip()[:1] in ("%", "!") else line
                      for line in cell.splitlines()) for cell in cells]


def chapters(root: Path = ROOT) -> list[Chapter]:
    """The notebooks of the book, in order."""
    found = []
    for page in pages(root):
        path = source(page, root)
        if path.suffix != ".ipynb":
            continue
        notebook = read_notebook(path)
        needs = notebook["metadata"].get("hlstm", {})
        for kind in needs.get("corpora", ()):
            if kind not in CORPORA:
                raise GraphError(f"{page}.ipynb: metadata hlstm.corpora names {kind!r}; "
                                 f"known: {', '.join(CORPORA)}")
        for run in needs.get("runs", ()):
            corpus_of(run, PROFILES[0])
        try:
            trees = [ast.parse(cell) for cell in code_cells(notebook)]
        except SyntaxError as error:
            raise GraphError(f"{page}.ipynb: a code cell is no Python ({error.msg}: "
                             f"{(error.text or '').strip()!r}); correct the cell") from None
        code = closure((file for tree in trees for file in imports(tree, None, root)), root)
        files = tuple(path.relative_to(root).as_posix() for name in needs.get("files", ())
                      for path in sorted(root.glob(name)))
        found.append(Chapter(page, tuple(needs.get("runs", ())), tuple(needs.get("corpora", ())), code, files))
    return found


def kind_of(experiment: str) -> str:
    """The first part of an experiment's name, checked."""
    kind = experiment.split("-")[0]
    if kind not in TRAINED_ON:
        raise GraphError(f"no corpus is known for the experiment {experiment!r}; "
                         "add the first part of its name to TRAINED_ON in book/tools/graph.py")
    return kind


def corpus_of(experiment: str, profile: str) -> str | None:
    """The folder of the corpus that an experiment is trained on; None where its sequences are drawn from a seed."""
    corpus = TRAINED_ON[kind_of(experiment)]
    corpus = "flowers" if experiment.endswith("-flowers") else corpus
    return CORPORA[corpus][profile] if corpus else None


def seeds(experiment: str, profile: str) -> tuple[int, ...]:
    """The seeds that a profile runs an experiment with."""
    return SEEDS.get(kind_of(experiment), {}).get(profile, (0,))


def record_of(experiment: str, profile: str, seed: int | str) -> str:
    """The record's path, relative to the root (as `hlstm_src.records.path_of` has it)."""
    folder = "results" if profile in KEPT else "results/local"
    return f"{folder}/{profile}/{experiment}/seed{seed}.json"


def kept_records(experiment: str, root: Path = ROOT) -> list[str]:
    """The recorded results of an experiment that are there, of all seeds."""
    return sorted(path.relative_to(root).as_posix() for profile in KEPT
                  for path in (root / "results" / profile / experiment).glob("seed*.json"))


def beside_pages(root: Path = ROOT) -> list[str]:
    """Pictures, styles and the like: the files in folders of book/ that hold no program."""
    folders = (p for p in (root / "book").iterdir() if p.is_dir() and p.name not in NOT_PAGES)
    return sorted(path.relative_to(root).as_posix() for folder in folders
                  for path in folder.rglob("*") if path.is_file())


def training_code(root: Path = ROOT) -> tuple[str, ...]:
    """The files that a training run is made from: `experiments.py` and all that it imports."""
    return closure([root / "hlstm_src" / "experiments.py"], root)


# --- imports, read and not executed ---------------------------------------------------------------

def _module(dotted: str, root: Path) -> Path | None:
    """The file of a module of ours, or None."""
    if dotted.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*dotted.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imports(tree: ast.AST, file: Path | None, root: Path = ROOT) -> set[Path]:
    """The files of ours that a piece of code imports; `file` is where it stands (for `from .x`)."""
    found: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(path for alias in node.names if (path := _module(alias.name, root)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and file is not None:
                home = file.relative_to(root).parent.parts
                base = ".".join([*home[: len(home) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                found.update(_imported(base, alias.name, root))
    return found


def _imported(base: str, name: str, root: Path) -> set[Path]:
    """The files behind `from base import name`."""
    if submodule := _module(f"{base}.{name}", root):
        return {submodule}
    package = _module(base, root)
    if package is None:
        return set()
    if package.name == "__init__.py" and name != "*":
        # A name that the package passes on: the file it comes from, not all that stands beside it.
        for node in ast.walk(_tree(package)):
            if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
                return imports(ast.Module([node], []), package, root)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":      # imported when used
                if home := ast.literal_eval(node.value).get(name):
                    return {package} | _imported(f"{base}.{home}", name, root)
    return {package}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def closure(files: Iterable[Path], root: Path = ROOT) -> tuple[str, ...]:
    """The files, and those they import in turn, and the .yml beside each; paths relative to `root`."""
    seen: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.suffix == ".py":
            waiting.extend(imports(_tree(path), path, root))
            if (data := path.with_suffix(".yml")).is_file():
                waiting.append(data)
    return tuple(sorted(path.relative_to(root).as_posix() for path in seen))
