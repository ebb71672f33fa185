"""8-bit experts that compute in float32: ONNX Runtime's own kernel rounds their inputs to 8 bits as well."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vocabtrim_export.lowering.experts import MOE, QMOE
from vocabtrim_export.lowering.nodes import CONTRIB
from vocabtrim_export.lowering.quantize import BLOCK

# the inputs of QMoE
_X, _ROUTE, _UP_BIAS, _DOWN_BIAS, _WEIGHTS = 0, 1, 4, 7, 14
_PARTS = {"up": (2, 3, 11), "down": (5, 6, 12)}  # values, scales, zero points
_MOE_ATTRIBUTES = {"k", "activation_type", "swiglu_fusion", "activation_alpha", "activation_beta", "swiglu_limit"}


def float_experts(model: onnx.ModelProto) -> None:
    """Replace each QMoE of 8 bits by MoE on its dequantised weights, so that a proof can be sharp."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        bits = {attribute.name: attribute.i for attribute in node.attribute}.get("expert_weight_bits")
        nodes += _as_moe(model.graph, node) if node.op_type == QMOE and bits == 8 else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _as_moe(graph: onnx.GraphProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Returns nodes that dequantise the weights, take the logarithms of the routing weights, and MoE."""
    own, out = node.output[0], f"{node.output[0]}.normalised"
    names = {part: f"{own}.{part}" for part in _PARTS}
    nodes = [each for part, name in names.items() for each in _dequantize(graph, node, _PARTS[part], name)]
    options = {each.name: helper.get_attribute_value(each) for each in node.attribute if each.name in _MOE_ATTRIBUTES}
    inputs = [node.input[_X], f"{own}.route", names["up"], node.input[_UP_BIAS], names["down"], node.input[_DOWN_BIAS]]
    last = _constant(graph, f"{own}.axis", [-1])
    return [
        *nodes,
        helper.make_node("Log", [node.input[_ROUTE]], [f"{own}.route"]),
        helper.make_node(MOE, inputs, [out], domain=CONTRIB, **options),
        helper.make_node("ReduceSum", [node.input[_WEIGHTS], last], [f"{own}.total"], keepdims=1),
        helper.make_node("Mul", [out, f"{own}.total"], [own]),
    ]


def _dequantize(
    graph: onnx.GraphProto, node: onnx.NodeProto, parts: tuple[int, int, int], name: str
) -> list[onnx.NodeProto]:
    """Returns nodes that compute `name`: float32[experts, out, in], (values − zero) · scale block by block."""
    values, scales, zeros = (node.input[index] for index in parts)
    blocks = _constant(graph, f"{name}.blocks", [0, 0, -1, BLOCK])
    rows, axis = _constant(graph, f"{name}.rows", [0, 0, -1]), _constant(graph, f"{name}.axis", [3])
    return [
        helper.make_node("Cast", [values], [f"{name}.values"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", [f"{name}.values", blocks], [f"{name}.by_block"]),
        helper.make_node("Cast", [zeros], [f"{name}.zeros"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [f"{name}.zeros", axis], [f"{name}.zero"]),
        helper.make_node("Unsqueeze", [scales, axis], [f"{name}.scale"]),
        helper.make_node("Sub", [f"{name}.by_block", f"{name}.zero"], [f"{name}.shifted"]),
        helper.make_node("Mul", [f"{name}.shifted", f"{name}.scale"], [f"{name}.scaled"]),
        helper.make_node("Reshape", [f"{name}.scaled", rows], [name]),
    ]


def _constant(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name
