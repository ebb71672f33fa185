"""Facts about an architecture, from its configuration and its class, before any weight is read."""

import copy
import inspect
import sys
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vocabtrim_export.tracing.experts import as_experts, expert_modules

Config: TypeAlias = PreTrainedConfig
ModelClass: TypeAlias = type[PreTrainedModel]

_PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_SPARSE_LAYERS = {"chunked_attention", "indexed_attention", "compressed_sparse_attention"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TRACED_EXPERTS = {"jetmoe"}  # its experts are products of split rows, which a graph can hold
_TWO_CACHES = {"mimo_v2_flash"}  # its layers with a window have twice the heads of the others


def keeps_a_state(config: Config, kind: ModelClass) -> bool:
    """Returns whether a layer keeps a state that cannot be rewound, by transformers' own mark or the layers' types."""
    others = _layer_types(config) - _PLAIN_LAYERS - _SPARSE_LAYERS
    return bool(getattr(kind, "_is_stateful", False) or others)


def has_sparse_attention(config: Config, _kind: ModelClass) -> bool:
    """Returns whether layers choose the earlier tokens that they attend to."""
    return not _SPARSE_LAYERS.isdisjoint(_layer_types(config)) or config.to_dict().get("index_topk") is not None


def is_bidirectional(config: Config, kind: ModelClass) -> bool:
    """Returns whether attention sees later tokens.

    Only classes that can also be an encoder build either mask; others merely inherit the flag `is_decoder`.
    """
    builds_either = "create_bidirectional_mask" in inspect.getsource(sys.modules[kind.__module__])
    is_encoder = builds_either and getattr(config, "is_decoder", None) is False
    is_encoder = is_encoder or getattr(config, "is_causal", None) is False
    return is_encoder or getattr(config, "use_bidirectional_attention", None) in (True, "all")


def has_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether the class runs experts, through transformers' common interface or by indices of tokens."""
    modeling = sys.modules[kind.__module__]
    if config.model_type in _TRACED_EXPERTS or getattr(config, "enable_moe_block", None) is False:
        return False
    if set(getattr(config, "mlp_layer_types", None) or ()) == {"dense"}:
        return False
    configs = [config, getattr(config, "ffn_config", None)]
    count = max((getattr(each, name, None) or 0 for each in configs for name in _EXPERTS), default=0)
    return count > 1 or (hasattr(modeling, "use_experts_implementation") and "MoE" in kind.__name__)


def owns_its_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether the experts bypass transformers' common interface."""
    return has_experts(config, kind) and not hasattr(sys.modules[kind.__module__], "use_experts_implementation")


def has_unknown_experts(config: Config, kind: ModelClass) -> bool:
    """Returns whether some experts do not compute the composite Experts, tried on a model without weights."""
    if not has_experts(config, kind):
        return False
    with torch.device("meta"):
        skeleton = kind(copy.deepcopy(config))
    return any(as_experts(name, module) is None for name, module in expert_modules(skeleton))


def has_alibi(config: Config, _kind: ModelClass) -> bool:
    """Returns whether attention has ALiBi biases; transformers' MPT has them whatever its configuration says."""
    return config.model_type in ("bloom", "mpt") or getattr(config, "alibi", None) is True


def has_relative_bias(config: Config, _kind: ModelClass) -> bool:
    """Returns whether attention has biases that depend on distance."""
    names = ("position_bias_num_buckets", "relative_max_distance", "relative_attention_num_buckets", "clamp_len")
    return any(getattr(config, name, None) is not None for name in names)


def has_sinks(_config: Config, kind: ModelClass) -> bool:
    """Returns whether attention has sinks: one more logit for each head, of no key."""
    return "s_aux" in inspect.getsource(sys.modules[kind.__module__])


def ignores_its_window(config: Config, kind: ModelClass) -> bool:
    """Returns whether the configuration states a sliding window that the class has no code for."""
    slides = {"sliding_attention"} & (_layer_types(config) or {"sliding_attention"})
    window = getattr(config, "sliding_window", None) if slides else None
    return bool(window) and "sliding_window" not in inspect.getsource(sys.modules[kind.__module__])


def shares_caches(config: Config, _kind: ModelClass) -> bool:
    """Returns whether the last layers read the KV caches of earlier ones."""
    return bool(getattr(config, "num_kv_shared_layers", None))


def caches_differ(config: Config, _kind: ModelClass) -> bool:
    """Returns whether the layers' KV caches differ in shape."""
    changes: Any = config.to_dict().get("per_layer_config") or {}
    sizes = {"head_dim", "num_key_value_heads"}
    return config.model_type in _TWO_CACHES or any(not sizes.isdisjoint(changed) for changed in changes.values())


def owns_its_attention(config: Config, kind: ModelClass) -> bool:
    """Returns whether attention bypasses transformers' common interface, and is none that `tracing.alibi` replaces."""
    return not hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS") and not has_alibi(config, kind)


def counts_positions(config: Config, kind: ModelClass) -> bool:
    """Returns whether the class takes no position_ids, and its attention depends on them."""
    return "position_ids" not in inspect.signature(kind.forward).parameters and not has_alibi(config, kind)


def _layer_types(config: Config) -> set[str]:
    return {str(kind) for kind in getattr(config, "layer_types", None) or ()}
