"""Options of the commands that export and calibrate, and those that every command has."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vocabtrim_export.cli.prompt_arguments import add_template_arguments, template_args

if TYPE_CHECKING:
    from runtime.pair import Auto
    from vocabtrim_export.calibration.counting import CalibrationSettings


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `calibration_settings` reads."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="prompts, conversations or texts to count on: text, .jsonl, .json, .csv, .tsv or .parquet files (see "
        "docs/conversations.md), also compressed (.gz, .bz2, .xz, .zst), directories of such files, or data sets of "
        "the hub (hf://OWNER/NAME). Or token counts (.safetensors) of earlier calibrations. Files given as "
        "NAME=PATH[:WEIGHT] are domains, which are counted separately and mixed by weight (default: Python's "
        "documentation, which is unlike most users' prompts)",
    )
    group.add_argument(
        "--calibration-source",
        choices=["target", "drafter", "text"],
        help="what to count: the tokens that the target or the drafter generates on the prompts, or those of the text "
        "itself (default: target, or drafter if there is no target)",
    )
    group.add_argument(
        "--calibration-tokens",
        type=calibration_tokens,
        default="auto",
        metavar="N",
        help="how many tokens to count; auto stops when more generated tokens would hardly change which ones K keeps, "
        "and reads all of a text, up to 20,000,000 tokens",
    )
    _add_generation_arguments(group)


def _add_generation_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration-endpoint",
        metavar="URL",
        help="let a server with OpenAI's protocol (vLLM, SGLang, llama.cpp) generate, such as "
        "http://localhost:8000/v1; its key is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument("--calibration-model", metavar="NAME", help="the model's name on that server")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="count or generate on the Ray cluster at ADDRESS, such as head:6379; without ADDRESS, on the cluster that "
        "runs on this machine, else on all its cores. The counts equal those of one process",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="sampling temperature of the generations that are counted; 0: greedy",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the sampling of these generations")
    add_template_arguments(group)


def calibration_tokens(text: str) -> "int | Auto":
    """Parse `--calibration-tokens`: a number, or "auto"."""
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from error


def calibration_settings(options: argparse.Namespace) -> "CalibrationSettings":
    """Returns the settings from the options of `add_calibration_arguments`."""
    from vocabtrim_export.calibration.counting import CalibrationSettings

    return CalibrationSettings(
        tuple(options.calibration),
        options.calibration_source,
        options.calibration_tokens,
        options.temperature,
        options.seed,
        options.calibration_endpoint,
        options.calibration_model,
        options.ray,
        options.chat_template,
        template_args(options),
    )


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--format`."""
    from vocabtrim_export.formats import FORMATS

    parser.add_argument(
        "--format",
        nargs="+",
        choices=["onnx", "trt", *FORMATS],
        default=["onnx"],
        metavar="FORMAT",
        help="onnx (the default): bundles for ONNX Runtime; trt: bundles with TensorRT plans. Other programs' formats, "
        f"each written to DIR/FORMAT in addition: {', '.join(FORMATS)} (see docs/formats.md)",
    )


def other_formats(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the formats that `--format` names in addition to the bundles, each once."""
    return tuple(name for name in dict.fromkeys(options.format) if name not in ("onnx", "trt"))


def add_json_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
