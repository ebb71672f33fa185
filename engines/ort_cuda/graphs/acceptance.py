"""The acceptance of a sampled round: `runtime.accept.accept_sampled` as a small ONNX graph for the device.

It runs between the target's verification and the next draft (`engines.ort_cuda.sampler`), on probabilities that
`engines.ort_cuda.graphs.sampling` makes of the logits (temperature, top-k, top-p, min-p). It has no state, no weights
and no control flow.

The graph uses only what ONNX Runtime (CPU, CUDA) and TensorRT all run: gathers instead of scatters (but for in-context
slots, whose tokens are not known beforehand), running sums instead of products, and counting instead of ArgMax, because
TensorRT does not promise which of several equal values its ArgMax finds. The length of the draft is a dynamic
dimension, which a TensorRT plan's profile fixes.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.bundle.graph_io import SLOT_TOKEN_IDS
from engines.bundle.vocab_map import VocabMap
from engines.ort_cuda.graphs.builder import FLOAT, INT64, GraphBuilder
from engines.ort_cuda.graphs.sampling import draw

_DRAFT = "draft_length"
_VERIFIED = "verified"  # draft_length + 1
_END = (1 << 31) - 1


def sampled_acceptance(vocab: int, kept_token_ids: NDArray[np.int64] | None = None, slots: int = 0) -> ir.Model:
    """Returns a graph that keeps or replaces drafted tokens so that the output has the target's distribution.

    Leviathan et al. 2023, arXiv 2211.17192, algorithm 1: token i stays while u_i < p_i(token) / q_i(token); the next
    token is drawn from the positive part of p − q at the first rejected position, or from p if all tokens stay. The
    rule and its edge cases are those of `runtime.accept.accept_sampled`, in float32: a uniform number has 24 bits, and
    one within about 1e-6 of the border between two tokens may give either.

    Inputs of the graph:
        draft_ids: int64[1, γ], γ ≥ 1; token i was drawn from row i of q.
        p: float32[γ + 1, vocab], the target's distributions before each drafted token and after the last.
        q: float32[γ, K + slots], the drafter's distributions.
        uniforms: float32[γ + 1], in [0, 1); the last one draws the next token.
        slot_token_ids: int64[slots], the tokens of the last columns of q; -1 for an empty slot, whose q is 0. The graph
            has this input only with slots.
    Outputs of the graph:
        accepted: int64[1].
        next_token: int64[1], `NO_TOKEN` where a number that it depends on is not finite.

    Args:
        vocab: Columns of p.
        kept_token_ids: int64[K], ascending, the tokens of the first K columns of q; other tokens have q = 0. None:
            column i is token i, and K = vocab.
        slots: The columns of q behind the first K. No token is in both parts.
    """
    graph = GraphBuilder("sampled_acceptance")
    kept = np.arange(vocab) if kept_token_ids is None else VocabMap(kept_token_ids, vocab).kept_token_ids
    draft = graph.input("draft_ids", ir.DataType.INT64, [1, _DRAFT])
    p = graph.input("p", ir.DataType.FLOAT, [_VERIFIED, vocab])
    q = graph.input("q", ir.DataType.FLOAT, [_DRAFT, len(kept) + slots])
    uniforms = graph.input("uniforms", ir.DataType.FLOAT, [_VERIFIED])
    columns = _Columns(graph, vocab, kept, slots)

    tokens = graph.reshape(draft, -1)
    # u·q < p rather than u < p/q: no division by zero, and where q is zero p alone decides
    bound = graph.op("Mul", graph.op("Slice", uniforms, *graph.ints([0], [-1])), columns.drafted(q, tokens))
    stays = graph.op("Less", bound, _entries(graph, p, tokens, vocab))
    accepted = _leading(graph, stays)

    weights = _replacement(graph, columns, p, q, accepted, stays)
    drawn = draw(graph, graph.reshape(weights, 1, vocab), vocab, graph.op("Slice", uniforms, *graph.ints([-1], [_END])))
    outputs = {"accepted": accepted, "next_token": drawn}
    return graph.finish({name: (value, ir.DataType.INT64, [1]) for name, value in outputs.items()})


class _Columns:
    """Finds the column of q that belongs to a token.

    The table int64[vocab] holds the column of each kept token, and the number of columns for any other token. Tokens in
    slots are not in the table.
    """

    def __init__(self, graph: GraphBuilder, vocab: int, kept: NDArray[np.int64], slots: int) -> None:
        self.graph, self.vocab, self.kept, self.count = graph, vocab, len(kept), len(kept) + slots
        self.slot_tokens = graph.input(SLOT_TOKEN_IDS, ir.DataType.INT64, [slots]) if slots else None
        self.table: ir.Value | None = None
        if len(kept) < vocab:
            table = np.full(vocab, self.count, np.int64)
            table[kept] = np.arange(len(kept))
            self.table = graph.constant("q_columns", table)

    def drafted(self, q: ir.Value, tokens: ir.Value) -> ir.Value:
        """Returns q_i(token i), float32[γ]."""
        graph = self.graph
        if self.table is None:
            return _entries(graph, q, tokens, self.count)
        column = graph.op("Gather", self.table, tokens, axis=0)
        if self.slot_tokens is not None:
            is_slot, at = self._slot_columns(self.slot_tokens, tokens)
            column = graph.op("Where", is_slot, at, column)
        (last,) = graph.ints([self.count - 1])
        entries = _entries(graph, q, graph.op("Min", column, last), self.count)
        return graph.op("Where", graph.op("Greater", column, last), graph.floats(0), entries)

    def spread(self, row: ir.Value) -> ir.Value:
        """Returns one row of q, float32[1, K + slots], as float32[vocab], one value for each token."""
        graph = self.graph
        flat = graph.reshape(row, self.count)
        if self.table is None:
            return flat
        kept = graph.op("Gather", graph.op("Concat", flat, graph.floats(0), axis=0), self.table, axis=0)
        return self._with_slots(flat, kept)

    def _slot_columns(self, slot_tokens: ir.Value, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns which of `tokens`, int64[γ], are in slots, bool[γ], and the columns of those, int64[γ]."""
        graph = self.graph
        matches = graph.op("Cast", graph.op("Equal", graph.reshape(tokens, -1, 1), slot_tokens), to=INT64)
        numbers = graph.constant("slot_columns", np.arange(self.kept, self.count))
        is_slot = graph.op("Greater", graph.reshape(graph.total(matches, 1), -1), *graph.ints([0]))
        return is_slot, graph.reshape(graph.total(graph.op("Mul", matches, numbers), 1), -1)

    def _with_slots(self, flat: ir.Value, kept: ir.Value) -> ir.Value:
        """Add the values of the tokens in slots. Empty slots are written behind the vocabulary, and cut.

        Args:
            flat: float32[K + slots], a row of q.
            kept: float32[vocab], the values of the kept tokens.
        """
        graph = self.graph
        if self.slot_tokens is None:
            return kept
        zero, first, vocab, end = graph.ints([0], [self.kept], [self.vocab], [_END])
        at = graph.op("Where", graph.op("Less", self.slot_tokens, zero), vocab, self.slot_tokens)
        values = graph.op("Slice", flat, first, end)
        wider = graph.op("Concat", kept, graph.floats(0), axis=0)
        return graph.op("Slice", graph.op("ScatterElements", wider, at, values, axis=0), zero, vocab)


