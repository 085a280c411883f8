"""The pipeline, on a small book of its own: what runs, what does not run again, and how it fails."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest

import hlstm_src
from book.tools import build, graph, render

JOB = re.compile(r"^(?:local)?rule (\w+):.*?^ +output: (\S+)", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.xdist_group("pipeline")

STUB = {
    "hlstm_src/__init__.py": "from .figures import draw\nfrom .lstm import WIDTH\n",
    "hlstm_src/lstm.py": "WIDTH = 1\n",
    "hlstm_src/figures.py": "def draw():\n    return 'drawn'\n",
    "hlstm_src/unrelated.py": "x = 1\n",
    "hlstm_src/paper.py": "claims = 1\n",
    "hlstm_src/paper.yml": "wer: 8.7\n",
    # Trains when there is no record or the key says so, and keeps a diary.
    "hlstm_src/experiments.py": """
from fnmatch import fnmatch
from pathlib import Path
from . import lstm, paper
def run(name, profile, seed=0):
    folder = "results" if profile in ("desk", "wide", "paper") else "results/local"
    path = Path(__file__).parents[1] / folder / profile / name / f"seed{seed}.json"
    key = f"width {lstm.WIDTH}"
    if path.exists() and (key in path.read_text() or profile in ("desk", "wide", "paper")):
        return key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(key)
    with open(Path(__file__).parents[1] / "diary.txt", "a") as diary:
        diary.write(f"trained {name} {profile}\\n")
    return key
""",
    "hlstm_src/__main__.py": """
import sys
from . import experiments
_, run, name, _, profile, _, seed = sys.argv
experiments.run(name, profile, int(seed))
""",
    "data_prep/mini/speech/manifest.csv": "id\n",
    "data/an4/manifest.csv": "id\n",
    "_toc.yml": "format: jb-book\nroot: book/index\nparts:\n- caption: P\n  chapters:\n"
                "  - file: book/trains\n  - file: book/draws\n",
    "references.bib": "",
    "book/index.md": "# Index\n\nA small book.\n",
    "book/_static/style.css": "p { color: black; }\n",
}


def notebook(title, *cells, parameters='profile = "laptop"', kernel="python3", **needs):
    """A chapter as JSON; every cell but the first two is given."""
    def code(number, source, tags=()):
        return {"cell_type": "code", "id": f"{title}-{number:02d}", "metadata": {"tags": list(tags)},
                "source": source, "outputs": [], "execution_count": None}
    first = {"cell_type": "markdown", "id": f"{title}-01", "metadata": {}, "source": f"# {title}"}
    second = [code(2, parameters, ["parameters"])] if parameters else []
    return json.dumps({"cells": [first, *second, *(code(3 + n, cell) for n, cell in enumerate(cells))],
                       "metadata": {"hlstm": needs, "kernelspec": {"name": kernel, "display_name": "Python 3"}},
                       "nbformat": 4, "nbformat_minor": 5})


class Book:
    """A small project that runs the real Makefile, Snakefile and tools on stub modules."""

    def __init__(self, folder, root):
        self.folder = folder
        for name, text in STUB.items():
            self.write(name, text)
        for name in ("Snakefile", "Makefile", "_config.yml"):
            shutil.copy(root / name, folder / name)
        shutil.copytree(root / "book" / "tools", folder / "book" / "tools",
                        ignore=shutil.ignore_patterns("__pycache__"))
        self.write("book/trains.ipynb", notebook(
            "trains", "from hlstm_src import experiments", "print(experiments.run('ds2-lstm5', profile), profile)",
            runs=["ds2-lstm5"], corpora=["speech"]))
        self.write("book/draws.ipynb", notebook("draws", "from hlstm_src import draw\nprint(draw())"))

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def call(self, *command):
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        environment.pop("HLSTM_REAL_DATA", None)
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900)

    def make(self, profile="smoke"):
        return self.call("make", "book", f"PROFILE={profile}", f"PY={sys.executable}")

    def ask(self, profile, *options):
        """What Snakemake says with these options."""
        done = self.call(sys.executable, "-m", "book.tools.build", "--profile", profile, "--", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def plan(self, profile="smoke"):
        """What a build would do now: the jobs as "rule output", without the book's own."""
        jobs = JOB.findall(self.ask(profile, "--dry-run"))
        return {f"{rule} {os.path.basename(output)}" for rule, output in jobs} - {"book index.html"}

    def text_of(self, page, profile="smoke"):
        return (self.folder / "_build" / "site" / profile / "_build" / "html" / f"{page}.html").read_text()

    def diary(self):
        path = self.folder / "diary.txt"
        return path.read_text().splitlines() if path.exists() else []


