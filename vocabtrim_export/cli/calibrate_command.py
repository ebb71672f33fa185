"""Count how often a model uses each token. The counts serve exports with any K; an interrupted run can be continued."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.arguments import add_calibration_arguments, add_json_argument
from vocabtrim_export.cli.console import RATES, progress_reporter

if TYPE_CHECKING:
    from vocabtrim_export.calibration import Skipped

EXAMPLE = "--target Qwen/Qwen2.5-Coder-1.5B-Instruct --calibration prompts.jsonl --output counts.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--target",
        metavar="MODEL",
        help="the target: a hub id, a local model directory or a .gguf file. Its generations are the best to count",
    )
    parser.add_argument("--drafter", metavar="MODEL", help="the drafter, if its generations are to be counted instead")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file of token counts to write (.safetensors), for vocabtrim-export --calibration",
    )
    add_calibration_arguments(parser)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from vocabtrim_export.calibration.counter import Listener
    from vocabtrim_export.calibration.counting import calibrate_models
    from vocabtrim_export.cli.arguments import calibration_settings
    from vocabtrim_export.cli.prompt_arguments import print_skipped

    skipped: list[Skipped] = []
    notes: list[str] = []
    with progress_reporter(RATES) as progress:
        listener = Listener(progress, skipped.append, notes.append)
        counts = calibrate_models(
            options.drafter, options.target, options.output, calibration_settings(options), listener
        )
    print_skipped(skipped)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    distinct = int(((counts.counts + counts.held_out) > 0).sum())
    if options.json:
        print(json.dumps({"output": str(options.output), "distinct": distinct} | counts.describe(), indent=2))
    else:
        print(f"{options.output}: {counts.total} tokens counted, {distinct} different ones, from {counts.source}")
