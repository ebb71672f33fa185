"""`Nodes` adds operators at one place of a graph; `name_nodes` names all operators of a graph."""

import ast
from collections import Counter
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from vocabtrim_export.lowering.graph import DecoderGraph

CONTRIB = "com.microsoft"
Attribute: TypeAlias = int | float | str | tuple[int, ...] | ir.TensorProtocol
_SCOPES = "pkg.torch.onnx.name_scopes"


class Nodes:
    """`nodes("Op", inputs…, attribute=…)` puts a node in front of `anchor`, in the same layer of the model.

    It returns the node's one output.
    """

    def __init__(self, decoder: DecoderGraph, anchor: ir.Node) -> None:
        self.decoder, self.anchor = decoder, anchor

    def __call__(self, op: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        return self._insert(ir.node(op, inputs, attributes))

    def contrib(self, op: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Add one of ONNX Runtime's own operators. Returns its output."""
        return self._insert(ir.node(op, inputs, attributes, domain=CONTRIB))

    def _insert(self, node: ir.Node) -> ir.Value:
        if _SCOPES in self.anchor.metadata_props:
            node.metadata_props[_SCOPES] = self.anchor.metadata_props[_SCOPES]
        self.decoder.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        """Returns a constant int64 vector."""
        return self.decoder.constant("ints_" + "_".join(map(str, values)), values)

    def number(self, value: float) -> ir.Value:
        """Returns a constant float32 scalar."""
        name = f"number_{value!r}"
        return self.decoder.initializer(name, ir.Tensor(np.array(value, np.float32), name=name))


def name_nodes(graph: ir.Graph) -> None:
    """Name every node after the layer of the model that it belongs to, so that compiler messages can be understood."""
    seen: Counter[str] = Counter()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        # the last scope is the operator's own; the first ones are the whole model
        layer = scopes[-2].removeprefix("model.") if len(scopes) > 1 and scopes[-2] else "model"
        name = f"{layer}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
