"""Architectures that cannot be exported, recognised by their configuration before any weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from engines.errors import VocabtrimError
from vocabtrim_export.sources.architecture import (
    Config,
    ModelClass,
    caches_differ,
    counts_positions,
    has_alibi,
    has_experts,
    has_relative_bias,
    has_sinks,
    has_sparse_attention,
    has_unknown_experts,
    is_bidirectional,
    keeps_a_state,
    owns_its_attention,
    owns_its_experts,
    shares_caches,
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One kind of architecture that is refused.

    Attributes:
        what: The kind, in the form that follows "is".
        why: Why it cannot be exported.
        matches: Whether a language model of this configuration and class is of the kind.
        instead: The model to use instead.
    """

    what: str
    why: str
    matches: Callable[[Config, ModelClass], bool]
    instead: str = "give a decoder-only model with plain attention in every layer, such as Llama, Qwen3 or Gemma 3"


def check_architecture(spec: str, config: PreTrainedConfig) -> None:
    """Refuse architectures that cannot be exported, by the configuration alone.

    Args:
        spec: MODEL as the user gave it.
        config: The language model's own configuration; for a multimodal checkpoint its text model's.

    Raises:
        VocabtrimError: One line names the kind of architecture, why it cannot be exported and what to use instead.
    """
    if config.is_encoder_decoder:
        raise _error(spec, config, _ENCODER_DECODER)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise VocabtrimError(
            f"{spec} is no language model: transformers has none for {config.model_type}; give a causal language model"
        )
    _check(spec, config, kind, REFUSALS)


def check_tensorrt(spec: str, config: PreTrainedConfig) -> None:
    """Refuse a language model that ONNX Runtime runs and TensorRT does not. See `check_architecture`."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None:  # not a head
        _check(spec, config, kind, NOT_FOR_TENSORRT)


def _check(spec: str, config: PreTrainedConfig, kind: ModelClass, refusals: Sequence[Refusal]) -> None:
    for refusal in refusals:
        if refusal.matches(config, kind):
            raise _error(spec, config, refusal)


def _error(spec: str, config: PreTrainedConfig, refusal: Refusal) -> VocabtrimError:
    return VocabtrimError(f"{spec} ({config.model_type}) is {refusal.what}: {refusal.why}; {refusal.instead}")


_ENCODER_DECODER = Refusal(
    "an encoder-decoder model",
    "its decoder reads what an encoder makes of the prompt, and only a decoder by itself can be exported",
    lambda config, _kind: bool(config.is_encoder_decoder),
    "give a decoder-only model",
)
REFUSALS = (
    Refusal(
        "a byte-level model with patches",
        "it has no tokens, so there is no vocabulary to trim",
        lambda config, _kind: hasattr(config, "patcher_config"),
    ),
    Refusal(
        "a speech model",
        "its text is one stream beside those of its audio codes",
        lambda config, _kind: getattr(config, "audio_vocab_size", None) is not None,
        "give a language model",
    ),
    Refusal(
        "a model with bidirectional attention",
        "its tokens see those behind them (is_decoder, is_causal or use_bidirectional_attention in config.json), so it "
        "cannot continue a text token by token",
        is_bidirectional,
        "give a model trained as a decoder",
    ),
    Refusal(
        "a model with a recurrent state (state space, linear attention or convolution layers)",
        "the state of its layers cannot be rewound when drafted tokens are rejected",
        keeps_a_state,
    ),
    Refusal(
        "a mixture of experts with code of its own",
        "transformers does not compute its experts through the interface that the export replaces",
        owns_its_experts,
        "give a mixture of the common form, such as Qwen3-MoE, or a dense model",
    ),
    Refusal(
        "a model with sparse or chunked attention",
        "its layers choose which earlier tokens they attend to, which the exported attention cannot do",
        has_sparse_attention,
    ),
    Refusal(
        "a model with relative position biases",
        "the exported attention has no bias that depends on distance",
        has_relative_bias,
    ),
    Refusal(
        "a model whose last layers read the KV caches of earlier ones",
        "every exported layer has a KV cache of its own",
        shares_caches,
    ),
    Refusal(
        "a model whose layers have KV caches of different shapes",
        "the bundles' KV cache has one shape for all layers",
        caches_differ,
    ),
    Refusal(
        "a model with attention code of its own",
        "transformers does not compute its attention through the interface that the export replaces",
        owns_its_attention,
    ),
    Refusal(
        "a model that counts positions by itself",
        "its code takes no position_ids, so it cannot continue from a KV cache outside of transformers",
        counts_positions,
    ),
    Refusal(
        "a mixture of experts with a gate of its own",
        "its experts do not compute SwiGLU, the one gated unit that ONNX Runtime's experts have on a CPU",
        has_unknown_experts,
        "give a mixture of the common form, such as Qwen3-MoE, or a dense model",
    ),
)
NOT_FOR_TENSORRT = (
    Refusal(
        "a mixture of experts",
        "TensorRT's parser has no operator that picks a token's experts",
        has_experts,
        "use --format onnx, or give a dense model",
    ),
    Refusal(
        "a model with ALiBi positions",
        "the attention that is written for TensorRT has no bias that grows with distance",
        has_alibi,
        "use --format onnx, or give another model",
    ),
    Refusal(
        "a model with attention sinks",
        "ONNX's standard attention, which TensorRT's parser reads, has no input for a sink",
        has_sinks,
        "use --format onnx, or give another model",
    ),
)
