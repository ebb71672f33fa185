"""One decode step of an exported target against the graph that GenAI's builder writes from the same weights.

Both run in one process, with IO binding, KV buffers bound as past and present, and one shared thread pool; the steps
alternate and medians are compared. Ours also picks the token (ArgMax); the other one stops at the logits.

    pip install onnxruntime-genai
    python -m onnxruntime_genai.models.builder -m MODEL_DIR -o GENAI_DIR -p fp32 -e cpu
    python benchmarks/decode_step.py --ours BUNDLE --genai GENAI_DIR
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from engines import load_engine
from runtime.measure.environment import environment

CAPACITY = 1024


def genai_step(directory: Path, past: int) -> Callable[[], None]:
    """A step of one token after `past` cached ones, as the builder's graph wants it."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as the engines' sessions
    session = ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()

    def share(array: np.ndarray) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array)

    inputs = {
        "input_ids": np.full((1, 1), 5, np.int64),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.full((1, 1), past, np.int64),
    }
    head_size = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    for value in session.get_inputs():
        if value.name in inputs:
            binding.bind_ortvalue_input(value.name, share(inputs[value.name]))
            continue
        cache = share(np.zeros((1, value.shape[1], CAPACITY, head_size), np.float32))
        binding.bind_ortvalue_input(value.name, cache)
        binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
    vocab = session.get_outputs()[0].shape[-1]
    binding.bind_ortvalue_output("logits", share(np.zeros((1, 1, vocab), np.float32)))
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ours", type=Path, required=True, help="a target's bundle")
    parser.add_argument("--genai", type=Path, required=True, help="the output of ONNX Runtime GenAI's builder")
    parser.add_argument("--past", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with load_engine(options.ours) as engine:  # first: it makes the pool that both share
        engine.feed([5] * options.past)

        def ours() -> None:
            engine.rewind(options.past)
            engine.feed([5])

        steps = {"ours": ours, "genai": genai_step(options.genai, options.past)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.steps + 20):
            for name in sorted(steps, reverse=bool(turn % 2)):
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[20:]) * 1e3 for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["ours"][20:], seconds["genai"][20:], strict=True)]
    result = {
        "ms": medians,
        "ratio_of_medians": medians["ours"] / medians["genai"],
        "median_of_paired_ratios": statistics.median(ratios),
        "past": options.past,
        "steps": options.steps,
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