TRAINS, DRAWS, RUN = "chapter trains.ipynb", "chapter draws.ipynb", "run seed0.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory, root):
    """The small book, built once, in a folder whose name has spaces."""
    book = Book(tmp_path_factory.mktemp("built in a folder"), root)
    done = book.make()
    assert done.returncode == 0, done.stdout + done.stderr
    return book


@pytest.fixture
def edit(built):
    """Appends to a file of the small book, and takes it back after the test, times included."""
    before = {}

    def edit(name, text="\n# changed\n"):
        path = built.folder / name
        before[path] = path.read_bytes(), path.stat()
        path.write_text(path.read_text() + text)
    yield edit
    for path, (content, stat) in before.items():
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_book_is_built_from_executed_chapters(built):
    assert built.diary() == ["trained ds2-lstm5 smoke"]
    assert "width 1 smoke" in built.text_of("book/trains") and "drawn" in built.text_of("book/draws")
    assert "A small book." in built.text_of("book/index") and "style.css" in built.text_of("book/index")
    assert (built.folder / "_build" / "html" / "index.html").samefile(
        built.folder / "_build" / "site" / "smoke" / "_build" / "html" / "index.html")


def test_the_page_shows_the_profile_that_was_run(built):
    text = re.sub(r"<[^>]*>", "", built.text_of("book/draws"))
    assert 'profile = "smoke"' in text.replace("&quot;", '"') and "laptop" not in text


def test_no_line_of_prose_begins_with_a_percent_sign():
    said = nbformat.v4.new_output("display_data", {"text/markdown": "7.5 % live"})
    printed = nbformat.v4.new_output("stream", text="7.5 % live")
    prose, code = nbformat.v4.new_markdown_cell("9 % and a % sign"), nbformat.v4.new_code_cell("9 % 2")
    code.outputs = [said, printed]
    made = render.dressed(nbformat.v4.new_notebook(cells=[prose, code]))
    assert [cell.source for cell in made.cells] == ["9\u00a0% and a % sign", "9 % 2"]
    assert said.data["text/markdown"] == "7.5\u00a0% live" and printed.text == "7.5 % live"


def test_with_nothing_changed_nothing_runs(built):
    done = built.make()
    assert done.returncode == 0 and "running" not in done.stdout and "building" not in done.stdout


def test_files_that_were_only_touched_run_nothing(built):
    for path in built.folder.glob("hlstm_src/*"):
        if path.is_file():
            path.touch()
    (built.folder / "book" / "trains.ipynb").touch()
    (built.folder / "data_prep/mini/speech/manifest.csv").touch()
    assert built.plan() == set()


@pytest.mark.parametrize("name, jobs", [
    ("hlstm_src/figures.py", {DRAWS}),
    ("hlstm_src/unrelated.py", set()),
    ("hlstm_src/lstm.py", {RUN, TRAINS}),
    ("hlstm_src/paper.yml", {RUN, TRAINS}),
    ("data_prep/mini/speech/manifest.csv", {RUN, TRAINS}),
    ("book/draws.ipynb", {DRAWS}),
])
def test_an_edit_runs_what_depends_on_it_and_nothing_else(built, edit, name, jobs):
    edit(name, "\n" if name.endswith((".ipynb", ".yml", ".csv")) else "\n# changed\n")
    assert built.plan() == jobs


def test_a_run_that_is_up_to_date_by_its_key_is_not_trained_again(built, edit):
    record = built.folder / "results/local/smoke/ds2-lstm5/seed0.json"
    edit("hlstm_src/experiments.py")
    built.ask("smoke", str(record.relative_to(built.folder)))
    assert record.read_text() == "width 1" and built.diary() == ["trained ds2-lstm5 smoke"]
    assert built.plan() == {TRAINS}
    edit("hlstm_src/lstm.py", "WIDTH = 2\n")
    built.ask("smoke", str(record.relative_to(built.folder)))
    assert record.read_text() == "width 2" and built.diary() == ["trained ds2-lstm5 smoke"] * 2


def test_a_new_recorded_result_renews_the_page(built):
    record = built.folder / "results" / "desk" / "ds2-lstm5" / "seed0.json"
    record.parent.mkdir(parents=True)
    record.write_text("recorded")
    assert built.plan() == {TRAINS}
    shutil.rmtree(record.parent)


