"""The run record: everything that one run found out, as one JSON file.

Every table, figure and chapter takes its numbers from records (the paper's own come by `paper.py`).
Those of the profiles `smoke` and `laptop` are scratch work and lie under `results/local/`; those of
`desk`, `wide` and `paper` cost hours and are kept. Reading a record needs neither torch nor the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from .errors import UserError
from .files import replacing
from .profiles import PROFILES, ROOT, home

SCHEMA_VERSION = 1
LOCAL = tuple(name for name, p in PROFILES.items() if not p.kept)
KEPT = tuple(name for name, p in PROFILES.items() if p.kept)
# Of an x86 processor, what speed depends on most: LLVM's name and ours, the widest first.
INSTRUCTIONS = {"amx-bf16": "AMX", "avx512bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
PACKAGES = ("torch", "numpy", "scipy", "accelerate", "safetensors", "soundfile", "jiwer", "numba", "thop")


class RecordError(UserError):
    """A record cannot be read or written. One line: the file, the field, the remedy."""


def _plain(value: Any) -> Any:
    """The value as JSON would give it back: tuples become lists, keys become strings, no NaN."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except TypeError as error:
        raise ValueError(str(error)) from None


def _utc(text: str) -> str:
    """An ISO 8601 time, checked to carry UTC."""
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError("the time must be in UTC, such as 2026-01-31T12:00:00+00:00")
    return text


