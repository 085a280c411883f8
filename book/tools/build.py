"""Build the book: the command behind `make book`.

    python -m book.tools.build --profile laptop --jobs 2

Calls Snakemake with the settings that the graph is written for, and nothing else; options after `--`
are handed on to it (`-- --dry-run`, or, with the package snakemake-executor-plugin-slurm,
`-- --executor slurm --jobs 8`).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

from book.tools.graph import PROFILES, ROOT, GraphError, chapters

# A job is due when an input is newer and differs, or when the set of its inputs changed.
# The last one takes no value, so that what follows it may be a file to make. Snakemake's own lock would outlive
# a build that was killed; see `alone`.
SETTINGS = (
    "--rerun-triggers", "mtime", "input",
    "--rerun-incomplete",
    "--max-checksum-file-size", "1GB",
    "--quiet", "host", "progress", "reason",
    "--nolock",
)
FAILED = re.compile(r"Error in rule (\w+):.*?^\s*output: ([^\s,]+)", re.DOTALL | re.MULTILINE)


def snakemake(profile: str, jobs: int, *more: str) -> list[str]:
    """The command line of Snakemake for this book."""
    return [sys.executable, "-m", "snakemake", "--config", f"profile={profile}", "--cores", str(jobs),
            *SETTINGS, *more]


@contextmanager
def alone(root: Path) -> Iterator[tuple[int, ...]]:
    """Only one build at a time in a checkout, since two would write the same files.

    Gives the descriptors to hand on to Snakemake, so that the place is taken for as long as it runs, however this
    process ends; and free when nobody runs any more.

    Raises:
        GraphError: another build is at work here.
    """
    (root / "_build").mkdir(exist_ok=True)
    with open(root / "_build" / ".building", "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GraphError(f"{root}: another build is at work in this folder; wait for it, or stop it") from None
        yield (file.fileno(),) if fcntl else ()


def run(command: list[str], loud: bool, keep: tuple[int, ...] = ()) -> tuple[int, str]:
    """Run Snakemake, which is handed the descriptors `keep`; its exit code, and what remains to be said of a failure.

    The jobs write to standard output, also their errors; standard error is Snakemake's own. A job that
    failed has said why, so only its name is repeated; a fault of the graph only Snakemake can tell.
    """
    # A session of its own: whoever stops the build stops Snakemake and all its jobs, and none starts after that.
    # Records of the book are those of this folder.
    elsewhere = {name: value for name, value in os.environ.items() if name != "HLSTM_RESULTS"}
    child = subprocess.Popen(command, cwd=ROOT, stderr=None if loud else subprocess.PIPE, text=True, env=elsewhere,
                             start_new_session=True, pass_fds=keep)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _, told = child.communicate()
    except KeyboardInterrupt:
        _stop(child)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = FAILED.findall(told or "")
    return child.returncode, "".join(f"failed: {rule} {out}\n" for rule, out in failed) or (told or "")


def _stop(child: subprocess.Popen, patience: float = 20.0) -> None:
    """Ends a child and its children: trainings are given time to leave a checkpoint, then all are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(patience if number == signal.SIGTERM else None)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def point(root: Path, profile: str) -> None:
    """Make `_build/html` lead to the book of this profile."""
    link = root / "_build" / "html"
    link.unlink(missing_ok=True)
    link.symlink_to(f"site/{profile}/_build/html", target_is_directory=True)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The exit code of Snakemake, 0 when the book stands."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.build", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--jobs", type=positive, default=2, help="jobs at a time (default 2)")
    parser.add_argument("more", nargs="*", help="options for Snakemake, after --")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        chapters()
        with alone(ROOT) as keep:
            code, errors = run(snakemake(given.profile, given.jobs, *given.more), bool(given.more), keep)
    except (GraphError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        code, errors = 130, ""
    seconds = time.monotonic() - started
    if code:
        print(errors, f"make book: stopped after {seconds:.0f} s (PROFILE={given.profile})", sep="",
              file=sys.stderr)
    elif not given.more:
        point(ROOT, given.profile)
        print(f"make book: _build/html/index.html (PROFILE={given.profile}, {seconds:.0f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main())
