"""Cuts the LM head of an ONNX graph: the columns of its product, and of the constants that belong to them."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.bundle.graph_io import TOKEN_IDS, TOKEN_TABLE
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.onnx_input.head import ELEMENTWISE, OnnxHead, constant, matrix_axis, transposed


def cut_head(model: ir.Model, head: OnnxHead, vocab_map: VocabMap) -> None:
    """Keep the columns of `vocab_map` and add the output token_ids: int64[batch, sequence], full-vocabulary ids.

    All other inputs and outputs stay; logits get len(vocab_map) columns. A matrix that the head shares with the
    embedding, quantised or not, stays whole for the embedding.

    Raises:
        VocabtrimError: The head is quantised in a way in which columns depend on one another.
    """
    cutter = _Cutter(model.graph, head.vocab, vocab_map.kept_token_ids)
    cutter.through(head.logits)
    _state_columns(head, len(vocab_map))
    _bake_token_ids(model.graph, head.logits, vocab_map)


class _Cutter:
    """Replaces inputs of the nodes, from the logits back to the product, by cut ones. Each constant is cut once."""

    def __init__(self, graph: ir.Graph, vocab: int, rows: NDArray[np.int64]) -> None:
        self.graph, self.vocab, self.rows = graph, vocab, rows
        self.done: set[ir.Node] = set()

    def through(self, value: ir.Value) -> None:
        """Cut what computes `value`, [..., vocab], to the kept columns, from its node back to the product."""
        node = value.producer()
        if node is None or node in self.done:
            return
        self.done.add(node)
        if node.op_type in ELEMENTWISE:
            for index, part in enumerate(node.inputs):
                if part is not None and constant(part) is not None:
                    self._beside(node, index)
                elif part is not None:
                    self.through(part)
        elif node.op_type == "MatMulNBits":
            self._blocks(node)
        elif node.op_type in ("MatMul", "MatMulInteger", "Gemm"):
            self._matrix(node)

    def _matrix(self, node: ir.Node) -> None:
        weight = node.inputs[1]
        assert weight is not None
        node.replace_input_with(1, self.cut(weight, matrix_axis(node), node))
        beside = {"Gemm": 2, "MatMulInteger": 3}.get(node.op_type)  # the bias; the matrix's zero points
        if beside is not None and beside < len(node.inputs) and node.inputs[beside] is not None:
            self._beside(node, beside)

    def _blocks(self, node: ir.Node) -> None:
        """Cut MatMulNBits: everything but the activations and g_idx starts with the columns' axis, flat or not."""
        for index, value in enumerate(node.inputs):
            if index in (1, 2, 3, 5) and value is not None:
                stored = self._constant(value, node)
                lines = stored.reshape(self.vocab, -1)[self.rows]
                shape = (len(self.rows), *stored.shape[1:]) if stored.shape[0] == self.vocab else (-1,)
                node.replace_input_with(index, self._add(value, lines.reshape(shape)))
        node.attributes["N"] = ir.AttrInt64("N", len(self.rows))

    def _beside(self, node: ir.Node, index: int) -> None:
        """Cut a constant that has a number for each column; leave one that has one number for all columns."""
        value = node.inputs[index]
        assert value is not None
        stored = self._constant(value, node)
        if stored.ndim and stored.shape[-1] == self.vocab:
            node.replace_input_with(index, self._add(value, stored[..., self.rows]))
        elif stored.ndim and stored.shape[-1] != 1:
            raise VocabtrimError(
                f"the head's {node.op_type} has a constant of shape {stored.shape}, which does not have a number for "
                "each token: the rows cannot be cut"
            )

    def cut(self, value: ir.Value, axis: int, before: ir.Node) -> ir.Value:
        """Keep only `rows` along an axis of `value`, a matrix that is constant or computed from one.

        New nodes are inserted before `before`.
        """
        if constant(value) is not None:
            stored = self._constant(value, before)
            return self._add(value, np.take(stored, self.rows, axis))
        node = value.producer()
        if node is not None and node.op_type == "Transpose":
            return self._again(node, [self._input(node, 0, transposed(node, axis), before)], before)
        if node is not None and node.op_type in ("Cast", "Identity"):
            return self._again(node, [self._input(node, 0, axis, before)], before)
        if node is not None and node.op_type == "DequantizeLinear":
            return self._dequantized(node, axis, before)
        made_by = "an input" if node is None else node.op_type
        raise VocabtrimError(f"the head's matrix comes from {made_by}, not from a constant: its rows cannot be cut")

    def _dequantized(self, node: ir.Node, axis: int, before: ir.Node) -> ir.Value:
        """Cut scales and zero points.

        There is one for all, one for each row or column, or one for each block within a row of the vocabulary.
        """
        quantised = self._input(node, 0, axis, before)
        along = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
        along %= 2  # a matrix has two axes
        if block and along == axis:
            raise VocabtrimError("the head is quantised in blocks of several rows: they cannot be cut one by one")
        inputs: list[ir.Value | None] = [quantised]
        for index in range(1, len(node.inputs)):
            value = node.inputs[index]
            if value is not None:
                stored = self._constant(value, before)
                if block:
                    value = self._add(value, np.take(stored, self.rows, axis))
                elif stored.size > 1 and along == axis:
                    value = self._add(value, stored[self.rows])
            inputs.append(value)
        return self._again(node, inputs, before)

    def _input(self, node: ir.Node, index: int, axis: int, before: ir.Node) -> ir.Value:
        value = node.inputs[index]
        assert value is not None
        return self.cut(value, axis, before)

    def _again(self, node: ir.Node, inputs: list[ir.Value | None], before: ir.Node) -> ir.Value:
        """Copy the node with other inputs, so that whatever else reads its output is not changed."""
        copy = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain)
        self.graph.insert_before(before, copy)
        return copy.outputs[0]

    def _constant(self, value: ir.Value, node: ir.Node) -> NDArray[np.generic]:
        stored = constant(value)
        if stored is None:
            raise VocabtrimError(
                f"the head's {node.op_type} reads {value.name}, which is no constant: the rows cannot be cut"
            )
        array: NDArray[np.generic] = stored.numpy()
        return array

    def _add(self, value: ir.Value, array: NDArray[np.generic]) -> ir.Value:
        """Add an initializer of the type of `value`, and return it."""
        stored = constant(value)
        assert stored is not None
        name = f"{value.name}.kept"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=stored.dtype, name=name)
        kept = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(kept)
        return kept


