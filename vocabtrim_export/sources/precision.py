"""A loaded model in another dtype for the time of a block."""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vocabtrim_export.sources.expert_by_expert import expert_by_expert, stacks


@contextmanager
def calibration_model(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give a model in the dtype that this CPU samples fastest in.

    It is a bfloat16 copy where the CPU has instructions for it, which makes it two to three times as fast. Elsewhere it
    is the model itself, in float32 until the context ends.
    """
    if calibration_dtype() == torch.bfloat16:
        whole = all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        yield model if whole else _bfloat16_copy(model)
        return
    with held_in(model, torch.float32):
        yield model


@contextmanager
def held_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Hold all of a model's parameters in `dtype` until the context ends.

    Buffers stay as they are: rotary frequencies in half precision would rotate by wrong angles.
    """
    before = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(model.parameters(), before, strict=True):
            parameter.data = data


def calibration_dtype() -> torch.dtype:
    """Returns the dtype that this CPU runs a model fastest in."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@contextmanager
def running_in(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let a model run in `dtype` until the context ends. Its parameters are cast as they are used, a layer's at a time.

    It costs a cast of every parameter in each run, and no memory for more than the largest layer, of whose experts one
    is cast at a time: for a few runs, not for generating. Buffers stay as they are: rotary frequencies in half
    precision would rotate by wrong angles.
    """
    apart = {id(stack) for stack in stacks(model) if stack.dtype != dtype}
    units = [unit for unit in _units(model, apart) if any(each.dtype != dtype for each in unit.cast)]
    handles = [handle for unit in units for handle in unit.hook(dtype)]
    try:
        with expert_by_expert(model) if apart else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for unit in units:  # where a run was interrupted
            unit.restore()


class _Unit:
    """A module and the parameters that are cast while it runs: those in floating point, without those `apart` by id."""

    def __init__(self, module: nn.Module, parameters: Iterator[nn.Parameter], apart: Collection[int]) -> None:
        self._module = module
        self.cast = [each for each in parameters if each.is_floating_point() and id(each) not in apart]
        self._before: list[torch.Tensor] = []

    def hook(self, dtype: torch.dtype) -> list[Any]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._before = [each.data for each in self.cast]
            for each in self.cast:
                each.data = each.data.to(dtype)

        def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
            self.restore()

        before, after = self._module.register_forward_pre_hook, self._module.register_forward_hook
        return [before(enter, prepend=True), after(leave)]

    def restore(self) -> None:
        for each, data in zip(self.cast, self._before, strict=False):
            each.data = data
        self._before = []


def _units(module: nn.Module, apart: Collection[int]) -> Iterator[_Unit]:
    """Returns a model's layers, whose code may read a parameter of any module in them, and its other modules."""
    if isinstance(module, nn.ModuleList):
        for layer in module:
            yield _Unit(layer, layer.parameters(), apart)
        return
    yield _Unit(module, module.parameters(recurse=False), apart)
    for child in module.children():
        yield from _units(child, apart)


def _bfloat16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its parameters in bfloat16. They are never copied in their own dtype."""
    parameters = {
        id(each): torch.nn.Parameter(each.to(torch.bfloat16), requires_grad=False) for each in model.parameters()
    }
    return copy.deepcopy(model, parameters)
