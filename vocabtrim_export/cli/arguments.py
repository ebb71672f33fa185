"""Options that several commands share, so that they have the same names and words everywhere."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vocabtrim_export.counting import CalibrationSettings


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files, .jsonl or .json files of prompts, conversations or texts, directories of these; or token "
        "counts (.safetensors) of earlier calibrations. Without it a corpus that comes with Python stands in",
    )
    parser.add_argument(
        "--calibration-source",
        choices=["target", "drafter", "text"],
        help="whose tokens to count: what the target or the drafter generates on the prompts, or the text itself "
        "(default: target where there is one, else drafter)",
    )
    parser.add_argument("--calibration-tokens", type=int, default=100_000, metavar="N", help="tokens to count")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling that calibrates")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling that calibrates")


def calibration_settings(options: argparse.Namespace) -> "CalibrationSettings":
    """What `add_calibration_arguments` parsed."""
    from vocabtrim_export.counting import CalibrationSettings

    return CalibrationSettings(
        tuple(options.calibration),
        options.calibration_source,
        options.calibration_tokens,
        options.temperature,
        options.seed,
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, required=True, metavar="DIR", help="the target's bundle")
    parser.add_argument("--device", default="cpu", help="where the engines run")
    parser.add_argument("--draft-length", type=int, default=4, metavar="N", help="tokens drafted per round (γ)")


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
