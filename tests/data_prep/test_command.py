"""Programs that are ended from outside leave nothing half-built, hidden or not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import command

# Where the tests are run in the background, SIGINT is ignored, and so it would be by their children.
PROGRAM = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from data_prep import command, corpus
def main() -> None:
    with corpus.new_folder("out", "mine") as folder:
        (folder / "half").touch()
        Path("building").touch()
        time.sleep(600)
command.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_begun_goes_and_what_stood_there_stays(number, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/corpus.json").write_text('{"name": "mine"}')
    env = os.environ | {"PYTHONPATH": str(Path(command.__file__).parents[1])}
    words = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "building").exists():
            time.sleep(0.05)
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 1
        process.send_signal(number)
        err = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["building", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.json"]
