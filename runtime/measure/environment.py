"""The machine and the library versions of a measurement."""

import platform
from pathlib import Path

import numpy as np

from engines.cores import usable_cores


def cpu_model() -> str:
    """Returns the processor's name, or its architecture where the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def environment() -> dict[str, str | int]:
    """Returns the CPU, its usable cores, the system, and the versions of Python and numpy."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