def test_a_recorded_file_that_a_chapter_names_renews_the_page(built):
    old, bench = (built.folder / "book/draws.ipynb").read_text(), built.folder / "results" / "desk" / "engine.json"
    built.write("book/draws.ipynb", old.replace('"hlstm": {', '"hlstm": {"files": ["results/desk/engine.json"]'))
    try:
        built.ask("smoke", "_build/executed/smoke/book/draws.ipynb")                       # it may be missing
        assert DRAWS not in built.plan()
        bench.parent.mkdir(parents=True, exist_ok=True)
        bench.write_text("{}")
        assert DRAWS in built.plan()
    finally:
        bench.unlink(missing_ok=True)
        built.write("book/draws.ipynb", old)
        built.ask("smoke", "_build/executed/smoke/book/draws.ipynb")


def test_recorded_runs_are_history(built, edit):
    """A desk record is made when it is missing; code and corpus may change, it stays."""
    assert "recorded_run seed0.json" in built.plan("desk")
    record = built.folder / "results" / "desk" / "ds2-lstm5" / "seed0.json"
    record.parent.mkdir(parents=True)
    record.write_text("recorded")
    os.utime(record, (0, 0))
    edit("hlstm_src/lstm.py")
    edit("data/an4/manifest.csv")
    assert built.plan("desk") == {TRAINS, DRAWS}
    built.ask("desk", "--force", str(record.relative_to(built.folder)))
    assert record.read_text() == "recorded" and not [line for line in built.diary() if "desk" in line]
    shutil.rmtree(record.parent)


# --- failures --------------------------------------------------------------------------------------

@pytest.fixture
def small(tmp_path, root):
    return Book(tmp_path, root)


def test_a_failing_cell_stops_the_build_and_says_where(small):
    small.write("book/draws.ipynb", notebook("draws", "x = 1", "y = 2\nprint(x / 0)", "print('never')"))
    done = small.make()
    assert done.returncode != 0 and done.stdout.count("A cell failed") == 1
    block = done.stdout[done.stdout.index("A cell failed"):]
    for said in ("book/draws.ipynb", "4 (id draws-04)", "2: print(x / 0)", "ZeroDivisionError: division by zero"):
        assert said in block
    left = small.folder / re.search(r"look at +(\S+)", block)[1]
    assert "ZeroDivisionError" in left.read_text() and "never\\n" not in left.read_text()
    assert not (small.folder / "_build/executed/smoke/book/draws.ipynb").exists()
    assert not (small.folder / "_build/site/smoke/_build/html/index.html").exists()
    assert "failed: chapter" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("broken, message", [
    ({"parameters": None}, "0 code cells are tagged 'parameters'"),
    ({"kernel": "julia-1.10"}, "its kernelspec is julia-1.10, not python3; run: make fix"),
])
def test_a_chapter_that_papermill_could_not_run_is_refused_before_it_starts(small, broken, message):
    small.write("book/draws.ipynb", notebook("draws", "open('ran', 'w')", **broken))
    done = small.call(sys.executable, "-m", "book.tools.execute", "book/draws.ipynb", "out.ipynb")
    assert done.returncode == 2 and f"error: book/draws.ipynb: {message}" in done.stderr
    assert not (small.folder / "book" / "ran").exists() and not (small.folder / "out.ipynb").exists()


def test_a_warning_of_the_book_is_an_error(small):
    small.write("_toc.yml", "format: jb-book\nroot: book/index\n")
    small.write("book/index.md", "# Index\n\n{ref}`nowhere`\n")
    done = small.make()
    assert done.returncode != 0
    assert re.search(r"index\.md:3: WARNING: undefined label: '?nowhere", done.stdout)
    assert not (small.folder / "_build/site/smoke/_build/html/index.html").exists()


