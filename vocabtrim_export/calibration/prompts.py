"""Documents turned into token ids: chats rendered by the tokenizer's template, raw text as it is."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.corpus import Document, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompts(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]) -> list[list[int]]:
    """The token ids that a model is to continue, for each document.

    A chat is rendered with the generation prompt where the tokenizer has a template; otherwise, and for raw text, the
    plain text is taken, with the special tokens that the tokenizer adds to text.
    """

    def encode_one(document: Document) -> list[int]:
        is_chat = bool(document.prompt and tokenizer.chat_template)
        return encode(tokenizer, [prompt_text(tokenizer, document)], add_special_tokens=not is_chat)[0]

    return [encode_one(document) for document in documents]  # a template writes its special tokens itself


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text, whole: neither padded nor truncated."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def prompt_text(tokenizer: "PreTrainedTokenizerFast", document: Document) -> str:
    """The text that a model is to continue."""
    if not document.prompt:
        return document.text
    if not tokenizer.chat_template:
        return "\n\n".join(message.content for message in document.prompt)
    return render_chat(tokenizer, document.prompt)


def render_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], chat_template: str | None = None
) -> str:
    """Render with `chat_template`, else the tokenizer's own, up to where an answer begins.

    A template that knows no system role finds the system's text before the user's. The date that some templates write
    is left empty: the result must not depend on the day. Raises `VocabtrimError` where the template fails.
    """
    from jinja2 import TemplateError

    def render(chat: Sequence[Message]) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in chat],
            tokenize=False,
            chat_template=chat_template,
            add_generation_prompt=True,
            strftime_now=lambda _format: "",
        )
        return cast(str, text)  # as `tokenize=False` says

    system, *rest = messages
    try:
        try:
            return render(messages)
        except TemplateError:
            if system.role != "system":
                raise
            return render([Message(rest[0].role, f"{system.content}\n\n{rest[0].content}"), *rest[1:]])
    except TemplateError as error:
        raise VocabtrimError(f"the tokenizer's chat template cannot render a conversation: {error}") from error
