"""The LM head: which positions it reads, which rows it keeps, and the table that maps its columns back to tokens."""

import onnx_ir as ir
import torch
from torch import Tensor

from engines.bundle.graph_io import INPUT_IDS, KEEP, LOGITS_POSITIONS, TOKEN_IDS, TOKEN_TABLE
from engines.bundle.vocab_map import VocabMap
from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.nodes import Nodes

_END = (1 << 63) - 1


def keep_last_positions(decoder: DecoderGraph) -> None:
    """Feed the head only the last `num_logits_to_keep: int64[1]` positions: a prefill needs one row of logits."""
    (head,) = decoder.composites("Head")
    ids = next(value for value in decoder.graph.inputs if value.name == INPUT_IDS)
    keep = decoder.input(KEEP, ir.DataType.INT64, [1])
    nodes = Nodes(decoder, head)
    # Slice reads its bounds on the host. Shape writes its result there too, which keeps this sum on the host: Neg(keep)
    # would run on a GPU and be copied back, and a graph with such a copy cannot become a CUDA graph.
    start = nodes("Sub", nodes("Shape", ids, start=1, end=2), keep)
    last = nodes("Slice", head.inputs[0], start, nodes.ints(_END), nodes.ints(1))
    head.replace_input_with(0, last)


def select_positions(decoder: DecoderGraph) -> None:
    """Feed the head only the positions at the indices `logits_positions: int64[keep]` of the input."""
    (head,) = decoder.composites("Head")
    indices = decoder.input(LOGITS_POSITIONS, ir.DataType.INT64, ["keep"])
    head.replace_input_with(0, Nodes(decoder, head)("Gather", head.inputs[0], indices, axis=1))


def select_last_position(decoder: DecoderGraph) -> None:
    """Feed the head only the last position."""
    (head,) = decoder.composites("Head")
    nodes = Nodes(decoder, head)
    head.replace_input_with(0, nodes("Gather", head.inputs[0], nodes.ints(-1), axis=1))


def trim_head(decoder: DecoderGraph, rows: Tensor) -> None:
    """Keep only these rows (and bias entries) of the head, int64[K]. A tied embedding keeps all of its rows."""
    (head,) = decoder.composites("Head")
    for index, value in list(enumerate(head.inputs))[1:]:
        if value is not None:
            name = name_of(value)
            head.replace_input_with(index, decoder.add_weight(f"{name}.kept", decoder.weights[name].rows(rows)))


def bake_token_ids(decoder: DecoderGraph, vocab_map: VocabMap | None, slots: ir.Value | None = None) -> None:
    """Add the output token_ids, int64[1, keep].

    It is the ArgMax of the logits (the first of equal ones), then, for a trimmed head, a Gather from the table of kept
    token ids. This must run before other outputs are added: logits is output 0.

    Args:
        decoder: The graph.
        vocab_map: The tokens of the head's rows; None for a full head.
        slots: int64[M], the token ids of the columns after the head's own; None where there are no slots.
    """
    logits = decoder.graph.outputs[0]
    columns = len(vocab_map) if vocab_map else int(logits.shape[-1])  # type: ignore[index, arg-type]
    if slots is not None and slots.shape is not None:
        columns += int(slots.shape[0])  # type: ignore[arg-type]
    logits.shape = ir.Shape([1, "keep", columns])
    compared = logits
    if decoder.dtype is torch.bfloat16:  # ONNX Runtime's CUDA has no ArgMax for it; a cast to float changes no order
        cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
        decoder.graph.append(cast)
        compared = cast.outputs[0]
    top = ir.node("ArgMax", [compared], {"axis": -1, "keepdims": 0, "select_last_index": 0})
    decoder.graph.append(top)
    if vocab_map is not None:
        table = decoder.initializer(TOKEN_TABLE, ir.Tensor(vocab_map.kept_token_ids, name=TOKEN_TABLE))
        if slots is not None:
            tables = ir.node("Concat", [table, slots], {"axis": 0})
            decoder.graph.append(tables)
            table = tables.outputs[0]
        top = ir.node("Gather", [table, top.outputs[0]])
        decoder.graph.append(top)
    decoder.output(top.outputs[0], TOKEN_IDS, ir.DataType.INT64, [1, "keep"])
