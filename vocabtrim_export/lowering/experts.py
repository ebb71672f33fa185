"""Lowers Experts composites to ONNX Runtime's MoE, or QMoE with int4 or int8 blocks."""

import math
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from engines.bundle.graph_io import INPUT_IDS
from engines.errors import VocabtrimError
from vocabtrim_export.lowering.graph import DecoderGraph, attributes, name_of
from vocabtrim_export.lowering.nodes import Nodes
from vocabtrim_export.lowering.ort_products import quantized_parts
from vocabtrim_export.lowering.quantize import BITS, BLOCK, Quantization
from vocabtrim_export.lowering.weights import Weight

MOE, QMOE = "MoE", "QMoE"
_INTERLEAVED = 1  # rows of gate and up alternate: the only layout that the CPU's kernels take
_LEAST_WEIGHT = 1e-30  # stands for a router's weight of 0, which has no logarithm; it changes no sum in float32


@dataclass(frozen=True, slots=True)
class _ExpertLayer:
    """One Experts composite.

    Attributes:
        name: The composite's name.
        up: [experts, 2·size, hidden].
        down: [experts, hidden, size].
        by_halves: The rows of `up` are those of all gates, then all others; else they alternate, as in the graph.
        biases: The names of the initializers of up's and down's biases; None where there are none.
        options: Attributes of the ONNX Runtime operator.
    """

    name: str
    up: Weight
    down: Weight
    by_halves: bool
    biases: tuple[str | None, str | None]
    options: dict[str, int | float | str]


def lower_experts(decoder: DecoderGraph, quantization: Quantization) -> None:
    """Lower Experts to MoE or QMoE, which compute with the experts and the weights that the model's own router picked.

    Both operators route by themselves, from one number for each expert and token. MoE takes these numbers' softmax: its
    input is the logarithms of the router's weights, −inf for experts that were not picked, and its output is multiplied
    by the weights' sum, which the softmax divided by. The input of QMoE is the weights, 0 for the other experts.

    Raises:
        VocabtrimError: Blocks do not divide the experts' sizes.
    """
    unpicked: dict[int, ir.Value] = {}
    fill = float("-inf") if quantization == "none" else 0.0
    for node in decoder.composites("Experts"):
        x, index, weights = node.inputs[:3]
        layer, nodes = _layer(decoder, node), Nodes(decoder, node)
        count = layer.up.shape[0]
        if count not in unpicked:
            unpicked[count] = _filled(decoder, count, fill)
        if quantization == "none":
            least = nodes.number(_LEAST_WEIGHT)
            numbers = nodes("Log", nodes("Max", _cast(nodes, weights, ir.DataType.FLOAT), least))
            route = nodes("ScatterElements", unpicked[count], index, _cast(nodes, numbers, decoder.ir_dtype), axis=1)
            total = nodes("ReduceSum", weights, nodes.ints(-1), keepdims=1)
            out = nodes("Mul", _dense(nodes, layer, x, route), total)
        else:
            route = nodes("ScatterElements", unpicked[count], index, weights, axis=1)
            out = _quantized(nodes, layer, x, route, BITS[quantization])
        decoder.replace(node, [], [out])


def _layer(decoder: DecoderGraph, node: ir.Node) -> _ExpertLayer:
    numbers = attributes(node)
    transposed, interleaved = bool(numbers["transposed"]), bool(numbers["interleaved"])
    up, down = (name_of(value) for value in node.inputs[3:5])
    up_bias, down_bias = (name_of(value) if value is not None else None for value in (*node.inputs[5:], None, None)[:2])
    if up_bias is not None and not interleaved:
        bias = _by_turns(decoder.weights[up_bias], by_halves=True)
        up_bias = f"{up_bias}.interleaved"
        decoder.add_weight(up_bias, bias)
    options: dict[str, int | float | str] = {
        "k": int(numbers["k"]),
        "activation_type": "swiglu",
        "swiglu_fusion": _INTERLEAVED,
        "activation_alpha": float(numbers["alpha"]),
        "activation_beta": float(numbers["beta"]),
    }
    if numbers["limit"]:
        options["swiglu_limit"] = float(numbers["limit"])
    first, second = (_out_in(decoder.weights[name], transposed) for name in (up, down))
    return _ExpertLayer(up.rpartition(".")[0], first, second, not interleaved, (up_bias, down_bias), options)


