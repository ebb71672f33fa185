"""One traced decoder → one ONNX Runtime model: the order of the passes, and what the result reads per step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from engines.errors import VocabtrimError
from engines.vocab_map import VocabMap
from vocabtrim_export.graph.decoder import DecoderGraph, name_of
from vocabtrim_export.graph.head import bake_token_ids, keep_last_positions, trim_head
from vocabtrim_export.graph.ort import CONTRIB, lower_attention, lower_norms
from vocabtrim_export.graph.quantize import HEAD, Quantization, lower_products
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
    traced: Traced,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    vocab_map: VocabMap | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Lowered:
    """Lower for ONNX Runtime, the head trimmed to `vocab_map` where one is given. `traced` stays as it was.

    moments: of the linear layers' inputs, as `input_moments` measures them; int4 is better with them.
    """
    by_weight = {f"model.{name}.weight": value for name, value in (moments or {}).items()}
    decoder = DecoderGraph.of(traced, dtype, by_weight)
    (head,) = decoder.composites("Head")
    name = name_of(head.inputs[1])  # of a tied weight, whichever name it was traced under
    decoder.weights[name] = replace(decoder.weights[name], moments=(moments or {}).get(HEAD))
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
    heads, head_dim = _cache_form(caches)
    return Lowered(
        decoder.model,
        weight_bytes_per_step=_bytes_per_step(decoder.graph),
        head_bytes=sum(_size(decoder.graph.initializers[name]) for name in head_weights),
        kv_bytes_per_token=len(caches) * heads * head_dim * decoder.dtype.itemsize,
        num_layers=len(caches) // 2,
        num_kv_heads=heads,
        head_dim=head_dim,
    )


def _bytes_per_step(graph: ir.Graph) -> int:
    total = 0
    for value in graph.initializers.values():
        whole = any(use.idx not in _TABLES.get(use.node.op_type, ()) for use in value.uses())
        total += _size(value) // (1 if whole else _dims(value)[0])
    return total


def _cache_form(caches: list[ir.Value]) -> tuple[int, int]:
    """Heads and head size of the KV caches, which a bundle has of one form only."""
    forms = {(shape[1], shape[3]) for shape in map(_dims, caches)}
    if len(forms) != 1:
        raise VocabtrimError(f"the layers' KV caches differ in form ({sorted(forms)}), which bundles cannot hold")
    return forms.pop()


def _dims(value: ir.Value) -> list[int]:
    """The dimensions of a value; 0 for one that is not known."""
    assert value.shape is not None
    return [dim if isinstance(dim, int) else 0 for dim in value.shape]


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
