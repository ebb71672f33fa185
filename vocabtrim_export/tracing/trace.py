"""From a transformers causal LM to an ONNX graph of composites, without touching its weights.

The graph is traced on a skeleton of the model: same configuration, fake tensors in the export's dtype. Tracing so
needs no memory for weights, and one trace serves a target and the drafter cut from it.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_INPUT, HIDDEN_OUTPUT, INPUT_IDS, LOGITS, POSITION_IDS
from engines.errors import VocabtrimError
from vocabtrim_export.tracing.composites import DOMAIN, Norm, Rope, composites, rotary_modules
from vocabtrim_export.tracing.failure import untraceable

OPSET = 20


@dataclass(frozen=True, slots=True)
class Traced:
    """A decoder as composites.

    graph: inputs input_ids, position_ids: int64[1, S]; output logits[1, S, vocab]. Its initializers have names and
    shapes, no values. weights: their values by name, sharing the model's memory.
    A target that a head reads has the output features[1, S, layers·hidden] as well, a head the input hidden and the
    output next_hidden, [1, S, hidden] both.
    rotates: whether attention does the rotation; else it is in the graph as the model writes it.
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
    """Trace `model` for a KV cache of `context_length` tokens.

    feature_layers: those whose inputs are to be an output, too; counted on, the LM head is one more.
    fuse_rotation: let attention rotate q and k, where the model's rotation is of the kind that it can do. That
    supposes that the model attends to what its rotation gives, with nothing in between.
    Raises `VocabtrimError` for an architecture that transformers' attention interface does not cover.
    """
    modeling = sys.modules[type(model).__module__]
    rope = find_rope(model, modeling, context_length) if fuse_rotation else None
    try:
        graph = _trace_skeleton(model, modeling, dtype, find_norms(model), rope, feature_layers)
    except VocabtrimError:
        raise
    except Exception as error:  # whatever the model's own code or torch.export raises
        raise untraceable(model, error) from error
    _check_attention(graph, model)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    weights |= {f"model.{name}": tensor for name, tensor in model.named_buffers()}
    weights |= {f"rope.{name}": tensor for name, tensor in (rope.named_buffers() if rope else ())}
    return Traced(graph, weights, rope is not None)


def find_norms(model: PreTrainedModel) -> list[Norm]:
    """The RMS norms of a model, known by what they compute and not by their name alone."""
    return [
        norm
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and (norm := _as_norm(name, module))
    ]


def _as_norm(name: str, module: nn.Module) -> Norm | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0))
    scale = weight.detach().float()
    expected = copy.deepcopy(module).float()(probe)
    plain = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    for zero_centered in (False, True):
        if torch.allclose(expected, plain * (1 + scale if zero_centered else scale), rtol=1e-4, atol=1e-5):
            return Norm(name, epsilon, zero_centered)
    return None


def find_rope(model: PreTrainedModel, modeling: ModuleType, context_length: int) -> Rope | None:
    """The rotary tables of a model that rotates halves of (the first dimensions of) q and k; None for any other."""
    modules, apply = rotary_modules(model), getattr(modeling, "apply_rotary_pos_emb", None)
    if len(modules) != 1 or apply is None:
        return None
    by_layer_type = "layer_type" in inspect.signature(modules[0].forward).parameters
    layer_types = sorted(set(model.config.get_text_config().layer_types)) if by_layer_type else [None]
    positions, hidden = torch.arange(context_length)[None], torch.zeros(1, 1, 1)
    tables = {}
    for layer_type in layer_types:
        options = {"layer_type": layer_type} if layer_type else {}
        cos, sin = modules[0](hidden, positions, **options)
        half = cos.shape[-1] // 2
        # GroupQueryAttention takes tables of a multiple of 8 columns
        if half % 8 or not _rotates_halves(apply, cos[:, -1:], sin[:, -1:]):
            return None
        tables[layer_type or "default"] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    return Rope(tables)


