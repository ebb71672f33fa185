"""The cores that this process may run on."""

import os


def usable_cores() -> int:
    """Returns how many cores the process may use: `taskset`, a container or a scheduler may leave it only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
