"""Rows of padding that attention computes and nothing else: they cost far less than a padded step."""

from dataclasses import dataclass

import onnx_ir as ir

from engines.bundle.graph_io import ATTENTION_PADDING, INPUT_IDS
from vocabtrim_export.lowering.graph import DecoderGraph
from vocabtrim_export.lowering.nodes import Nodes

_KEY_BIAS = 6  # of Attention's inputs: queries, keys, values, cosines, sines, sinks, the bias of keys


def suffices(decoder: DecoderGraph) -> bool:
    """Returns whether padding attention can make a quantised decoder one model in steps of every length.

    Experts have kernels of their own for a lone row, and a bias of the keys is made for the rows that are fed.
    """
    has_bias = any(len(node.inputs) > _KEY_BIAS and node.inputs[_KEY_BIAS] for node in decoder.composites("Attention"))
    return not has_bias and not any(decoder.composites("Experts"))


@dataclass(frozen=True, slots=True)
class AttentionPadding:
    """What all layers share.

    Attributes:
        pads: int64[2], the rows of padding before and behind those fed.
        fed: int64[1], the rows fed, S.
    """

    pads: ir.Value
    fed: ir.Value

    @classmethod
    def before(cls, node: ir.Node, decoder: DecoderGraph) -> "AttentionPadding":
        """Add the input `attention_padding`, and what follows from it, in front of `node`."""
        nodes = Nodes(decoder, node)
        ids = next(value for value in decoder.graph.inputs if value.name == INPUT_IDS)
        padding = decoder.default_input(ATTENTION_PADDING, [0])
        pads = nodes("Concat", nodes.ints(0), padding, axis=0)
        return cls(pads, nodes("Shape", ids, start=1, end=2))

    def padded(self, nodes: Nodes, rows: ir.Value | None) -> ir.Value | None:
        """Returns [1, S + padding, ·], the rows and zeros behind them; None for None, as keys packed with queries are.

        Args:
            nodes: Makes nodes.
            rows: [1, S, ·].
        """
        return rows and nodes("Pad", rows, self.pads, None, nodes.ints(1))

    def cut(self, nodes: Nodes, rows: ir.Value) -> ir.Node:
        """Returns a node, not in the graph yet, whose output is the first S of [1, S + padding, ·] rows."""
        return ir.node("Slice", [rows, nodes.ints(0), self.fed, nodes.ints(1)])