Plain = Annotated[dict[str, Any], BeforeValidator(_plain)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Time = Annotated[str, AfterValidator(_utc)]


class _Part(pydantic.BaseModel):
    """A piece of a record: unknown fields, NaN and infinities are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    def __getitem__(self, name: str) -> Any:
        """`part["name"]` is `part.name`, so that a record reads like its JSON."""
        return dict(self)[name]


class EpochRow(_Part):
    """One epoch, counted from 0: training loss, learning rate at its end, seconds, densities, validation scores."""
    epoch: Natural
    phase: str
    loss: float
    lr: float
    seconds: float
    density: Share | None = None
    densities: dict[str, Share] | None = None
    scores: dict[str, float] = {}


class PhaseRow(_Part):
    """One growth or pruning event: what lived after it, how it scored, whether it was kept."""
    phase: str
    epoch: Natural
    density: Share
    nonzero: Natural
    scores: dict[str, float] = {}
    kept: bool
    note: str = ""


class Count(_Part):
    """Size and work of one frame or step; `nonzero_` counts what the masks leave alive."""
    params: Natural
    nonzero_params: Natural
    macs: Natural
    nonzero_macs: Natural
    flops: Natural
    nonzero_flops: Natural

    @pydantic.model_validator(mode="after")
    def _living_within_all(self) -> Count:
        for name in ("params", "macs", "flops"):
            if self["nonzero_" + name] > self[name]:
                raise ValueError(f"nonzero_{name} is larger than {name}")
        return self


class Counts(_Part):
    """`cell`: the recurrent weights alone; `model`: the whole network."""
    cell: Count
    model: Count


class LatencyRow(_Part):
    """One timing, in microseconds: which engine, how many threads, which case."""
    engine: str
    threads: Annotated[int, Field(ge=1)]
    case: str
    microseconds: Annotated[float, Field(gt=0)]


class ModelFile(_Part):
    """The weights beside the record: file name, SHA-256, bytes."""
    file: str
    sha256: str
    bytes: Natural


class Provenance(_Part):
    """Where a record comes from: code, versions, corpus, machine, time."""
    commit: str  # "unknown" outside git
    dirty: bool
    lock_sha256: str
    versions: dict[str, str]
    corpus: str
    corpus_sha256: str
    cpu: str
    gpu: str | None
    cores: Natural
    threads: Natural
    instructions: list[str] | None = None             # of INSTRUCTIONS, those that the CPU has; None: not noted
    precision: Literal["fp32", "bf16"] | None = None  # of the products in training; None: not noted
    started: Time
    ended: Time
    seconds: Annotated[float, Field(ge=0)]
    command: str

    def closed(self, seconds: float, precision: str) -> Provenance:
        """This provenance with the run ending now, after so much work, whose products had this precision."""
        return self.model_copy(update={"ended": now(), "seconds": seconds, "precision": precision})


class RunRecord(_Part):
    """One run. Scores are in percent where the field's habit is percent (WER, CER)."""
    schema_version: Literal[1] = SCHEMA_VERSION
    experiment: Name
    profile: Literal["smoke", "laptop", "desk", "wide", "paper"]
    seed: Natural
    title: str
    key: str
    recipe: Plain
    history: list[EpochRow]
    phases: list[PhaseRow] = []
    scores: dict[str, float]
    valid_scores: dict[str, float] = {}
    normalisation: str
    samples: list[Plain] = []
    counts: Counts
    latency: list[LatencyRow] = []
    model: ModelFile | None = None
    provenance: Provenance

    def save(self, path: str | Path) -> Path:
        """Write the record as indented UTF-8 JSON, all of it or (RecordError) nothing."""
        path = Path(path)
        try:  # fields may have been changed since the record was made
            checked = type(self).model_validate(self.model_dump())
            text = json.dumps(checked.model_dump(), indent=1, ensure_ascii=False, allow_nan=False)
            with replacing(path) as part:
                part.write_text(f"{text}\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            raise RecordError(f"{path}: {_first(error)}; nothing was written") from None
        return path


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _first(error: Exception) -> str:
    """The first complaint on one line, with the path of its field."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first, *rest = error.errors()
    field = ".".join(str(step) for step in first["loc"]) or "record"
    text = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{field}: {text}" + (f" (and {len(rest)} more)" if rest else "")


def read(path: str | Path) -> RunRecord:
    """Read and check a record.

    Raises RecordError, which names file, field and remedy: the file is missing or is not JSON, its
    schema version is another, or a field is missing, unknown or invalid.
    """
    path = Path(path)
    anew = "restore it from git or run the experiment again (python -m hlstm_src run --help)"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such record; make it with python -m hlstm_src run (--list names what there is)"
                          ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise RecordError(f"{path}: cannot be read as JSON ({error}); {anew}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version is True or version != SCHEMA_VERSION:
        remedy = "update the code" if isinstance(version, int) and version > SCHEMA_VERSION else anew
        raise RecordError(f"{path}: schema_version: {version!r}, but {SCHEMA_VERSION} is read here; {remedy}")
    try:
        return RunRecord.model_validate(data)
    except ValidationError as error:
        raise RecordError(f"{path}: {_first(error)}; {anew}") from None


def check_model(file: str | Path) -> None:
    """Raise RecordError if the record beside a model file tells of other bytes.

    A flipped bit in a weight reads as well as the right one. Where there is no such file, or no record of it, nothing
    is known, and nothing said; other programs name their JSON files after a model, too. Raises RecordError as well for
    a record that cannot be read.
    """
    file = Path(file)
    record = file.with_suffix(".json")
    if not (file.is_file() and record.is_file()):
        return
    with contextlib.suppress(OSError, ValueError, RecursionError):
        other = json.loads(record.read_text(encoding="utf-8"))
        names = RunRecord.model_fields.keys()                      # of which a spoilt record has most
        if not isinstance(other, dict) or 2 * len(names & other.keys()) < len(names):
            return
    told = read(record)
    model = told.model
    if model and file.name == model.file and hashlib.sha256(file.read_bytes()).hexdigest() != model.sha256:
        raise RecordError(f"{file}: not the model that {record.name} tells of, but damaged, or of another run; restore "
                          f"it from git or train it anew: python -m hlstm_src run {told.experiment} --profile "
                          f"{told.profile} --seed {told.seed} --force")


def folder(profile: str, root: str | Path | None = None) -> Path:
    """The folder of a profile's records, in the repository `root`.

    Without a `root` it is this one (`profiles.home`), or what the environment variable HLSTM_RESULTS names as
    `results`.
    """
    if profile not in PROFILES:
        raise RecordError(f"{profile}: no such profile; choose one of {', '.join(PROFILES)}")
    named = os.environ.get("HLSTM_RESULTS")
    results = Path(named) if named and root is None else Path(root or home()) / "results"
    return results / "local" / profile if profile in LOCAL else results / profile


def path_of(experiment: str, profile: str, seed: int, root: str | Path | None = None) -> Path:
    """Where the record of a run lies. Raises RecordError for a name that is no file name, and for a seed out of range.
    """
    if not 0 <= int(seed) < 2 ** 31:
        raise RecordError(f"{experiment} seed {seed}: a seed is a whole number from 0 to {2 ** 31 - 1}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", experiment):
        raise RecordError(f"{experiment} seed {seed}: no name of a run; see python -m hlstm_src run --help")
    return folder(profile, root) / experiment / f"seed{int(seed)}.json"


def read_at(experiment: str, profile: str, seed: int, root: str | Path | None = None) -> RunRecord:
    """The record of a run. Raises RecordError as `read`, and for one that lies where another's belongs."""
    path = path_of(experiment, profile, seed, root)
    record = read(path)
    _at_home(record, path, root)
    return record


def _at_home(record: RunRecord, path: Path, root: str | Path | None) -> None:
    if path != (place := path_of(record.experiment, record.profile, record.seed, root)):
        raise RecordError(f"{path}: this record belongs at {place}; move it there or delete it")


def find(profile: str, experiment: str | None = None, root: str | Path | None = None) -> list[RunRecord]:
    """All records of a profile, by experiment and seed; an empty list where there is none.

    Raises RecordError for a record that cannot be read or lies where another's belongs.
    """
    found = []
    for path in folder(profile, root).glob("*/seed*.json"):
        if experiment is None or path.parent.name == experiment:
            found.append(record := read(path))
            _at_home(record, path, root)
    return sorted(found, key=lambda record: (record.experiment, record.seed))


def fingerprint(recipe: Any, corpus_sha256: str, code_files: Iterable[str | Path]) -> str:
    """The `key` of a run: SHA-256 over the recipe, the corpus hash and the training code.

    Files count by name and bytes, so a changed comment changes the key: simple, and on the safe side.
    """
    digest = hashlib.sha256(json.dumps([_plain(recipe), corpus_sha256], sort_keys=True).encode())
    for path in sorted(map(Path, code_files), key=lambda path: path.name):
        data = path.read_bytes()
        digest.update(f"\n{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _commit() -> dict[str, Any]:
    """Commit, and whether the tree differs from it. Writing a result soils nothing."""
    git = ["git", "-C", str(ROOT)]
    try:
        asked = [*git, "rev-parse", "--show-toplevel", "HEAD"]
        top, head = subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL).splitlines()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--", ".", ":(exclude)results"])
    except (OSError, ValueError, subprocess.CalledProcessError):
        top = head = changed = ""
    if not head or Path(top).resolve() != ROOT:  # no git, or that of some folder above
        return {"commit": "unknown", "dirty": True}
    return {"commit": head, "dirty": bool(changed)}


def machine() -> tuple[str, int]:
    """Name of the CPU and the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join((found[1] if found else platform.processor() or "unknown").split()), cores


def processor(origin: dict) -> str:
    """Name of the CPU in a provenance and, where that is noted, the widest of its INSTRUCTIONS."""
    has = origin.get("instructions") or []
    return origin["cpu"] + next((f" ({told})" for name, told in INSTRUCTIONS.items() if name in has), "")


def _command() -> str:
    """The command line of this process, without the folders of this machine."""
    if "ipykernel" in sys.modules:
        return "a notebook"
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"
    words = ["python -m", program.parent.name] if module else [program.name or "python"]
    for word in sys.argv[1:]:
        head, sign, tail = word.rpartition("=")
        path = Path(tail)
        if path.is_absolute():
            tail = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        words.append(head + sign + tail)
    return " ".join(words)


def provenance(corpus_name: str, corpus_sha256: str) -> Provenance:
    """What there is to know about this run's code, machine, command and time; `corpus_sha256` is the manifest's.

    To be taken when a run starts and `closed` when it ends: it then names the commit that trained. Of a run that was
    cut off and taken up again, start, command and machine are those of the last sitting, the seconds those of all.
    """
    import torch  # only runs need these; whoever reads records does not
    from llvmlite.binding import get_host_cpu_features

    started = now()
    lock = ROOT / "requirements.lock"
    lock_sha256 = hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else "unknown"
    versions = {name: metadata.version(name) for name in PACKAGES if find_spec(name)}
    cpu, cores = machine()
    has = get_host_cpu_features()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    place = {"cpu": cpu, "gpu": gpu, "cores": cores, "threads": torch.get_num_threads(),
             "instructions": [name for name in INSTRUCTIONS if has.get(name)]}
    code = {"lock_sha256": lock_sha256, "versions": {"python": platform.python_version(), **versions}}
    code |= {"corpus": corpus_name, "corpus_sha256": corpus_sha256, "command": _command()}
    return Provenance(**_commit(), **code, **place, started=started, ended=started, seconds=0)
