"""All ids that end a generation, from every file that names one."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast


def eos_token_ids(tokenizer: "PreTrainedTokenizerFast", *configs: Any) -> frozenset[int]:
    """Returns all ids in `eos_token_id` of the tokenizer and of each of `configs`: each is an id, several or none.

    Raises:
        VocabtrimError: One of them is no token id.
    """
    named = [tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)]
    lists = [ids if isinstance(ids, list | tuple) else [ids] for ids in named]
    ids = [token_id for ids in lists for token_id in ids if token_id is not None]
    for token_id in ids:
        if not isinstance(token_id, int | float) or token_id != int(token_id):
            raise VocabtrimError(
                f"eos_token_id names {token_id!r}, which is no token id: correct config.json and generation_config.json"
            )
    return frozenset(int(token_id) for token_id in ids if token_id >= 0)  # -1 stands for none


def add_end_tokens(
    generation_config: "GenerationConfig", config: Any, tokenizer: "PreTrainedTokenizerFast", others: Iterable[int]
) -> None:
    """Put every id that ends a generation into `generation_config`, where calibration, selection and export read it.

    Args:
        generation_config: Changed in place.
        config: The text model's; ids that its embedding has no row for are left out.
        tokenizer: Its chat template's end of an assistant's turn is added too.
        others: Ids that the weight file names.
    """
    named = eos_token_ids(tokenizer, generation_config, config) | turn_end_token_ids(tokenizer) | frozenset(others)
    generation_config.eos_token_id = sorted(token_id for token_id in named if token_id < config.vocab_size) or None


def turn_end_token_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Returns the id of the special token that follows the assistant's text in a rendered conversation.

    A model that was trained on such conversations generates it when its answer is complete. The result is empty where
    no special token follows, and where there is no template or it does not render a plain question and answer.
    """
    try:
        chat = runtime_tokenizer(tokenizer).chat
    except VocabtrimError:  # a template that does not parse is an error of the first conversation, not of the model
        return frozenset()
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [chat.assistant_end(name).lstrip() for name in chat.names]
    first = {token for end in ends if end for token in tokenizer.encode(end, add_special_tokens=False)[:1]}
    return frozenset(special.intersection(first))
