"""The token embedding of a quantised graph: rows in blocks of 8 bits, which an LM head of the same blocks shares."""

import math
from collections.abc import Mapping

import onnx_ir as ir
import torch

from engines.bundle.graph_io import INPUT_IDS
from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.nodes import CONTRIB
from vocabtrim_export.lowering.ort_products import quantized_parts
from vocabtrim_export.lowering.quantize import BLOCK, block_size
from vocabtrim_export.lowering.weights import Weight

GATHER_BLOCKS = "GatherBlockQuantized"
EMBEDDING_BITS = 8
EMBEDDING = "rows"  # stands in the names of an embedding's blocks


def lower_embedding(decoder: DecoderGraph) -> None:
    """Lower the Gather of the tokens' rows to GatherBlockQuantized, in a float32 graph whose head is lowered already.

    Embeddings in float16 and bfloat16 stay as they are: such graphs are for GPUs, where this operator was never run. So
    do embeddings whose rows blocks do not divide.
    """
    if decoder.dtype is not torch.float32:
        return
    for node in list(decoder.graph):
        if node.op_type != "Gather" or node.domain or name_of(node.inputs[1]) != INPUT_IDS:
            continue
        name = name_of(node.inputs[0])
        dense = decoder.weights.get(name)
        if dense is None or len(dense.shape) != 2 or dense.shape[1] % BLOCK:
            continue
        block = block_size(EMBEDDING_BITS, dense.shape[1])
        parts = quantized_parts(dense, EMBEDDING_BITS, block)
        is_shared = _is_stored(decoder, name, parts)
        data, *scaling = (_stored(decoder, name, part, weight, is_shared) for part, weight in parts.items())
        options = {"bits": EMBEDDING_BITS, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        gather = ir.node(GATHER_BLOCKS, [data, node.inputs[1], *scaling], options, domain=CONTRIB)
        decoder.replace(node, [gather], gather.outputs)


def _is_stored(decoder: DecoderGraph, name: str, parts: Mapping[str, Weight]) -> bool:
    """Returns whether a head reads the same blocks: those of a tied weight, with as many bits."""
    head = {part: decoder.weights.get(f"{name}.{part}") for part in parts}
    return all(weight is not None and weight.shape == parts[part].shape for part, weight in head.items())


def _stored(decoder: DecoderGraph, name: str, part: str, weight: Weight, is_shared: bool) -> ir.Value:
    """Returns a part of the blocks, [vocab, …]; it is a view of the head's part where a head reads the same blocks."""
    flat = weight.reshaped((weight.shape[0], math.prod(weight.shape[1:])))
    if is_shared:
        return decoder.add_view(f"{name}.{EMBEDDING}.{part}", flat, f"{name}.{part}")
    return decoder.add_weight(f"{name}.{EMBEDDING}.{part}", flat)
