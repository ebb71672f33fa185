"""Experts that compute with the weights of a quantised bundle, dequantised one expert at a time."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import onnx_ir as ir
from torch import Tensor
from transformers import PreTrainedModel

from vocabtrim_export.lowering.experts import deinterleave, rows_first
from vocabtrim_export.lowering.quantize import BITS
from vocabtrim_export.proof.blocks import Memory, from_blocks, is_rounded
from vocabtrim_export.sources.expert_by_expert import STACKS, expert_by_expert
from vocabtrim_export.tracing.experts import ExpertModule, find_experts

_PARTS = dict(zip(STACKS, ("up", "down"), strict=True))  # the names of the stacks in a graph


@contextmanager
def dequantized_experts(
    model: PreTrainedModel, written: Mapping[str, ir.Value], quantization: str, prefix: str, unlike: list[str]
) -> Iterator[None]:
    """Let each module of experts use its weights from a graph for the block.

    Args:
        model: Its weights are as they were after the block.
        written: The graph's initializers.
        quantization: "int8" or "int4".
        prefix: The graph's prefix to the model's own name of a weight.
        unlike: Gets the names of modules whose written weights are not the model's, rounded, as the model runs.
    """
    with ExitStack() as stack:
        stack.enter_context(expert_by_expert(model))
        for experts in find_experts(model):
            module: Any = model.get_submodule(experts.name)
            parameters = module._parameters
            module._parameters = {name: each for name, each in parameters.items() if name not in STACKS}
            stack.callback(setattr, module, "_parameters", parameters)
            for name, part in _PARTS.items():
                stored = f"{prefix}{experts.name}.{part}"
                matrices = _Matrices(experts, name, parameters[name].data, stored, written, quantization, unlike)
                setattr(module, name, matrices)
                stack.callback(vars(module).pop, name)
                stack.callback(module.register_forward_hook(matrices.check_others).remove)
        yield


class _Matrices:
    """The matrices of a module's experts by index, as a graph has them."""

    def __init__(
        self,
        experts: ExpertModule,
        name: str,
        own: Tensor,
        stored: str,
        written: Mapping[str, ir.Value],
        quantization: str,
        unlike: list[str],
    ) -> None:
        self._experts, self._own, self._stored, self._written = experts, own, stored, written
        self._by_halves = name == STACKS[0] and not experts.interleaved  # in the file these rows alternate
        self._quantization, self._unlike = quantization, unlike
        self._others = set(range(len(own)))  # experts that were not checked yet

    def __getitem__(self, expert: int) -> Tensor:
        """Returns the matrix in the module's own layout, and notes the module where it is not its own, rounded."""
        matrix = from_blocks(self._written, self._stored, BITS[self._quantization], Memory(), expert=expert)[None]
        matrix = deinterleave(matrix) if self._by_halves else matrix
        if expert in self._others:
            self._others.discard(expert)
            own = rows_first(self._own[expert : expert + 1], self._experts.transposed)
            if not is_rounded(matrix[0], own[0], self._quantization):
                self._unlike.append(self._experts.name)
        return rows_first(matrix, self._experts.transposed)[0]

    def check_others(self, _module: Any, _inputs: Any, _output: Any) -> None:
        """Check the experts that no token picked."""
        for expert in sorted(self._others):
            self[expert]
