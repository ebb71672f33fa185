"""A model that computes with the weights of a quantised bundle, read from its file and dequantised."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engines.errors import VocabtrimError
from vocabtrim_export.lowering.embedding import EMBEDDING, EMBEDDING_BITS
from vocabtrim_export.lowering.quantize import BITS
from vocabtrim_export.lowering.tidy import packed_name
from vocabtrim_export.proof.blocks import EVERY, Memory, from_blocks, is_rounded, read_tensor
from vocabtrim_export.proof.dequantized_experts import dequantized_experts
from vocabtrim_export.sources.source import Source


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
    written, memory = ir.load(graph).graph.initializers, Memory()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            load = partial(_written, name, model, written, quantization, prefix, memory)
            handles += _swap(name, module, load, head_rows.get(module), unlike, quantization)
        elif isinstance(module, nn.Embedding):
            for rows in (f"{prefix}{each}.weight.{EMBEDDING}" for each in _names(name, model)):
                if f"{rows}.quantized" in written:
                    load = partial(from_blocks, written, rows, EMBEDDING_BITS, memory)
                    handles += _swap(name, module, load, None, unlike, "int8")
    try:
        with dequantized_experts(model, written, quantization, prefix, unlike):
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


def _written(
    name: str,
    model: PreTrainedModel,
    written: Mapping[str, ir.Value],
    quantization: str,
    prefix: str,
    memory: Memory,
) -> Tensor:
    """Returns the written weight of the linear layer `name`, [out, in]."""
    for each in _names(name, model):
        for tensor in (f"{prefix}{each}.weight.kept", f"{prefix}{each}.weight"):
            weight = _dequantize(written, tensor, quantization, memory)
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
    own = slice(start, start + packed[name].out_features)
    weight = _dequantize(written, packed_name(f"{prefix}{next(iter(packed))}.weight"), quantization, memory, own)
    assert weight is not None, f"{name} is in no product of the graph"
    return weight


def _names(name: str, model: PreTrainedModel) -> list[str]:
    """Returns `name`, and for a head or an embedding the other's name too: a tied weight has either module's name."""
    head = model.get_output_embeddings()
    if head is None:  # parallel heads, which have no embedding either
        return [name]
    pair = [head, model.get_input_embeddings()]
    if model.get_submodule(name) not in pair:
        return [name]
    return [name, *(each for each, module in model.named_modules() if module in pair and each != name)]


def _dequantize(
    written: Mapping[str, ir.Value], tensor: str, quantization: str, memory: Memory, rows: slice = EVERY
) -> Tensor | None:
    """Returns these rows of the weight [out, in] that the graph multiplies with; None where `tensor` is not in it."""
    if f"{tensor}.quantized" in written:
        return from_blocks(written, tensor, BITS[quantization], memory, rows=rows)
    if f"{tensor}.{quantization}" in written:  # DequantizeLinear: q · scale, by rows or blocks of them
        values, scales = (
            read_tensor(written[f"{tensor}.{part}"])[rows] for part in (quantization, f"{quantization}_scales")
        )
        by_block = values.float().unflatten(1, (1 if scales.ndim == 1 else scales.shape[1], -1))
        by_row: Tensor = by_block.mul_(scales.view(len(values), -1, 1)).flatten(1)
        return by_row
    return None
