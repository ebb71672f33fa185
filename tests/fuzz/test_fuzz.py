"""A reader refuses what it cannot read in one line; `python -m tests.fuzz --seconds 3600` says so for longer."""

import subprocess
import sys
from pathlib import Path

SECONDS = 1  # for each of the targets


def test_readers_refuse_what_they_cannot_read():
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
