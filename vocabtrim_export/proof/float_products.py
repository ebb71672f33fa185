"""Quantised products that compute in float32, on weights that are dequantised as they are needed."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vocabtrim_export.lowering.nodes import CONTRIB

_TYPES = {4: TensorProto.UINT4, 8: TensorProto.UINT8}
_OPSET, _IR_VERSION = 21, 10  # the first with 4-bit types
_INPUTS = 4  # of MatMulNBits: x, values, scales and zero points


def float_products(model: onnx.ModelProto) -> None:
    """Replace each MatMulNBits by DequantizeLinear and a product, which for a few rows take a third of its time.

    The weights stay in their file: each is named a second time, as a matrix with one block a row.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _as_product(graph, node, tensors) if _is_known(node, tensors) else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    for each in model.opset_import:
        if not each.domain:
            each.version = max(each.version, _OPSET)


def _is_known(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> bool:
    """Returns whether a node is a MatMulNBits as the exporter writes it; an odd number of 4-bit zero points is not."""
    if node.op_type != "MatMulNBits" or len(node.input) != _INPUTS or node.input[1] not in tensors:
        return False
    number = _numbers(node)
    return number["bits"] == 8 or -(-number["K"] // number["block_size"]) % 2 == 0


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _as_product(graph: onnx.GraphProto, node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """Returns nodes that compute (values − zero) · scale for each block, and multiply with the transpose of all."""
    number, own = _numbers(node), node.output[0]
    x, values, scales, zeros = node.input
    rows, block, bits = number["N"], number["block_size"], number["bits"]
    blocks = -(-number["K"] // block)
    by_block = _view(graph, tensors[values], f"{own}.values", bits, (rows * blocks, block))
    zero = _view(graph, tensors[zeros], f"{own}.zeros", bits, (rows * blocks,))
    every, shape = _ints(graph, f"{own}.every", [-1]), _ints(graph, f"{own}.shape", [rows, blocks * block])
    nodes = []
    if padding := blocks * block - number["K"]:
        ends = _ints(graph, f"{own}.ends", [0, padding])
        nodes.append(helper.make_node("Pad", [x, ends, "", every], [f"{own}.padded"]))
        x = f"{own}.padded"
    return [
        *nodes,
        helper.make_node("Reshape", [scales, every], [f"{own}.scales"]),
        helper.make_node("DequantizeLinear", [by_block, f"{own}.scales", zero], [f"{own}.blocks"], axis=0),
        helper.make_node("Reshape", [f"{own}.blocks", shape], [f"{own}.weight"]),
        helper.make_node("FusedMatMul", [x, f"{own}.weight"], [own], domain=CONTRIB, transB=1),
    ]


def _view(graph: onnx.GraphProto, tensor: TensorProto, name: str, bits: int, shape: tuple[int, ...]) -> str:
    """Name a tensor's bytes a second time, as values of `bits` in this shape."""
    view = TensorProto()
    view.CopyFrom(tensor)
    view.name, view.data_type, view.dims[:] = name, _TYPES[bits], shape
    graph.initializer.append(view)
    return name


def _ints(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name