def _replacement(
    graph: GraphBuilder, columns: _Columns, p: ir.Value, q: ir.Value, accepted: ir.Value, stays: ir.Value
) -> ir.Value:
    """Returns the weights that the next token is drawn from, float32[vocab], not normalised.

    They are the positive part of p − q at the first rejected position, or p after a wholly accepted draft.
    """
    rejected = graph.op("ReduceMax", graph.op("Cast", graph.op("Not", stays), to=INT64), keepdims=1)
    # the first rejected position's row of q; the last row, times zero, where there is none
    row = graph.op("Gather", q, graph.op("Sub", graph.op("Add", accepted, rejected), *graph.ints([1])), axis=0)
    q_row = graph.op("Mul", row, graph.op("Cast", rejected, to=FLOAT))
    p_row = graph.reshape(graph.op("Gather", p, accepted, axis=0), columns.vocab)
    rest = graph.op("Relu", graph.op("Sub", p_row, columns.spread(q_row)))
    # Where p equals q, rounding alone rejected, and nothing is left over.
    sums = graph.total(graph.blocks(graph.reshape(rest, 1, columns.vocab), columns.vocab)[0], 2)
    is_left = graph.op("Greater", graph.reshape(graph.total(sums, 1), 1), graph.floats(0))
    return graph.op("Where", is_left, rest, p_row)


def _leading(graph: GraphBuilder, flags: ir.Value) -> ir.Value:
    """Returns the number of leading true values of `flags`, bool[γ], as int64[1]."""
    failed = graph.op("Cast", graph.op("Not", flags), to=INT64)
    so_far = graph.op("CumSum", failed, graph.axis(0))
    intact = graph.op("Cast", graph.op("Equal", so_far, *graph.ints([0])), to=INT64)
    return graph.op("ReduceSum", intact, *graph.ints([0]), keepdims=1)


def _entries(graph: GraphBuilder, table: ir.Value, columns: ir.Value, width: int) -> ir.Value:
    """Returns `table[i, columns[i]]`, [γ], of a table [γ or more, width], without copying rows as a Slice would."""
    widths = graph.op("Add", graph.op("Mul", columns, *graph.ints([0])), *graph.ints([width]))
    starts = graph.op("CumSum", widths, graph.axis(0), exclusive=1)
    flat = graph.reshape(table, -1)
    return graph.op("Gather", flat, graph.op("Add", starts, columns), axis=0)
