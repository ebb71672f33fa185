"""Options of `--format trt`, and the settings that they describe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.combinations import refuse_stated

if TYPE_CHECKING:
    from vocabtrim_export.trt.settings import TensorRTSettings

# Options that only TensorRT reads → the fields of `TensorRTSettings`.
_TENSORRT_OPTIONS = {
    "trt_flavor": "flavor",
    "compute_capability": "compute_capabilities",
    "draft_length": "draft_length",
    "prefill_chunk": "prefill_chunk",
    "span": "spans",
    "unroll_draft": "unroll",
    "strip_weights": "strip_weights",
    "timing_cache": "timing_cache",
    "version_compatible": "version_compatible",
}


def add_tensorrt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `tensorrt_settings` reads."""
    group = parser.add_argument_group("with --format trt")
    group.add_argument(
        "--trt-flavor",
        choices=["auto", "tensorrt", "rtx", "none"],
        help="what builds the plans. tensorrt: builds for the GPU of this machine; rtx: TensorRT-RTX, which builds "
        "without a GPU; auto, the default: tensorrt if it is installed and there is a GPU, else rtx; none: write the "
        "ONNX graphs without plans",
    )
    group.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="compute capabilities of the GPUs to build for, such as 8.6 8.9 (rtx only; default: all from 8.0 on)",
    )
    _add_shape_arguments(group)
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="build plans without weights, which are read from the ONNX graph when a plan is loaded",
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="reuse the kernel timings in FILE and add new ones (tensorrt only)",
    )
    group.add_argument(
        "--version-compatible",
        action="store_true",
        help="build plans that TensorRT's lean runtime, a tenth of the full one's size, can run too (tensorrt only)",
    )
    group.add_argument("--verbose", action="store_true", help="show what TensorRT logs while it builds")


def _add_shape_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--draft-length",
        type=int,
        metavar="N",
        help="the most drafted tokens that a round verifies (γ; default: 4)",
    )
    group.add_argument(
        "--unroll-draft", action="store_true", help="also build a plan that drafts all γ tokens in one call"
    )
    group.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of the prompt that one call reads (default: 256)",
    )
    group.add_argument(
        "--span",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="shorter texts to build for too, in tokens: a step then attends to the smallest span that holds the text "
        "instead of to --max-length",
    )


def tensorrt_settings(options: argparse.Namespace) -> "TensorRTSettings | None":
    """Returns the settings from the options of `add_tensorrt_arguments`; None for another format.

    Raises:
        VocabtrimError: The options contradict `--format`.
    """
    if {"onnx", "trt"} <= set(options.format):
        raise VocabtrimError(
            "--format onnx and --format trt make the same bundles: give one here, the other its own --output"
        )
    named = {name: getattr(options, name) for name in _TENSORRT_OPTIONS}
    stated = {name: value for name, value in named.items() if value or (value == 0 and value is not False)}
    if "trt" not in options.format:
        refuse_stated(options, {"verbose": False}, "shows what TensorRT logs: give --format trt as well")
        for name in stated:
            raise VocabtrimError(f"--{name.replace('_', '-')} is for TensorRT: give --format trt as well")
        return None
    from vocabtrim_export.trt.settings import TensorRTSettings

    fields: dict[str, Any] = {}
    for name, value in stated.items():
        fields[_TENSORRT_OPTIONS[name]] = tuple(value) if isinstance(value, list) else value
    return TensorRTSettings(**fields)
