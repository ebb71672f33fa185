"""Peak memory of `vocabtrim-export`, against the size of the model's weights in the exported dtype.

    python benchmarks/export_memory.py --drafter MODEL --k 8192 --output DIR …

takes the options of `vocabtrim-export`, runs it, and adds a line of JSON: the peak resident memory of the process, the
bytes of the model's weights (without a second copy of a tied head), and (peak − 1 GB) / weights.
"""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open


def main() -> None:
    command = [str(Path(sys.executable).parent / "vocabtrim-export"), "--json", *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = json.loads(done.stdout)
    weights = model_bytes(Path(sys.argv[sys.argv.index("--drafter") + 1]), result["manifests"]["drafter"]["dtype"])
    print(json.dumps({"peak": peak, "weights": weights, "peak_less_1_gb_over_weights": (peak - 1e9) / weights}))


def model_bytes(path: Path, dtype: str) -> int:
    """Bytes of all parameters of a model directory or a `.gguf` file, in `dtype`."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        count = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    else:
        count = 0
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in [*tensors.keys()])
    return count * {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]


if __name__ == "__main__":
    main()
