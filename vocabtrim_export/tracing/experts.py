"""Finds the experts of a routed MLP by what they compute, and emits them as one composite while a model is traced.

Only the experts are replaced. The router stays in the graph as the model writes it, so any routing that a graph can
hold works: softmax or sigmoid, normalised or not, limited to groups, with correction biases and scaling factors.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vocabtrim_export.tracing.emit import emit

# what transformers' `use_experts_implementation` gives a module of experts
_MARKS = ("_apply_gate", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
_PROBED = 16  # numbers that the gate is tried on, at each size
_SIZES = (1.0, 10.0, 100.0)  # the sizes of these numbers: a limit is larger than some and smaller than others


@dataclass(frozen=True, slots=True)
class ExpertModule:
    """A module that computes down · gated(gate_up · x + bias) + bias for the experts that a router picked.

    With g and u for the halves of gate_up's output, G = min(g, limit) and U = clamp(u, −limit, limit), gated is `G ·
    sigmoid(alpha · G) · (U + beta)`.

    Attributes:
        name: The module's name in its model.
        interleaved: The rows of gate_up are g and u alternating; else all of g, then all of u.
        transposed: gate_up and down are [experts, in, out]; else [experts, out, in].
        alpha: The factor in the sigmoid.
        beta: The number added to u.
        limit: The bound that g and u are clamped to; 0 for none.
    """

    name: str
    interleaved: bool
    transposed: bool
    alpha: float
    beta: float
    limit: float


def expert_modules(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Returns the modules, by name, that run their experts through transformers' common interface."""
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in _MARKS):
            yield name, module


def find_experts(model: PreTrainedModel) -> list[ExpertModule]:
    """Returns the modules of experts whose gate is a known one. No weights are read."""
    return [experts for name, module in expert_modules(model) if (experts := as_experts(name, module))]


def as_experts(name: str, module: Any) -> ExpertModule | None:
    """Returns the computation of a module of experts; None where `ExpertModule` does not describe it."""
    if not module.has_gate or module.has_post_expert_norm:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.cat([torch.randn(1, 2 * _PROBED, generator=generator) * size for size in _SIZES])
    try:
        expected = module._apply_gate(probe)
    except Exception:  # code of any architecture: what cannot be tried is not known
        return None
    numbers = sorted({float(value) for value in vars(module).values() if type(value) in (int, float) and value > 0})
    forms = itertools.product((False, True), (1.0, *numbers), (0.0, 1.0), (0.0, *numbers))
    for interleaved, alpha, beta, limit in forms:
        if torch.allclose(expected, _gated(probe, interleaved, alpha, beta, limit), rtol=1e-4, atol=1e-5):
            return ExpertModule(name, interleaved, bool(module.is_transposed), alpha, beta, limit)
    return None


def _gated(x: Tensor, interleaved: bool, alpha: float, beta: float, limit: float) -> Tensor:
    g, u = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    most = limit or math.inf
    g, u = g.clamp(max=most), u.clamp(-most, most)
    return g * torch.sigmoid(alpha * g) * (u + beta)


def experts_forward(experts: ExpertModule) -> Callable[..., Tensor]:
    """Returns a `forward` for the module that `experts` describes, which emits the composite Experts."""

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        inputs = [x, index, weights.to(x.dtype), self.gate_up_proj, self.down_proj]
        if self.has_bias:
            inputs += [self.gate_up_proj_bias, self.down_proj_bias]
        return emit(
            "Experts",
            inputs,
            x.shape,
            num_experts=self.gate_up_proj.shape[0],
            k=index.shape[-1],
            interleaved=int(experts.interleaved),
            transposed=int(experts.transposed),
            alpha=experts.alpha,
            beta=experts.beta,
            limit=experts.limit,
        )

    return forward
