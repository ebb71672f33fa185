"""Medusa heads (arXiv 2401.10774): their checkpoint, as FasterDecoding and its successors write it, and their graph."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig

from engines.bundle.graph_io import FEATURES_OUTPUT, LOGITS
from engines.bundle.read import file_digest
from engines.bundle.typed_json import decode, read
from engines.errors import VocabtrimError
from vocabtrim_export.drafters.base import ParallelHeads
from vocabtrim_export.drafters.source import HeadSource, LoadHead, assemble, read_tensors, weight_files
from vocabtrim_export.lowering.graph import DecoderGraph
from vocabtrim_export.lowering.lm_head import bake_token_ids
from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.nodes import CONTRIB
from vocabtrim_export.lowering.ort_products import lower_products
from vocabtrim_export.lowering.pipeline import Weights
from vocabtrim_export.lowering.weights import Weight
from vocabtrim_export.sources.paths import local_path
from vocabtrim_export.sources.source import Source
from vocabtrim_export.sources.weight_files import tensor_shapes
from vocabtrim_export.tracing.emit import DOMAIN
from vocabtrim_export.tracing.trace import OPSET

_PREFIX = re.compile(r"^(?:medusa_heads?\.|heads\.)?(?=\d+\.)")
_NUMBER = re.compile(r"^heads\.(\d+)\.")
_MOST = 64  # the most heads, and blocks of each, far more than any checkpoint has


class MedusaConfig(LlamaConfig):
    """The configuration of Medusa heads.

    Attributes:
        feature_size: The target's hidden size.
        head_rows: Rows of each head.
        blocks: Residual blocks in front of each head's rows.
    """

    model_type = "medusa"
    feature_size: int = 0
    head_rows: int = 0
    num_heads: int = 0
    blocks: int = 0


class _Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(ParallelHeads):
    """Each head is a few residual blocks and a product."""

    config: MedusaConfig
    config_class = MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        size = config.feature_size
        self.heads = nn.ModuleList(
            nn.Sequential(*(_Block(size) for _ in range(config.blocks)), nn.Linear(size, config.head_rows, bias=False))
            for _ in range(config.num_heads)
        )
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def lm_heads(self) -> Sequence[nn.Linear]:
        return [head[-1] for head in self.heads]  # type: ignore[index]

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads], 1)

    def lower(self, weights: Weights) -> Lowered:
        graph = ir.Graph([], [], nodes=[], name="medusa", opset_imports={"": OPSET, CONTRIB: 1})
        decoder = DecoderGraph(ir.Model(graph, ir_version=10, producer_name="vocabtrim-export"), {}, weights.dtype)
        count, size = self.config.num_heads, self.config.feature_size
        features = decoder.input(FEATURES_OUTPUT, decoder.ir_dtype, [1, "sequence_length", size])
        axis = decoder.constant("ints_1", [1])
        rows = [_head(decoder, features, f"heads.{i}", weights, self) for i in range(count)]
        logits = _node(decoder, "Concat", [_node(decoder, "Unsqueeze", [row, axis]) for row in rows], axis=1)
        kept = len(weights.vocab_map) if weights.vocab_map else self.config.head_rows
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


def find_head(drafter: str, _target: str) -> LoadHead:
    """See `HeadKind.module`; the checkpoint itself is read when it is loaded."""
    return partial(load_medusa, drafter)


def load_medusa(spec: str, target: Source) -> HeadSource:
    """Load Medusa heads.

    Args:
        spec: The directory of the checkpoint.
        target: The loaded target, whose dtype the heads get.

    Raises:
        VocabtrimError: The checkpoint is incomplete or of an uncovered form, or its heads are not for this target.
    """
    directory = local_path(spec)
    where = str(directory / "config.json")
    data = read(directory / "config.json")
    heads, blocks = (
        decode(int, data.get(name), f"{where}: {name}") for name in ("medusa_num_heads", "medusa_num_layers")
    )
    files = weight_files(directory, "Medusa heads")
    names = {file: {name: _PREFIX.sub("heads.", name) for name in tensor_shapes(file)} for file in files}
    numbers = {int(match[1]) for each in names.values() for name in each.values() if (match := _NUMBER.match(name))}
    if not 0 < heads <= _MOST or blocks > _MOST or numbers != set(range(heads)):
        raise VocabtrimError(
            f"{spec} holds {len(numbers)} Medusa heads and its config.json says {heads}: fetch it again"
        )
    text = target.model.config.get_text_config()
    sizes = {"feature_size": text.hidden_size, "head_rows": target.vocab_size, "num_heads": heads, "blocks": blocks}
    context = getattr(text, "max_position_embeddings", 4096)
    config = {"hidden_size": text.hidden_size, "vocab_size": target.vocab_size, "max_position_embeddings": context}
    model = assemble(spec, "medusa", lambda: MedusaHeads(MedusaConfig(**config, **sizes)), read_tensors(names), target)
    digest = hashlib.sha256("\n".join([*map(file_digest, files), target.digest]).encode()).hexdigest()
    rows, features = np.arange(target.vocab_size), (int(text.num_hidden_layers),)
    return HeadSource(spec, model, target.tokenizer, digest, "medusa", rows, features)


def _head(decoder: DecoderGraph, x: ir.Value, name: str, weights: Weights, model: MedusaHeads) -> ir.Value:
    """Lower one head: [1, S, hidden] → [1, S, rows]. Returns its logits."""
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
