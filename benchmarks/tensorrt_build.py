"""Build a drafter (K rows) and its target with TensorRT-RTX for some GPUs: seconds, plan sizes, what the plans hold.

    python benchmarks/tensorrt_build.py --model MODEL --counts token_counts.safetensors [--k 8192] [--json FILE]

Needs no GPU. Plans with and without the trim are compared twice: of the model as it is, and with its head untied from
its embedding (scaled by 1.5, since TensorRT stores equal constants once).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from engines.bundle.read import Manifest
from runtime.measure.environment import environment
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.pipeline import export
from vocabtrim_export.settings import ExportSettings
from vocabtrim_export.sources.source import DTYPES, load_source
from vocabtrim_export.trt.network import NETWORK_NAME, Network
from vocabtrim_export.trt.settings import TensorRTSettings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--counts", type=Path, required=True)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--compute-capability", nargs="+", default=["8.6", "8.9", "12.0"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(folder))
    text = json.dumps(report, indent=2) + "\n"
    if options.json:
        options.json.write_text(text, "utf-8")
    print(text)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    builds = {
        capability: build(options, folder / capability, options.model, options.k, (capability,), target=True)
        for capability in options.compute_capability
    }
    first = options.compute_capability[:1]
    untied = untie(options.model, folder / "untied")
    trims = {
        name: {
            "trimmed": build(options, folder / f"{name}_trimmed", model, options.k, tuple(first), target=False),
            "full": build(options, folder / f"{name}_full", model, 10_000_000, tuple(first), target=False),
        }
        for name, model in (("as_it_is", options.model), ("untied", untied))
    }
    return {"k": options.k, "builds": builds, "trims": trims, "environment": environment()}


def build(
    options: argparse.Namespace, output: Path, model: str, k: int, capabilities: tuple[str, ...], target: bool
) -> dict[str, object]:
    """Export; sizes and seconds of what was built."""
    began: dict[str, float] = {}
    seconds: dict[str, float] = {}

    def progress(task: str, done: int, total: int) -> None:
        began.setdefault(task, time.perf_counter())
        if done >= total:
            seconds[task] = round(time.perf_counter() - began[task], 2)

    start = time.perf_counter()
    settings = ExportSettings(
        k,
        TensorRTSettings(flavor="rtx", compute_capabilities=capabilities),
        max_length=1024,
        calibration=CalibrationSettings((options.counts,)),
    )
    result = export(model, model if target else None, output, settings, progress)
    whole = round(time.perf_counter() - start, 2)
    bundles = {"drafter": describe(result.drafter, result.drafter_manifest)}
    if result.target and result.target_manifest:
        bundles["target"] = describe(result.target, result.target_manifest)
    return {"seconds": whole, "seconds_by_task": seconds, "bundles": bundles}


def describe(bundle: Path, manifest: Manifest) -> dict[str, object]:
    network = Network.from_json((bundle / NETWORK_NAME).read_text("utf-8"), NETWORK_NAME)
    counts = network.counts()
    assert manifest.tensorrt is not None
    return {
        "plan_bytes": (bundle / "model.engine").stat().st_size,
        "head_rows": manifest.head_rows,
        "head_bytes": manifest.head_bytes,
        "weight_bytes_per_step": manifest.weight_bytes_per_step,
        "tensorrt": f"{manifest.tensorrt.flavor} {manifest.tensorrt.version}",
        "layers": {name: counts[name] for name in ("KV_CACHE_UPDATE", "ATTENTION_INPUT", "MATRIX_MULTIPLY", "TOPK")},
        "kernels": len(network.kernels),
        "fused_attention_kernels": sum("mha" in kernel.name for kernel in network.kernels),
    }


def untie(model: str, directory: Path) -> str:
    """A copy of the model whose head is a weight of its own."""
    source = load_source(model, DTYPES["fp16"])
    head = source.model.get_output_embeddings()
    head.weight = type(head.weight)(head.weight.detach() * 1.5, requires_grad=False)
    source.model.config.tie_word_embeddings = False
    source.model.save_pretrained(directory)
    source.tokenizer.save_pretrained(directory)
    return str(directory)


if __name__ == "__main__":
    main()
