"""Tokenizers that transformers reads from a tokenizer.json: they have to split text as that file states."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece

_SPACE = "add_prefix_space"


def follow_tokenizer_file(where: str, tokenizer: Any) -> None:
    """Give a tokenizer the model, normaliser, pre-tokenizer and decoder of its `tokenizer.json`.

    transformers 5 takes only the tokens and merges of that file where tokenizer_config.json names a class with parts of
    its own, such as GPT2Tokenizer or LlamaTokenizer. What the file splits otherwise, such as the digits of SmolLM2,
    then gets other ids than those that the model was trained on.

    Left as they are: special tokens, the tokens that the class puts around a text, the settings of BERT's class (whose
    file may lack what tokenizer_config.json says), and `add_prefix_space`, which tokenizer_config.json may set.

    Args:
        where: The model's directory.
        tokenizer: transformers' fast tokenizer; changed in place.
    """
    file = Path(where) / "tokenizer.json"
    if not file.is_file():
        return
    stated, backend = Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer
    if isinstance(stated.model, WordPiece):
        return
    backend.model, backend.normalizer, backend.decoder = stated.model, stated.normalizer, stated.decoder
    if _without_space(stated.pre_tokenizer) != _without_space(backend.pre_tokenizer):
        backend.pre_tokenizer = stated.pre_tokenizer
    if not _surrounds(backend) and tokenizer.init_kwargs.get("add_bos_token") is not False:
        backend.post_processor = stated.post_processor  # GPTNeoXTokenizer forgets it, and the BOS with it


def _surrounds(backend: Tokenizer) -> bool:
    """Returns whether the tokenizer puts tokens around a text."""
    return len(backend.encode("a").ids) > len(backend.encode("a", add_special_tokens=False).ids)


def _without_space(pre_tokenizer: Any) -> Any:
    """Returns the settings of a pre-tokenizer without `add_prefix_space`; None where there is none."""
    if pre_tokenizer is None:
        return None

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(item) for name, item in value.items() if name != _SPACE}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads(pre_tokenizer.__getstate__()))
