"""Trim a drafter's LM head to the K tokens that are used most, and export drafter and target to ONNX or TensorRT."""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.arguments import (
    add_calibration_arguments,
    add_format_argument,
    add_json_argument,
)
from vocabtrim_export.cli.console import RATES, progress_reporter
from vocabtrim_export.cli.selection_text import kept, notes, parse_k
from vocabtrim_export.cli.tensorrt_arguments import add_tensorrt_arguments, tensorrt_settings

if TYPE_CHECKING:
    from vocabtrim_export.pipeline import ExportResult

EXAMPLE = (
    "--drafter Qwen/Qwen2.5-Coder-0.5B-Instruct --target Qwen/Qwen2.5-Coder-1.5B-Instruct --quantize-drafter int4 "
    "--k 32000 --calibration prompts.jsonl --output out"
)
_MODEL = "a hub id, a local model directory, a .gguf file, or a directory with an ONNX decoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    _add_model_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to write DIR/drafter, DIR/target and DIR/FORMAT",
    )
    add_format_argument(parser)
    _add_weight_arguments(parser)
    add_calibration_arguments(parser)
    add_tensorrt_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace the bundles of an earlier export in DIR")
    add_json_argument(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--drafter",
        required=True,
        metavar="MODEL",
        help=f"the model to trim: {_MODEL}. Or a head that reads the target's hidden states: the directory of an EAGLE "
        "head or of Medusa heads, or mtp for the target's own multi-token-prediction layer",
    )
    parser.add_argument("--target", metavar="MODEL", help="the model that it drafts for; may be the same")
    parser.add_argument(
        "--k",
        required=True,
        metavar="K",
        help="how many tokens the drafter's head keeps, one row each, rounded up to a multiple of 64. coverage:0.95: "
        "as few as cover that share of held-out tokens. auto: the number that should be fastest, by the target's text "
        "on held-out prompts and by steps measured here (for drafters that are language models, on the CPU)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        metavar="M",
        help="in-context slots: the drafter can also propose the last M distinct tokens of the text that are not among "
        "the K (default: 0, or what --k auto chooses)",
    )


def _add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], help="dtype of weights and KV cache (default: fp32; fp16 for trt)"
    )
    quantizations = ["none", "int8", "int4", "fp8"]
    parser.add_argument("--quantize", choices=quantizations, default="none", help="quantise the weights of both models")
    parser.add_argument(
        "--quantize-drafter",
        choices=quantizations,
        help="quantise the drafter's weights in another way than --quantize",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens that the KV caches hold (default: the model's context, at most 4096)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from vocabtrim_export.cli.arguments import calibration_settings, other_formats
    from vocabtrim_export.cli.onnx_trim import run_onnx
    from vocabtrim_export.onnx_input.trim import holds_onnx
    from vocabtrim_export.pipeline import export
    from vocabtrim_export.settings import ExportSettings

    if holds_onnx(options.drafter):
        run_onnx(options)
        return
    settings = ExportSettings(
        k=parse_k(options.k),
        trt=tensorrt_settings(options),
        dtype=options.dtype,
        quantize=options.quantize,
        quantize_drafter=options.quantize_drafter,
        max_length=options.max_length,
        formats=other_formats(options),
        slots=options.slots,
        calibration=calibration_settings(options),
        force=options.force,
    )
    if options.verbose:
        logging.basicConfig(stream=sys.stderr, format="%(message)s")
        logging.getLogger("vocabtrim_export.trt").setLevel(logging.DEBUG)
    with progress_reporter(RATES) as progress:
        result = export(options.drafter, options.target, options.output, settings, progress)
    for note in (*result.notes, *notes(result.selection, builtin=not options.calibration)):
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(summary(result), indent=2) if options.json else text(result))


def summary(result: "ExportResult") -> dict[str, object]:
    """Returns the data that `--json` prints."""
    selection = result.selection
    return {
        "drafter": str(result.drafter),
        "target": str(result.target) if result.target else None,
        "formats": {path.name: str(path) for path in result.formats},
        "k": len(selection.vocab_map),
        "full_vocab": selection.vocab_map.full_vocab,
        "coverage": selection.coverage,
        "counted": selection.counted,
        "always_kept": selection.always_kept,
        "filler": selection.filler,
        "manifests": {
            "drafter": asdict(result.drafter_manifest),
            "target": asdict(result.target_manifest) if result.target_manifest else None,
        },
    }


def text(result: "ExportResult") -> str:
    """Returns the text that is printed without `--json`: the kept tokens, the bundles, and a command to try them."""
    selection, drafter, target = result.selection, result.drafter_manifest, result.target_manifest
    lines = [
        kept(selection) + (f", and {drafter.slots} slots" if drafter.slots else ""),
        f"drafter  {result.drafter}: {drafter.weight_bytes_per_step / 1e6:.1f} MB a step, "
        f"head {drafter.head_bytes / 1e6:.1f} MB",
    ]
    lines += [f"{path.name:8} {path}" for path in result.formats]
    if result.target and target:
        lines.append(f"target   {result.target}: {target.weight_bytes_per_step / 1e6:.1f} MB a step")
        device = "--device cuda " if target.tensorrt and target.tensorrt.flavor != "none" else ""
        bundles = f"--target {result.target} --drafter {result.drafter}"
        lines.append(f"try      vocabtrim generate {device}{bundles} --prompt 'Hi!'")
    return "\n".join(lines)
