"""One traced decoder → one ONNX Runtime model: the order of the passes, and what the result reads per step."""

from dataclasses import dataclass

import onnx_ir as ir
import torch

from engines.vocab_map import VocabMap
from vocabtrim_export.graph.decoder import DecoderGraph
from vocabtrim_export.graph.head import bake_token_ids, keep_last_positions, trim_head
from vocabtrim_export.graph.ort import CONTRIB, lower_attention, lower_norms
from vocabtrim_export.graph.quantize import Quantization, lower_products
from vocabtrim_export.graph.tidy import pack_projections, tidy
from vocabtrim_export.lowering.trace import OPSET, Traced

# of these inputs a step reads a few rows: an embedding or remap table, rotary tables
_TABLES = {"Gather": (0,), "GroupQueryAttention": (7, 8)}


@dataclass(frozen=True, slots=True)
class Lowered:
    """A finished model, and the bytes of weights that one decode step reads: in all, and of the head alone."""

    model: ir.Model
    weight_bytes_per_step: int
    head_bytes: int
    kv_bytes_per_token: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


def lower(
    traced: Traced, dtype: torch.dtype, quantization: Quantization = "none", vocab_map: VocabMap | None = None
) -> Lowered:
    """Lower for ONNX Runtime, the head trimmed to `vocab_map` where one is given. `traced` stays as it was."""
    decoder = DecoderGraph.of(traced, dtype)
    decoder.model.producer_name, decoder.graph.name = "vocabtrim-export", "decoder"
    tidy(decoder)
    pack_projections(decoder)
    keep_last_positions(decoder)
    if vocab_map is not None:
        trim_head(decoder, vocab_map)
    bake_token_ids(decoder, vocab_map)
    lower_norms(decoder)
    lower_attention(decoder)
    head_weights = lower_products(decoder, quantization)
    decoder.finish()
    decoder.graph.opset_imports.update({"": OPSET, CONTRIB: 1})
    caches = [value for value in decoder.graph.inputs if str(value.name).startswith("past_key_values.")]
    shapes = [value.shape for value in caches if value.shape is not None]
    return Lowered(
        decoder.model,
        weight_bytes_per_step=_bytes_per_step(decoder.graph),
        head_bytes=sum(_size(decoder.graph.initializers[name]) for name in head_weights),
        kv_bytes_per_token=sum(int(shape[1]) * int(shape[3]) for shape in shapes) * decoder.dtype.itemsize,
        num_layers=len(caches) // 2,
        num_kv_heads=int(shapes[0][1]),
        head_dim=int(shapes[0][3]),
    )


def _bytes_per_step(graph: ir.Graph) -> int:
    total = 0
    for value in graph.initializers.values():
        whole = any(use.idx not in _TABLES.get(use.node.op_type, ()) for use in value.uses())
        rows = 1 if whole or value.shape is None else int(value.shape[0])
        total += _size(value) // rows
    return total


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
