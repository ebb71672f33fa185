"""A model that computes with the weights of a quantised bundle, read from its file and dequantised."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engines.errors import VocabtrimError
from vocabtrim_export.lowering.embedding import EMBEDDING, EMBEDDING_BITS
from vocabtrim_export.lowering.experts import deinterleave, interleave, rows_first
from vocabtrim_export.lowering.quantize import BITS
from vocabtrim_export.lowering.tidy import packed_name
from vocabtrim_export.sources.source import Source
from vocabtrim_export.tracing.experts import ExpertModule, find_experts

_ROWS_AT_ONCE = 4096  # an LM head is the largest tensor: a copy more of it in float32 takes gigabytes
# Largest root mean square error of a row, as a share of the row's own: what rounding to 4 or 8 bits in blocks never
# comes near, and another row's values exceed.
_MOST_ERROR = {"int4": 0.6, "int8": 0.1, "fp8": 0.1}


@contextmanager
def dequantized(
    model: PreTrainedModel,
    graph: Path,
    quantization: str,
    head_rows: Mapping[nn.Module, Tensor | None],
    prefix: str = "model.",
) -> Iterator[list[str]]:
    """Let each linear layer and the embedding of `model` use their weights from the file `graph` for the block.

    Args:
        model: Its weights are as they were after the block. One layer's are dequantised at a time.
        graph: A graph with `MatMulNBits`, or with `DequantizeLinear` after its weights.
        quantization: "int8", "int4" or "fp8".
        head_rows: For each LM head the rows that the graph keeps, int64[K]: its logits have K columns. None for all.
        prefix: The graph's prefix to the model's own name of a weight.

    Yields:
        The layers whose written weights are not the model's, rounded; filled as the model runs.
    """
    unlike: list[str] = []
    handles = []
    written = ir.load(graph).graph.initializers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            load = partial(_written, name, model, written, quantization, prefix)
            handles += _swap(name, module, load, head_rows.get(module), unlike, quantization)
        elif isinstance(module, nn.Embedding):
            for rows in (f"{prefix}{each}.weight.{EMBEDDING}" for each in _names(name, model)):
                if f"{rows}.quantized" in written:
                    load = partial(_from_blocks, written, rows, EMBEDDING_BITS)
                    handles += _swap(name, module, load, None, unlike, "int8")
    for experts in find_experts(model):
        handles += _swap_experts(experts, model, written, quantization, prefix, unlike)
    try:
        yield unlike
    finally:
        for handle in handles:
            handle.remove()


def _swap(
    name: str,
    module: Any,
    load: Callable[[], Tensor],
    rows: Tensor | None,
    unlike: list[str],
    quantization: str,
) -> list[Any]:
    """Returns hooks that give `module` the weight [out, in] of `load`, and these rows of its bias, while it runs."""
    before: list[tuple[nn.Parameter, nn.Parameter | None]] = []

    def enter(_module: nn.Module, _inputs: Any) -> None:
        weight, bias = module.weight, getattr(module, "bias", None)
        before.append((weight, bias))
        transposed = isinstance(module, Conv1D)
        own = weight.data.t() if transposed else weight.data
        own = own if rows is None else own[rows]
        written_weight = load()[:, : own.shape[1]]  # blocks are filled up
        if not is_rounded(written_weight, own, quantization):
            unlike.append(name)
            return
        module.weight = nn.Parameter(written_weight.t() if transposed else written_weight, requires_grad=False)
        if rows is not None and bias is not None:
            module.bias = nn.Parameter(bias.data[rows], requires_grad=False)

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        module.weight, bias = before.pop()
        if bias is not None:
            module.bias = bias

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _swap_experts(
    experts: ExpertModule,
    model: PreTrainedModel,
    written: Mapping[str, ir.Value],
    quantization: str,
    prefix: str,
    unlike: list[str],
) -> list[Any]:
    """Returns such hooks for a module of experts.

    In the file the weights are [experts, out, in], rows of gate and up alternating.
    """
    module: Any = model.get_submodule(experts.name)
    before: dict[str, nn.Parameter] = {}

    def enter(_module: nn.Module, _inputs: Any) -> None:
        for part, name in (("up", "gate_up_proj"), ("down", "down_proj")):
            before[name] = own = getattr(module, name)
            rows = rows_first(own.data, experts.transposed)
            if part == "up" and not experts.interleaved:
                rows = interleave(rows)
            written_weight = _dequantize(written, f"{prefix}{experts.name}.{part}", quantization)
            if written_weight is None or not is_rounded(written_weight, rows.flatten(0, 1), quantization):
                unlike.append(experts.name)
                continue
            written_weight = written_weight.view_as(rows)
            if part == "up" and not experts.interleaved:
                written_weight = deinterleave(written_weight)
            setattr(
                module,
                name,
                nn.Parameter(rows_first(written_weight, experts.transposed).contiguous(), requires_grad=False),
            )

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        for name, parameter in before.items():
            setattr(module, name, parameter)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def unlike_weights(source: Source, name: str, quantization: str) -> str:
    """Returns what to say of a module whose written weights are not the model's, to end a sentence.

    Raises:
        VocabtrimError: The model's own are no numbers.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in source.model.get_submodule(name).parameters()):
        raise VocabtrimError(
            f"{source.name}: its weights of {name} hold NaN or infinite numbers, they are damaged or overflow: "
            "download them again, or try another --dtype"
        )
    return f"its weights of {name} are not the model's, rounded to {quantization}"


