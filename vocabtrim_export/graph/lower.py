"""One traced decoder → one graph for ONNX Runtime or TensorRT: the order of the passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from engines.vocab_map import VocabMap
from vocabtrim_export.graph.decoder import DecoderGraph, name_of
from vocabtrim_export.graph.head import (
    bake_token_ids,
    keep_last_positions,
    select_last_position,
    select_positions,
    trim_head,
)
from vocabtrim_export.graph.lowered import Lowered
from vocabtrim_export.graph.nodes import name_nodes
from vocabtrim_export.graph.ort import CONTRIB, lower_attention, lower_norms
from vocabtrim_export.graph.qdq import standard_products
from vocabtrim_export.graph.quantize import HEAD, Quantization, lower_products
from vocabtrim_export.graph.standard import STANDARD_OPSET, CacheForm, standard_attention, standard_norms
from vocabtrim_export.graph.tidy import pack_projections, tidy
from vocabtrim_export.graph.unroll import unroll
from vocabtrim_export.lowering.trace import OPSET, Traced


@dataclass(frozen=True, slots=True)
class Weights:
    """What a graph's weights are to be.

    vocab_map: the head's rows, None for all. moments: of the linear layers' inputs, as `input_moments` measures them;
    int4 is better with them.
    """

    dtype: torch.dtype
    quantization: Quantization = "none"
    vocab_map: VocabMap | None = None
    moments: Mapping[str, Tensor] | None = None


def lower(traced: Traced, weights: Weights) -> Lowered:
    """Lower for ONNX Runtime. `traced` stays as it was."""
    decoder = _start(traced, weights)
    pack_projections(decoder)
    keep_last_positions(decoder)
    _finish_head(decoder, weights)
    lower_norms(decoder)
    lower_attention(decoder)
    head_weights = lower_products(decoder, weights.quantization)
    decoder.finish()
    decoder.graph.opset_imports.update({"": OPSET, CONTRIB: 1})
    return Lowered.of(decoder, head_weights)


def lower_standard(traced: Traced, weights: Weights, cache: CacheForm) -> Lowered:
    """Lower to standard operators, for TensorRT. `traced` stays as it was.

    Inputs input_ids, position_ids: int64[1, sequence_length]; logits_positions: int64[keep], which of these positions
    the head reads; past_key_values.N.key|value: [1, kv_heads, slots, head_dim]; see `CacheForm` for attended_slots.
    Outputs logits: [1, keep, rows], token_ids: int64[1, keep], present.N.key|value. Tokens are written to the cache
    from slot `position_ids[0, 0]` on.
    """
    decoder = _start(traced, weights)
    positions = next(value for value in decoder.graph.inputs if value.name == "position_ids")
    for value in decoder.graph.inputs:
        value.shape = ir.Shape([1, "sequence_length"])
    select_positions(decoder)
    _finish_head(decoder, weights)
    return _finish_standard(decoder, weights, cache, [positions])


def lower_unrolled(traced: Traced, weights: Weights, cache: CacheForm, steps: int) -> Lowered:
    """As `lower_standard`, `steps` greedy steps at once: see `unroll` for what goes in and comes out."""
    decoder = _start(traced, weights)
    select_last_position(decoder)
    _finish_head(decoder, weights)
    return _finish_standard(decoder, weights, cache, unroll(decoder, steps))


def _start(traced: Traced, weights: Weights) -> DecoderGraph:
    moments = weights.moments or {}
    decoder = DecoderGraph.of(traced, weights.dtype, {f"model.{name}.weight": value for name, value in moments.items()})
    (head,) = decoder.composites("Head")
    name = name_of(head.inputs[1])  # of a tied weight, whichever name it was traced under
    decoder.weights[name] = replace(decoder.weights[name], moments=moments.get(HEAD))
    decoder.model.producer_name, decoder.graph.name = "vocabtrim-export", "decoder"
    tidy(decoder)
    return decoder


def _finish_head(decoder: DecoderGraph, weights: Weights) -> None:
    if weights.vocab_map is not None:
        trim_head(decoder, weights.vocab_map)
    bake_token_ids(decoder, weights.vocab_map)


def _finish_standard(
    decoder: DecoderGraph, weights: Weights, cache: CacheForm, positions: Sequence[ir.Value]
) -> Lowered:
    standard_norms(decoder)
    standard_attention(decoder, cache, positions)
    head_weights = standard_products(decoder, weights.quantization)
    decoder.finish()
    name_nodes(decoder.graph)
    decoder.graph.opset_imports.update({"": STANDARD_OPSET})
    return Lowered.of(decoder, head_weights)
