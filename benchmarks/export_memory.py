"""Peak memory of `vocabtrim-export`, against the size of the model's largest tensor, and the seconds of each task.

    python benchmarks/export_memory.py --drafter MODEL --k 8192 --calibration token_counts.safetensors --output DIR …

takes the options of `vocabtrim-export`, runs it, and adds a line of JSON: the peak resident memory of the process, with
the pages of mapped files (`peak`) and without them (`peak_without_files`; the system drops those when memory is short),
the seconds it took and those of each task, such as "load target" (`tasks`, by the lines of progress, which go on to
standard error), the bytes of the largest tensor in float32, and the bound that an export should keep to without
files: that tensor times (threads + 2), and 1.5 GB.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

_EVERY = 0.05  # seconds
_PARTS = {"RssAnon:", "RssShmem:"}


def main() -> None:
    command = [sys.executable, "-c", "from vocabtrim_export.cli.main import export_main; export_main()", "--json"]
    began, without_files, peak = time.monotonic(), 0, 0
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    tasks: dict[str, float] = {}
    with subprocess.Popen([*command, *sys.argv[1:]], **pipes) as export:
        threading.Thread(target=time_tasks, args=(export.stderr, tasks), daemon=True).start()
        while export.poll() is None:
            status = [line.split() for line in Path(f"/proc/{export.pid}/status").read_text("utf-8").splitlines()]
            sizes = {words[0]: int(words[1]) * 1024 for words in status if words[0].startswith(("Rss", "VmHWM"))}
            without_files = max(without_files, sum(sizes.get(name, 0) for name in _PARTS))
            peak = max(peak, sizes.get("VmHWM:", 0))
            time.sleep(_EVERY)
    if export.returncode:
        sys.exit(export.returncode)
    models = [Path(sys.argv[i + 1]) for i, name in enumerate(sys.argv) if name in ("--drafter", "--target")]
    largest = 4 * max(map(largest_tensor, models))
    bound = largest * ((os.cpu_count() or 1) + 2) + 1.5e9
    seconds = round(time.monotonic() - began)
    figures = {"peak": peak, "peak_without_files": without_files, "seconds": seconds, "tasks": tasks}
    print(json.dumps(figures | {"largest_tensor": largest, "bound": bound}))


def time_tasks(lines: Iterable[str], tasks: dict[str, float]) -> None:
    """Note the seconds from a task's first line of progress to its last, and hand the lines on."""
    began: dict[str, float] = {}
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        if match := re.match(r"([\w ]+): \d+/\d+", line):
            begin = began.setdefault(match[1], time.monotonic())
            tasks[match[1]] = round(time.monotonic() - begin, 1)


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
    main()
