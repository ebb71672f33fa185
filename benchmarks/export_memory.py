"""Peak memory of `vocabtrim-export`, against the size of the model's largest tensor.

    python benchmarks/export_memory.py --drafter MODEL --k 8192 --calibration token_counts.safetensors --output DIR …

takes the options of `vocabtrim-export`, runs it, and adds a line of JSON: the peak resident memory of the process, with
the pages of mapped files (`peak`) and without them (`peak_without_files`; the system drops those when memory is short),
the seconds it took, the bytes of the largest tensor in float32, and the bound that an export should keep to without
files: that tensor times (threads + 2), and 1.5 GB.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

_EVERY = 0.05  # seconds
_PARTS = {"RssAnon:", "RssShmem:"}


def main() -> None:
    command = [sys.executable, "-c", "from vocabtrim_export.cli.main import export_main; export_main()", "--json"]
    began, without_files, peak = time.monotonic(), 0, 0
    with subprocess.Popen([*command, *sys.argv[1:]], stdout=subprocess.DEVNULL) as export:
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
    figures = {"peak": peak, "peak_without_files": without_files, "seconds": seconds}
    print(json.dumps(figures | {"largest_tensor": largest, "bound": bound}))


def largest_tensor(path: Path) -> int:
    """Numbers in the largest tensor of a model directory or a `.gguf` file."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return max(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    sizes = []
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            sizes += [math.prod(tensors.get_slice(name).get_shape()) for name in [*tensors.keys()]]
    return max(sizes)


if __name__ == "__main__":
    main()
