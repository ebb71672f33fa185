"""Peak memory of `vocabtrim-export`, against the size of the model's largest tensor, and the seconds of each task.

    python benchmarks/export_memory.py --drafter MODEL --k 8192 --calibration token_counts.safetensors --output DIR …

takes the options of `vocabtrim-export`, runs it, and adds a line of JSON: the peak resident memory of the process, with
the pages of mapped files (`peak`) and without them (`peak_without_files`; the system drops those when memory is short),
the seconds it took, the bytes of the largest tensor in float32, and the bound that an export should keep to without
files: that tensor times (threads + 2), and 1.5 GB. `tasks` has the seconds of each task, such as "load target", and its
peak without files; a task is known by its lines of progress, which go on to standard error.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

_EVERY = 0.05  # seconds
_PARTS = {"RssAnon:", "RssShmem:"}
_BETWEEN = "between tasks"


@dataclass
class Tasks:
    """The task that an export is at, and what each took: its seconds, and its peak memory without mapped files."""

    now: str = _BETWEEN
    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def follow(self, lines: Iterable[str]) -> None:
        """Read the lines of progress until they end, and hand them on."""
        for line in lines:
            print(line, end="", file=sys.stderr, flush=True)
            if match := re.match(r"([\w ]+): (\d+)/(\d+)", line):
                self._enter(_BETWEEN if match[2] == match[3] else match[1])
        self._enter(_BETWEEN)

    def _enter(self, task: str) -> None:
        now = time.monotonic()
        self.seconds[self.now] = self.seconds.get(self.now, 0.0) + now - self.began
        self.now, self.began = task, now

    def sample(self, memory: int) -> None:
        self.peaks[self.now] = max(self.peaks.get(self.now, 0), memory)

    def figures(self) -> dict[str, Any]:
        return {
            name: {"seconds": round(seconds, 1), "peak_without_files": self.peaks.get(name, 0)}
            for name, seconds in self.seconds.items()
        }


def measure(options: Sequence[str]) -> dict[str, Any]:
    """Run an export, and leave the program where it fails.

    Args:
        options: Those of `vocabtrim-export`.

    Returns:
        The figures that the module names.
    """
    command = [sys.executable, "-c", "from vocabtrim_export.cli.main import export_main; export_main()", "--json"]
    began, tasks, peak = time.monotonic(), Tasks(), 0
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *options], **pipes) as export:
        reader = threading.Thread(target=tasks.follow, args=(export.stderr,), daemon=True)
        reader.start()
        while export.poll() is None:
            status = [line.split() for line in Path(f"/proc/{export.pid}/status").read_text("utf-8").splitlines()]
            sizes = {words[0]: int(words[1]) * 1024 for words in status if words[0].startswith(("Rss", "VmHWM"))}
            tasks.sample(sum(sizes.get(name, 0) for name in _PARTS))
            peak = max(peak, sizes.get("VmHWM:", 0))
            time.sleep(_EVERY)
        reader.join()
    if export.returncode:
        sys.exit(export.returncode)
    models = [Path(options[i + 1]) for i, name in enumerate(options) if name in ("--drafter", "--target")]
    largest = 4 * max(map(largest_tensor, models))
    return {
        "peak": peak,
        "peak_without_files": max(tasks.peaks.values()),
        "largest_tensor": largest,
        "bound": round(largest * ((os.cpu_count() or 1) + 2) + 1.5e9),
        "seconds": round(time.monotonic() - began),
        "tasks": tasks.figures(),
    }


def largest_tensor(path: Path) -> int:
    """Numbers in the largest tensor of a model directory or a `.gguf` file."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return max(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    sizes: list[int] = []
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            sizes += [math.prod(tensors.get_slice(name).get_shape()) for name in [*tensors.keys()]]
    return max(sizes)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
