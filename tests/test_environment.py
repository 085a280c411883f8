"""pyproject.toml, requirements.lock and environment.yml describe one and the same environment."""

import ast
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

WORKFLOWS = {"test": "make test", "book": "make book PROFILE=laptop", "gpu": "make book PROFILE=paper"}
LOCKED_EXTRAS = ("book", "data", "scores", "compact", "bench", "dev")


def pins_of(text):
    """The lock as a list of (normalised name, version); every line must be an exact pin."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found) if not match]
    return [(canonicalize_name(match[1]), match[2]) for match in found]


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def lock(root):
    return pins_of((root / "requirements.lock").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def conda(root):
    return yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))


def test_the_lock_names_each_package_once_and_in_order(root, lock):
    names = [name for name, _ in lock]
    assert len(names) == len(set(names))
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins, key=str.upper)


def test_the_lock_holds_every_requirement_but_vision(project, lock):
    assert set(project["optional-dependencies"]) == {*LOCKED_EXTRAS, "vision"}
    pins = dict(lock)
    wanted = project["dependencies"] + [r for e in LOCKED_EXTRAS for r in project["optional-dependencies"][e]]
    for requirement in map(Requirement, wanted):
        assert canonicalize_name(requirement.name) in pins, f"{requirement}: not in requirements.lock; make lock"
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: the lock has {version}"


def test_the_lock_fits_every_machine(lock):
    """No package for one kind of GPU, no build label, nothing that has to match another wheel."""
    pins = dict(lock)
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda", "torchvision"))]
    assert not [version for version in pins.values() if "+" in version]
    assert pins["torch"] == "2.13.0"
    assert pins["jupyter-book"] == "1.0.4.post1"  # version 2 ignores _config.yml


def test_our_own_package_is_not_in_the_lock(project, lock):
    assert canonicalize_name(project["name"]) not in dict(lock)


def test_the_core_stands_without_the_book(project):
    core = {canonicalize_name(Requirement(r).name) for r in project["dependencies"]}
    book = {canonicalize_name(Requirement(r).name) for r in project["optional-dependencies"]["book"]}
    assert not core & (book | {"jupyter", "sphinx", "pytest", "numba", "torchvision"})


def test_conda_installs_this_very_lock_and_the_same_python(root, project, conda):
    pip = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip == [["-r requirements.lock"]]
    python = next(entry for entry in conda["dependencies"] if str(entry).startswith("python="))
    version = python.removeprefix("python=")
    assert f"Python {version}." in (root / "requirements.lock").read_text(encoding="utf-8").split("\n\n")[0]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(Version(version + ".0"))


def test_conda_adds_nothing_that_the_lock_decides(conda, lock):
    others = {str(entry).split("=")[0] for entry in conda["dependencies"] if not isinstance(entry, dict)}
    assert not (others - {"python", "pip", "make"}) and not others & set(dict(lock)) - {"pip"}


@pytest.mark.parametrize("line", ["torch>=2", "torch", "-e .", "torch @ file:///a/torch.whl", "torch==2.13.0+cpu"])
def test_a_loose_line_in_the_lock_is_found(line):
    with pytest.raises(AssertionError):
        pins_of(f"# header\nnumpy==2.0.0\n{line}\n")


def test_continuous_integration_and_the_workflows_call_make(root):
    assert "test" in re.search(r"^exec make .*$", (root / ".ci" / "run").read_text(), re.MULTILINE)[0].split()
    for name, command in WORKFLOWS.items():
        workflow = yaml.safe_load((root / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
        steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
        assert any(command in step for step in steps), name


def test_the_example_in_the_readme_runs(root, capsys):
    text = (root / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names = {}
    exec(example, names)
    assert names["woken"] > 0 and names["slept"] > 0 and 0 < names["masks"].density() < 0.5
    assert capsys.readouterr().out.split()[0] == str(names["woken"])


def test_the_readmes_map_names_every_module_once_and_each_imports_from_its_own_row_or_above(root):
    plan = (root / "README.md").read_text(encoding="utf-8").split("from the ground up")[1].split("\n\n## ")[0]
    rows = [re.findall(r"(\w+)\.py`", line) for line in plan.splitlines()]
    row_of = {name: k for k, row in enumerate(rows) for name in row}
    files = [path for path in (root / "hlstm_src").rglob("*.py") if path.stem != "__init__"]
    assert sorted(name for row in rows for name in row) == sorted(path.stem for path in files)
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:      # what is needed to import it, no more
            if isinstance(node, ast.ImportFrom) and node.level:
                last = (node.module or "").split(".")[-1]
                for name in [last] if last in row_of else [each.name for each in node.names]:
                    assert row_of.get(name, 0) <= row_of[path.stem], f"{path.name} imports {name}.py from a lower row"
