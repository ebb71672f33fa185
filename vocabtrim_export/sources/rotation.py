"""The largest position of a model's rotary embedding, and the tables of models that have two sets of them."""

from typing import Any

from transformers import PreTrainedModel

from engines.errors import VocabtrimError
from vocabtrim_export.tracing.composites import rotary_modules

DEFAULT_CONTEXT = 4096


def context_length(name: str, model: PreTrainedModel, max_length: int | None) -> int:
    """Returns the number of tokens that the KV cache of a bundle holds.

    Args:
        name: The model's name, for the error.
        model: The loaded model.
        max_length: The user's `--max-length`; None takes the model's first length, at most 4,096 tokens.

    Raises:
        VocabtrimError: `max_length` is below 2 or more than the model can take.
    """
    config = model.config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", DEFAULT_CONTEXT))
    if max_length is None:
        return min(limit, _first_length(model) or limit, DEFAULT_CONTEXT)
    if _rope(model).get("rope_type") == "dynamic" and max_length > limit:
        raise VocabtrimError(
            f"--max-length {max_length}: beyond {limit} tokens {name} rotates by another frequency at every length "
            f"(dynamic rope scaling), and a graph has one set of tables; give at most {limit}"
        )
    if not 2 <= max_length <= limit:  # a token of the prompt and one that follows it
        raise VocabtrimError(f"--max-length {max_length} is not in the 2 to {limit} tokens that {name} takes")
    return max_length


def fix_long_tables(name: str, model: PreTrainedModel, context: int) -> tuple[str, ...]:
    """Choose a LongRoPE model's long tables permanently where `context` is beyond its first length.

    transformers takes the short tables for short texts and the long ones for long texts; a graph has one set. The model
    is changed in place, so that calibration, the graph and every comparison rotate alike.

    Returns:
        A note for the user, where the tables were chosen.
    """
    first = _first_length(model)
    if first is None or context <= first:
        return ()
    rope = _rope(model)
    rope["short_factor"] = rope["long_factor"]
    for rotary in rotary_modules(model):
        for buffer, value in type(rotary)(model.config.get_text_config()).named_buffers():
            setattr(rotary, buffer, value)
        rotary.long_inv_freq = None  # type: ignore[assignment]
    return (
        f"--max-length {context} is beyond the first {first} tokens of {name}: its long rotary tables are used at "
        "every length, where transformers takes the short ones for shorter texts",
    )


def _rope(model: PreTrainedModel) -> dict[str, Any]:
    return getattr(model.config.get_text_config(), "rope_parameters", None) or {}


def _first_length(model: PreTrainedModel) -> int | None:
    """Returns the length up to which a LongRoPE model takes its short tables; None for a model with one rotation."""
    rope = _rope(model)
    if rope.get("rope_type") != "longrope":
        return None
    config = model.config.get_text_config()
    stated = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(stated or config.max_position_embeddings)
