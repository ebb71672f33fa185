"""Every change of files that an export or a calibration makes is a place to be killed at, or to find the disk full."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")  # a disk that flushes takes minutes for this
RUNS = {"calibration": 2, "exports": 4}  # of faults: kills and full disks; exports to an empty place and over others


@pytest.mark.parametrize("job", RUNS)
def test_the_old_state_or_the_new_one(job):
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as work:
        command = [sys.executable, "-m", "tests.faults", job, work]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the old state or the new one") == RUNS[job]