def _rotates_halves(apply: object, cos: Tensor, sin: Tensor) -> bool:
    size = cos.shape[-1]
    x = torch.randn(1, 1, 1, size, generator=torch.Generator().manual_seed(0))
    a, b = x.split(size // 2, dim=-1)
    c, s = cos[..., : size // 2], sin[..., : size // 2]
    expected = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    try:
        q, k = apply(x, x, cos, sin)  # type: ignore[operator]
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(y.shape == x.shape and torch.allclose(y, expected, rtol=1e-4, atol=1e-5) for y in (q, k))


class _Decoder(nn.Module):
    """The graph's inputs and outputs around the model; `outputs` are the names of the latter."""

    def __init__(self, model: PreTrainedModel, rope: Rope | None, feature_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.rope, self.feature_layers = model, rope, feature_layers
        self.outputs = [LOGITS, FEATURES_OUTPUT] if feature_layers else [LOGITS]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        with layer_inputs(self.model, self.feature_layers) as entered:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return (logits, torch.cat(entered(), -1)) if self.feature_layers else (logits,)


class _HeadDecoder(_Decoder):
    """The same of a head that reads and gives a hidden state."""

    def __init__(self, model: PreTrainedModel, rope: Rope | None) -> None:
        super().__init__(model, rope)
        self.outputs = [LOGITS, HIDDEN_OUTPUT]

    def forward(self, input_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        output = self.model(input_ids, position_ids, hidden)
        return output.logits, output.hidden_states


@contextmanager
def layer_inputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Callable[[], list[Tensor]]]:
    """Notes what enters these decoder layers when `model` runs: [1, S, hidden] each, in the order of `layers`. The
    number of layers itself stands for the LM head, which reads what leaves the last layer and the norm behind it.

    Raises `VocabtrimError` for a model whose layers are not to be found.
    """
    entered: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            entered[index] = inputs[0] if inputs else named["hidden_states"]

        return hook

    handles = []
    if layers:
        modules = [*decoder_layers(model), model.get_output_embeddings()]
        handles = [modules[i].register_forward_pre_hook(note(i), with_kwargs=True) for i in layers]
    try:
        yield lambda: [entered[i] for i in layers]
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of modules that is as long as the model is deep. Raises `VocabtrimError` where there is none."""
    config = model.config.get_text_config()
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    found = [each for each in lists if len(each) == config.num_hidden_layers]
    if len(found) != 1:
        raise VocabtrimError(f"a {config.model_type} model does not show its layers, whose inputs a head would read")
    return found[0]


def _trace_skeleton(
    model: PreTrainedModel,
    modeling: ModuleType,
    dtype: torch.dtype,
    norms: list[Norm],
    rope: Rope | None,
    feature_layers: Sequence[int],
) -> ir.Model:
    length = torch.export.Dim("sequence_length", min=1, max=1 << 20)
    with FakeTensorMode(), torch.no_grad():
        skeleton = type(model)._from_config(_config_of(model), dtype=dtype).eval()
        fake_rope = rope and Rope(
            {
                name.removeprefix("cos_"): (torch.empty(cos.shape, dtype=dtype), torch.empty(cos.shape, dtype=dtype))
                for name, cos in rope.named_buffers()
                if name.startswith("cos_")
            }
        )
        example = {INPUT_IDS: torch.ones(1, 7, dtype=torch.long), POSITION_IDS: torch.arange(7)[None]}
        if HIDDEN_INPUT in inspect.signature(skeleton.forward).parameters:  # a head, which reads hidden states too
            decoder: _Decoder = _HeadDecoder(skeleton, fake_rope)
            example[HIDDEN_INPUT] = torch.zeros(1, 7, skeleton.config.hidden_size, dtype=dtype)
        else:
            decoder = _Decoder(skeleton, fake_rope, feature_layers)
        with composites(skeleton, modeling, norms, fake_rope):
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


def _config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """A copy that says whether `model` ties its head to its embedding: checkpoints may store a head all the same."""
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
