"""The proof of graphs without a KV cache: parallel heads, and the product that joins a target's features for a head."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.bundle.graph_io import FEATURES_OUTPUT
from engines.bundle.read import FEATURES_NAME, MODEL_NAME
from engines.deviation import TOLERANCE, deviation
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.drafters.base import FeatureHead, ParallelHeads
from vocabtrim_export.proof.computed import run_products
from vocabtrim_export.proof.dequantized import dequantized, unlike_weights
from vocabtrim_export.sources.precision import running_in

_ROWS = 5
Heads = Mapping[nn.Module, Tensor | None]


def heads_difference(directory: Path, plan: BundlePlan) -> str | None:
    """Returns how a graph of parallel heads differs from the heads, as the end of a sentence; None if it does not."""
    model = plan.source.model
    assert isinstance(model, ParallelHeads)
    rows = None if plan.head_rows is None else torch.from_numpy(plan.head_rows)
    heads: dict[nn.Module, Tensor | None] = {head: rows for head in model.lm_heads}
    outputs = _compare(directory / MODEL_NAME, plan, model, model.config.feature_size, heads)
    if isinstance(outputs, str):
        return outputs
    logits, token_ids = outputs
    best = logits.argmax(-1)
    tokens = best if plan.vocab_map is None else plan.vocab_map.kept_token_ids[best]
    return None if np.array_equal(token_ids, tokens) else "its token_ids are not those of its largest logits"


def fusion_difference(directory: Path, plan: BundlePlan) -> str | None:
    """Returns how `features.onnx` differs from the head's product, as the end of a sentence; None if it does not.

    It is also None for a model without `features.onnx`.
    """
    model = plan.source.model
    if not isinstance(model, FeatureHead) or model.fuse is None:
        return None
    outputs = _compare(directory / FEATURES_NAME, plan, model.fuse, model.fuse.in_features, {})
    return f"in {FEATURES_NAME}, {outputs}" if isinstance(outputs, str) else None


def _compare(graph: Path, plan: BundlePlan, module: nn.Module, size: int, heads: Heads) -> str | list[NDArray[Any]]:
    """Run the graph and the module on random rows of `size` numbers.

    Returns:
        The graph's outputs, or how the first of them differs from the module's.
    """
    rows = np.random.default_rng(0).standard_normal((1, _ROWS, size), np.float32)
    try:
        computed = run_products(graph, FEATURES_OUTPUT, rows)
    except VocabtrimError as error:
        return str(error)
    model = plan.source.model
    with torch.inference_mode(), running_in(model, torch.float32), _as_written(graph, plan, heads) as unlike:
        wanted = module(torch.from_numpy(rows)).numpy()
    if unlike:
        return unlike_weights(plan.source, unlike[0], plan.quantization)
    if plan.quantization == "none" and heads and plan.head_rows is not None:
        wanted = wanted[..., plan.head_rows]
    off = deviation(computed[0], wanted)
    return computed if off <= TOLERANCE[plan.dtype] else f"what it computes is off by {off:.2g} of its spread"


def _as_written(graph: Path, plan: BundlePlan, heads: Heads) -> AbstractContextManager[list[str]]:
    if plan.quantization == "none":
        return nullcontext([])
    return dequantized(plan.source.model, graph, plan.quantization, heads, prefix="")
