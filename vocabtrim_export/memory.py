"""The memory that this process may use: the machine's, or its container's where that is less."""

import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
_NOW = Path("/proc/meminfo")


def all_memory() -> int:
    """Returns the bytes of memory that this process could ever use."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *filter(None, map(_limit, _LIMITS))])


def available_memory() -> int:
    """Returns the bytes that can be used now without swapping, where the system states them; otherwise all memory."""
    for line in _NOW.read_text("utf-8").splitlines() if _NOW.is_file() else ():
        if line.startswith("MemAvailable:"):
            return min(all_memory(), int(line.split()[1]) * 1024)
    return all_memory()


def _limit(file: Path) -> int | None:
    """Returns the bytes that a file of limits states; None where there is no such file, or no limit in it."""
    try:
        text = file.read_text("utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
