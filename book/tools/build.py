"""Build the book: the command behind `make book`.

    python -m book.tools.build --profile laptop --jobs 2

Calls Snakemake with the settings that the graph is written for, and nothing else; options after `--`
are handed on to it (`-- --dry-run`, `-- --executor slurm`, ...).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from book.tools.graph import PROFILES, ROOT, GraphError, chapters

# A job is due when an input is newer and differs, or when the set of its inputs changed.
# The last one takes no value, so that what follows it may be a file to make.
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


def run(command: list[str], loud: bool) -> tuple[int, str]:
    """Run Snakemake; its exit code, and what remains to be said about a failure.

    The jobs write to standard output, also their errors; standard error is Snakemake's own. A job that
    failed has said why, so only its name is repeated; a fault of the graph only Snakemake can tell.
    """
    done = subprocess.run(command, cwd=ROOT, stderr=None if loud else subprocess.PIPE, text=True, check=False)
    failed = FAILED.findall(done.stderr or "")
    return done.returncode, "".join(f"failed: {rule} {out}\n" for rule, out in failed) or (done.stderr or "")


def point(root: Path, profile: str) -> None:
    """Make `_build/html` lead to the book of this profile."""
    link = root / "_build" / "html"
    link.unlink(missing_ok=True)
    link.symlink_to(f"site/{profile}/_build/html", target_is_directory=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code of Snakemake, 0 when the book stands."""
    parser = argparse.ArgumentParser(prog="python -m book.tools.build", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--jobs", type=int, default=2, help="jobs at a time (default 2)")
    parser.add_argument("more", nargs="*", help="options for Snakemake, after --")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        chapters()
        code, errors = run(snakemake(given.profile, given.jobs, *given.more), loud=bool(given.more))
    except GraphError as error:
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
