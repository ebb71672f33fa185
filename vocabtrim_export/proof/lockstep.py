"""Several calls of a graph as one run, in which each weight is read and dequantised once for all of them."""

from collections.abc import Container, Mapping
from typing import TypeVar

import onnx
from onnx import helper

from engines.bundle.graph_io import PAST, PRESENT, present_name

# Products of rows with weights, and which of their inputs is the first weight. A row of the output is of one row of the
# inputs that are not weights.
_WEIGHTS = {"MatMul": 1, "FusedMatMul": 1, "MoE": 2, "QMoE": 2}


T = TypeVar("T")


def call_name(name: str, call: int) -> str:
    """Returns the name that an input or output of the graph has in the run's call of this number, from 0."""
    return f"{name}.call{call}"


def by_call(values: Mapping[str, T], count: int) -> list[dict[str, T]]:
    """Returns the values of each call, by the names that they have in the graph of one call."""
    ends = [call_name("", call) for call in range(count)]
    return [{name.removesuffix(end): value for name, value in values.items() if name.endswith(end)} for end in ends]


def in_lockstep(model: onnx.ModelProto, count: int) -> None:
    """Repeat the graph for `count` calls after each other, each on the KV cache of the one before.

    A node that reads activations is there once for each call, so every call has its own shapes. A product with weights
    is there once: it reads the rows of all calls, joined. Each node follows itself in the call before, so a layer's
    dequantised weights are needed by no later layer.

    Args:
        model: Changed in place. Its inputs and outputs get the names of `call_name`; of the KV cache only the first
            call's inputs and the last call's outputs remain.
        count: The number of calls.
    """
    graph, calls = model.graph, range(count)
    constants = {tensor.name for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if all(name in constants or not name for name in node.input):
            constants.update(node.output)
            nodes.append(node)
        elif _is_product(node, constants):
            nodes += _joined(node, constants, count)
        else:
            nodes += [_renamed(node, constants, call) for call in calls]
    fed = [each for each in graph.input if each.name not in constants]
    inputs = [_named(each, call) for call in calls for each in fed if not call or not _is_past(each)]
    outputs = [
        _named(each, call) for call in calls for each in graph.output if call == count - 1 or not _is_present(each)
    ]
    for field, values in ((graph.node, nodes), (graph.input, inputs), (graph.output, outputs)):
        del field[:]
        field.extend(values)
    del graph.value_info[:]


def _value(name: str, constants: Container[str], call: int) -> str:
    """Returns the name of a value in a call: a weight's own, and of the past that of the call before's cache."""
    if not name or name in constants:
        return name
    if call and name.startswith(PAST):
        return call_name(present_name(name), call - 1)
    return call_name(name, call)


def _renamed(node: onnx.NodeProto, constants: Container[str], call: int) -> onnx.NodeProto:
    own = onnx.NodeProto()
    own.CopyFrom(node)
    own.name = ""  # names must differ, and nothing reads them
    own.input[:] = [_value(name, constants, call) for name in node.input]
    own.output[:] = [_value(name, constants, call) for name in node.output]
    return own


def _joined(node: onnx.NodeProto, constants: Container[str], count: int) -> list[onnx.NodeProto]:
    """Returns nodes that join the rows of all calls, compute `node` once and split its output."""
    own = node.output[0]
    read = [name for name in node.input if name and name not in constants]
    rows = [_value(read[0], constants, call) for call in range(count)]
    product = onnx.NodeProto()
    product.CopyFrom(node)
    product.input[:] = [f"{own}.{name}.joined" if name in read else name for name in node.input]
    product.output[:] = [f"{own}.joined"]
    joins = [
        helper.make_node(
            "Concat", [_value(name, constants, call) for call in range(count)], [f"{own}.{name}.joined"], axis=-2
        )
        for name in dict.fromkeys(read)
    ]
    counts = [f"{own}.count{call}" for call in range(count)]
    sizes = [
        helper.make_node("Shape", [name], [size], start=-2, end=-1) for name, size in zip(rows, counts, strict=True)
    ]
    return [
        *joins,
        product,
        *sizes,
        helper.make_node("Concat", counts, [f"{own}.counts"], axis=0),
        helper.make_node(
            "Split", [f"{own}.joined", f"{own}.counts"], [call_name(own, call) for call in range(count)], axis=-2
        ),
    ]


def _is_product(node: onnx.NodeProto, constants: Container[str]) -> bool:
    """Returns whether a node multiplies the rows of its first input with weights."""
    at = _WEIGHTS.get(node.op_type)
    transposed = any(attribute.name in ("transA", "transBatchA") and attribute.i for attribute in node.attribute)
    return at is not None and not transposed and node.input[0] not in constants and node.input[at] in constants


def _named(value: onnx.ValueInfoProto, call: int) -> onnx.ValueInfoProto:
    own = onnx.ValueInfoProto()
    own.CopyFrom(value)
    own.name = call_name(value.name, call)
    for size in own.type.tensor_type.shape.dim:
        if size.dim_param:  # calls differ in it, and ONNX Runtime reuses memory where sizes have one name
            size.dim_param = call_name(size.dim_param, call)
    return own


def _is_past(value: onnx.ValueInfoProto) -> bool:
    return value.name.startswith(PAST)


def _is_present(value: onnx.ValueInfoProto) -> bool:
    return value.name.startswith(PRESENT)
