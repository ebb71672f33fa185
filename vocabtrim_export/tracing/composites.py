"""The composite operators that tracing emits, and the stand-ins that make a transformers model emit them.

A traced graph holds attention, norms and linear layers as one node each, so a lowering starts from the
decoder's meaning and never has to recognise it in primitive operators:

    Linear(x, weight[out, in], bias?)      attribute transposed=1: the weight is [in, out]
    Head(x, weight[vocab, hidden], bias?)  the LM head
    RMSNorm(x, weight)                     attributes epsilon, zero_centered (then it scales by 1 + weight)
    Attention(q, k, v, cos?, sin?, sink?,  q, k, v: [1, S, heads·head_dim]; cos, sin: [context, rotary_dim/2];
              key_bias?)                   sink: [heads], one more logit for each head; key_bias: [heads, context],
                                           what is added to the logits of each key;
                                           attributes layer, num_heads, num_kv_heads, head_dim, scale,
                                           window (tokens that attention reaches back, itself included; 0: all),
                                           softcap (0: none)
    Experts(x, index, weights,             x: [S, hidden]; index: int64[S, k], the experts that a router picked for
            gate_up, down,                 each token, and their weights: [S, k]; gate_up: [experts, 2·size, hidden];
            gate_up_bias?, down_bias?)     down: [experts, hidden, size]; attributes num_experts, k, and those of
                                           `tracing.experts.ExpertModule`
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vocabtrim_export.tracing.alibi import KeyBias, alibi_replacements
from vocabtrim_export.tracing.emit import emit
from vocabtrim_export.tracing.experts import ExpertModule, experts_forward

ATTENTION = "vocabtrim_composite"


@dataclass(frozen=True, slots=True)
class Norm:
    """A module that computes `x · rsqrt(mean(x²) + epsilon) · w`, w = weight, or 1 + weight if zero_centered."""

    name: str
    epsilon: float
    zero_centered: bool


class Rope(nn.Module):
    """A model's rotary tables as buffers `cos_NAME`, `sin_NAME`: [context, rotary_dim/2], one pair a layer type."""

    def __init__(self, tables: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for name, (cos, sin) in tables.items():
            self.register_buffer(f"cos_{name}", cos)
            self.register_buffer(f"sin_{name}", sin)

    def table(self, layer_type: str | None) -> tuple[Tensor, Tensor]:
        name = layer_type or "default"
        return self.get_buffer(f"cos_{name}"), self.get_buffer(f"sin_{name}")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model that composites stand for.

    Attributes:
        norms: The RMS norms.
        experts: The modules of experts.
        rope: The rotary tables; None leaves the rotation as the model writes it.
        key_bias: The biases of ALiBi; None for other models.
    """

    norms: list[Norm]
    experts: list[ExpertModule]
    rope: Rope | None
    key_bias: KeyBias | None = None


def rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that turn positions into cosines and sines."""
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


@contextmanager
def composites(skeleton: PreTrainedModel, modeling: ModuleType, parts: Parts) -> Iterator[None]:
    """Make `skeleton`, whose code is in the module `modeling`, emit composites while it is traced.

    With rotary tables, the model's rotary module hands out whole tables instead of the rows of some positions, and its
    `apply_rotary_pos_emb` passes them on to the Attention composite, which then rotates. Without, the rotation stays
    in the graph as the model writes it.
    """
    handed_on: list[tuple[Tensor, Tensor]] = []
    attention = _attention(handed_on)
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    skeleton.config._attn_implementation = ATTENTION
    head = skeleton.get_output_embeddings()
    with ExitStack() as stack:

        def stand_in(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(_replaced(owner, name, value))

        stand_in(nn.Linear, "forward", _linear)
        stand_in(Conv1D, "forward", _conv1d)
        stand_in(head, "forward", _head.__get__(head))
        for norm in parts.norms:
            module = skeleton.get_submodule(norm.name)
            stand_in(module, "forward", _rms_norm(norm).__get__(module))
        for each in parts.experts:
            module = skeleton.get_submodule(each.name)
            stand_in(module, "forward", experts_forward(each).__get__(module))
        if parts.key_bias is not None:
            for replacement in alibi_replacements(skeleton, modeling, parts.key_bias, attention, _linear):
                stand_in(*replacement)
        if parts.rope is not None:
            stand_in(modeling, "apply_rotary_pos_emb", _hand_on(handed_on))
            for module in rotary_modules(skeleton):
                stand_in(module, "forward", _hand_out(parts.rope))
        yield


def _hand_out(rope: Rope) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a `forward` for rotary modules that returns whole tables."""

    def hand_out(
        _hidden: Tensor,
        position_ids: Tensor,  # noqa: ARG001
        layer_type: str | None = None,
    ) -> tuple[Tensor, Tensor]:  # the parameters have the names of transformers' own modules
        return rope.table(layer_type)

    return hand_out


def _hand_on(handed_on: list[tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns an `apply_rotary_pos_emb` that puts the tables into `handed_on` and rotates nothing."""

    def hand_on(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        handed_on[:] = [(cos, sin)]
        return q, k

    return hand_on


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    return emit("Linear", [x, self.weight, self.bias], (*x.shape[:-1], self.out_features))


def _conv1d(self: Conv1D, x: Tensor) -> Tensor:
    return emit("Linear", [x, self.weight, self.bias], (*x.shape[:-1], self.nf), transposed=1)


def _head(self: nn.Linear, x: Tensor) -> Tensor:
    return emit("Head", [x, self.weight, self.bias], (*x.shape[:-1], self.out_features))


def _rms_norm(norm: Norm) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        attributes = {"epsilon": norm.epsilon, "zero_centered": int(norm.zero_centered)}
        return emit("RMSNorm", [x, self.weight], x.shape, **attributes)

    return forward


@dataclass(frozen=True, slots=True)
class _WindowMask:
    """What a layer gets for its mask where attention reaches back `size` tokens; other layers get None."""

    size: int


def _mask(*_: object, local_size: int | None = None, **__: object) -> _WindowMask | None:
    """Stands in for transformers' masks. Some models (Qwen2-MoE, PhiMoE) state a layer's window by its mask alone."""
    return None if local_size is None else _WindowMask(local_size)


def _flattened(x: Tensor, head_dim: int) -> Tensor:
    """Returns [1, heads, length, size] as [1, length, heads · head_dim]; zeros, which change nothing, fill it up."""
    if x.shape[-1] < head_dim:
        x = nn.functional.pad(x, (0, head_dim - x.shape[-1]))
    return x.transpose(1, 2).reshape(1, x.shape[2], -1)


def _attention(handed_on: list[tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, None]]:
    """Returns an attention function for transformers; it takes the rotary tables out of `handed_on`."""

    def attention(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: _WindowMask | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        _, heads, length, key_dim = q.shape
        value_dim = v.shape[-1]
        head_dim = max(key_dim, value_dim)
        flat = [_flattened(x, head_dim) for x in (q, k, v)]
        tables = handed_on.pop() if handed_on else (None, None)
        inputs = [*flat, *tables, options.get("s_aux"), options.get("key_bias")]
        while inputs[-1] is None:
            inputs.pop()
        out = emit(
            "Attention",
            inputs,
            flat[0].shape,
            layer=module.layer_idx,
            num_heads=heads,
            num_kv_heads=k.shape[1],
            head_dim=head_dim,
            scale=float(key_dim**-0.5 if scaling is None else scaling),
            window=(attention_mask.size if attention_mask else sliding_window) or 0,
            softcap=float(softcap or 0),
        )
        return out.reshape(1, length, heads, head_dim)[..., :value_dim], None

    return attention


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
