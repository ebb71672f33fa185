"""Documents turned into token ids: chats rendered by the tokenizer's template, raw text as it is."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.document import Document, Skipped, describe_skipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from runtime import SpeculativeDecoder


def encode_document(tokenizer: Tokenizer, document: Document, options: ChatOptions | None = None) -> list[int]:
    """Returns the token ids that a model is to continue.

    A chat is rendered up to where an answer begins; a template that knows no system role finds the system's text before
    the user's. Raw text, and a prompt for a tokenizer without a template, are taken as they are, with the special
    tokens that the tokenizer adds to text.

    Raises:
        VocabtrimError: The template refuses the messages.
    """
    options = options or ChatOptions()
    if not document.prompt:
        return tokenizer.encode(document.text)
    if not tokenizer.has_chat_template:
        return tokenizer.encode("\n\n".join(message.content for message in document.prompt))
    messages = [asdict(message) for message in document.prompt]
    try:
        return tokenizer.encode_chat(messages, options)
    except VocabtrimError:
        if messages[0]["role"] != "system":
            raise
    system, user = messages
    return tokenizer.encode_chat([user | {"content": f"{system['content']}\n\n{user['content']}"}], options)


def prompts_that_fit(
    decoder: "SpeculativeDecoder", documents: Sequence[Document], most: int, options: ChatOptions
) -> tuple[list[list[int]], list[Skipped]]:
    """Returns the token ids of the first `most` documents that the decoder can run, and the documents left out before.

    Raises:
        VocabtrimError: None fits, the decoder has no tokenizer, or there is no chat template of the name in `options`.
    """
    tokenizer = decoder.tokenizer
    if tokenizer is None:
        raise VocabtrimError("the target's bundle has no tokenizer, which prompts need: export it again")
    tokenizer.chat.check(options)
    prompts: list[list[int]] = []
    skipped: list[Skipped] = []
    for document in documents:
        if len(prompts) == most:
            break
        try:
            prompts.append(decoder.encode(encode_document(tokenizer, document, options)))
        except VocabtrimError as error:
            skipped.append(Skipped(document.where, str(error)))
    if not prompts:
        raise VocabtrimError(f"no prompt can be used: {describe_skipped(skipped) if skipped else 'there is none'}")
    return prompts, skipped


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Returns the token ids of each text, neither padded nor truncated."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids
