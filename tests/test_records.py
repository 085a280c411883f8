"""Run records: what is saved is read back exactly, and nothing doubtful is saved or read."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlstm_src import profiles, records
from hlstm_src.records import RecordError, RunRecord
from tests import recorded

COUNT = ("params", "macs", "flops")


def make(experiment="ds2-lstm5", profile="smoke", seed=0, **changes) -> RunRecord:
    """A small valid record with something in every field."""
    return recorded.make(experiment, profile, seed, **{
        "recipe": {"width": 4, "betas": (0.9, 0.999)},
        "history": [{"epoch": 1, "phase": "train", "loss": 2.5, "lr": 1e-3, "seconds": 1.5}],
        "phases": [{"phase": "prune", "epoch": 1, "density": 0.4, "nonzero": 40, "kept": True}],
        "valid_scores": {"wer": 14.0},
        "counts": {part: recorded.count(100, 40) for part in ("cell", "model")},
        "samples": [{"id": "a", "reference": "YES", "hypothesis": "YES"}],
        "latency": [{"engine": "torch", "threads": 1, "case": "one step", "microseconds": 325.0}],
        "model": {"file": "seed0.safetensors", "sha256": "1" * 64, "bytes": 10}} | changes)


numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
score_maps = st.dictionaries(st.text(max_size=8), numbers, max_size=3)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
epochs = st.fixed_dictionaries(
    {
        "epoch": st.integers(0, 999),
        "phase": st.text(max_size=6),
        "loss": numbers,
        "lr": numbers,
        "seconds": numbers,
    },
    optional={"density": shares, "densities": st.dictionaries(st.text(max_size=6), shares, max_size=3)},
)


@st.composite
def counts(draw):
    total = {name: draw(st.integers(0, 2**60)) for name in COUNT}
    return total | {f"nonzero_{name}": draw(st.integers(0, total[name])) for name in COUNT}


@st.composite
def any_record(draw):
    return make(
        profile=draw(st.sampled_from(list(records.PROFILES))),
        seed=draw(st.integers(0, 99)),
        title=draw(st.text(max_size=10)),
        recipe=draw(st.dictionaries(st.text(max_size=5), plain, max_size=4)),
        history=draw(st.lists(epochs, max_size=3)),
        scores=draw(score_maps),
        valid_scores=draw(score_maps),
        samples=draw(st.lists(st.dictionaries(st.text(max_size=5), plain, max_size=3), max_size=2)),
        counts={"cell": draw(counts()), "model": draw(counts())},
        model=None,
    )


@settings(max_examples=60, deadline=None)
@given(record=any_record())
def test_a_record_comes_back_exactly_and_saves_to_the_same_bytes(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "seed0.json"
    record.save(path)
    back = records.read(path)
    assert back == record
    first = path.read_bytes()
    back.save(path)
    assert path.read_bytes() == first


def test_tuples_in_a_recipe_become_what_json_gives_back(tmp_path):
    record = make()
    assert record.recipe["betas"] == [0.9, 0.999]
    assert records.read(record.save(tmp_path / "r.json")) == record


def test_items_read_like_attributes():
    record = make()
    assert record["counts"]["cell"]["params"] == record.counts.cell.params == 100
    with pytest.raises(KeyError):
        record["no_such_field"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["scores", "recipe", "history", "samples"])
def test_what_is_no_number_is_neither_made_nor_saved(bad, where, tmp_path):
    row = {"epoch": 1, "phase": "train", "loss": bad, "lr": 0.1, "seconds": 1}
    change = {"scores": {"wer": bad}, "recipe": {"lr": bad}, "history": [row], "samples": [{"x": bad}]}
    with pytest.raises(ValueError):
        make(**{where: change[where]})
    record = make()
    path = record.save(tmp_path / "r.json")
    before = path.read_bytes()
    spoilt = {"scores": record.scores, "recipe": record.recipe, "samples": record.samples[0]}
    if where == "history":
        record.history[0].loss = bad
    else:
        spoilt[where]["x"] = bad
    with pytest.raises(RecordError, match="nothing was written"):
        record.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_what_no_record_may_hold_is_not_saved(tmp_path):
    record = make()
    record.phases[0].density = 1.5
    with pytest.raises(RecordError, match="r.json: phases.0.density: .*; nothing was written"):
        record.save(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_letters_of_any_alphabet_can_be_read_in_the_file(tmp_path):
    assert '"title": "Größe ≤ 3"' in make(title="Größe ≤ 3").save(tmp_path / "r.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("crash", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_old_record_whole(step, crash, tmp_path, monkeypatch):
    path = make(title="old").save(tmp_path / "r.json")

    def fail(*_):
        raise crash

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RecordError if isinstance(crash, OSError) else KeyboardInterrupt):
        make(title="new").save(path)
    monkeypatch.undo()
    assert records.read(path).title == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_the_record_is_never_open_half_written(tmp_path, monkeypatch):
    """At the moment the new file takes its place, it is already complete."""
    path, seen = tmp_path / "r.json", []
    real = os.replace

    def watch(part, target):
        assert not path.exists()
        seen.append(records.read(part).title)
        real(part, target)

    monkeypatch.setattr(os, "replace", watch)
    make(title="whole").save(path)
    assert seen == ["whole"]


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.pop("scores"), "scores: Field required"),
        (lambda data: data["provenance"].pop("cpu"), "provenance.cpu: Field required"),
        (lambda data: data.update(colour="red"), "colour: "),
        (lambda data: data["history"][0].update(loss="much"), "history.0.loss: "),
        (lambda data: data["history"][0].update(loss=math.nan), "history.0.loss: "),
        (lambda data: data["counts"]["cell"].update(nonzero_params=101), "counts.cell: nonzero_params"),
        (lambda data: data["provenance"].update(started="2026-01-31T12:00:00"), "provenance.started: "),
        (lambda data: data["provenance"].update(started="2026-01-31T12:00:00+01:00"), "provenance.started: "),
        (lambda data: data["phases"][0].update(density=1.5), "phases.0.density: "),
        (lambda data: data["history"][0].update(density=1.5), "history.0.density: "),
        (lambda data: data["history"][0].update(densities={"w": -0.1}), "history.0.densities.w: "),
        (lambda data: data["counts"]["model"].update(nonzero_macs=101), "counts.model: nonzero_macs is larger than"),
        (lambda data: data["counts"]["model"].update(nonzero_flops=201), "counts.model: nonzero_flops is larger than"),
        (lambda data: data["latency"][0].update(threads=0), "latency.0.threads: "),
        (lambda data: data["latency"][0].update(microseconds=0), "latency.0.microseconds: "),
        (lambda data: [data.pop(name) for name in ("title", "key", "seed")], "seed: Field required (and 2 more)"),
        (lambda data: data.update(profile="huge"), "profile: "),
        (lambda data: data.update(schema_version=2), "update the code"),
        (lambda data: data.update(schema_version=0), "schema_version: 0"),
        (lambda data: data.update(schema_version=0), "run the experiment again"),
        (lambda data: data.pop("schema_version"), "schema_version: None"),
        (lambda data: data.update(schema_version=True), "schema_version: True"),
    ],
)
def test_a_bad_field_is_named_with_its_file_on_one_line(change, says, tmp_path):
    path = make().save(tmp_path / "r.json")
    edit(path, change)
    with pytest.raises(RecordError) as caught:
        records.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "title"', b"\xff\xfe", b"[]", b"null", b"[" * 99999])
def test_what_is_no_record_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        records.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_which_its_record_says_nothing_is_taken_as_it_is(tmp_path):
    (tmp_path / "r.safetensors").touch()
    path = make().save(tmp_path / "r.json")
    edit(path, lambda data: data.update(model=None))
    records.check_model(tmp_path / "r.safetensors")
    edit(path, lambda data: data.update(model={"file": "r.safetensors", "sha256": "0" * 64, "bytes": 1}))
    with pytest.raises(RecordError, match="not the model that r.json tells of"):
        records.check_model(tmp_path / "r.safetensors")


@pytest.mark.parametrize("content", ["[]", "null", '{"weight_map": {}, "model": "tiny"}'])
def test_other_json_beside_a_model_is_passed_over_and_a_spoilt_record_is_not(content, tmp_path):
    (tmp_path / "r.safetensors").touch()
    (tmp_path / "r.json").write_text(content)
    records.check_model(tmp_path / "r.safetensors")
    whole = make().save(tmp_path / "r.json").read_text()
    (tmp_path / "r.json").write_text(whole[:len(whole) // 2])
    with pytest.raises(RecordError, match="cannot be read as JSON"):
        records.check_model(tmp_path / "r.safetensors")
    for spoil in (lambda data: data.update(schema_version=0), lambda data: data.pop("schema_version")):
        edit(make().save(tmp_path / "r.json"), spoil)
        with pytest.raises(RecordError, match="schema_version"):
            records.check_model(tmp_path / "r.safetensors")


def test_a_missing_record_says_how_to_make_it(tmp_path):
    with pytest.raises(RecordError, match="no such record; make it with"):
        records.read(tmp_path / "r.json")


@given(part=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_a_truncated_record_is_never_taken_for_a_whole_one(part, tmp_path_factory):
    path = make().save(tmp_path_factory.mktemp("records") / "r.json")
    data = path.read_bytes()
    path.write_bytes(data[: -1 - part])
    with pytest.raises(RecordError):
        records.read(path)


def test_paths_keep_scratch_and_kept_records_apart(tmp_path, monkeypatch):
    at = {profile: records.path_of("ds2-lstm5", profile, 3, tmp_path) for profile in records.PROFILES}
    for profile in ("smoke", "laptop"):
        assert at[profile] == tmp_path / "results/local" / profile / "ds2-lstm5/seed3.json"
    for profile in ("desk", "wide", "paper"):
        assert at[profile] == tmp_path / "results" / profile / "ds2-lstm5/seed3.json"
    monkeypatch.setenv("HLSTM_RESULTS", str(tmp_path / "elsewhere"))
    assert records.path_of("a", "desk", 0) == tmp_path / "elsewhere/desk/a/seed0.json"
    assert records.path_of("a", "desk", 0, tmp_path) == tmp_path / "results/desk/a/seed0.json"
    monkeypatch.delenv("HLSTM_RESULTS")
    assert records.path_of("a", "desk", 0) == records.ROOT / "results/desk/a/seed0.json"
    monkeypatch.setenv("HLSTM_RESULTS", "")                                     # as if it were not set
    assert records.path_of("a", "desk", 0) == records.ROOT / "results/desk/a/seed0.json"
    # Where only the package is installed, nothing is written beside it.
    monkeypatch.setattr(profiles, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert records.path_of("a", "desk", 0) == tmp_path / "results/desk/a/seed0.json"
    assert profiles.place("data/an4") == tmp_path / "data/an4"
    assert profiles.place(profiles.MINI_SPEECH) == tmp_path / "site-packages" / profiles.MINI_SPEECH


@pytest.mark.parametrize(
    ("name", "profile", "seed"), [("../a", "desk", 0), ("", "desk", 0), ("a", "big", 0), ("a", "desk", -1),
                                  ("a/../../b", "desk", 0), ("a\n", "desk", 0), ("a", "desk", 2 ** 31)]
)
def test_a_name_that_is_no_run_has_no_path(name, profile, seed):
    with pytest.raises(RecordError):
        records.path_of(name, profile, seed)


def test_find_gives_the_records_of_one_profile_in_order(tmp_path):
    assert records.find("smoke", root=tmp_path) == []
    for experiment, profile, seed in [
        ("b", "smoke", 10),
        ("b", "smoke", 9),
        ("a", "smoke", 0),
        ("a", "desk", 0),
        ("b-more", "smoke", 7),
        *(("c", "smoke", seed) for seed in range(12, -1, -1)),     # whatever the order of the folder
    ]:
        make(experiment, profile, seed).save(records.path_of(experiment, profile, seed, tmp_path))
    found = [(record.experiment, record.seed) for record in records.find("smoke", root=tmp_path)]
    assert found == [("a", 0), ("b", 9), ("b", 10), ("b-more", 7), *(("c", seed) for seed in range(13))]
    assert [record.seed for record in records.find("smoke", "b", tmp_path)] == [9, 10]


def test_find_leaves_other_files_beside_the_records_alone(tmp_path):
    path = make().save(records.path_of("ds2-lstm5", "smoke", 0, tmp_path))
    (path.parent / "notes.json").write_text("no record")
    (path.parent.parent / "seed1.json").write_text("no record")
    assert [record.seed for record in records.find("smoke", root=tmp_path)] == [0]


def test_find_refuses_a_record_in_the_place_of_another(tmp_path):
    make("ds2-lstm5", "smoke").save(records.path_of("ds2-lstm5", "desk", 0, tmp_path))
    with pytest.raises(RecordError, match="belongs at"):
        records.find("desk", root=tmp_path)
    with pytest.raises(RecordError, match="belongs at"):
        records.read_at("ds2-lstm5", "desk", 0, tmp_path)


def test_the_fingerprint_sees_recipe_corpus_and_code_and_nothing_else(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a = 1\n")
    two.write_text("b = 2\n")
    base = records.fingerprint({"x": 1, "y": (2, 3)}, "corpus", [one, two])
    assert base == records.fingerprint({"y": [2, 3], "x": 1}, "corpus", [two, one])
    assert base != records.fingerprint({"x": 1, "y": [2, 4]}, "corpus", [one, two])
    assert base != records.fingerprint({"x": 1, "y": [2, 3]}, "other", [one, two])
    assert base != records.fingerprint({"x": 1, "y": [2, 3]}, "corpus", [one])
    one.write_text("a = 1  # a comment counts\n")
    assert base != records.fingerprint({"x": 1, "y": [2, 3]}, "corpus", [one, two])
    (tmp_path / "away").mkdir()
    moved = (tmp_path / "away/one.py", tmp_path / "away/two.py")
    for old, new in zip((one, two), moved, strict=True):
        new.write_bytes(old.read_bytes())
    here = records.fingerprint({}, "corpus", [one, two])
    assert here == records.fingerprint({}, "corpus", moved)
    apart = tmp_path / "z/one.py", tmp_path / "y/two.py"                        # the folders sort the other way round
    for old, new in zip((one, two), apart, strict=True):
        new.parent.mkdir()
        new.write_bytes(old.read_bytes())
    assert here == records.fingerprint({}, "corpus", apart)


def test_code_that_moves_to_another_file_changes_the_fingerprint(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"

    def found(first, second, files=(one, two)):
        for file, text in zip(files, (first, second), strict=True):
            file.write_text(text)
        return records.fingerprint({}, "corpus", files)
    assert len({found("a\nb\n", "c\n"), found("a\n", "b\nc\n"), found("", "a\nb\nc\n"),
                found("a\nb\n", "c\n", (one, tmp_path / "zwei.py"))}) == 4


def test_provenance_holds_no_folder_of_this_machine(monkeypatch):
    root = str(records.ROOT)
    argv = [f"{root}/hlstm_src/__main__.py", "run", "ds2-lstm5", f"--data={root}/data/an4", "/far/away/x.json"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    taken = records.provenance("an4", "4" * 64)
    assert taken.command == "python -m hlstm_src run ds2-lstm5 --data=data/an4 x.json"
    assert root not in taken.model_dump_json()
    assert taken.cores >= 1 and taken.threads >= 1 and taken.cpu
    assert taken.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy"} <= set(taken.versions)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert records.provenance("an4", "4" * 64).command == "a notebook"


def test_provenance_names_the_commit_and_a_changed_tree(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *words], text=True).strip()

    monkeypatch.setattr(records, "ROOT", tmp_path.resolve())
    assert records.provenance("an4", "4").commit == "unknown"
    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    make().save(records.path_of("ds2-lstm5", "desk", 0, tmp_path))
    taken = records.provenance("an4", "4")
    assert (taken.commit, taken.dirty) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("a = 2\n")
    assert records.provenance("an4", "4").dirty
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(records, "ROOT", tmp_path.resolve() / "inner")
    assert records.provenance("an4", "4").commit == "unknown"


def test_a_provenance_says_what_the_processor_can_do():
    has = records.provenance("an4", "4").instructions
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    for name in ("avx2", "avx512f"):                                       # Linux names these as LLVM does
        assert not flags or (name in has) == (name in flags)
    assert records.processor({"cpu": "a", "instructions": ["avx2", "avx512f"]}) == "a (AVX-512)"
    assert records.processor({"cpu": "a", "instructions": []}) == records.processor({"cpu": "a"}) == "a"


def test_closing_keeps_the_start_and_counts_the_time():
    taken = make().provenance
    closed = taken.closed(12.5, "bf16")
    assert closed.started == taken.started and closed.ended > taken.ended
    assert (closed.seconds, closed.precision) == (12.5, "bf16")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", closed.ended)        # to the second


def test_the_module_itself_does_not_load_torch():
    code = "import sys, hlstm_src.records; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=records.ROOT, check=True)
