"""`DecoderGraph`: a traced decoder while it is lowered, with the edits that every lowering shares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from torch import Tensor

from vocabtrim_export.lowering.weights import Weight
from vocabtrim_export.tracing.emit import DOMAIN
from vocabtrim_export.tracing.trace import Traced

BYTES_OF = "bytes_of"  # of an initializer's `meta`: the name of the initializer whose bytes it has


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """An ONNX model under construction and the weights of its initializers by name. Passes change both in place."""

    model: ir.Model
    weights: dict[str, Weight]
    dtype: torch.dtype

    @classmethod
    def of(cls, traced: Traced, dtype: torch.dtype, moments: Mapping[str, Tensor]) -> "DecoderGraph":
        """Copy `traced`, so that it can be lowered again.

        Args:
            traced: The traced decoder.
            dtype: The dtype of the weights.
            moments: See `Weight`, by the weight's name.
        """
        initializers = traced.graph.graph.initializers
        weights = {
            # some stay in float32 in any model, such as the frequencies of a rotation
            name: Weight.of(tensor, to_torch_dtype(value.dtype), moments.get(name))
            for name, tensor in traced.weights.items()
            if (value := initializers.get(name)) is not None and value.dtype is not None
        }
        return cls(traced.graph.clone(), weights, dtype)

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def ir_dtype(self) -> ir.DataType:
        return from_torch_dtype(self.dtype)

    def composites(self, op: str) -> Iterator[ir.Node]:
        """Returns the composite nodes `op` in order; they may be replaced while iterating."""
        yield from [node for node in self.graph if node.domain == DOMAIN and node.op_type == op]

    def add_weight(self, name: str, weight: Weight) -> ir.Value:
        """Add an initializer with the values of `weight`."""
        self.weights[name] = weight
        return self.initializer(name, weight.to_ir(name))

    def add_view(self, name: str, weight: Weight, of: str) -> ir.Value:
        """Add an initializer whose bytes are those of another one, so that they are stored once: see `save_graph`.

        Args:
            name: The initializer's name.
            weight: Its values.
            of: The name of the other initializer.
        """
        value = self.add_weight(name, weight)
        value.meta[BYTES_OF] = of
        return value

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """Add an int64 initializer.

        Args:
            name: The initializer's name; one that is there already is returned as it is.
            values: int64[n].
        """
        return self.initializer(name, ir.Tensor(np.array(values, np.int64), name=name))

    def initializer(self, name: str, tensor: ir.Tensor[Any] | ir.LazyTensor) -> ir.Value:
        """Add an initializer; an existing one of this name is returned as it is."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add an input to the graph.

        Args:
            name: The input's name.
            dtype: The input's dtype.
            shape: Its sizes; a text names a dynamic one.
        """
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def default_input(self, name: str, values: Sequence[int]) -> ir.Value:
        """Add an input that need not be fed.

        Args:
            name: The input's name.
            values: int64[n], its values where nothing is fed.
        """
        value = self.constant(name, values)
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph.

        Args:
            value: The value, which gets this name, dtype and shape.
            name: The output's name.
            dtype: The output's dtype.
            shape: Its sizes; a text names a dynamic one.
        """
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.graph.outputs.append(value)

    def replace(self, old: ir.Node, new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
        """Put the nodes `new` in the place of `old`, and `outputs` in the places of its outputs."""
        self.graph.insert_before(old, new)
        for before, after in zip(old.outputs, outputs, strict=True):
            after.shape, after.type = before.shape, before.type
            after.name, before.name = before.name, None
            before.replace_all_uses_with(after, replace_graph_outputs=True)
        self.graph.remove(old, safe=True)

    def finish(self) -> None:
        """Drop what nothing uses, give every initializer its values, and forget shapes that edits made untrue."""
        RemoveUnusedNodesPass()(self.model)
        RemoveUnusedOpsetsPass()(self.model)
        self.model.functions.clear()
        self.graph.metadata_props.clear()  # the exporter's notes about the origin of values
        for name, value in list(self.graph.initializers.items()):
            if name in self.weights:
                value.const_value = self.weights[name].to_ir(name)
        for value in list(self.graph.inputs):
            if not value.uses():
                self.graph.inputs.remove(value)
        outputs = set(self.graph.outputs)
        for node in self.graph:
            for value in node.outputs:
                if value not in outputs:
                    value.shape = value.type = None


def attributes(node: ir.Node) -> dict[str, int | float]:
    """Returns the numbers that a composite carries."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def name_of(value: ir.Value | None) -> str:
    """Returns the name of a value that is known to have one."""
    assert value is not None
    assert value.name is not None
    return value.name
