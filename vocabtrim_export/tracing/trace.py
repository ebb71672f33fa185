"""Trace a transformers causal LM as an ONNX graph of composites, without touching its weights.

The graph is traced on a skeleton of the model: same configuration, fake tensors in the export's dtype. Tracing so
needs no memory for weights, and one trace serves a target and the drafter cut from it.
"""

import copy
import gc
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT, HIDDEN_OUTPUT, INPUT_IDS, LOGITS, POSITION_IDS
from engines.errors import VocabtrimError
from vocabtrim_export.tracing.alibi import KeyBias, find_key_bias
from vocabtrim_export.tracing.composites import Parts, Rope, composites
from vocabtrim_export.tracing.emit import DOMAIN
from vocabtrim_export.tracing.experts import find_experts
from vocabtrim_export.tracing.failure import untraceable
from vocabtrim_export.tracing.layers import layer_inputs
from vocabtrim_export.tracing.parts import find_norms, find_rope, takes_positions

OPSET = 20


@dataclass(frozen=True, slots=True)
class Traced:
    """A decoder as composites.

    Attributes:
        graph: Its inputs are input_ids and position_ids, int64[1, S], its output logits[1, S, vocab]. A target that a
            head reads has the output features[1, S, layers·hidden] too; a head has the input hidden and the output
            next_hidden, [1, S, hidden] both. Initializers have names and shapes, no values.
        weights: The initializers' values by name, which share the model's memory.
        rotates: Whether attention does the rotation; else it is in the graph as the model writes it.
    """

    graph: ir.Model
    weights: dict[str, Tensor]
    rotates: bool


def trace(
    model: PreTrainedModel,
    dtype: torch.dtype,
    context_length: int,
    feature_layers: Sequence[int] = (),
    fuse_rotation: bool = True,
) -> Traced:
    """Trace a model.

    Args:
        model: A transformers causal LM, or a head.
        dtype: The dtype of the graph's weights.
        context_length: The tokens that the KV cache holds.
        feature_layers: The layers whose inputs become an output too; the number of layers itself is the LM head.
        fuse_rotation: Let attention rotate q and k, where it can do the model's rotation. The model must then attend to
            the rotated q and k, with no operation in between.

    Raises:
        VocabtrimError: transformers' attention interface does not cover the architecture.
    """
    modeling = sys.modules[type(model).__module__]
    key_bias = find_key_bias(model, context_length)
    in_attention = fuse_rotation and not _rotates_a_part(model) and key_bias is None
    rope = find_rope(model, modeling, context_length) if in_attention else None
    try:
        parts = Parts(find_norms(model), find_experts(model), rope, key_bias)
        graph = _trace_skeleton(model, modeling, dtype, parts, feature_layers)
    except VocabtrimError:
        raise
    except Exception as error:  # whatever the model's own code or torch.export raises
        raise untraceable(model, error) from error
    _check_attention(graph, model)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {f"model.{name}": tensor for name, tensor in model.named_buffers()}
    weights |= {f"rope.{name}": tensor for name, tensor in (rope.named_buffers() if rope else ())}
    weights |= {f"key_bias.{name}": tensor for name, tensor in (key_bias.named_buffers() if key_bias else ())}
    return Traced(graph, weights, rope is not None)


def _rotates_a_part(model: PreTrainedModel) -> bool:
    """Returns whether attention is latent (MLA): only a part of each query and key is rotated."""
    return any(hasattr(module, "qk_rope_head_dim") for module in model.modules())


class _Decoder(nn.Module):
    """A model with the graph's inputs and outputs; `outputs` are the names of the outputs."""

    def __init__(self, model: PreTrainedModel, parts: Parts, feature_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.rope, self.key_bias, self.feature_layers = model, parts.rope, parts.key_bias, feature_layers
        self.outputs = [LOGITS, FEATURES_OUTPUT] if feature_layers else [LOGITS]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        with layer_inputs(self.model, self.feature_layers) as entered:
            options = {"position_ids": position_ids} if takes_positions(self.model) else {}
            logits = self.model(input_ids=input_ids, use_cache=False, **options).logits
        return (logits, torch.cat(entered(), -1)) if self.feature_layers else (logits,)


class _HeadDecoder(_Decoder):
    """A head with the graph's inputs and outputs; it reads a hidden state and computes the next."""

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        super().__init__(model, parts)
        self.outputs = [LOGITS, HIDDEN_OUTPUT]

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        output = self.model(input_ids, position_ids, hidden)
        return output.logits, output.hidden_states


def _trace_skeleton(
    model: PreTrainedModel,
    modeling: ModuleType,
    dtype: torch.dtype,
    parts: Parts,
    feature_layers: Sequence[int],
) -> ir.Model:
    length = torch.export.Dim("sequence_length", min=1, max=1 << 20)
    with _no_garbage_collection(), FakeTensorMode(), torch.no_grad():
        skeleton = type(model)._from_config(_config_of(model), dtype=dtype).eval()
        fake_bias = parts.key_bias and KeyBias(torch.empty(parts.key_bias.get_buffer("bias").shape, dtype=dtype))
        fake = replace(parts, rope=parts.rope and _empty_rope(parts.rope, dtype), key_bias=fake_bias)
        example = {INPUT_IDS: torch.ones(1, 7, dtype=torch.long), POSITION_IDS: torch.arange(7)[None]}
        if HIDDEN_INPUT in inspect.signature(skeleton.forward).parameters:  # a head, which reads hidden states too
            decoder: _Decoder = _HeadDecoder(skeleton, fake)
            example[HIDDEN_INPUT] = torch.zeros(1, 7, skeleton.config.hidden_size, dtype=dtype)
        else:
            decoder = _Decoder(skeleton, fake, feature_layers)
        with composites(skeleton, modeling, fake):
            program = torch.export.export(
                decoder, tuple(example.values()), dynamic_shapes=({1: length},) * len(example), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=list(example),
                output_names=decoder.outputs,
            )
    assert exported is not None
    return exported.model


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the collection of reference cycles, which would scan every object of PyTorch again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _empty_rope(rope: Rope, dtype: torch.dtype) -> Rope:
    """Returns rotary tables of the same shapes without values."""
    return Rope(
        {
            name.removeprefix("cos_"): (torch.empty(cos.shape, dtype=dtype), torch.empty(cos.shape, dtype=dtype))
            for name, cos in rope.named_buffers()
            if name.startswith("cos_")
        }
    )


def _config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns a copy of the config that states whether `model` ties its head to its embedding.

    The checkpoint decides that, not its config: it may store a head although the config says tied.
    """
    config = copy.deepcopy(model.config)
    head = model.get_output_embeddings()
    if head is not None:
        is_tied = head.weight is model.get_input_embeddings().weight
        for each in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
            each.tie_word_embeddings = is_tied
    return config


def _check_attention(graph: ir.Model, model: PreTrainedModel) -> None:
    nodes = [node for node in graph.graph if node.domain == DOMAIN and node.op_type == "Attention"]
    layers = sorted(node.attributes["layer"].as_int() for node in nodes)
    expected = list(range(model.config.get_text_config().num_hidden_layers))
    if layers != expected:
        how = "several times" if len(nodes) > len(expected) else "in code of its own"
        raise VocabtrimError(
            f"a {model.config.model_type} model cannot be exported: transformers computes the attention of its layers "
            f"{how}, and the export replaces one call of the common attention interface per layer; give another "
            "architecture"
        )
