"""Measure the gain of trimming on this GPU, on ONNX Runtime's CUDA, with random weights in shapes of known models.

python benchmarks/gpu.py [--json FILE] [--bundles DIR]

Runs from a source tree that is not installed; needs an NVIDIA GPU with 30 GB, onnxruntime-gpu, torch, transformers,
onnx, onnxscript and cuda-bindings. Every drafted token is accepted, so that tokens/s show latency alone.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import Engine, load_engine
from engines.ort_cuda.provider import require_provider
from runtime import SamplingParams, decode_rounds
from runtime.measure.bench import bench
from runtime.measure.sweep import SweepReport, SweepRow, SweepSettings, sweep
from vocabtrim_export.cli.bench_tables import show_sweep
from vocabtrim_export.random_weights.bundles import RandomBundles, RandomSettings, random_bundles

MAX_LENGTH = 4352
TRIMMED, FULL, DRAFT_LENGTH, CONTEXT = "32768 rows", "full", 4, 128  # of what is said in one number


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--target", default="llama-3.1-8b", metavar="SHAPE")
    parser.add_argument("--drafter", default="llama-3.2-1b", metavar="SHAPE")
    parser.add_argument("--bundles", type=Path, metavar="DIR", help="keep the random weights there (about 30 GB)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    require_provider()
    start = time.perf_counter()
    with ExitStack() as stack:
        directory = options.bundles or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vocabtrim-")))
        made = make(options.target, options.drafter, directory)
        say("bundles made", start)
        target = stack.enter_context(load_engine(made.target, "cuda"))
        drafters = {
            name: stack.enter_context(load_engine(path, "cuda", target)) for name, path in made.drafters.items()
        }
        say("engines loaded", start)
        report = run(target, drafters)
        say("sweep done", start)
        alike = agreement(target, drafters[TRIMMED])
        apart = stack.enter_context(load_engine(made.drafters[TRIMMED], "cuda"))  # on another stream: step by step
        rounds = {"one graph": round_ms(target, drafters[TRIMMED]), "step by step": round_ms(target, apart)}
    found = claims(report) | {"equal_prompts": alike, "round_ms": rounds, "seconds": time.perf_counter() - start}
    show_sweep(report)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"claims": found} | report.to_dict(), indent=2) + "\n", "utf-8")


def say(what: str, start: float) -> None:
    print(f"{time.perf_counter() - start:6.1f} s: {what}", flush=True)


def make(target: str, drafter: str, directory: Path) -> RandomBundles:
    """fp16; heads of several sizes, and the trimmed one once more in int4."""
    rows = (8192, 16384, 32768, None)
    half = random_bundles(RandomSettings(target, drafter, rows, "fp16", max_length=MAX_LENGTH), directory, quiet)
    settings = RandomSettings(target, drafter, rows[2:3], "fp16", "none", "int4", MAX_LENGTH)
    (int4,) = random_bundles(settings, directory, quiet).drafters.values()
    return RandomBundles(half.target, {**half.drafters, f"{TRIMMED}, int4": int4})


def quiet(task: str, done: int, total: int) -> None:
    """Progress nobody watches."""


def prompts(target: Engine, count: int) -> list[list[int]]:
    ids = np.random.default_rng(0).integers(target.manifest.vocab_size, size=(count, CONTEXT))
    return [[int(token) for token in row] for row in ids]


def run(target: Engine, drafters: dict[str, Engine]) -> SweepReport:
    settings = SweepSettings((1, 2, 4, 8), (CONTEXT, 1024, 4096), 64, 3, "all")
    return sweep(target, drafters, prompts(target, 1), settings)


def agreement(target: Engine, drafter: Engine) -> list[int]:
    """Count random prompts whose output equals target-only decoding: [equal, all]. The drafter is a poor guess there.

    A verified block is not bit for bit a step of one token: where two logits nearly tie, one may differ.
    """
    report = bench(target, {"trimmed": drafter}, prompts(target, 4), max_new_tokens=64, repeats=1, bandwidth=1.0)
    return [report.modes["trimmed"].equal_prompts or 0, 4]


def round_ms(target: Engine, drafter: Engine) -> dict[str, float]:
    """Medians of whole rounds, by how tokens are chosen. Random weights: how many are accepted means nothing."""
    ways = {
        "greedy": SamplingParams(),
        "temperature": SamplingParams(1.0, seed=0),
        "temperature, top-p 0.95": SamplingParams(1.0, top_p=0.95, seed=0),
        "temperature, top-k 50": SamplingParams(1.0, 50, seed=0),
    }
    found = {}
    for name, sampling in ways.items():
        for _ in range(2):  # in the first, graphs are captured
            text = prompts(target, 1)[0]
            entries = decode_rounds(
                target, drafter, text, max_new_tokens=96, draft_length=DRAFT_LENGTH, sampling=sampling
            )
            rounds = [entry for entry in entries if not entry.is_prefill]
        found[name] = 1e3 * float(np.median([entry.seconds for entry in rounds if entry.drafted == DRAFT_LENGTH]))
    return found


def claims(report: SweepReport) -> dict[str, Any]:
    """The figures that sum the sweep up, at one draft length and context."""

    def row(drafter: str) -> SweepRow:
        wanted = drafter, DRAFT_LENGTH, CONTEXT
        return next(each for each in report.rows if (each.drafter, each.draft_length, each.context) == wanted)

    trimmed, full = row(TRIMMED).report, row(FULL).report
    bytes_ratio = full.bytes_per_step / trimmed.bytes_per_step
    time_ratio = (full.draft_step_ms or 0) / (trimmed.draft_step_ms or 1)
    return {
        "draft_step_full_over_trimmed": {"bytes": bytes_ratio, "time": time_ratio, "off": time_ratio / bytes_ratio - 1},
        "bandwidth_fraction": {
            each.drafter: row(each.drafter).report.bandwidth_fraction
            for each in report.rows[1:]
            if (each.draft_length, each.context) == (DRAFT_LENGTH, CONTEXT)
        },
        "target_step_bandwidth_fraction": report.rows[0].report.bandwidth_fraction,
        "host_ms_a_round": trimmed.host_percentiles_ms and trimmed.host_percentiles_ms.p50,
        "decode_speedup_over_full": trimmed.decode_tokens_per_second / full.decode_tokens_per_second,
    }


if __name__ == "__main__":
    main()
