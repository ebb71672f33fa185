"""`polygraphy_inputs.py` of a bundle: real inputs of its graphs, in the shapes that its plans have, for Polygraphy."""

from collections.abc import Sequence
from pathlib import Path

from engines.base import MOST_UNREAD
from engines.bundle.read import Manifest
from engines.errors import VocabtrimError

LOADER_NAME = "polygraphy_inputs.py"

_SCRIPT = '''"""Inputs of this bundle's graphs for Polygraphy: a real prompt over an empty KV cache.

    polygraphy run model.onnx --onnxrt --data-loader-script polygraphy_inputs.py
    polygraphy run model.onnx --trt --onnxrt --data-loader-script polygraphy_inputs.py:load_PHASE SHAPES
    python polygraphy_inputs.py inputs.json [PHASE]     # and then: polygraphy run … --load-inputs inputs.json

PHASE is one of this bundle's: prefill, verify or draft; unrolled is the one of draft.onnx. SHAPES are the options that
`python polygraphy_inputs.py --shapes PHASE` prints: TensorRT needs the sizes before it builds.
"""

import json
import sys
from pathlib import Path

import numpy as np

PROMPT = @PROMPT@
MANIFEST = json.loads((Path(__file__).parent / "vocabtrim.json").read_text("utf-8"))
SPANS = sorted({profile["span"] for profile in MANIFEST["tensorrt"]["profiles"]})  # the last: the whole cache
UNROLLED_TOKENS = @UNROLLED@
HIDDEN_SIZE = @HIDDEN@  # of a row of the head, for in-context slots


def phases():
    """Name → (tokens fed, positions predicted; None where the graph is not asked which)."""
    calls = {
        profile["phase"]: (profile["tokens"], profile["keep"])
        for profile in MANIFEST["tensorrt"]["profiles"]
        if profile["span"] == SPANS[0]
    }
    return calls | ({"unrolled": (UNROLLED_TOKENS, None)} if MANIFEST["tensorrt"]["draft_length"] else {})


def feed(phase):
    """The inputs of one call, by name."""
    if phase not in phases():
        sys.exit(f"this bundle has no phase {phase}: choose from {', '.join(phases())}")
    tokens, keep = phases()[phase]
    inputs = {"input_ids": np.resize(np.array(PROMPT), (1, tokens)), "position_ids": np.arange(tokens)[None]}
    if keep is not None:
        inputs["logits_positions"] = np.arange(tokens - keep, tokens)
    if len(SPANS) > 1:
        inputs["attended_slots"] = np.arange(SPANS[0])
    cache = (1, MANIFEST["num_kv_heads"], SPANS[-1], MANIFEST["head_dim"])
    caches = [name for name in MANIFEST["inputs"] if name.startswith("past_key_values.")]
    return inputs | {name: zeros(cache) for name in caches} | empty_slots()


def empty_slots():
    """In-context slots of the head, where it has some."""
    count = MANIFEST["slots"]
    shapes = {"slot_weight": (HIDDEN_SIZE, count), "slot_bias": (count,)}
    slots = {name: zeros(shape) for name, shape in shapes.items() if name in MANIFEST["inputs"]}
    return slots | ({"slot_token_ids": np.full(count, -1)} if count else {})


def zeros(shape):
    if MANIFEST["dtype"] == "bf16":  # numpy has no such type; Polygraphy takes torch's
        import torch

        return torch.zeros(shape, dtype=torch.bfloat16)
    return np.zeros(shape, {"fp16": np.float16, "fp32": np.float32}[MANIFEST["dtype"]])


def load_data():
    """Every phase of model.onnx, one after the other."""
    for phase in phases():
        if phase != "unrolled":
            yield feed(phase)


def load_prefill():
    yield feed("prefill")


def load_verify():
    yield feed("verify")


def load_draft():
    yield feed("draft")


def load_unrolled():
    yield feed("unrolled")


def main(arguments):
    if len(arguments) == 2 and arguments[0] == "--shapes":
        shapes = " ".join(f"{name}:{list(x.shape)}".replace(" ", "") for name, x in feed(arguments[1]).items())
        print(" ".join(f"--trt-{which}-shapes {shapes}" for which in ("min", "opt", "max")))
    elif len(arguments) in (1, 2) and not arguments[0].startswith("-"):
        from polygraphy.json import save_json

        save_json([feed(phase) for phase in arguments[1:]] or list(load_data()), arguments[0])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
'''


def write_loader(directory: Path, manifest: Manifest, prompt_ids: Sequence[int], hidden_size: int = 0) -> Path:
    """Write `polygraphy_inputs.py`, which reads the rest from the bundle's manifest.

    Args:
        directory: The bundle.
        manifest: Its manifest.
        prompt_ids: Token ids of a real text, which is repeated where a shape has more tokens.
        hidden_size: The numbers in a row of the head, for slots.

    Returns:
        The path of the script.

    Raises:
        VocabtrimError: The bundle is not of `--format trt`, or the prompt is empty or has ids that the model lacks.
    """
    if manifest.tensorrt is None:
        raise VocabtrimError(f"{directory} has no fixed shapes to give inputs for: export it with --format trt")
    if not prompt_ids or not 0 <= min(prompt_ids) <= max(prompt_ids) < manifest.vocab_size:
        raise VocabtrimError(
            f"the prompt for {LOADER_NAME} must be token ids below {manifest.vocab_size}, at least one"
        )
    path = directory / LOADER_NAME
    numbers = {"@PROMPT@": _wrapped(prompt_ids), "@UNROLLED@": MOST_UNREAD, "@HIDDEN@": hidden_size}
    script = _SCRIPT
    for name, number in numbers.items():
        script = script.replace(name, str(number))
    path.write_text(script, "utf-8")
    return path


def _wrapped(numbers: Sequence[int]) -> str:
    """Returns the source of a Python list of the numbers, sixteen a line."""
    rows = [numbers[start : start + 16] for start in range(0, len(numbers), 16)]
    lines = "".join(f"    {', '.join(str(int(number)) for number in row)},\n" for row in rows)
    return f"[\n{lines}]"
