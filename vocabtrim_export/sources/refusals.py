"""Architectures that cannot be exported, recognised by what their configuration says before any weight is read."""

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from engines.errors import VocabtrimError
from vocabtrim_export.tracing.experts import as_experts, expert_modules

Config: TypeAlias = PreTrainedConfig
ModelClass: TypeAlias = type[PreTrainedModel]

_PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_OTHER_LAYERS = {"chunked_attention": "chunks", "indexed_attention": "index", "compressed_sparse_attention": "index"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Refusal:
    """One kind of architecture that is refused.

    Attributes:
        what: The kind, in the form that follows "is".
        why: Why it cannot be exported.
        matches: Whether a language model of this configuration and class is of the kind.
        instead: Which model to use instead.
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


def _layer_types(config: Config) -> set[str]:
    return {str(kind) for kind in getattr(config, "layer_types", None) or ()}


def _keeps_a_state(config: Config, kind: ModelClass) -> bool:
    """Returns whether a layer keeps a state that cannot be rewound, by transformers' own mark or the layers' types."""
    others = _layer_types(config) - _PLAIN_LAYERS - _OTHER_LAYERS.keys()
    return bool(getattr(kind, "_is_stateful", False) or others)


def _is_bidirectional(config: Config, kind: ModelClass) -> bool:
    """Returns whether attention sees later tokens.

    Only classes that can also be an encoder build either mask; others merely inherit the flag `is_decoder`.
    """
    builds_either = "create_bidirectional_mask" in inspect.getsource(sys.modules[kind.__module__])
    is_encoder = builds_either and getattr(config, "is_decoder", None) is False
    return is_encoder or getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _has_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether the class runs experts, through transformers' common interface or by indices of tokens."""
    modeling = sys.modules[kind.__module__]
    if config.model_type in _TRACED_EXPERTS or getattr(config, "enable_moe_block", None) is False:
        return False
    if set(getattr(config, "mlp_layer_types", None) or ()) == {"dense"}:
        return False
    configs = [config, getattr(config, "ffn_config", None)]
    count = max((getattr(each, name, None) or 0 for each in configs for name in _EXPERTS), default=0)
    return count > 1 or (hasattr(modeling, "use_experts_implementation") and "MoE" in kind.__name__)


def _owns_its_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether the experts bypass transformers' common interface."""
    return _has_experts(config, kind) and not hasattr(sys.modules[kind.__module__], "use_experts_implementation")


def _has_unknown_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether some experts do not compute the composite Experts, tried on a model without weights."""
    if not _has_experts(config, kind):
        return False
    with torch.device("meta"):
        skeleton = kind(copy.deepcopy(config))
    return any(as_experts(name, module) is None for name, module in expert_modules(skeleton))


_TRACED_EXPERTS = {"jetmoe"}  # its experts are products of split rows, which a graph can hold


def _has_latent_values(config: Config, _kind: ModelClass) -> bool:
    sizes = config.to_dict()  # an attribute cannot be read where the layers differ
    if sizes.get("kv_lora_rank") is None:
        return False
    keys = (sizes.get("qk_nope_head_dim") or 0) + (sizes.get("qk_rope_head_dim") or 0)
    return bool(keys != sizes.get("v_head_dim"))


def _has_alibi(config: Config, _kind: ModelClass) -> bool:
    nested = getattr(config, "attn_config", None)
    flags = (getattr(config, "alibi", None), getattr(nested, "alibi", None))
    return any(flag is True for flag in flags) or config.model_type == "bloom"


def _has_relative_bias(config: Config, _kind: ModelClass) -> bool:
    names = ("position_bias_num_buckets", "relative_max_distance", "relative_attention_num_buckets", "clamp_len")
    return any(getattr(config, name, None) is not None for name in names)


def _has_sinks(_config: Config, kind: ModelClass) -> bool:
    return "s_aux" in inspect.getsource(sys.modules[kind.__module__])


def _shares_caches(config: Config, _kind: ModelClass) -> bool:
    return bool(getattr(config, "num_kv_shared_layers", None))


def _caches_differ(config: Config, _kind: ModelClass) -> bool:
    changes: Any = config.to_dict().get("per_layer_config") or {}
    sizes = {"head_dim", "num_key_value_heads"}
    return config.model_type in _TWO_CACHES or any(not sizes.isdisjoint(changed) for changed in changes.values())


_TWO_CACHES = {"mimo_v2_flash"}  # its layers with a window have twice the heads of the others


def _owns_its_attention(_config: Config, kind: ModelClass) -> bool:
    return not hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")


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
        "its tokens see those behind them (is_decoder, or use_bidirectional_attention, in config.json), so it cannot "
        "continue a text token by token",
        _is_bidirectional,
        "give a model trained as a decoder",
    ),
    Refusal(
        "a model with a recurrent state (state space, linear attention or convolution layers)",
        "the state of its layers cannot be rewound when drafted tokens are rejected",
        _keeps_a_state,
    ),
    Refusal(
        "a mixture of experts with code of its own",
        "transformers does not compute its experts through the interface that the export replaces",
        _owns_its_experts,
        "give a mixture of the common form, such as Qwen3-MoE, or a dense model",
    ),
    Refusal(
        "a model with multi-head latent attention",
        "its keys and values have different sizes, which the bundles' KV cache cannot hold",
        _has_latent_values,
    ),
    Refusal(
        "a model with sparse or chunked attention",
        "its layers choose which earlier tokens they attend to, which the exported attention cannot do",
        lambda config, _kind: bool(_layer_types(config) & _OTHER_LAYERS.keys()),
    ),
    Refusal(
        "a model with ALiBi positions",
        "the exported attention has no bias that grows with distance",
        _has_alibi,
    ),
    Refusal(
        "a model with relative position biases",
        "the exported attention has no bias that depends on distance",
        _has_relative_bias,
    ),
    Refusal(
        "a model whose last layers read the KV caches of earlier ones",
        "every exported layer has a KV cache of its own",
        _shares_caches,
    ),
    Refusal(
        "a model whose layers have KV caches of different shapes",
        "the bundles' KV cache has one shape for all layers",
        _caches_differ,
    ),
    Refusal(
        "a model with attention code of its own",
        "transformers does not compute its attention through the interface that the export replaces",
        _owns_its_attention,
    ),
    Refusal(
        "a model that counts positions by itself",
        "its code takes no position_ids, so it cannot continue from a KV cache outside of transformers",
        lambda _config, kind: "position_ids" not in inspect.signature(kind.forward).parameters,
    ),
    Refusal(
        "a mixture of experts with a gate of its own",
        "its experts do not compute SwiGLU, the one gated unit that ONNX Runtime's experts have on a CPU",
        _has_unknown_experts,
        "give a mixture of the common form, such as Qwen3-MoE, or a dense model",
    ),
)
NOT_FOR_TENSORRT = (
    Refusal(
        "a mixture of experts",
        "TensorRT's parser has no operator that picks a token's experts",
        _has_experts,
        "use --format onnx, or give a dense model",
    ),
    Refusal(
        "a model with attention sinks",
        "ONNX's standard attention, which TensorRT's parser reads, has no input for a sink",
        _has_sinks,
        "use --format onnx, or give another model",
    ),
)
