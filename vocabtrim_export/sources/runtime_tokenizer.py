"""The tokenizer that a model's bundle will run with, created from transformers' one before there is a bundle."""

from typing import TYPE_CHECKING

from engines.bundle.chat_template import DEFAULT
from engines.bundle.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def runtime_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> Tokenizer:
    """Returns a tokenizer that renders and encodes prompts as `generate` will.

    Raises:
        VocabtrimError: A chat template does not parse.
    """
    names = ("split_special_tokens", "clean_up_tokenization_spaces")
    config = tokenizer.special_tokens_map | {name: getattr(tokenizer, name) for name in names}
    return Tokenizer(tokenizer.backend_tokenizer, config, tokenizer.chat_template)


def template_note(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, ...]:
    """Returns a line for a tokenizer none of whose named chat templates is the default."""
    named = tokenizer.chat_template
    if not isinstance(named, dict) or DEFAULT in named:
        return ()
    return (f"no chat template is named {DEFAULT}: choose one by --chat-template, of {', '.join(named)}",)
