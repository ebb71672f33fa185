"""What `vocabtrim-export` does with a drafter that is an ONNX model already."""

import argparse
import json
import sys

from engines.errors import VocabtrimError
from vocabtrim_export.cli.console import progress_reporter

_NOT_FOR_ONNX = ("target", "dtype", "quantize_drafter", "max_length", "slots")


def run_onnx(options: argparse.Namespace) -> None:
    """Trim it in place of an export. Raises `VocabtrimError`."""
    from vocabtrim_export.cli.arguments import calibration_settings
    from vocabtrim_export.cli.selection_text import kept, notes, parse_k
    from vocabtrim_export.onnx_input.trim import trim_onnx

    given = [name for name in _NOT_FOR_ONNX if getattr(options, name)]
    given += ["format"] if options.format != ["onnx"] else []
    given += ["quantize"] if options.quantize != "none" else []
    if given:
        raise VocabtrimError(
            f"--{given[0].replace('_', '-')} needs the original weights: a drafter that is an ONNX model keeps all but "
            "its head, and is trimmed alone"
        )
    with progress_reporter() as progress:
        made = trim_onnx(
            options.drafter, options.output, parse_k(options.k), calibration_settings(options), options.force, progress
        )
    for note in (*made.notes, *notes(made.selection, builtin=not options.calibration)):
        print(f"note: {note}", file=sys.stderr)
    before, after = made.head_bytes
    if options.json:
        found = {"drafter": str(made.drafter), "k": len(made.selection.vocab_map), "product": made.product}
        print(json.dumps(found | {"head_bytes": after, "full_head_bytes": before}, indent=2))
        return
    print(kept(made.selection))
    print(
        f"drafter  {made.drafter}: its head, a {made.product}, reads {after / 1e6:.1f} MB instead of {before / 1e6:.1f}"
    )
    print("token_ids of the full vocabulary are an output now; logits have a column for each kept token")
