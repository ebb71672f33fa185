"""A bundle's graph for runtimes that feed `attention_mask` and want a full row of logits for every token."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from engines.bundle.graph_io import (
    ATTENTION_PADDING,
    INPUT_IDS,
    KEEP,
    LOGITS,
    SEQLENS_K,
    TOKEN_IDS,
    TOKEN_TABLE,
    TOTAL_LENGTH,
)
from engines.bundle.manifest import MODEL_NAME, WEIGHTS_NAME
from engines.errors import VocabtrimError
from vocabtrim_export.formats.exported import Exported
from vocabtrim_export.lowering.graph_files import clone_file

_OWN_INPUTS = (SEQLENS_K, TOTAL_LENGTH, KEEP, ATTENTION_PADDING)


def check_widths(exported: Exported, name: str) -> None:
    """Check that the pair's graphs fit a format whose models share one vocabulary.

    Raises:
        VocabtrimError: The drafter's full head has more tokens than the target.
    """
    target, drafter = exported.manifests["target"], exported.manifests["drafter"]
    if drafter.head_rows == drafter.vocab_size > target.vocab_size:
        raise VocabtrimError(
            f"--format {name}: the drafter has {drafter.vocab_size} tokens, its target {target.vocab_size}: give a "
            "smaller --k, which cuts the rest"
        )


def write_masked(bundle: Path, directory: Path, vocab: int, width: int) -> None:
    """Write the changed graph of `bundle`, and a clone of its weights.

    The graph's inputs are input_ids: int64[1, S]; attention_mask: int64[1, past + S]; past_key_values.N.key|value as
    before; and position_ids where the model reads them. Its outputs are logits: [1, S, width], −inf for every token
    that a trimmed head has no row for, and present.N.key|value.

    Args:
        bundle: A bundle of `--format onnx`.
        directory: An empty directory.
        vocab: Tokens of the bundle's model.
        width: Tokens of the target. Where they are more than `vocab`, an id that only the target has is read as the
            last one here, because the embedding has no row for it.
    """
    model = onnx.load(bundle / MODEL_NAME, load_external_data=False)
    graph = model.graph
    _remove(graph.input, _OWN_INPUTS)
    _remove(graph.output, (TOKEN_IDS,))
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total_length"])
    graph.input.insert(1, mask)
    logits = next(value for value in graph.output if value.name == LOGITS)
    rows = logits.type.tensor_type.shape.dim[2].dim_value
    tail = [] if rows == width else _widen(graph, rows, width, logits.type.tensor_type.elem_type)
    front = _known_ids(graph, vocab) if vocab < width else []
    nodes = [*_lengths(graph), *front, *graph.node, *tail]
    del graph.node[:]
    graph.node.extend(_used(nodes, [value.name for value in graph.output]))
    logits.CopyFrom(helper.make_tensor_value_info(LOGITS, logits.type.tensor_type.elem_type, [1, "length", width]))
    used = {name for node in graph.node for name in node.input}
    _remove(graph.initializer, [tensor.name for tensor in graph.initializer if tensor.name not in used])
    onnx.save(model, directory / MODEL_NAME)
    clone_file(bundle / WEIGHTS_NAME, directory / WEIGHTS_NAME)


def _lengths(graph: GraphProto) -> list[NodeProto]:
    """Returns nodes that compute attention's lengths from the mask, and makes the head read all positions."""
    _constant(graph, "mask.axis", np.array([1], np.int64))
    return [
        _node("ReduceSum", ["attention_mask", "mask.axis"], "mask.sum", keepdims=0),
        _node("Sub", ["mask.sum", "mask.axis"], "mask.last"),
        _node("Cast", ["mask.last"], SEQLENS_K, to=TensorProto.INT32),
        _node("Shape", ["attention_mask"], "mask.length", start=1, end=2),
        _node("Cast", ["mask.length"], TOTAL_LENGTH, to=TensorProto.INT32),
        _node("Shape", [INPUT_IDS], KEEP, start=1, end=2),
    ]


def _known_ids(graph: GraphProto, vocab: int) -> list[NodeProto]:
    """Returns nodes that replace ids of `vocab` or more.

    The target may pad its head, or have tokens that the drafter lacks.
    """
    for node in graph.node:
        node.input[:] = ["ids.known" if name == INPUT_IDS else name for name in node.input]
    _constant(graph, "ids.last", np.array(vocab - 1, np.int64))
    return [_node("Min", [INPUT_IDS, "ids.last"], "ids.known")]


def _widen(graph: GraphProto, rows: int, width: int, dtype: int) -> list[NodeProto]:
    """Returns nodes that scatter the logits of `rows` tokens into a row of `width`, −inf elsewhere."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["logits.kept" if name == LOGITS else name for name in names]
    if all(tensor.name != TOKEN_TABLE for tensor in graph.initializer):  # a full head of fewer tokens than the target's
        _constant(graph, TOKEN_TABLE, np.arange(rows, dtype=np.int64))
    _constant(graph, "wide.width", np.array([width], np.int64))
    minus = helper.make_tensor("value", dtype, [1], [-np.inf])
    return [
        _node("Shape", ["logits.kept"], "wide.shape"),
        _node("Expand", [TOKEN_TABLE, "wide.shape"], "wide.columns"),
        _node("Shape", ["logits.kept"], "wide.rows", start=0, end=2),
        _node("Concat", ["wide.rows", "wide.width"], "wide.full", axis=0),
        _node("ConstantOfShape", ["wide.full"], "wide.empty", value=minus),
        _node("ScatterElements", ["wide.empty", "wide.columns", "logits.kept"], LOGITS, axis=2),
    ]


def _used(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Returns the `nodes`, in topological order, that `outputs` need."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]


def _node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op}.{output}", **attributes)


def _constant(graph: GraphProto, name: str, values: NDArray[np.int64]) -> None:
    graph.initializer.append(numpy_helper.from_array(values, name))


def _remove(values: Any, names: Iterable[str]) -> None:
    """Drop the values with these names from a repeated field."""
    gone = set(names)
    for value in [value for value in values if value.name in gone]:
        values.remove(value)
