"""How the programs of this package are started."""

import signal
import sys
from collections.abc import Callable

import typer


def run(main: Callable[..., None]) -> None:
    """Run a program with the options of the command line.

    SIGTERM, by which machines and their schedulers end a program, unwinds it as an error does: what it began to
    build under a hidden name goes, and what stood there before stays. Exit code 143.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    typer.run(main)
