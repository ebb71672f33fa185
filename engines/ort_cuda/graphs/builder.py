"""`GraphBuilder`: small ONNX graphs of arithmetic, node by node."""

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

OPSET = 20
_IR_VERSION = 10
INT64, FLOAT = int(ir.DataType.INT64), int(ir.DataType.FLOAT)  # as an attribute of Cast


class GraphBuilder:
    """A graph under construction: `op("Op", inputs…, attribute=…)` appends a node and returns its one output."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tape = ir.tape.Tape()
        self._inputs: list[ir.Value] = []
        self._constants: dict[str, ir.Value] = {}

    def op(self, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Append a node to the graph, in ONNX's own domain.

        Args:
            op: The operator.
            inputs: The node's inputs.
            attributes: The node's attributes.

        Returns:
            The node's one output.
        """
        return self._tape.op(op, inputs, attributes)

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        """Add an input to the graph.

        Args:
            name: The input's name.
            dtype: The input's dtype.
            shape: Its sizes; a text names a dynamic one.
        """
        self._inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)))
        return self._inputs[-1]

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Returns the initializer `name`, which the first call with that name makes."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.Tensor(array, name=name), name=name)
        return self._constants[name]

    def ints(self, *vectors: list[int]) -> list[ir.Value]:
        """Returns constant int64 vectors, one for each list."""
        return [self.constant("ints_" + "_".join(map(str, v)), np.array(v, np.int64)) for v in vectors]

    def axis(self, axis: int) -> ir.Value:
        """Returns the constant that CumSum takes for an axis."""
        return self.constant(f"axis_{axis}", np.array(axis, np.int64))

    def floats(self, *values: float) -> ir.Value:
        """Returns a constant float32 vector of these values."""
        return self.constant("floats_" + "_".join(map(str, values)), np.array(values, np.float32))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Returns `value` in another shape, in which -1 and 0 mean what ONNX's Reshape means by them."""
        return self.op("Reshape", value, *self.ints([*shape]))

    def highest(self, value: ir.Value, count: int) -> ir.Value:
        """Returns the `count` highest values of each row of [rows, columns], the highest first."""
        attributes = {"axis": 1, "largest": 1, "sorted": 1}
        values, _ = self._tape.op_multi_out("TopK", [value, *self.ints([count])], attributes, num_outputs=2)
        return values

    def total(self, value: ir.Value, axis: int) -> ir.Value:
        """Returns the sum along an axis, which stays with size 1."""
        return self.op("ReduceSum", value, *self.ints([axis]), keepdims=1)

    def blocks(self, value: ir.Value, size: int) -> tuple[ir.Value, int, int]:
        """Reshape [rows, size] to [rows, count, width], zeros at the end. Returns the blocks, count and width.

        Running sums over blocks, and then inside them, have about √size terms each: they round far less in float32 than
        sums of 262k terms, and ONNX Runtime's older CUDA kernels take time quadratic in the terms.
        """
        width = 1 << math.ceil(math.log2(size) / 2)
        count = -(-size // width)
        if padding := count * width - size:
            value = self.op("Pad", value, *self.ints([0, 0, 0, padding]))
        return self.reshape(value, -1, count, width), count, width

    def finish(self, outputs: Mapping[str, tuple[ir.Value, ir.DataType, list[int | str]]]) -> ir.Model:
        """Returns the finished model.

        Args:
            outputs: The value, dtype and shape of each output, by its name.
        """
        for name, (value, dtype, shape) in outputs.items():
            value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        graph = ir.Graph(
            self._inputs,
            [value for value, _, _ in outputs.values()],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=self._name,
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="vocabtrim_export")
