"""Settings of a `.gguf` file that are refused, and those of its architecture that nothing here reads."""

from typing import Any

from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import GgufHeader

# What is read, compared with the tensors' shapes, refused elsewhere, or without effect on what the model computes.
_KNOWN = frozenset(
    (
        *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("use_parallel_residual", "attn_logit_softcapping", "final_logit_softcapping", "tensor_data_layout"),
        *("logit_scale", "residual_scale", "embedding_scale", "pooling_type", "expert_shared_feed_forward_length"),
        *("expert_count", "expert_used_count", "expert_gating_func", "expert_feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.causal", "attention.scale"),
        *("attention.clamp_kqv", "attention.max_alibi_bias", "shortconv.l_cache"),
        *("attention.sliding_window", "attention.sliding_window_pattern"),
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    )
)
_SIZES = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
_BY_LAYER = ("lfm2", "gemma4")  # architectures of which transformers reads sizes of each layer
_ROTATION = "rope.scaling."  # read, or refused, in `gguf_rotation`
_WITHOUT_EFFECT = (0, 1, "")


def check_kind(header: GgufHeader) -> None:
    """Refuse files that hold no decoder, or one whose layers have sizes of their own.

    Raises:
        VocabtrimError: The file is of such a kind.
    """
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise VocabtrimError(f"{header.path} holds no model but a part of one ({kind}): give the language model's file")
    parameters = header.hyperparameters()
    if parameters.get("attention.causal") is False:
        raise VocabtrimError(
            f"{header.path} is a model with bidirectional attention, which cannot continue a text token by token: give "
            "a model trained as a decoder"
        )
    by_layer = [name for name in _SIZES if not isinstance(parameters.get(name, 0), int)]
    if by_layer and header.architecture not in _BY_LAYER:
        raise VocabtrimError(
            f"{header.path} states {header.architecture}.{by_layer[0]} for each layer, which is not read: give the "
            "original weights"
        )


def unread_note(header: GgufHeader) -> tuple[str, ...]:
    """Returns a note that names the settings which the export does not follow; none where there are none."""
    unread = {
        name: value
        for name, value in header.hyperparameters().items()
        if name not in _KNOWN and not name.startswith(_ROTATION) and _has_effect(value)
    }
    if not unread:
        return ()
    named = ", ".join(f"{header.architecture}.{name}={_shown(value)}" for name, value in sorted(unread.items()))
    return (f"{header.path} has settings that are not read, so the model may differ from llama.cpp's: {named}",)


def _has_effect(value: Any) -> bool:
    return hasattr(value, "tolist") or isinstance(value, list) or value not in _WITHOUT_EFFECT


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:80]
