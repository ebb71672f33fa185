"""What transformers leaves out when it opens a `.gguf` file, or puts in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engines.bundle.typed_json import parse
from engines.errors import VocabtrimError

_FIRST_CONTEXT = 8192  # of Llama 3; with these three, one factor for each release says all of its rotation
_LOW, _HIGH = 1.0, 4.0
_BASE = 10000.0  # where a file states none


def rope_parameters(path: Path) -> dict[str, Any] | None:
    """How Llama 3.1 and later turn, which their files say by a tensor of divisors; None for what transformers reads.

    Raises `VocabtrimError` for a file that scales its rotation in another way: transformers would not scale it.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    stated = {name.split(".", 1)[-1]: field for name, field in reader.fields.items() if ".rope." in name}
    scaling = str(stated["rope.scaling.type"].contents()) if "rope.scaling.type" in stated else "none"
    if scaling != "none":
        raise VocabtrimError(f"{path} scales its rotation ({scaling}), which is not read: give the original weights")
    tensors = [tensor for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if not tensors:
        return None
    base = float(stated["rope.freq_base"].contents()) if "rope.freq_base" in stated else _BASE
    divisors = np.asarray(tensors[0].data, np.float32).ravel()
    factor = float(divisors.max())
    wanted = _divisors(len(divisors), base, factor)
    if tensors[0].name != "rope_freqs.weight" or not np.allclose(divisors, wanted):
        raise VocabtrimError(f"{path} turns by {tensors[0].name}, not as Llama 3 does: give the original weights")
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _FIRST_CONTEXT,
    }


def _divisors(half: int, base: float, factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each frequency: 1 where it turns more than `_HIGH` times in the first context, `factor` below `_LOW`."""
    turns = _FIRST_CONTEXT / (2 * np.pi * base ** (np.arange(half) / half))
    share = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    made: np.ndarray[Any, np.dtype[np.float64]] = 1 / ((1 - share) / factor + share)
    return made


def without_additions(tokenizer: PreTrainedTokenizerFast, rows: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a file of `rows` tokens without the <|endoftext|> that transformers adds where there is none."""
    described = parse(tokenizer.backend_tokenizer.to_str(), "the tokenizer")
    assert isinstance(described, dict)
    kept = [token for token in described["added_tokens"] if token["id"] < rows]
    if len(kept) == len(described["added_tokens"]):
        return tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described | {"added_tokens": kept})),
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
    )
