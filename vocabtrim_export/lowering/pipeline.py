"""One traced decoder → one graph for ONNX Runtime or TensorRT: the order of the passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor, nn

from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT, POSITION_IDS
from engines.bundle.vocab_map import VocabMap
from vocabtrim_export.lowering.attention_padding import suffices
from vocabtrim_export.lowering.embedding import lower_embedding
from vocabtrim_export.lowering.experts import lower_experts
from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.lm_head import (
    bake_token_ids,
    keep_last_positions,
    select_last_position,
    select_positions,
    trim_head,
)
from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.nodes import CONTRIB, name_nodes
from vocabtrim_export.lowering.ort_operators import lower_attention, lower_norms
from vocabtrim_export.lowering.ort_products import lower_products
from vocabtrim_export.lowering.quantize import HEAD, Quantization
from vocabtrim_export.lowering.slots import add_slots, slot_weights
from vocabtrim_export.lowering.standard_operators import STANDARD_OPSET, CacheForm, standard_attention, standard_norms
from vocabtrim_export.lowering.standard_products import standard_products
from vocabtrim_export.lowering.tidy import pack_projections, tidy
from vocabtrim_export.lowering.unroll import unroll
from vocabtrim_export.lowering.weights import Weight
from vocabtrim_export.tracing.emit import DOMAIN
from vocabtrim_export.tracing.trace import OPSET, Traced


@dataclass(frozen=True, slots=True)
class Weights:
    """Settings for storing a graph's weights, and the rows of the head that are kept.

    Attributes:
        dtype: The dtype of the weights.
        quantization: The quantisation of products.
        vocab_map: The tokens of the head's rows; None for all.
        moments: Second moments of the linear layers' inputs (`input_moments`); int4 is better with them.
        head_rows: int64[K], the model's rows for the tokens of `vocab_map`; None where a token's row is its id.
        slots: In-context slots of a trimmed head (see `add_slots`), 0 for none.
        pads_attention: Whether attention can compute more rows than are fed, see `lower_attention`.
    """

    dtype: torch.dtype
    quantization: Quantization = "none"
    vocab_map: VocabMap | None = None
    moments: Mapping[str, Tensor] | None = None
    head_rows: Tensor | None = None
    slots: int = 0
    pads_attention: bool = False


def lower(traced: Traced, weights: Weights) -> Lowered:
    """Lower for ONNX Runtime. `traced` stays as it was."""
    decoder = _start(traced, weights)
    pack_projections(decoder)
    keep_last_positions(decoder)
    _finish_head(decoder, weights)
    lower_norms(decoder)
    lower_attention(decoder, weights.pads_attention and suffices(decoder))
    lower_experts(decoder, weights.quantization)
    head_weights = lower_products(decoder, weights.quantization)
    if weights.quantization != "none":
        lower_embedding(decoder)
    decoder.finish()
    for node in decoder.graph:
        node.metadata_props.clear()  # traceback lines with the paths of this machine
    decoder.graph.opset_imports.update({"": OPSET, CONTRIB: 1})
    return Lowered.of(decoder, head_weights)


def lower_slot_rows(traced: Traced, weights: Weights, rows: Tensor, is_standard: bool) -> dict[str, Weight]:
    """Returns the head's rows, int64[n], that may enter slots; see `slot_weights`. `traced` stays as it was."""
    return slot_weights(_start(traced, weights), weights.quantization, rows, is_standard)


def lower_features(linear: nn.Linear, weights: Weights) -> ir.Model:
    """Lower the product that computes a head's hidden state: features [1, S, features] → [1, S, hidden].

    Args:
        linear: The product, with or without a bias.
        weights: The settings for storing its weights.
    """
    graph = ir.Graph([], [], nodes=[], name="features", opset_imports={"": OPSET, CONTRIB: 1})
    decoder = DecoderGraph(ir.Model(graph, ir_version=10, producer_name="vocabtrim-export"), {}, weights.dtype)
    moments = (weights.moments or {}).get("fc")
    tensors = {"fc.weight": linear.weight, "fc.bias": linear.bias}
    inputs = [
        decoder.add_weight(name, Weight.of(tensor, weights.dtype, moments))
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    x = decoder.input(FEATURES_OUTPUT, decoder.ir_dtype, [1, "sequence_length", linear.in_features])
    node = ir.node("Linear", [x, *inputs], domain=DOMAIN)
    graph.append(node)
    decoder.output(node.outputs[0], HIDDEN_INPUT, decoder.ir_dtype, [1, "sequence_length", linear.out_features])
    lower_products(decoder, weights.quantization)
    decoder.finish()
    graph.opset_imports.update({"": OPSET, CONTRIB: 1})
    return decoder.model


def lower_standard(traced: Traced, weights: Weights, cache: CacheForm) -> Lowered:
    """Lower to standard operators, for TensorRT. `traced` stays as it was.

    The inputs are input_ids, position_ids: int64[1, sequence_length]; logits_positions: int64[keep], which of these
    positions the head reads; past_key_values.N.key|value: [1, kv_heads, slots, head_dim]; see `CacheForm` for
    attended_slots. The outputs are logits: [1, keep, rows], token_ids: int64[1, keep], present.N.key|value. Tokens are
    written to the cache from slot `position_ids[0, 0]` on.
    """
    decoder = _start(traced, weights)
    positions = next(value for value in decoder.graph.inputs if value.name == POSITION_IDS)
    for value in decoder.graph.inputs:
        value.shape = ir.Shape([1, "sequence_length"])
    select_positions(decoder)
    _finish_head(decoder, weights)
    return _finish_standard(decoder, weights, cache, [positions])


def lower_unrolled(traced: Traced, weights: Weights, cache: CacheForm, steps: int) -> Lowered:
    """Lower greedy steps to one graph of standard operators; `unroll` lists its inputs and outputs.

    Args:
        traced: The traced decoder, which stays as it was.
        weights: The settings for storing weights.
        cache: The form of the KV cache.
        steps: γ, the number of steps.
    """
    decoder = _start(traced, weights)
    select_last_position(decoder)
    _finish_head(decoder, weights)
    return _finish_standard(decoder, weights, cache, unroll(decoder, steps))


def _start(traced: Traced, weights: Weights) -> DecoderGraph:
    moments = weights.moments or {}
    decoder = DecoderGraph.of(traced, weights.dtype, {f"model.{name}.weight": value for name, value in moments.items()})
    (head,) = decoder.composites("Head")
    name = name_of(head.inputs[1])  # a tied weight may have been traced under either name
    decoder.weights[name] = replace(decoder.weights[name], moments=moments.get(HEAD))
    decoder.model.producer_name, decoder.graph.name = "vocabtrim-export", "decoder"
    tidy(decoder)
    return decoder


def _finish_head(decoder: DecoderGraph, weights: Weights) -> None:
    slots = None
    if weights.vocab_map is not None:
        slots = add_slots(decoder, weights.slots) if weights.slots else None
        rows = torch.from_numpy(weights.vocab_map.kept_token_ids.copy())
        trim_head(decoder, rows if weights.head_rows is None else weights.head_rows)
    bake_token_ids(decoder, weights.vocab_map, slots)


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