@pytest.mark.parametrize("name, text, message", [
    ("_toc.yml", "format: jb-book\nroot: book/none\n", "there is no book/none.ipynb or book/none.md"),
    ("book/draws.ipynb", "{", "book/draws.ipynb: not a notebook"),
    ("book/draws.ipynb", notebook("draws", "x ="), "book/draws.ipynb: a code cell is no Python"),
    ("book/draws.ipynb", notebook("draws", corpora=["song"]), "hlstm.corpora names 'song'; known: speech"),
    ("book/draws.ipynb", notebook("draws", runs=["nmt-lstm"]), "no corpus is known for the experiment 'nmt-lstm'"),
    ("Snakefile", "rule x: input: 'a' b\n", "SyntaxError in file"),
])
def test_a_graph_that_does_not_hang_together_is_one_clear_message(small, name, text, message):
    small.write(name, text)
    done = small.make()
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_pictures_that_are_not_there_are_asked_for_in_our_words(small):
    """The archives are taken from the folder that is named; without one, and of MSCOCO, the error says what to do."""
    small.write("book/trains.ipynb", notebook("trains", corpora=["captions"]))
    for profile, message in (("desk", "HLSTM_REAL_DATA: is not set: say with it where ucm_captions.tar.gz lies, or"),
                             ("paper", "error: data/coco: 19 GB, to be prepared first; python -m data_prep.coco")):
        done = small.make(profile)
        assert done.returncode != 0 and message in done.stdout, done.stdout + done.stderr
        assert "MissingInput" not in done.stderr
    for name, does in (("karpathy", "open('data/ucm/manifest.csv', 'w').write(sys.argv[2])"),
                       ("features", "open('features.txt', 'w').write(' '.join(sys.argv[1:]))")):
        small.write(f"data_prep/{name}.py", f"import sys\n{does}\n")
    small.call("env", "HLSTM_REAL_DATA=/archives", "make", "book", "PROFILE=desk", f"PY={sys.executable}")
    assert (small.folder / "data/ucm/manifest.csv").read_text() == "/archives/ucm_captions.tar.gz"
    assert (small.folder / "features.txt").read_text() == "--corpus data/ucm --encoder efficientnet_lite0"


# --- the real book ---------------------------------------------------------------------------------

def test_chapters_declare_the_runs_they_ask_for(root):
    """A name in a chapter's code is that of a run it needs, or of records that its metadata names as files."""
    experiments = pytest.importorskip("hlstm_src.experiments")
    for chapter in graph.chapters(root):
        assert set(chapter.runs) <= set(experiments.CATALOGUE), chapter.page
        notebook = graph.read_notebook(graph.source(chapter.page, root))
        strings = set(re.findall(r"""["']([a-z0-9][a-z0-9-]+)["']""", "\n".join(graph.code_cells(notebook))))
        patterns = notebook["metadata"].get("hlstm", {}).get("files", ())
        read = {name for name in experiments.CATALOGUE for pattern in patterns
                if fnmatch(graph.record_of(name, "desk", 0), pattern)}
        assert strings & set(experiments.CATALOGUE) <= set(chapter.runs) | read, chapter.page


def test_several_seeds_of_an_experiment_of_seconds_are_one_job(small):
    small.write("book/trains.ipynb", notebook("trains", runs=["toy-gp", "ds2-lstm5"]))
    plan = small.ask("laptop", "--dry-run")
    seeds = graph.seeds("toy-gp", "laptop")
    assert len(seeds) >= 5 and graph.seeds("toy-gp", "smoke") == graph.seeds("ds2-lstm5", "laptop") == (0,)
    outputs = ", ".join(f"results/local/laptop/toy-gp/seed{k}.json (update)" for k in seeds)
    assert plan.count("rule run_seeds:") == plan.count("rule run:") == 1 and f"output: {outputs}" in plan


def test_the_graph_and_the_module_agree(root):
    from hlstm_src import experiments, profiles, records
    assert set(graph.PROFILES) == set(profiles.PROFILES)
    assert {p for p in graph.PROFILES if profiles.PROFILES[p].kept} == set(graph.KEPT)
    for name in graph.PROFILES:
        p = profiles.PROFILES[name]
        folders = {"speech": p.speech.corpus, "captions": p.captions.corpus,
                   "flowers": (p.flowers or p.captions).corpus}
        assert {kind: graph.CORPORA[kind][name] for kind in graph.CORPORA} == folders
        assert graph.corpus_of("nt-lstm1-flowers", name) == folders["flowers"]
        for experiment in experiments.CATALOGUE:
            assert root / graph.record_of(experiment, name, 3) == records.path_of(experiment, name, 3)
            corpus, made = graph.corpus_of(experiment, name), experiments.recipe(experiment, name)
            assert corpus == {"speech": p.speech.corpus, "captions": made.task.get("corpus")}.get(made.benchmark)
            runs = {"toy": p.toy.seeds, "captions": p.captions.seeds}.get(made.benchmark, 1)
            assert graph.seeds(experiment, name) == tuple(range(runs))
    assert {path.relative_to(root).as_posix() for path in experiments.CODE} <= set(graph.training_code(root))
    drawing = {"hlstm_src/figures.py", "hlstm_src/tables.py"}
    assert not drawing & set(graph.training_code(root))