def is_rounded(given: Tensor, own: Tensor, quantization: str) -> bool:
    """Returns whether `given` is `own`, [out, in], rounded to `quantization`: none of its rows is another's."""
    most = _MOST_ERROR.get(quantization, 0.0)
    return given.shape == own.shape and float(_row_errors(given, own).max()) <= most


def _row_errors(given: Tensor, own: Tensor) -> Tensor:
    """Returns the error of each row as a share of its size, [out]; 0 for a row of zeros that is still one."""
    parts = [_part_errors(*rows) for rows in zip(given.split(_ROWS_AT_ONCE), own.split(_ROWS_AT_ONCE), strict=True)]
    return torch.cat(parts)


def _part_errors(given: Tensor, own: Tensor) -> Tensor:
    own = own.float()
    difference = torch.linalg.vector_norm(given - own, dim=-1)
    return torch.where(difference == 0, 0, difference / torch.linalg.vector_norm(own, dim=-1))  # NaN stays NaN


def _written(
    name: str, model: PreTrainedModel, written: Mapping[str, ir.Value], quantization: str, prefix: str
) -> Tensor:
    """Returns the written weight of the linear layer `name`, [out, in]."""
    for each in _names(name, model):
        for tensor in (f"{prefix}{each}.weight.kept", f"{prefix}{each}.weight"):
            weight = _dequantize(written, tensor, quantization)
            if weight is not None:
                return weight
    parent, _, _ = name.rpartition(".")
    siblings = {f"{parent}.{each}": child for each, child in model.get_submodule(parent).named_children()}
    packed = {  # q, k and v in one product
        each: child
        for each, child in siblings.items()
        if isinstance(child, nn.Linear) and f"{prefix}{each}.weight.quantized" not in written
    }
    before = itertools.takewhile(lambda each: each != name, packed)
    start = sum(packed[each].out_features for each in before)
    weight = _dequantize(written, packed_name(f"{prefix}{next(iter(packed))}.weight"), quantization)
    assert weight is not None, f"{name} is in no product of the graph"
    return weight[start : start + packed[name].out_features]


def _names(name: str, model: PreTrainedModel) -> list[str]:
    """Returns `name`, and for a head or an embedding the other's name too: a tied weight has either module's name."""
    head = model.get_output_embeddings()
    if head is None:  # parallel heads, which have no embedding either
        return [name]
    pair = [head, model.get_input_embeddings()]
    if model.get_submodule(name) not in pair:
        return [name]
    return [name, *(each for each, module in model.named_modules() if module in pair and each != name)]


def _dequantize(written: Mapping[str, ir.Value], tensor: str, quantization: str) -> Tensor | None:
    """Returns the weight [out, in] that the graph multiplies with; None where `tensor` is not in it."""
    if f"{tensor}.quantized" in written:
        return _from_blocks(written, tensor, BITS[quantization])
    if f"{tensor}.{quantization}" in written:  # DequantizeLinear: q · scale, by rows or blocks of them
        values, scales = (_read(written[f"{tensor}.{part}"]) for part in (quantization, f"{quantization}_scales"))
        by_block = values.float().unflatten(1, (1 if scales.ndim == 1 else scales.shape[1], -1))
        by_row: Tensor = by_block.mul_(scales.view(len(values), -1, 1)).flatten(1)
        return by_row
    return None


def _from_blocks(written: Mapping[str, ir.Value], tensor: str, bits: int) -> Tensor:
    """Returns [out, in] from the blocks of MatMulNBits, QMoE and GatherBlockQuantized, (q − zero) · scale."""
    parts = (_read(written[f"{tensor}.{part}"]) for part in ("quantized", "zero_points", "scales"))
    values, zeros, scales = parts
    if scales.ndim == 3:  # of experts
        values, zeros, scales = (part.flatten(0, 1) for part in (values, zeros, scales))
    if bits == 4:
        values, zeros = (torch.stack([x & 15, x >> 4], -1).flatten(-2) for x in (values, zeros))
    zeros, values = zeros[:, : scales.shape[1]], values.reshape(*scales.shape, -1)
    return values.float().sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def _read(value: ir.Value) -> Tensor:
    """Returns the tensor; a type that PyTorch cannot read from NumPy becomes float32, which holds it exactly."""
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    return torch.from_numpy(numbers.copy() if numbers.dtype.kind in "ui" else numbers.astype("float32"))
