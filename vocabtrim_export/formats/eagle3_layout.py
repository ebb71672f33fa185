"""The layout that loaders of EAGLE-3 checkpoints expect, key by key and shape by shape (see docs/formats.md)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engines.errors import VocabtrimError

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_AUX_STATES = 3  # hidden states of the target that fc joins
_OPTIONAL = ("embed_tokens.weight",)  # without it the target's embedding is used


def check_layout(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
    """Check a checkpoint's layout.

    Args:
        config: Its config.json.
        tensors: Its tensors by name.
        name: Its name, for messages.

    Raises:
        VocabtrimError: Names the first key that vLLM, SGLang or TensorRT-LLM would refuse or silently leave out.
    """
    architectures = config.get("architectures") or []
    if not set(architectures) & set(_ARCHITECTURES):
        raise VocabtrimError(f"{name}: its architecture is {architectures}, none of {', '.join(_ARCHITECTURES)}")
    wanted = _shapes(config, name)
    for key in wanted:
        if key not in tensors and key not in _OPTIONAL:
            raise VocabtrimError(f"{name} has no {key}, which the loaders need")
    for key, tensor in tensors.items():
        if key not in wanted:
            # vLLM fails on it, SGLang drops it without a word
            raise VocabtrimError(f"{name} has {key}, which no loader of one-layer Llama heads knows")
        if tuple(tensor.shape) != wanted[key]:
            raise VocabtrimError(f"{name}: {key} is {list(tensor.shape)}, the loaders expect {list(wanted[key])}")
    for key, dtype in (("d2t", torch.int64), ("t2d", torch.bool)):
        if tensors[key].dtype is not dtype:
            raise VocabtrimError(f"{name}: {key} is {tensors[key].dtype}, the loaders expect {dtype}")


def _shapes(config: Mapping[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
        vocab, rows = int(config["vocab_size"]), int(config["draft_vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise VocabtrimError(
            f"{name}: its config.json lacks a size, or states one that is no number: {error}"
        ) from error
    size = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * size, int(config.get("num_key_value_heads") or heads) * size
    aux = _AUX_STATES * int(config.get("target_hidden_size") or hidden)
    layer = {
        "self_attn.q_proj.weight": (queries, 2 * hidden),  # reads the embedding and the hidden state side by side
        "self_attn.k_proj.weight": (keys, 2 * hidden),
        "self_attn.v_proj.weight": (keys, 2 * hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "hidden_norm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        **{f"midlayer.{key}": shape for key, shape in layer.items()},
        "fc.weight": (hidden, aux),
        "norm.weight": (hidden,),
        "embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (rows, hidden),
        "d2t": (rows,),
        "t2d": (vocab,),
    }
