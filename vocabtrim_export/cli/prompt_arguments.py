"""Options for a model's input: files of prompts, messages, tools, and how a chat template renders them."""

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


def add_template_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that `template_args` and `chat_options` read."""
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a variable of the model's chat template, such as enable_thinking=false; a value that is not JSON is "
        "text; may be given several times",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="the name of one of the model's chat templates, if it has several (default: tool_use where tools are "
        "given, else default)",
    )


def add_prompts_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--prompts`."""
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files of prompts or conversations (forms: docs/conversations.md); a record that the model cannot take is "
        "skipped and named",
    )


def template_args(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the variables that `--template-arg` sets.

    Raises:
        VocabtrimError: An argument has no name or no value.
    """
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
    """Returns the chat template and its variables from the options of `add_template_arguments`."""
    from engines.bundle.chat_template import ChatOptions

    return ChatOptions(options.chat_template, template_args=template_args(options))


def print_skipped(skipped: "Sequence[Skipped]") -> None:
    """Print on standard error which records were left out, and how many."""
    from vocabtrim_export.calibration.document import describe_skipped

    if skipped:
        print(f"note: {describe_skipped(skipped)}", file=sys.stderr)


def read_json(path: Path, what: str) -> Any:
    """Returns the JSON data in a file.

    Args:
        path: The file.
        what: The option that names it, for errors.

    Raises:
        VocabtrimError: The file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise VocabtrimError(f"cannot read {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VocabtrimError(f"{what} {path} is not JSON: {' '.join(str(error).split())[:100]}") from error
