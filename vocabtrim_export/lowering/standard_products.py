"""Lowers products to standard operators: MatMul, with DequantizeLinear for quantised weights."""

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import VocabtrimError
from vocabtrim_export.lowering.cores import map_on_cores
from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.nodes import Nodes
from vocabtrim_export.lowering.quantize import (
    BLOCK,
    Quantization,
    blocks_first,
    pack,
    product_error,
    rows_in_cache,
)
from vocabtrim_export.lowering.weights import Parts, Weight

_FP8_MAX = 448.0  # the largest float8_e4m3fn
_INT4_TOP = 7
# as for asymmetric blocks: clipping a block's extremes gains more than it costs with 16 levels
_SHRINKS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def standard_products(decoder: DecoderGraph, quantization: Quantization) -> list[str]:
    """Turn every Linear and Head into MatMul, with a DequantizeLinear before a quantised weight; a bias becomes an Add.

    Weights stay [out, in] under a Transpose: so a compiler stores a tied embedding and head once, and uses one layout
    for products of a few rows and of many. int8 and fp8 have one scale a row, int4 one a block of inputs. TensorRT
    keeps only these quantised: it converts int8 and fp8 in blocks to 16-bit weights when it builds.

    Returns:
        The names of the initializers that the head reads.

    Raises:
        VocabtrimError: int4 cannot divide a layer into blocks.
    """
    columns: dict[str, tuple[ir.Value, list[str]]] = {}  # an unrolled graph uses every weight in every step
    head_weights: list[str] = []
    for node in [*decoder.composites("Linear"), *decoder.composites("Head")]:
        x, weight, *bias = node.inputs
        nodes = Nodes(decoder, node)
        name = name_of(weight)
        if name not in columns:
            rows, read = _rows(nodes, name, "transposed" in node.attributes, quantization)
            columns[name] = nodes("Transpose", rows, perm=(1, 0)), read
        matrix, read = columns[name]
        out = nodes("MatMul", x, matrix)
        if bias and bias[0] is not None:
            out = nodes("Add", out, bias[0])
            read = [*read, name_of(bias[0])]
        if node.op_type == "Head":
            head_weights = read
        decoder.replace(node, [], [out])
    return head_weights


def _rows(nodes: Nodes, name: str, transposed: bool, quantization: Quantization) -> tuple[ir.Value, list[str]]:
    """Returns the weight [out, in] of a product, and the names of the initializers that it is computed from."""
    decoder = nodes.decoder
    dense = decoder.weights[name].transposed() if transposed else decoder.weights[name]
    if quantization != "none":
        return _quantized(nodes, name, dense, quantization)
    if transposed:
        name = f"{name}.T"
        decoder.add_weight(name, dense)
    return decoder.graph.initializers[name], [name]


def _quantized(nodes: Nodes, name: str, dense: Weight, quantization: Quantization) -> tuple[ir.Value, list[str]]:
    """Returns a dequantised weight, [out, in], and the names of the initializers that it is computed from."""
    rows, size = dense.shape
    values, scales = f"{name}.{quantization}", f"{name}.{quantization}_scales"
    if quantization != "int4":
        parts = Parts(lambda: quantize_rows(dense.load(), quantization))
        dtype = torch.int8 if quantization == "int8" else torch.float8_e4m3fn
        weight = nodes.decoder.add_weight(values, Weight(dense.shape, dtype, lambda: parts.take(0)))
        scale = nodes.decoder.add_weight(scales, Weight((rows,), dense.dtype, lambda: parts.take(1)))
        return nodes("DequantizeLinear", weight, scale, axis=0), [values, scales]
    if size % BLOCK:
        raise VocabtrimError(f"{name} has {size} inputs, which int4 blocks of {BLOCK} do not divide: use int8")
    block = _block(size)
    parts = Parts(lambda: quantize_int4(dense.load(), block, dense.moments))
    packed = ir.LazyTensor(
        lambda: _int4_tensor(parts.take(0), values), ir.DataType.INT4, ir.Shape(dense.shape), name=values
    )
    weight = nodes.decoder.initializer(values, packed)
    scale = nodes.decoder.add_weight(scales, Weight((rows, size // block), dense.dtype, lambda: parts.take(1)))
    return nodes("DequantizeLinear", weight, scale, axis=1, block_size=block), [values, scales]


def dequantized_rows(dense: Weight, quantization: Quantization) -> Weight:
    """Returns `dense`, [out, in], after quantisation and DequantizeLinear, in the dtype of `dense`."""
    if quantization == "none":
        return dense

    def load() -> Tensor:
        rows, size = dense.shape
        if quantization == "int4":
            values, scales = quantize_int4(dense.load(), _block(size), dense.moments)
        else:
            values, scales = quantize_rows(dense.load(), quantization)
        blocks = values.float().view(rows, scales[:1].numel(), -1)
        return (blocks * scales.float().view(rows, -1, 1)).view(rows, size).to(dense.dtype)

    return Weight(dense.shape, dense.dtype, load)


def _block(size: int) -> int:
    """Returns how many inputs share an int4 scale, in rows of `size`."""
    return 2 * BLOCK if size % (2 * BLOCK) == 0 else BLOCK


def _int4_tensor(values: Tensor, name: str) -> ir.PackedTensor[NDArray[np.uint8]]:
    nibbles = pack((values & 15).to(torch.uint8), 4).flatten().numpy()
    return ir.PackedTensor(nibbles, ir.DataType.INT4, shape=ir.Shape(values.shape), name=name)


def quantize_rows(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Quantise a weight symmetrically, with one scale a row.

    Args:
        weight: [out, in], any float dtype.
        quantization: "int8" or "fp8".

    Returns:
        int8 or float8_e4m3fn[out, in], and the scales, [out], in the weight's dtype.
    """
    top = 127.0 if quantization == "int8" else _FP8_MAX
    scales = (weight.float().abs().amax(-1) / top).to(weight.dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    scaled = (weight.float() / scales.float()[:, None]).clamp(-top, top)
    return (scaled.round().to(torch.int8) if quantization == "int8" else scaled.to(torch.float8_e4m3fn)), scales


def quantize_int4(weight: Tensor, block: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight symmetrically, as TensorRT wants it, in blocks of `block` inputs.

    Of several scales the one with the least error of the product is chosen, as in `quantize_blocks`.

    Returns:
        int8[out, in] from −8 to 7, and the scales, [out, in/block].
    """
    parts = map_on_cores(lambda rows: _int4_rows(rows, block, moments), rows_in_cache(weight))
    values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, scales


def _int4_rows(weight: Tensor, block: int, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    out, size = weight.shape
    blocks = blocks_first(weight).view(size // block, block // BLOCK, out, BLOCK)
    extreme = blocks.abs().amax((1, 3), keepdim=True)
    least = torch.full(extreme.shape, float("inf"), dtype=torch.float64)
    best_q, best_scale = torch.zeros_like(blocks), torch.ones_like(extreme)
    for shrink in _SHRINKS:
        scale = (extreme * (shrink / _INT4_TOP)).to(weight.dtype).float()
        scale = torch.where(scale == 0, 1.0, scale)
        q = (blocks / scale).round_().clamp_(-_INT4_TOP - 1, _INT4_TOP)
        off = (q * scale).sub_(blocks).view(-1, out, BLOCK)
        error = product_error(off, moments).view(*blocks.shape[:3], 1).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
    values = best_q.to(torch.int8).permute(2, 0, 1, 3).reshape(out, size)
    return values, best_scale.view(-1, out).T.to(weight.dtype)
