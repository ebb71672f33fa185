"""`ChatTemplates`: conversations rendered by a model's own templates as transformers' `apply_chat_template` does it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from engines.bundle.messages import MessageForms, fit_messages, plain_data, plain_messages, plain_tools
from engines.bundle.template_sandbox import CompiledTemplate
from engines.errors import VocabtrimError

DEFAULT, TOOL_USE = "default", "tool_use"
_OPEN_END = "VOCABTRIM_OPEN_END "  # the space tells whether the template trims what ends with it
_PROBE, _ARGUMENT = "vocabtrim probe", "vocabtrim_argument"
_ARGUMENTS = json.dumps({_ARGUMENT: 1})


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Settings for rendering a conversation as a prompt.

    Attributes:
        template: The name of one of the model's templates; None: "tool_use" where `tools` are given and the model has
            such a template, else "default".
        tools: The JSON schemas of tools that the model may call, as OpenAI and transformers have them.
        template_args: The template's own variables, such as `enable_thinking` or `documents`; plain JSON data.
        continue_final_message: The prompt ends within the last message, and the model continues that message.
        now: The time that `strftime_now` gives a template; None: the time of the rendering.
    """

    template: str | None = None
    tools: Sequence[Any] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    now: datetime | None = None


class ChatTemplates:
    """The chat templates of one tokenizer."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile the templates.

        Args:
            sources: jinja2 sources by name, see `named_templates`.
            special_tokens: The texts of special tokens by the names that templates use, such as `bos_token`.

        Raises:
            VocabtrimError: A template does not parse.
        """
        self._special_tokens = dict(special_tokens)
        self._templates = {name: CompiledTemplate(source) for name, source in sources.items()}
        self._forms: dict[str, MessageForms] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the templates, in order; empty where the tokenizer has none."""
        return tuple(sorted(self._templates))

    def render(self, messages: Sequence[Any], options: ChatOptions = ChatOptions()) -> str:
        """Render a conversation.

        Args:
            messages: Messages `{"role": …, "content": …}` as OpenAI or transformers have them; they may have text
                parts, tool calls, and contents that are None.
            options: The template and its variables.

        Returns:
            The prompt, up to where the assistant's answer begins; with `continue_final_message`, up to the end of the
            last message.

        Raises:
            VocabtrimError: There is no such template, or it refuses the messages or fails.
        """
        name = self._choose(options)
        _check_arguments(options.template_args)
        if isinstance(messages, str | Mapping) or not len(messages):
            raise VocabtrimError("the conversation is empty: give a list of at least one message")
        plain = fit_messages(plain_messages(messages), self._forms_of(name))
        if options.continue_final_message:
            return self._render_open(name, plain, options)
        return self._render(name, plain, options)

    def check(self, options: ChatOptions) -> None:
        """Check that there is a template of the name that `options` state, if they state one.

        Raises:
            VocabtrimError: There is none.
        """
        if options.template is not None:
            self._choose(options)

    def reads_tools(self, options: ChatOptions) -> bool:
        """Returns whether the template that `options` choose offers tools to the model.

        Raises:
            VocabtrimError: There is no such template.
        """
        return self._templates[self._choose(options)].reads("tools")

    def assistant_end(self, name: str) -> str:
        """Returns the text that the template writes after an assistant's last message; "" where that is not clear."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        text = self._try(name, messages, add_generation_prompt=False)
        return text.rpartition(_PROBE)[2]

    def _choose(self, options: ChatOptions) -> str:
        if not self._templates:
            raise VocabtrimError("this tokenizer has no chat template: give the prompt as plain text")
        wants_tools = options.tools is not None and TOOL_USE in self._templates
        name = options.template or (TOOL_USE if wants_tools else DEFAULT)
        if name not in self._templates:
            raise VocabtrimError(f"no chat template is named {name}: choose one of {', '.join(self.names)}")
        return name

    def _render(self, name: str, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        variables = {
            "messages": messages,
            "tools": plain_tools(options.tools),
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": lambda form: (options.now or datetime.now()).strftime(form),
        }
        return self._templates[name].render(self._special_tokens | variables | plain_data(options.template_args))

    def _render_open(self, name: str, messages: Sequence[dict[str, Any]], options: ChatOptions) -> str:
        """Render with a mark at the end of the last message, and cut there."""
        arguments = {"add_generation_prompt": False, **options.template_args}
        if arguments["add_generation_prompt"]:
            raise VocabtrimError("add_generation_prompt cannot go with continue_final_message: leave out one of them")
        *before, last = messages
        last_text, marked = _open_content(last.get("content"))
        last = last | {"content": marked}
        text = self._render(name, [*before, last], replace(options, template_args=arguments))
        kept, mark, _ = text.rpartition(_OPEN_END.strip())
        if not mark or mark in kept or last_text.strip() not in text:
            raise VocabtrimError(
                "the chat template does not write the final message once, as it is: it cannot be continued; leave out "
                "continue_final_message"
            )
        return kept if text[len(kept) :].startswith(_OPEN_END) else kept.rstrip()

    def _forms_of(self, name: str) -> MessageForms:
        """Find out which forms of messages this template reads, by rendering each form once."""
        if name not in self._forms:
            self._forms[name] = self._probe(name)
        return self._forms[name]

    def _probe(self, name: str) -> MessageForms:
        user = {"role": "user", "content": _PROBE}
        as_text = self._try(name, [user])
        as_parts = self._try(name, [user | {"content": [{"type": "text", "text": _PROBE}]}])
        parts = _PROBE in as_parts and (as_parts == as_text or not _shows_keys(as_parts))
        if _PROBE not in as_text and not parts:  # the template refuses a lone user message for another reason
            return MessageForms()
        text_call, object_call = _tool_call(_ARGUMENTS), _tool_call(json.loads(_ARGUMENTS))
        reads_text = _ARGUMENTS in self._try_contents(name, user, text_call)
        as_object = self._try_contents(name, user, object_call)
        reads_object = _ARGUMENT in as_object and (str(json.loads(_ARGUMENTS)) not in as_object or not reads_text)
        with_none = self._try(name, [user, {"content": None} | (text_call if reads_text else object_call)])
        reads_none = _ARGUMENT in with_none and str(None) not in with_none
        text = _PROBE in as_text
        content: list[Any] = ["a", _PROBE] if text else [[{"type": "text", "text": each}] for each in ("a", _PROBE)]
        with_developer = self._try(
            name, [{"role": "developer", "content": content[1]}, {"role": "user", "content": content[0]}]
        )
        return MessageForms(
            text,
            parts,
            reads_text or not reads_object,
            reads_object or not reads_text,
            reads_none,
            _PROBE in with_developer,
        )

    def _try_contents(self, name: str, user: dict[str, Any], call: dict[str, Any]) -> str:
        """Returns what the template writes of a tool call with no content, with None and with an empty text."""
        return "".join(self._try(name, [user, content | call]) for content in ({}, {"content": None}, {"content": ""}))

    def _try(self, name: str, messages: Sequence[dict[str, Any]], **arguments: Any) -> str:
        """Returns the rendered text; "" where the template fails."""
        try:
            return self._render(name, messages, ChatOptions(template_args=arguments))
        except VocabtrimError:
            return ""


def named_templates(value: Any) -> dict[str, str]:
    """Read what a tokenizer's config, or transformers, calls `chat_template`.

    Args:
        value: One jinja2 source, which becomes "default"; a mapping of names to sources; a list of `{"name": …,
            "template": …}`; or None.

    Returns:
        The jinja2 sources by name.
    """
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list | tuple):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)}
    named = value.items() if isinstance(value, Mapping) else ()
    return {name: source for name, source in named if isinstance(name, str) and isinstance(source, str)}


def _check_arguments(template_args: Mapping[str, Any]) -> None:
    if not isinstance(template_args, Mapping) or not all(isinstance(name, str) for name in template_args):
        raise VocabtrimError("template_args must map names of the template's variables to values")
    if reserved := sorted({"messages", "tools", "continue_final_message"} & set(template_args)):
        raise VocabtrimError(f"{reserved[0]} is no template argument: give it as an option of its own")


def _open_content(content: Any) -> tuple[str, Any]:
    """Returns the last text of a message's content, and the content with the mark behind that text."""
    if isinstance(content, str):
        return content, content + _OPEN_END
    for at in reversed(range(len(content)) if isinstance(content, list) else ()):
        part = content[at]
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return part["text"], [*content[:at], part | {"text": part["text"] + _OPEN_END}, *content[at + 1 :]]
    raise VocabtrimError("the final message has no text to continue: give it one, or leave out continue_final_message")


def _shows_keys(text: str) -> bool:
    """Returns whether the template printed a list of parts as Python or JSON instead of reading the parts."""
    return any(f"{quote}type{quote}" in text for quote in "'\"")


def _tool_call(arguments: Any) -> dict[str, Any]:
    function = {"name": "probe", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "call12345", "type": "function", "function": function}]}
