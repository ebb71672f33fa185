"""Sampling as two small ONNX graphs (logits to probabilities, to one token): `runtime.sampling`'s rules on a device.

They keep what the host's rule keeps: top-k with all ties of the k-th logit, top-p with the fewest tokens that hold it
and, of equal ones, the smaller id, then min-p. Arithmetic is float32; where sums round, a token on the very border may
fall to either side.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.bundle.graph_io import LOGITS, SLOT_TOKEN_IDS, TOKEN_IDS, TOKEN_TABLE
from engines.ort_cuda.graphs.builder import FLOAT, INT64, GraphBuilder

NO_TOKEN = -1  # stands for a token where the weights do not add up to a positive number


def warp_graph(size: int, logits_type: ir.DataType, top_k: int, has_top_p: bool, has_min_p: bool) -> ir.Model:
    """Returns a graph that computes the probabilities of `runtime.sampling.distribution` from logits.

    Its inputs are logits [1, rows, size]; temperature float32[1], above 0; top_p float32[1], with `has_top_p`; and
    min_p float32[1], above 0, with `has_min_p`. Its output is probabilities float32[rows, size], all NaN in a row whose
    logits are not finite.

    Args:
        size: Columns of the logits.
        logits_type: The logits' dtype.
        top_k: Keeps the k most likely tokens; 0, or `size` and more, keep all.
        has_top_p: Apply top-p.
        has_min_p: Apply min-p.
    """
    graph = GraphBuilder("warp")
    logits = graph.input(LOGITS, logits_type, [1, "rows", size])
    temperature = graph.input("temperature", ir.DataType.FLOAT, [1])
    rows = graph.reshape(logits, -1, size)
    if logits_type != ir.DataType.FLOAT:
        rows = graph.op("Cast", rows, to=FLOAT)
    scores = graph.op("Div", rows, temperature)
    has_top_k = 0 < top_k < size
    if has_top_k or has_top_p:
        descending = graph.highest(scores, size)
        if has_top_k:
            lowest = graph.op("Slice", descending, *graph.ints([top_k - 1], [top_k], [1]))
            scores, descending = (
                _without(graph, each, graph.op("Less", each, lowest)) for each in (scores, descending)
            )
        if has_top_p:
            top_p = graph.input("top_p", ir.DataType.FLOAT, [1])
            scores = _without(graph, scores, _outside_top_p(graph, scores, descending, size, top_p))
    if has_min_p:
        min_p = graph.input("min_p", ir.DataType.FLOAT, [1])
        lowest = graph.op("Add", graph.highest(scores, 1), graph.op("Log", min_p))
        scores = _without(graph, scores, graph.op("Less", scores, lowest))
    probabilities = graph.op("Softmax", scores, axis=1)
    return graph.finish({"probabilities": (probabilities, ir.DataType.FLOAT, ["rows", size])})


def draw_graph(size: int, kept_token_ids: NDArray[np.int64] | None, slots: int = 0) -> ir.Model:
    """Returns a graph that draws a token from a row of probabilities.

    Its inputs are probabilities float32[1, size]; uniform float32[1] in [0, 1); and, with slots, slot_token_ids
    int64[slots]. Its output is token_ids int64[1, 1].
    A row of NaN gives any token: none of its probabilities can be accepted later.

    Args:
        size: Columns of the probabilities.
        kept_token_ids: int64[size - slots], the tokens of the first columns; None where column i is token i.
        slots: The last columns, whose tokens are an input.
    """
    graph = GraphBuilder("draw")
    probabilities = graph.input("probabilities", ir.DataType.FLOAT, [1, size])
    column = draw(graph, probabilities, size, graph.input("uniform", ir.DataType.FLOAT, [1]))
    if kept_token_ids is not None:
        at = graph.op("Max", column, *graph.ints([0]))
        table = graph.constant(TOKEN_TABLE, kept_token_ids)
        if slots:
            table = graph.op("Concat", table, graph.input(SLOT_TOKEN_IDS, ir.DataType.INT64, [slots]), axis=0)
        column = graph.op("Gather", table, at, axis=0)
    return graph.finish({TOKEN_IDS: (graph.reshape(column, 1, 1), ir.DataType.INT64, [1, 1])})


def draw(graph: GraphBuilder, weights: ir.Value, size: int, uniform: ir.Value) -> ir.Value:
    """Draw an index in proportion to weights: the first at which their running sum passes `uniform` times their sum.

    Args:
        graph: The graph to append to.
        weights: float32[1, size].
        size: The number of weights.
        uniform: float32[1], in [0, 1).

    Returns:
        The index, int64[1]; NO_TOKEN where the sum is NaN or not positive. The weight at the index is never 0.
    """
    blocks, count, width = graph.blocks(weights, size)
    blocks = graph.reshape(blocks, count, width)
    sums = graph.reshape(graph.total(blocks, 1), count)
    running, whole = _running_sum(graph, sums, count)
    point = graph.op("Mul", uniform, whole)
    block = _passed(graph, running, whole, point)
    before = graph.op("Gather", graph.op("Concat", graph.floats(0), running, axis=0), block, axis=0)
    inside = graph.reshape(graph.op("Gather", blocks, block, axis=0), width)
    index = _passed(graph, *_running_sum(graph, inside, width), graph.op("Sub", point, before))
    drawn = graph.op("Add", graph.op("Mul", block, *graph.ints([width])), index)
    return graph.op("Where", graph.op("Greater", whole, graph.floats(0)), drawn, *graph.ints([NO_TOKEN]))


def _running_sum(graph: GraphBuilder, weights: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """Returns the inclusive running sum of float32[size], and its last element, float32[1]."""
    running = graph.op("CumSum", weights, graph.axis(0))
    return running, graph.op("Gather", running, *graph.ints([size - 1]), axis=0)


def _passed(graph: GraphBuilder, running: ir.Value, whole: ir.Value, point: ir.Value) -> ir.Value:
    """Returns the index of the first running sum that passes `point`, int64[1].

    Sums in another order may round the point to the whole sum or beyond, so it is limited to just below the whole.
    """
    below = graph.op("Min", point, graph.op("Mul", whole, graph.floats(1 - 2**-24)))
    passed = graph.op("LessOrEqual", running, below)  # nowhere, if they are NaN
    return graph.op("Cast", graph.total(graph.op("Cast", passed, to=FLOAT), 0), to=INT64)


def _without(graph: GraphBuilder, scores: ir.Value, dropped: ir.Value) -> ir.Value:
    """Returns `scores` with −∞ where `dropped` is true. NaN is never dropped, so that it reaches the output."""
    return graph.op("Where", dropped, graph.floats(-np.inf), scores)


def _outside_top_p(graph: GraphBuilder, scores: ir.Value, descending: ir.Value, size: int, top_p: ir.Value) -> ir.Value:
    """Returns bool[rows, size]: which scores are not among the fewest that hold `top_p` of the weight.

    Args:
        graph: The graph to append to.
        scores: float32[rows, size].
        descending: `scores`, each row sorted, the highest first.
        size: The number of columns.
        top_p: float32[1].
    """
    weights = graph.op("Softmax", descending, axis=1)
    wanted = graph.op("Mul", top_p, graph.total(weights, 1))
    inside = graph.op("Less", _running(graph, weights, size), wanted)  # true for the first score at least
    count = graph.total(graph.op("Cast", inside, to=FLOAT), 1)
    last = graph.op("Sub", graph.op("Cast", count, to=INT64), *graph.ints([1]))
    lowest = graph.op("GatherElements", descending, last, axis=1)
    # of equal scores, the first ones are kept: as many as the count leaves room for
    above = graph.total(graph.op("Cast", graph.op("Greater", scores, lowest), to=FLOAT), 1)
    ties = graph.op("Equal", scores, lowest)
    before = _running(graph, graph.op("Cast", ties, to=FLOAT), size)
    late = graph.op("GreaterOrEqual", before, graph.op("Sub", count, above))
    return graph.op("Or", graph.op("Less", scores, lowest), graph.op("And", ties, late))


def _running(graph: GraphBuilder, values: ir.Value, size: int) -> ir.Value:
    """Returns the exclusive running sum along each row of [rows, size]."""
    blocks, count, width = graph.blocks(values, size)
    inside = graph.op("CumSum", blocks, graph.axis(2), exclusive=1)
    before = graph.op("CumSum", graph.total(blocks, 2), graph.axis(1), exclusive=1)
    flat = graph.reshape(graph.op("Add", inside, before), -1, count * width)
    return graph.op("Slice", flat, *graph.ints([0], [size], [1]))
