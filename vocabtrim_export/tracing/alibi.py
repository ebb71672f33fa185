"""ALiBi: attention that adds a bias to the logits of each key, which grows with the key's position.

Three architectures have it, each in attention code of its own. While they are traced, that code gives way to the
composite Attention with a table of the biases. The tables are the model's own; as a softmax is the same when all logits
of a row grow alike, the bias of a key does not depend on the query's position.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Attend = Callable[..., Tensor]  # (module, q, k, v, scale) → [1, S, hidden]; q, k, v: [1, heads, S, head_dim]


class KeyBias(nn.Module):
    """The biases as a buffer `bias`: [heads, context]."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)


def alibi_modules(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Returns the attention modules, by name, whose code `alibi_replacements` replaces."""
    if getattr(model.config, "alibi", True):
        for name, module in model.named_modules():
            if type(module).__name__ in _FORMS:
                yield name, module


def find_key_bias(model: PreTrainedModel, context_length: int) -> KeyBias | None:
    """Returns the biases for a context of so many tokens; None for a model without ALiBi."""
    modules = [module for _, module in alibi_modules(model)]
    if not modules:
        return None
    modeling, heads = sys.modules[type(model).__module__], model.config.num_attention_heads
    if hasattr(modeling, "build_mpt_alibi_tensor"):
        bias = modeling.build_mpt_alibi_tensor(heads, context_length)
        bias = bias - bias[..., :1]  # of the distance to the last token; now of that to the first
    else:
        bias = modeling.build_alibi_tensor(torch.ones(1, context_length, dtype=torch.long), heads, torch.float32)
        bias = bias * getattr(modules[0], "beta", 1.0)
    return KeyBias(bias.float().view(heads, context_length))


def alibi_replacements(
    skeleton: PreTrainedModel,
    modeling: ModuleType,
    key_bias: KeyBias,
    attention: Callable[..., tuple[Tensor, None]],
    linear: Callable[..., Tensor],
) -> Iterator[tuple[Any, str, Any]]:
    """Returns what takes the place of a skeleton's own attention code, as (owner, name, value).

    Args:
        skeleton: The model.
        modeling: The module of its code.
        key_bias: Its biases.
        attention: An attention function for transformers.
        linear: A `forward` for linear layers, also for those that have one of their own.
    """

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attention(module, q, k, v, None, scale, key_bias=key_bias.get_buffer("bias"))[0].flatten(2)

    def forward_of(module: Any) -> Callable[..., tuple[Tensor, None]]:
        form = _FORMS[type(module).__name__]
        return lambda *inputs, **_options: (form(module, attend, *inputs), None)

    yield modeling, "create_causal_mask", lambda **_: torch.zeros(())  # nothing reads it
    for _, module in alibi_modules(skeleton):
        yield module, "forward", forward_of(module)
    for kind in {type(module) for module in skeleton.modules() if isinstance(module, nn.Linear)} - {nn.Linear}:
        yield kind, "forward", linear


def _bloom(self: Any, attend: Attend, x: Tensor, residual: Tensor) -> Tensor:
    out: Tensor = self.dense(attend(self, *self._reshape(self.query_key_value(x)), self.inv_norm_factor))
    return out + residual


def _falcon(self: Any, attend: Attend, x: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in self._split_heads(self.query_key_value(x)))
    out: Tensor = self.dense(attend(self, q, k, v, self.inv_norm_factor))
    return out


def _mpt(self: Any, attend: Attend, x: Tensor) -> Tensor:
    together = self.Wqkv(x)
    if self.clip_qkv:
        together = together.clamp(-self.clip_qkv, self.clip_qkv)
    q, k, v = (each.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for each in together.chunk(3, -1))
    out: Tensor = self.out_proj(attend(self, q, k, v, self.softmax_scale))
    return out


_FORMS: Mapping[str, Callable[..., Tensor]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "MptAttention": _mpt,
}
