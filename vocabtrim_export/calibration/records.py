"""One record of a data file made into documents: the known forms of prompts, conversations and texts."""

import math
from collections.abc import Iterator, Mapping, Sequence

from engines.bundle.messages import TEXT_PARTS
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.document import Document, Message, cut_text, without_surrogates

_CONVERSATIONS = ("messages", "conversations", "conversation")
# A question's field, and the fields that may hold its answer: plain prompts, GSM8K, Alpaca.
_ANSWERS = {
    "prompt": ("completion", "response"),
    "question": ("answer", "response"),
    "instruction": ("output", "response"),
}
MORE_FIELDS = ("input", "context", "completion", "response", "answer", "output")
FIELDS = (*_CONVERSATIONS, "turns", *_ANSWERS, "text")
_ROLES = {
    **{name: name for name in ("user", "assistant", "system", "tool")},
    **{"human": "user", "developer": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
}


def parse_record(record: object, where: str) -> Iterator[Document]:
    """Yield the documents of one record: one, several for a long text, or none where the record is empty.

    Args:
        record: A string, which is a prompt; a list, which is a conversation; or an object with OpenAI's `messages` (in
            a batch: `body.messages`), ShareGPT's `conversations`, `turns` (the user's), `prompt` with `completion`,
            `question` with `answer`, `instruction` with `input` and `output`, or `text`; the first of these is read. Or
            recorded traffic: OpenAI's `request` and its `response`; only the response's own message is an answer.
        where: The record's place, which errors begin with.

    Raises:
        VocabtrimError: The record has another form, or no message of a user.
    """
    if not isinstance(record, str | list | dict):
        raise VocabtrimError(f"{where}: expected an object with one of {', '.join(FIELDS)}; got {_kind(record)}")
    fields = record if isinstance(record, dict) else {"prompt" if isinstance(record, str) else "messages": record}
    replies: tuple[str, ...] | None = None
    request = fields.get("request")
    if isinstance(request, dict) and _field(fields) is None:
        replies = _replies(fields.get("response"), where)
        fields = request
    body = fields.get("body")
    if isinstance(body, dict) and _field(fields) is None:
        fields = body
    field = _field(fields)
    if field is None and any(name in fields for name in FIELDS):
        return  # the field exists and is null
    if field is None:
        names = ", ".join(str(name)[:40] for name in list(fields)[:8]) or "none"
        raise VocabtrimError(f"{where}: a record needs one of the fields {', '.join(FIELDS)}; it has {names}")
    if field == "text":
        for piece in cut_text([_content(fields[field], f"{where}, {field}")]):
            yield Document(piece, where=where)
        return
    messages = _messages(fields, field, where)
    spoken = [message for message in messages if message.content.strip()]
    if prompt := _first_prompt(messages):
        answers = tuple(message.content for message in spoken if message.role == "assistant")
        parts = tuple(message.content for message in spoken) + (replies or ())
        yield Document("\n\n".join(parts), prompt, where, parts, answers if replies is None else replies)
    elif spoken:
        roles = ", ".join(dict.fromkeys(message.role[:40] for message in spoken))
        raise VocabtrimError(f"{where}: no message in it is a user's: their roles are {roles}")


def _replies(response: object, where: str) -> tuple[str, ...]:
    """Returns the texts of a recorded response. Assistant messages of its request answered earlier requests."""
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = response["body"]
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        raise VocabtrimError(f"{where}: the response of recorded traffic needs `choices`, as OpenAI's has")
    texts = [choice.get("text") or (choice.get("message") or {}).get("content") for choice in choices]
    return tuple(_content(text, f"{where}, response") for text in texts if text)


def _is_choice(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("message") or {}, dict)


def _field(record: Mapping[str, object]) -> str | None:
    return next((name for name in FIELDS if record.get(name) is not None), None)


def _messages(record: Mapping[str, object], field: str, where: str) -> list[Message]:
    value = record[field]
    if field in _ANSWERS and isinstance(value, str):
        more = (record.get("input") or record.get("context")) if field == "instruction" else None
        value = [f"{value}\n\n{more}" if isinstance(more, str) and more.strip() else value]
    if not isinstance(value, list):
        raise VocabtrimError(f"{where}: `{field}` must be a list, not {_kind(value)}")
    messages = [_message(item, f"{where}, {field}[{index}]") for index, item in enumerate(value)]
    answer = next((record[name] for name in _ANSWERS.get(field, ()) if record.get(name) is not None), None)
    if isinstance(answer, str) or _is_number(answer):
        messages.append(Message("assistant", without_surrogates(str(answer))))
    elif isinstance(answer, list) and all(isinstance(item, Mapping) for item in answer):
        messages += [_message(item, f"{where}, answer[{index}]") for index, item in enumerate(answer)]
    return messages


def _is_number(value: object) -> bool:
    """Returns whether an answer is a number, as those of sums may be. NaN stands for a missing one in tables."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _message(item: object, where: str) -> Message:
    """Returns the message of an item in OpenAI's or ShareGPT's form, or of a plain string, which is the user's."""
    if isinstance(item, str):
        return Message("user", _content(item, where))
    if not isinstance(item, Mapping):
        raise VocabtrimError(f"{where}: expected a message, got {_kind(item)}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str):
        raise VocabtrimError(f"{where}: a message needs `role` and `content` (or `from` and `value`)")
    # A tool call has no content.
    return Message(_ROLES.get(role.strip().lower(), role), "" if content is None else _content(content, where))


def _content(value: object, where: str) -> str:
    """Returns the text of a string, or of the text parts of a list of content parts."""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        value = "".join(str(part.get("text", "")) for part in value if part.get("type") in TEXT_PARTS)
    if not isinstance(value, str):
        raise VocabtrimError(f"{where}: expected text, got {_kind(value)}")
    return without_surrogates(value)


def _first_prompt(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Returns the first user message with a text, and the system text before it; empty where no user speaks."""
    for index, message in enumerate(messages):
        if message.role == "user" and message.content.strip():
            before = [each.content for each in messages[:index] if each.role == "system" and each.content.strip()]
            return (Message("system", "\n\n".join(before)), message) if before else (message,)
    return ()


def _kind(value: object) -> str:
    return {dict: "object", list: "list", str: "string", type(None): "null"}.get(type(value), type(value).__name__)
