"""`vocabtrim-export` for a drafter that is an ONNX model already."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from engines.errors import VocabtrimError
from vocabtrim_export.cli.console import RATES, progress_reporter

if TYPE_CHECKING:
    from vocabtrim_export.onnx_input.trim import OnnxTrim
    from vocabtrim_export.selection import Coverage

_NOT_FOR_ONNX = ("target", "dtype", "quantize_drafter", "max_length", "slots")


def run_onnx(options: argparse.Namespace) -> None:
    """Trim the ONNX model that `--drafter` names, instead of an export.

    Raises:
        VocabtrimError: An option needs the original weights, or the model cannot be trimmed.
    """
    from vocabtrim_export.cli.arguments import calibration_settings
    from vocabtrim_export.cli.selection_text import notes
    from vocabtrim_export.onnx_input.trim import trim_onnx

    k = _checked_k(options)
    with progress_reporter(RATES) as progress:
        written = trim_onnx(options.drafter, options.output, k, calibration_settings(options), options.force, progress)
    for note in (*written.notes, *notes(written.selection, builtin=not options.calibration)):
        print(f"note: {note}", file=sys.stderr)
    _show(written, options.json)


def _checked_k(options: argparse.Namespace) -> "int | Coverage":
    """Returns K.

    Raises:
        VocabtrimError: An option needs the original weights.
    """
    from vocabtrim_export.cli.selection_text import parse_k
    from vocabtrim_export.cli.tensorrt_arguments import tensorrt_settings

    unusable = [name for name in _NOT_FOR_ONNX if getattr(options, name)]
    unusable += ["format"] if options.format != ["onnx"] else []
    unusable += ["quantize"] if options.quantize != "none" else []
    if unusable:
        raise VocabtrimError(
            f"--{unusable[0].replace('_', '-')} does not apply to a drafter that is an ONNX model, of which only the "
            "head changes: leave it out, or give the original weights"
        )
    tensorrt_settings(options)  # refuses options of TensorRT
    k = parse_k(options.k)
    if k == "auto":
        raise VocabtrimError("--k auto needs the original weights of both models: give a number or a coverage")
    return k


def _show(written: "OnnxTrim", as_json: bool) -> None:
    """Print what was trimmed, for a person or as JSON."""
    from vocabtrim_export.cli.selection_text import kept

    before, after = written.head_bytes
    if as_json:
        report = {"drafter": str(written.drafter), "k": len(written.selection.vocab_map), "product": written.product}
        print(json.dumps(report | {"head_bytes": after, "full_head_bytes": before}, indent=2))
        return
    print(kept(written.selection))
    print(
        f"drafter  {written.drafter}: its head, a {written.product}, reads {after / 1e6:.1f} MB "
        f"instead of {before / 1e6:.1f}"
    )
    print("token_ids of the full vocabulary are an output now; logits have a column for each kept token")
