"""The outputs that a proof expects: those of the loaded model in PyTorch, in float32."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engines.bundle.graph_io import FEATURES_OUTPUT, HIDDEN_OUTPUT, LOGITS
from vocabtrim_export.drafters.base import FeatureHead
from vocabtrim_export.proof.tokens import Calls, Window
from vocabtrim_export.sources.precision import running_in
from vocabtrim_export.tracing.composites import rotary_modules
from vocabtrim_export.tracing.layers import layer_inputs
from vocabtrim_export.tracing.parts import takes_positions

_WINDOWED = "vocabtrim_windowed"

FloatArray = NDArray[np.float32]


@torch.inference_mode()
def expected_outputs(
    model: PreTrainedModel, dtype: torch.dtype, calls: Calls, window: Window | None, feature_layers: Sequence[int]
) -> dict[str, FloatArray]:
    """Run `model` on the tokens in one forward pass, as a graph in `dtype` does.

    Args:
        model: The model, which computes in float32.
        dtype: The graph's, to which cosines and sines are rounded.
        calls: The tokens of the proof.
        window: The sliding window of the proof; None where the tokens do not reach past one.
        feature_layers: The layers whose inputs are the features; empty for a model that gives none.

    Returns:
        float32 arrays by the graph's names: logits[S, vocab], with `feature_layers` features[S, layers·hidden], and for
        a head next_hidden[S, hidden].
    """
    with _as_proven(model, dtype, window), layer_inputs(model, feature_layers) as entered:
        computed = _forward(model, calls)
        outputs = {LOGITS: computed.logits[0].numpy()}
        if isinstance(model, FeatureHead):
            outputs[HIDDEN_OUTPUT] = computed.hidden_states[0].numpy()
        if feature_layers:
            outputs[FEATURES_OUTPUT] = torch.cat(entered(), -1)[0].numpy()
    return outputs


@torch.inference_mode()
def expected_cache(
    model: PreTrainedModel, dtype: torch.dtype, calls: Calls, window: Window | None
) -> list[Mapping[str, FloatArray]]:
    """Returns the key and value of each layer, [kv_heads, S, head_dim] each.

    A layer with a window has those of the last tokens only.
    """
    with _as_proven(model, dtype, window):
        cache: Any = getattr(_forward(model, calls, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", ())
    return [{"value": layer.values[0].numpy(), "key": layer.keys[0].numpy()} for layer in layers]


def _forward(model: PreTrainedModel, calls: Calls, use_cache: bool = False) -> Any:
    """Run the model. Positions are passed where the model takes them, as transformers' generate does."""
    ids = torch.from_numpy(calls.token_ids)[None]
    if calls.hidden is not None:
        return model(ids, torch.arange(len(calls))[None], torch.from_numpy(calls.hidden)[None])
    options = {"position_ids": torch.arange(len(calls))[None]} if takes_positions(model) else {}
    return model(input_ids=ids, use_cache=use_cache, **options)


@contextmanager
def _as_proven(model: PreTrainedModel, dtype: torch.dtype, window: Window | None) -> Iterator[None]:
    """Hold `model` in float32, but for cosines and sines, which its graph rounds to `dtype`."""

    def rounded(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(output.to(dtype).float() for output in outputs)

    handles = [module.register_forward_hook(rounded) for module in rotary_modules(model)]
    try:
        with running_in(model, torch.float32), _narrowed(model, window):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _narrowed(model: PreTrainedModel, window: Window | None) -> Iterator[None]:
    """Put the proof's window into the configuration of `model`, from which its masks are computed.

    A head's layer gets only a causal mask in PyTorch; here its attention computes one with the window.
    """
    config = model.config.get_text_config()
    if window is None:
        yield
        return
    attention = config._attn_implementation
    config.sliding_window = window.narrowed
    if isinstance(model, FeatureHead):
        AttentionInterface.register(_WINDOWED, partial(_windowed_attention, window))
        config._attn_implementation = _WINDOWED
    try:
        yield
    finally:
        config.sliding_window, config._attn_implementation = window.size, attention


def _windowed_attention(
    window: Window, module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attend with q, k, v: [1, heads, S, head_dim] as transformers does, as far back as the layer's window reaches."""
    size, tokens = options.get("sliding_window"), torch.arange(q.shape[2])
    back = tokens[:, None] - tokens
    reach = len(tokens) if not size else window.narrowed if size == window.size else size
    return sdpa_attention_forward(module, q, k, v, ((back >= 0) & (back < reach))[None, None], **options)