def _state_columns(head: OnnxHead, columns: int) -> None:
    """Write the new number of columns into the shapes on the way from the product to the logits."""
    node = head.logits.producer()
    pending = [] if node is None else [node]
    while pending:
        node = pending.pop()
        for value in node.outputs:
            if value.shape is not None and len(value.shape) and value.shape[-1] == head.vocab:
                value.shape = ir.Shape([*value.shape[:-1], columns])
        if node is not head.product:
            producers = (value.producer() for value in node.inputs if value is not None)
            pending += [each for each in producers if each and each.op_type in ELEMENTWISE | {head.product.op_type}]


def _bake_token_ids(graph: ir.Graph, logits: ir.Value, vocab_map: VocabMap) -> None:
    """Add ArgMax of the logits (the first of equals), then Gather from the table of kept token ids."""
    if any(value.name == TOKEN_IDS for value in graph.outputs):
        raise VocabtrimError(
            "the graph has an output token_ids already: it was made by this tool, give what it was made from"
        )
    compared = logits
    if logits.dtype == ir.DataType.BFLOAT16:  # ONNX Runtime's CUDA has no ArgMax for it
        cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
        graph.append(cast)
        compared = cast.outputs[0]
    top = ir.node("ArgMax", [compared], {"axis": -1, "keepdims": 0, "select_last_index": 0})
    table = ir.Tensor(vocab_map.kept_token_ids, name=TOKEN_TABLE)
    kept = ir.Value(name=TOKEN_TABLE, type=ir.TensorType(ir.DataType.INT64), shape=table.shape, const_value=table)
    graph.register_initializer(kept)
    gather = ir.node("Gather", [kept, top.outputs[0]])
    graph.extend([top, gather])
    token_ids = gather.outputs[0]
    token_ids.name, token_ids.type = TOKEN_IDS, ir.TensorType(ir.DataType.INT64)
    token_ids.shape = None if logits.shape is None else ir.Shape(logits.shape[:-1])
    graph.outputs.append(token_ids)
