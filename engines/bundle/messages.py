"""Messages as users have them, made into what a chat template reads: plain JSON data in the form that it expects."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from engines.errors import VocabtrimError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first
_CONTENT, _CALLS = "content", "tool_calls"
TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file")


@dataclass(frozen=True, slots=True)
class MessageForms:
    """The forms of messages that a chat template can read.

    Attributes:
        text: Contents that are strings.
        parts: Contents that are lists of `{"type": "text", "text": …}`.
        argument_text: Arguments of tool calls as strings of JSON, as OpenAI has them; otherwise they must be objects.
        argument_object: Arguments of tool calls as objects; otherwise they must be strings of JSON.
        none: Contents that are None, in messages with tool calls. A template that cannot read them would write "None"
            or fail, so the key is left out for it; one that can read them gets the key.
        developer: Messages of the role "developer", OpenAI's later name of "system". Many templates pass over roles
            that they do not know, and the message would be lost.
    """

    text: bool = True
    parts: bool = True
    argument_text: bool = True
    argument_object: bool = True
    none: bool = False
    developer: bool = True


def plain_data(value: Any) -> Any:
    """Copy `value` into JSON's types, so that a template meets no object with methods of its own.

    Mappings, sequences, numpy scalars, dataclasses and pydantic models are converted; anything else becomes its type's
    name, as in transformers.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # an enum, say
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, np.generic):
        return plain_data(value.item())
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain_data, value)) if type(value) in (list, tuple) else [*map(plain_data, value)]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return plain_data(dump())
    return f"<{type(value).__name__}>"


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Copy messages into plain data, with their reasoning under each name that templates read.

    Keys whose value is None, and empty lists of tool calls, are left out, except for the content.

    Raises:
        VocabtrimError: Something is not a message, or a message has neither content nor a call, or images or other
            media.
    """
    plain = [plain_data(message) for message in messages]
    for index, message in enumerate(plain):
        if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
            raise VocabtrimError(f'messages[{index}] is no message: give {{"role": …, "content": …}}')
        if not isinstance(message.get("role"), str):
            raise VocabtrimError(f'messages[{index}] has no role: give one, such as "user" or "assistant"')
        if not message.keys() - {"role", "name"}:
            raise VocabtrimError(f"messages[{index}] has no content: give it a text")
        if message.get("function_call"):  # OpenAI's first form of a call; templates pass over it
            raise VocabtrimError(f"messages[{index}] has a function_call, which no template reads: give tool_calls")
        _refuse_media(message.get("content"), index)
    return [_with_reasoning(_without_nothing(message)) for message in plain]


def plain_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    """Copy the JSON schemas of tools into plain data.

    Raises:
        VocabtrimError: A tool is not a JSON schema.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise VocabtrimError("tools must be a list of JSON schemas, one for each tool")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            how = "; transformers.utils.get_json_schema makes one of a function" if callable(tool) else ""
            raise VocabtrimError(f"tools[{index}] is no JSON schema (an object){how}")
    return [plain_data(tool) for tool in tools]


def fit_messages(messages: Sequence[dict[str, Any]], forms: MessageForms) -> list[dict[str, Any]]:
    """Convert contents, tool-call arguments and roles to forms that the template reads, where it does not read theirs.

    Text parts are joined with nothing between them, as templates that read parts write them.
    """
    return [_fit_role(_fit_arguments(_fit_content(message, forms), forms), forms) for message in messages]


def _refuse_media(content: Any, index: int) -> None:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in _MEDIA:
            raise VocabtrimError(f"messages[{index}] has a part of type {part['type']!r}: only text can be read")


def _without_nothing(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys that say nothing: of the value None, and a list of no tool calls."""
    kept = {key: value for key, value in message.items() if value is not None or key == _CONTENT}
    return {key: value for key, value in kept.items() if key != _CALLS or value != []}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _fit_content(message: dict[str, Any], forms: MessageForms) -> dict[str, Any]:
    content = message.get("content")
    if content is None and _CONTENT in message and _CALLS not in message:
        content = ""  # templates would fail, or write "None"
        message = message | {_CONTENT: content}
    if content is None and not forms.none:
        return {key: value for key, value in message.items() if key != _CONTENT}
    if content is None and _CALLS in message:
        return message | {_CONTENT: None}
    if isinstance(content, str) and not forms.text:
        return message | {"content": [{"type": "text", "text": content}]}
    if not isinstance(content, list):
        return message
    texts = [_part_text(part) for part in content]
    if None in texts:
        return message
    if forms.parts:
        return message | {"content": [{"type": "text", "text": text} for text in texts]}
    return message | {"content": "".join(text for text in texts if text is not None)}


def _fit_role(message: dict[str, Any], forms: MessageForms) -> dict[str, Any]:
    is_lost = message.get("role") == "developer" and not forms.developer
    return message | {"role": "system"} if is_lost else message


def _part_text(part: Any) -> str | None:
    """Returns the text of one part of a content; None where it is not text."""
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        part = part.get("text")
    return part if isinstance(part, str) else None


def _fit_arguments(message: dict[str, Any], forms: MessageForms) -> dict[str, Any]:
    calls = message.get(_CALLS)
    if not isinstance(calls, list) or (forms.argument_text and forms.argument_object):
        return message
    return message | {_CALLS: [_fit_call(call, forms) for call in calls]}


def _fit_call(call: Any, forms: MessageForms) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if isinstance(arguments, dict) and not forms.argument_object:
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not forms.argument_text:
        arguments = _parsed(arguments)
    return call | {"function": function | {"arguments": arguments}}


def _parsed(arguments: str) -> Any:
    """Returns the object that a string of JSON stands for; other strings as they are."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # a model may have called a tool with something that is not JSON
    return parsed if isinstance(parsed, dict) else arguments
