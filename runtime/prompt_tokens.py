"""A prompt of any form → the token ids that the target reads."""

from collections.abc import Mapping, Sequence
from numbers import Number
from operator import index
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import ContextExceededError, VocabtrimError

_MOST_IDS = 1 << 32  # the tokenizers library's ids have 32 bits

# Text, the messages of a conversation (`{"role": …, "content": …}`, or pydantic models of them), or token ids.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | NDArray[np.int64]


def prompt_token_ids(prompt: Prompt, tokenizer: Tokenizer | None, chat: bool, options: ChatOptions) -> list[int]:
    """Turn a prompt into token ids.

    Args:
        prompt: Text, messages or token ids.
        tokenizer: The target's tokenizer; needed unless the prompt is token ids.
        chat: Put text into the chat template, as one message of the user, where the tokenizer has a template.
        options: The options of the chat template.

    Raises:
        VocabtrimError: There is no tokenizer, options are given for a prompt that no template renders, or the prompt
            has none of these forms.
    """
    given: Any = prompt
    is_list = hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, bytes | Mapping)
    if not is_list or _is_no_message(given):
        raise VocabtrimError(f"a prompt is text, a list of messages, or token ids; got {_kind(given)}")
    if isinstance(prompt, str):
        if chat and require_tokenizer(tokenizer).has_chat_template:
            return require_tokenizer(tokenizer).encode_chat([{"role": "user", "content": prompt}], options)
    elif len(prompt) and not hasattr(prompt[0], "__index__"):
        if options.tools and not require_tokenizer(tokenizer).chat.reads_tools(options):
            raise VocabtrimError("the model's chat template reads no tools: leave them out")
        return require_tokenizer(tokenizer).encode_chat(cast(Sequence[Any], prompt), options)
    if options != ChatOptions():
        raise VocabtrimError(
            "tools and template arguments are for messages that a chat template renders: leave them out, or "
            "give messages"
        )
    if isinstance(prompt, str):
        return require_tokenizer(tokenizer).encode(prompt)
    try:
        return [index(token) for token in cast(Sequence[int], prompt)]
    except TypeError as error:
        raise VocabtrimError(f"a prompt is text, a list of messages, or token ids; got {_kind(given)}") from error


def encode_prompt(
    prompt: Prompt, target: Engine, tokenizer: Tokenizer | None, chat: bool, options: ChatOptions
) -> list[int]:
    """Turn a prompt into token ids that the target can read.

    The arguments are those of `prompt_token_ids`, and the target's engine; the errors are also those of `check_prompt`.
    """
    token_ids = prompt_token_ids(prompt, tokenizer, chat, options)
    check_prompt(token_ids, target, tokenizer)
    return token_ids


def check_prompt(token_ids: Sequence[int], target: Engine, tokenizer: Tokenizer | None) -> None:
    """Check that the target can read a prompt.

    Args:
        token_ids: The prompt.
        target: The engine that reads it.
        tokenizer: Names tokens in the message.

    Raises:
        VocabtrimError: The prompt is empty, leaves no room in the context, or has ids that the target has no row for.
    """
    if not token_ids:
        raise VocabtrimError("the prompt is empty: give at least one token")
    if len(token_ids) >= target.capacity:
        raise ContextExceededError(
            f"the prompt has {len(token_ids)} tokens and the target's context holds {target.capacity}: "
            "shorten it, or export with a longer context"
        )
    vocab_size = target.manifest.vocab_size
    if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
        is_known = tokenizer and 0 <= outside[0] < _MOST_IDS
        token = tokenizer.backend.id_to_token(outside[0]) if tokenizer and is_known else None
        raise VocabtrimError(
            f"the prompt has the token id {outside[0]}{f' ({token})' if token else ''}, for which the target has "
            f"no row: its ids are 0 to {vocab_size - 1}; leave it out"
        )


def _is_no_message(prompt: Any) -> bool:
    """Returns whether a list begins with something that is neither a message nor a token id."""
    if isinstance(prompt, str) or not len(prompt):
        return False
    first = prompt[0]
    is_scalar = first is None or isinstance(first, str | bytes | list | tuple | Number)
    return is_scalar and not hasattr(first, "__index__")


def _kind(prompt: Any) -> str:
    is_list = isinstance(prompt, list | tuple) and prompt
    return f"a {type(prompt).__name__} of {type(prompt[0]).__name__}" if is_list else type(prompt).__name__


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """Returns the tokenizer.

    Raises:
        VocabtrimError: There is none.
    """
    if tokenizer is None:
        raise VocabtrimError("the target's bundle has no tokenizer: give the prompt as token ids, without stop strings")
    return tokenizer
