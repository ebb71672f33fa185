"""Medusa heads as a graph, which is no decoder: it only multiplies the target's features."""

from dataclasses import replace

import onnx_ir as ir
import torch
from torch import nn

from engines.bundle.graph_io import FEATURES_OUTPUT, LOGITS
from vocabtrim_export.drafters.medusa import MedusaHeads
from vocabtrim_export.lowering.graph import DecoderGraph
from vocabtrim_export.lowering.lm_head import bake_token_ids
from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.ort_operators import CONTRIB
from vocabtrim_export.lowering.ort_products import lower_products
from vocabtrim_export.lowering.pipeline import Weights
from vocabtrim_export.lowering.weights import Weight
from vocabtrim_export.tracing.composites import DOMAIN
from vocabtrim_export.tracing.trace import OPSET


def lower_medusa(model: MedusaHeads, weights: Weights) -> Lowered:
    """Lower to features: [1, S, hidden] → logits [1, heads, S, rows], token_ids: int64[1, heads, S].

    One call drafts with all heads, so a draft step counts as its share of the bytes that a call reads.
    """
    graph = ir.Graph([], [], nodes=[], name="medusa", opset_imports={"": OPSET, CONTRIB: 1})
    decoder = DecoderGraph(ir.Model(graph, ir_version=10, producer_name="vocabtrim-export"), {}, weights.dtype)
    count, size = model.config.num_heads, model.config.feature_size
    features = decoder.input(FEATURES_OUTPUT, decoder.ir_dtype, [1, "sequence_length", size])
    axis = decoder.constant("ints_1", [1])
    rows = [_head(decoder, features, f"heads.{i}", weights, model) for i in range(count)]
    logits = _node(decoder, "Concat", [_node(decoder, "Unsqueeze", [row, axis]) for row in rows], axis=1)
    kept = len(weights.vocab_map) if weights.vocab_map else model.config.head_rows
    decoder.output(logits, LOGITS, decoder.ir_dtype, [1, count, "sequence_length", kept])
    bake_token_ids(decoder, weights.vocab_map)
    logits.shape = ir.Shape([1, count, "sequence_length", kept])
    graph.outputs[1].shape = ir.Shape([1, count, "sequence_length"])
    head_weights = lower_products(decoder, weights.quantization)
    decoder.finish()
    graph.opset_imports.update({"": OPSET, CONTRIB: 1})
    lowered = Lowered.of(decoder, head_weights)
    shares = {name: getattr(lowered, name) // count for name in ("weight_bytes_per_step", "head_bytes")}
    return replace(lowered, **shares)


def _head(decoder: DecoderGraph, x: ir.Value, name: str, weights: Weights, model: MedusaHeads) -> ir.Value:
    """One head: [1, S, hidden] → [1, S, rows]."""
    for block in range(model.config.blocks):
        product = _product(decoder, "Linear", x, f"{name}.{block}.linear", weights, model)
        gated = _node(decoder, "Mul", [product, _node(decoder, "Sigmoid", [product])])
        x = _node(decoder, "Add", [x, gated])
    return _product(decoder, "Head", x, f"{name}.{model.config.blocks}", weights, model)


def _product(decoder: DecoderGraph, op: str, x: ir.Value, name: str, weights: Weights, model: MedusaHeads) -> ir.Value:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    weight = Weight.of(linear.weight, weights.dtype, (weights.moments or {}).get(name))
    if op == "Head" and weights.vocab_map:
        weight = weight.rows(torch.from_numpy(weights.vocab_map.kept_token_ids.copy()))
    inputs = [x, decoder.add_weight(f"{name}.weight", weight)]
    if linear.bias is not None:
        inputs.append(decoder.add_weight(f"{name}.bias", Weight.of(linear.bias, weights.dtype)))
    node = ir.node(op, inputs, domain=DOMAIN)
    decoder.graph.append(node)
    return node.outputs[0]


def _node(decoder: DecoderGraph, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op, inputs, attributes)
    decoder.graph.append(node)
    return node.outputs[0]
