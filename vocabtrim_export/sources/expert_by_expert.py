"""A mixture that runs with one expert's matrices in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vocabtrim_export.tracing.experts import find_experts

# the stacks of all experts' matrices in transformers' modules
STACKS = ("gate_up_proj", "down_proj")


def stacks(model: PreTrainedModel) -> list[nn.Parameter]:
    """Returns the parameters that hold the matrices of all experts of a layer."""
    modules: list[Any] = [model.get_submodule(experts.name) for experts in find_experts(model)]
    return [module._parameters[name] for module in modules for name in STACKS if name in module._parameters]


@contextmanager
def expert_by_expert(model: PreTrainedModel) -> Iterator[None]:
    """Let each module of experts take its matrices one expert at a time, in the dtype of its input, for the block.

    What it computes is what transformers' own grouped products compute, in the same order. Whatever gives an expert's
    matrix by its index may stand in for the attributes `STACKS` of a module.
    """
    with ExitStack() as stack:
        for experts in find_experts(model):
            module: Any = model.get_submodule(experts.name)
            if "forward" not in vars(module):
                module.forward = _forward_of(module)
                stack.callback(delattr, module, "forward")
        yield


def _forward_of(module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = x.new_empty(index.numel(), x.shape[-1])
        order, begin = index.flatten().argsort(stable=True), 0
        for expert, count in enumerate(torch.bincount(index.flatten()).tolist()):
            picked, begin = order[begin : begin + count], begin + count
            if count:
                gated = module._apply_gate(_product(module, "gate_up_proj", expert, x[picked // index.shape[-1]]))
                out[picked] = _product(module, "down_proj", expert, gated)
        return (out.view(*index.shape, -1) * weights[..., None]).sum(1).to(x.dtype)

    return forward


def _product(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    matrix: Tensor = getattr(module, name)[expert].to(x.dtype)
    out = x @ (matrix if module.is_transposed else matrix.t())
    if module.has_bias:
        out += getattr(module, f"{name}_bias")[expert]
    return out
