"""Finds the parts of a model that composites stand for, by what they compute: RMS norms and the rotation."""

import copy
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vocabtrim_export.tracing.composites import Norm, Rope, rotary_modules


def find_norms(model: PreTrainedModel) -> list[Norm]:
    """Returns the modules of a model that have the name of an RMS norm and compute one."""
    return [
        norm
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and (norm := _as_norm(name, module))
    ]


def _as_norm(name: str, module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    scale = weight.detach().float()
    expected = copy.deepcopy(module).float()(probe)
    plain = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    for zero_centered in (False, True):
        if torch.allclose(expected, plain * (1 + scale if zero_centered else scale), rtol=1e-4, atol=1e-5):
            return Norm(name, epsilon, zero_centered)
    return None


def find_rope(model: PreTrainedModel, modeling: ModuleType, context_length: int) -> Rope | None:
    """Returns the rotary tables of a model that rotates halves of (the first dimensions of) q and k; None for others.

    Args:
        model: The model.
        modeling: The module that defines it, whose `apply_rotary_pos_emb` is tried out.
        context_length: The positions of the tables.
    """
    modules, apply = rotary_modules(model), getattr(modeling, "apply_rotary_pos_emb", None)
    if len(modules) != 1 or apply is None:
        return None
    by_layer_type = "layer_type" in inspect.signature(modules[0].forward).parameters
    layer_types: list[str | None] = [None]
    if by_layer_type:  # some layer types may not rotate
        rotating: Any = modules[0].rope_type
        layer_types = [each for each in sorted(set(model.config.get_text_config().layer_types)) if each in rotating]
    positions, hidden = torch.arange(context_length)[None], torch.zeros(1, 1, 1)
    tables = {}
    for layer_type in layer_types:
        options = {"layer_type": layer_type} if layer_type else {}
        cos, sin = modules[0](hidden, positions, **options)
        last = cos[:, -1:], sin[:, -1:]
        # most models repeat their cosines and sines for the second half, a few (gpt-oss) do not
        half = next((n for n in (cos.shape[-1] // 2, cos.shape[-1]) if _rotates_halves(apply, *last, n)), None)
        if half is None or half % 8:  # GroupQueryAttention takes tables of a multiple of 8 columns
            return None
        tables[layer_type or "default"] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    return Rope(tables)


def _rotates_halves(apply: object, cos: Tensor, sin: Tensor, half: int) -> bool:
    """Returns whether `apply` rotates the halves of 2·half numbers by the first `half` cosines and sines."""
    if not half:
        return False
    x = torch.randn(1, 1, 1, 2 * half, generator=torch.Generator().manual_seed(0))
    a, b = x.split(half, dim=-1)
    c, s = cos[..., :half], sin[..., :half]
    expected = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    try:
        q, k = apply(x, x, cos, sin)  # type: ignore[operator]
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(y.shape == x.shape and torch.allclose(y, expected, rtol=1e-4, atol=1e-5) for y in (q, k))


def takes_positions(model: PreTrainedModel) -> bool:
    """Returns whether the model reads `position_ids`; others need none."""
    return "position_ids" in inspect.signature(model.forward).parameters