def test_make_help_lists_every_target(root):
    makefile = (root / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert targets == set(re.findall(r"^  ([a-z]+) ", shown, re.MULTILINE))


def test_make_refuses_an_unknown_profile(root):
    done = subprocess.run(["make", "book", "PROFILE=huge"], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0 and "smoke laptop desk wide paper" in done.stderr


def test_make_says_when_there_is_no_python(small):
    """A machine with make and a shell, and no Python at all."""
    tools = small.folder / "bin"
    tools.mkdir()
    for name in ("bash", "cmp", "dirname", "make"):
        (tools / name).symlink_to(shutil.which(name))
    small.write("requirements.lock", "")
    done = subprocess.run(["make", "book"], cwd=small.folder, capture_output=True, text=True, env={"PATH": str(tools)})
    assert done.returncode != 0 and "error: no Python 3.11 to 3.14 found" in done.stderr
    assert not (small.folder / ".venv").exists()


def test_whoever_stops_the_build_stops_its_jobs(tmp_path):
    """Snakemake's part is played by a program that starts another, which takes no notice of SIGTERM."""
    started = tmp_path / "started"
    job = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
           f"open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(120)")
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {job!r}])"
    code = f"from book.tools import build; build.run([{sys.executable!r}, '-c', {child!r}], True)"
    going = subprocess.Popen([sys.executable, "-c", code], cwd=graph.ROOT, stderr=subprocess.PIPE)
    until(lambda: started.exists() and started.read_text())
    going.terminate()
    assert b"KeyboardInterrupt" in going.communicate(timeout=60)[1]        # which `main` turns into a message
    until(lambda: not alive(int(started.read_text())))


def test_a_build_makes_the_records_of_its_own_folder(monkeypatch, capfd):
    """Else the graph would take for made what lies elsewhere."""
    monkeypatch.setenv("HLSTM_RESULTS", "/elsewhere")
    code, _ = build.run([sys.executable, "-c", "import os; print(os.environ.get('HLSTM_RESULTS'))"], True)
    assert code == 0 and capfd.readouterr().out.strip() == "None"


def test_two_profiles_are_none():
    done = subprocess.run(["make", "-n", "book", "PROFILE=smoke laptop"], cwd=graph.ROOT, capture_output=True,
                          text=True)
    assert done.returncode and "PROFILE=smoke laptop is unknown; choose one of: smoke laptop" in done.stderr


def test_two_builds_do_not_meet(tmp_path):
    """The second is refused for as long as Snakemake runs, even if what started it was killed; then the way is free."""
    started = tmp_path / "started"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(120)"
    code = ("from pathlib import Path; from book.tools import build\n"
            f"with build.alone(Path({str(tmp_path)!r})) as keep:\n"
            f"    build.run([{sys.executable!r}, '-c', {child!r}], True, keep)")
    going = subprocess.Popen([sys.executable, "-c", code], cwd=graph.ROOT)
    until(lambda: started.exists() and started.read_text())
    going.kill()
    going.wait()
    with pytest.raises(graph.GraphError, match="another build is at work in this folder"), build.alone(tmp_path):
        pass
    os.kill(int(started.read_text()), signal.SIGKILL)
    until(lambda: not alive(int(started.read_text())))
    with build.alone(tmp_path):
        pass


def until(true, seconds=60):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    """Whether a process still runs; one that nobody has fetched does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_jobs_are_at_least_one(jobs, capsys):
    with pytest.raises(SystemExit):
        build.main(["--jobs", jobs])
    assert "no whole number from 1 up" in capsys.readouterr().err


@pytest.mark.parametrize("name", hlstm_src.__all__)
def test_what_the_package_hands_on_is_known_by_the_file_it_comes_from(name):
    """The package imports a name when it is first used; a chapter with that name is due when the file changes."""
    home = Path(sys.modules[getattr(hlstm_src, name).__module__].__file__)
    tree = ast.parse(f"from hlstm_src import {name}")
    assert home in graph.imports(tree, graph.ROOT / "book/any.ipynb", graph.ROOT)
