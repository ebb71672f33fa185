"""A float16 or bfloat16 graph that computes in float32: the same nodes on the same weights."""

import onnx
from onnx import TensorProto, helper, numpy_helper

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def float32_view(model: onnx.ModelProto) -> None:
    """Change `model` in place to compute in float32. Its weights stay in their files and are cast when they are read.

    The comparison can then be as sharp as for a float32 graph, and ONNX Runtime's CPU has kernels for all of it.
    """
    graph = model.graph
    casts = []
    renamed = {tensor.name: f"{tensor.name}.float32" for tensor in graph.initializer if tensor.data_type in _HALF}
    for name, view in renamed.items():
        casts.append(helper.make_node("Cast", [name], [view], to=TensorProto.FLOAT))
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                values = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(values))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
