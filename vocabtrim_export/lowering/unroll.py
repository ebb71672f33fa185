"""γ greedy steps of a drafter as one graph: each step embeds the token that the step before it chose."""

import onnx_ir as ir

from engines.base import MOST_UNREAD
from engines.bundle.graph_io import INPUT_IDS, POSITION_IDS, TOKEN_IDS
from vocabtrim_export.lowering.graph import DecoderGraph
from vocabtrim_export.lowering.nodes import Nodes


def unroll(decoder: DecoderGraph, steps: int) -> list[ir.Value]:
    """Repeat the graph of composites `steps` times. Its outputs become token_ids: int64[1, steps].

    The first step reads MOST_UNREAD tokens: what a drafter may lack after a round. A caller that lacks one feeds the
    one before it again, which computes the same keys and values.

    Returns:
        The positions of each step: int64[1, S].
    """
    graph = decoder.graph
    ids, positions = (next(x for x in graph.inputs if x.name == name) for name in (INPUT_IDS, POSITION_IDS))
    ids.shape = positions.shape = ir.Shape([1, MOST_UNREAD])
    body, (_, top) = list(graph), tuple(graph.outputs)
    graph.outputs.clear()
    top.name = "first_token_id"
    end = ir.node("Identity", [top])  # an anchor after all steps
    graph.append(end)
    nodes = Nodes(decoder, end)
    last = nodes("Slice", positions, nodes.ints(-1), nodes.ints(MOST_UNREAD), nodes.ints(1))
    chosen, all_positions = [top], [positions]
    for step in range(1, steps):
        all_positions.append(nodes("Add", last, nodes.ints(step)))
        chosen.append(_repeat(body, {ids: chosen[-1], positions: all_positions[-1]}, end, top))
    tokens = nodes("Concat", *chosen, axis=1)
    graph.remove(end)
    decoder.output(tokens, TOKEN_IDS, ir.DataType.INT64, [1, steps])
    return all_positions


def _repeat(body: list[ir.Node], replaced: dict[ir.Value, ir.Value], end: ir.Node, result: ir.Value) -> ir.Value:
    """Copy `body` in front of `end` with some values replaced. Returns the copy's value for `result`."""
    for node in body:
        inputs = [replaced.get(x, x) if x is not None else None for x in node.inputs]
        copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs))
        copy.metadata_props.update(node.metadata_props)
        for before, after in zip(node.outputs, copy.outputs, strict=True):
            after.shape, after.type = before.shape, before.type
            replaced[before] = after
        assert end.graph is not None
        end.graph.insert_before(end, copy)
    return replaced[result]
