"""What ALiBi's biases cost: steps of a BLOOM with random weights with its biases and, from the same graph, without.

    python benchmarks/alibi_step.py > results.json

The model has eight layers of BLOOM-560m's size and a vocabulary of bytes, so that attention is more of a step than in
the whole model. Calls of 1 and 5 tokens after 1,000 are timed in turn; the ratio is the median of the pairs' ratios.
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import save_tokenizer

if TYPE_CHECKING:
    from engines import Engine
    from vocabtrim_export.lowering.quantize import Quantization

CONTEXT, CALLS, REPEATS = 1000, (1, 5), 200
QUANTIZATIONS: "tuple[Quantization, ...]" = ("none", "int4")


def save_bloom(directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", hidden_size=1024, n_layer=8, n_head=16, vocab_size=448)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)


def write(model: Path, bundle: Path, quantization: "Quantization", with_biases: bool) -> None:
    from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
    from vocabtrim_export.lowering import ort_operators
    from vocabtrim_export.proof.proven import trace_source
    from vocabtrim_export.sources.source import DTYPES, load_source

    plan = BundlePlan("target", load_source(str(model), DTYPES["fp32"]), "fp32", quantization, context_length=1280)
    bundle.mkdir()
    without = patch.object(ort_operators, "_key_bias", lambda *_: None)
    with nullcontext() if with_biases else without:
        write_bundle(bundle, trace_source(plan), plan, lambda *_: None)


def seconds(engine: "Engine", tokens: int) -> float:
    begin = perf_counter()
    engine.feed([7] * tokens, keep=tokens)
    took = perf_counter() - begin
    engine.rewind(CONTEXT)
    return took


def measure(model: Path, work: Path, quantization: "Quantization") -> list[dict[str, Any]]:
    from engines import load_engine

    rows = []
    paths = [work / f"{quantization}_{name}" for name in ("biased", "plain")]
    for path in paths:
        write(model, path, quantization, path is paths[0])
    with load_engine(paths[0]) as biased, load_engine(paths[1]) as plain:
        for engine in (biased, plain):
            engine.feed([7] * CONTEXT)
        for tokens in CALLS:
            pairs = [(seconds(biased, tokens), seconds(plain, tokens)) for _ in range(REPEATS)][REPEATS // 10 :]
            ms = [1e3 * median(times) for times in zip(*pairs, strict=True)]
            row = {"quantize": quantization, "context": CONTEXT, "tokens": tokens, "ms": ms[0], "ms_without": ms[1]}
            rows.append(row | {"ratio": median(a / b for a, b in pairs)})
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        save_bloom(model := Path(work) / "model")
        rows = [row for each in QUANTIZATIONS for row in measure(model, Path(work), each)]
    print(json.dumps({"cores": os.cpu_count(), "steps": rows}, indent=1))


if __name__ == "__main__":
    main()
