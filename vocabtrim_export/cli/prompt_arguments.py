"""Options that say what a model is asked: files of prompts, messages, tools, and how a chat template renders them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError

if TYPE_CHECKING:
    from engines.bundle.chat_template import ChatOptions
    from vocabtrim_export.calibration.document import Skipped


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the model's chat template, such as enable_thinking=false; the value is JSON, or else text; "
        "may be given several times",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="which of the model's named chat templates (default: tool_use where tools are given, else default)",
    )


def add_prompts_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files as --calibration takes them; a record that the model cannot take is left out, and named",
    )


def template_args(options: argparse.Namespace) -> dict[str, Any]:
    """What `--template-arg` gave. Raises `VocabtrimError` for an argument without a name or a value."""
    arguments: dict[str, Any] = {}
    for text in options.template_arg:
        name, separator, value = text.partition("=")
        if not (name.isidentifier() and separator):
            raise VocabtrimError(f"--template-arg {text!r}: give NAME=VALUE, such as enable_thinking=false")
        try:
            arguments[name] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[name] = value
    return arguments


def chat_options(options: argparse.Namespace) -> "ChatOptions":
    """How `add_template_arguments` says to render."""
    from engines.bundle.chat_template import ChatOptions

    return ChatOptions(options.chat_template, template_args=template_args(options))


def print_skipped(skipped: "Sequence[Skipped]") -> None:
    """Say on standard error which records were left out, and how many."""
    from vocabtrim_export.calibration.document import describe_skipped

    if skipped:
        print(f"note: {describe_skipped(skipped)}", file=sys.stderr)


def read_json(path: Path, what: str) -> Any:
    """The JSON in a file. Raises `VocabtrimError`."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise VocabtrimError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VocabtrimError(f"{what} {path} is not JSON: {' '.join(str(error).split())[:100]}") from error