def _out_in(weight: Weight, transposed: bool) -> Weight:
    """Returns a weight of experts as [experts, out, in]."""
    experts, rows, columns = weight.shape
    shape = (experts, columns, rows) if transposed else weight.shape
    return Weight(shape, weight.dtype, lambda: rows_first(weight.stored(), transposed))


def _by_turns(weight: Weight, by_halves: bool) -> Weight:
    """Returns a weight [experts, 2·n, …] with alternating rows of its halves, if they are `by_halves`."""
    return replace(weight, stored=lambda: interleave(weight.stored())) if by_halves else weight


def rows_first(tensor: Tensor, transposed: bool) -> Tensor:
    """Returns [experts, out, in] from [experts, in, out] if `transposed`, or the reverse; otherwise `tensor`."""
    return tensor.transpose(1, 2) if transposed else tensor


def interleave(tensor: Tensor) -> Tensor:
    """Returns [experts, 2·n, …] with the rows of its first and its second half alternating."""
    by_turns: Tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return by_turns


def deinterleave(tensor: Tensor) -> Tensor:
    """Undo `interleave`."""
    by_halves: Tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return by_halves


def _filled(decoder: DecoderGraph, count: int, fill: float) -> ir.Value:
    """Returns a constant [S, count], which all layers share."""
    nodes = Nodes(decoder, decoder.graph[0])
    ids = next(value for value in decoder.graph.inputs if value.name == INPUT_IDS)
    shape = nodes("Concat", nodes("Shape", ids, start=1, end=2), nodes.ints(count), axis=0)
    return nodes("ConstantOfShape", shape, value=TorchTensor(torch.tensor([fill], dtype=decoder.dtype)))


def _cast(nodes: Nodes, value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    return value if nodes.decoder.ir_dtype == ir.DataType.FLOAT else nodes("Cast", value, to=int(dtype))


def _dense(nodes: Nodes, layer: _ExpertLayer, x: ir.Value | None, route: ir.Value) -> ir.Value:
    decoder, (up_bias, down_bias) = nodes.decoder, _biases(nodes, layer)
    up = decoder.add_weight(f"{layer.name}.up", _by_turns(layer.up, layer.by_halves))
    down = decoder.add_weight(f"{layer.name}.down", layer.down)
    return nodes.contrib(MOE, x, route, up, up_bias, down, down_bias, **layer.options)


def _quantized(nodes: Nodes, layer: _ExpertLayer, x: ir.Value | None, route: ir.Value, bits: int) -> ir.Value:
    decoder, (up_bias, down_bias) = nodes.decoder, _biases(nodes, layer)
    up, down = (
        [
            decoder.add_weight(f"{layer.name}.{name}.{part}", _by_turns(weight, by_halves))
            for part, weight in _blocks(layer, dense, bits)
        ]
        for name, dense, by_halves in (("up", layer.up, layer.by_halves), ("down", layer.down, False))
    )
    first, second = (parts[:2] for parts in (up, down))
    inputs = [x, route, *first, up_bias, *second, down_bias, None, None, None, up[2], down[2], None, route]
    # level 4 rounds inputs to 8 bits; the only kernel for 8-bit experts does so at any level
    how = {"expert_weight_bits": bits, "block_size": BLOCK, "accuracy_level": 4, "weights_prepacked": 0}
    return nodes.contrib(QMOE, *inputs, **layer.options, **how)


def _biases(nodes: Nodes, layer: _ExpertLayer) -> list[ir.Value | None]:
    return [None if name is None else nodes.decoder.graph.initializers[name] for name in layer.biases]


def _blocks(layer: _ExpertLayer, dense: Weight, bits: int) -> list[tuple[str, Weight]]:
    """Returns the parts `quantized`, `scales` and `zero_points` of [experts, out, in], each [experts, out, …]."""
    experts, rows, size = dense.shape
    if size % BLOCK:
        raise VocabtrimError(
            f"{layer.name} has experts of {size} inputs, which blocks of {BLOCK} do not divide: leave them unquantised "
            "(--quantize none)"
        )
    parts = quantized_parts(dense, bits, BLOCK).items()
    return [(part, weight.reshaped((experts, rows, math.prod(weight.shape[1:])))) for part, weight in parts]
