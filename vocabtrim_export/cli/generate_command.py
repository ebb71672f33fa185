"""Generate text with a target; a drafter makes it faster and leaves the output as it is."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.cli.arguments import add_json_argument
from vocabtrim_export.cli.decoder_arguments import (
    add_decoder_arguments,
    add_sampling_arguments,
    add_stop_argument,
    load_decoder,
    sampling_params,
)
from vocabtrim_export.cli.figures import figures_line, print_text
from vocabtrim_export.cli.prompt_arguments import add_template_arguments, read_json, template_args
from vocabtrim_export.cli.streams import read_prompt

if TYPE_CHECKING:
    from runtime.stream import Stream

EXAMPLE = "--target out/target --drafter out/drafter --prompt 'Write a binary search in Python.'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_decoder_arguments(parser)
    _add_input_arguments(parser)
    _add_output_arguments(parser)
    add_sampling_arguments(parser)


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="the most tokens to generate")
    add_stop_argument(group)
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: print each token's log-probability and those of the N most likely",
    )
    add_json_argument(group)
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="let the answer be JSON of the schema in this file (docs/json.md)",
    )
    form.add_argument("--json-object", action="store_true", help="let the answer be a JSON object, whatever it holds")


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument("--prompt", help="the text to answer (default: read standard input)")
    group.add_argument(
        "--raw", action="store_true", help="continue the prompt instead of answering it: no chat template"
    )
    group.add_argument(
        "--messages",
        type=Path,
        metavar="FILE",
        help="answer a conversation instead of a prompt: a JSON list of messages, or the body of an OpenAI request, "
        "including its tools",
    )
    group.add_argument(
        "--tools", type=Path, metavar="FILE", help="a JSON list of the schemas of tools that the model may call"
    )
    group.add_argument(
        "--continue-final-message", action="store_true", help="continue the last message instead of answering it"
    )
    add_template_arguments(group)


def run(options: argparse.Namespace) -> None:
    """Run the command: the text goes to standard output, figures to standard error."""
    sampling = sampling_params(options)
    if options.logprobs is not None and not options.json:
        raise VocabtrimError("--logprobs is part of what --json prints: give --json as well")
    prompt, tools = _prompt(options)
    with load_decoder(options) as decoder:
        stream = decoder.stream(
            prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            chat=not options.raw,
            stop=options.stop,
            logprobs=options.logprobs,
            tools=tools,
            template_args=template_args(options),
            chat_template=options.chat_template,
            continue_final_message=options.continue_final_message,
            json_schema=_json_schema(options),
        )
        _show(stream, options.json)


def _show(stream: "Stream", as_json: bool) -> None:
    """Print the text as it comes, and its figures; or all of it as JSON at the end."""
    if as_json:
        print(json.dumps(stream.finish().to_dict(), indent=2))
        return
    printed = print_text(stream)
    result = stream.finish()
    print(figures_line(result.stats, result.finish_reason, printed.first_token_seconds), file=sys.stderr)


def _json_schema(options: argparse.Namespace) -> dict[str, Any] | None:
    """Returns the schema of the answer; None where any text will do."""
    if options.json_object:
        return {"type": "object"}
    if options.json_schema is None:
        return None
    schema = read_json(options.json_schema, "--json-schema")
    if not isinstance(schema, dict):
        raise VocabtrimError(f"--json-schema {options.json_schema} holds no JSON schema: give an object")
    return schema


def _prompt(options: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the text or the messages to answer, and the tools to offer, each None where there are none."""
    tools = read_json(options.tools, "--tools") if options.tools else None
    if options.messages is None:
        return read_prompt(options.prompt), tools
    if options.prompt is not None or options.raw:
        raise VocabtrimError("--messages is the whole prompt: leave out --prompt and --raw")
    messages = read_json(options.messages, "--messages")
    if isinstance(messages, dict):
        body = messages["body"] if isinstance(messages.get("body"), dict) else messages
        messages, tools = body.get("messages"), tools if tools is not None else body.get("tools")
        if unread := sorted(body.keys() - {"messages", "tools", "model"}):
            print(f"note: not read in {options.messages}: {', '.join(unread)}; give options instead", file=sys.stderr)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise VocabtrimError(f"--messages {options.messages} holds no list of messages: see docs/conversations.md")
    return messages, tools
