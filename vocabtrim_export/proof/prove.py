"""The proof of a bundle: its graphs compute what the loaded model does, to rounding."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bundle.graph_io import LOGITS, PAST, TOKEN_IDS
from engines.bundle.read import MODEL_NAME
from engines.deviation import TOLERANCE, deviation
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.drafters.base import ParallelHeads
from vocabtrim_export.proof.computed import Computed, run_graph, written_logits
from vocabtrim_export.proof.dequantized import dequantized, unlike_weights
from vocabtrim_export.proof.expected import FloatArray, expected_cache, expected_outputs
from vocabtrim_export.proof.products import fusion_difference, heads_difference
from vocabtrim_export.proof.slots import FilledSlots, filled_slots
from vocabtrim_export.proof.tokens import Calls, Window, calls, window_of
from vocabtrim_export.proof.unrolled import unrolled_difference
from vocabtrim_export.sources.source import DTYPES


def find_difference(directory: Path, plan: BundlePlan) -> str | None:
    """Run the graphs in `directory` on a few tokens: a prefill, a block and a decode step, past a sliding window.

    A window that only many tokens reach past is narrowed on both sides, and where that does not work, reached.

    Returns:
        None where they compute what `plan.source` does, else the first difference, to end a sentence.

    Raises:
        VocabtrimError: The model itself computes NaN or infinite logits.
    """
    if isinstance(plan.source.model, ParallelHeads):
        return heads_difference(directory, plan)
    in_attention = plan.trt is None  # where it can be narrowed
    window = window_of(plan.source.model, plan.context_length, narrow=in_attention)
    difference = _compare(directory, plan, window)
    if difference and window and window.narrowed != window.size:
        difference = _compare(directory, plan, window_of(plan.source.model, plan.context_length, narrow=False))
    if not difference and plan.dtype == "fp16" and plan.trt is None:
        _check_range(directory, plan)
    return difference or fusion_difference(directory, plan) or unrolled_difference(directory, plan)


def _check_range(directory: Path, plan: BundlePlan) -> None:
    """Run the graph in its own float16, which may overflow where float32 does not.

    A plan shows this when it is loaded.

    Raises:
        VocabtrimError: A logit is NaN or infinite.
    """
    fed = calls(plan.source, plan.context_length, None)
    logits = written_logits(directory, fed)
    if broken := (np.isnan(logits) | np.isposinf(logits)).any(-1).sum():
        raise VocabtrimError(
            f"{plan.source.name}: in fp16 it computes NaN or infinite logits after {broken} of {len(logits)} tokens, "
            "its numbers are beyond 65504: use --dtype fp32, or bf16 on a GPU"
        )


def _compare(directory: Path, plan: BundlePlan, window: Window | None) -> str | None:
    fed = calls(plan.source, plan.context_length, window)
    slots = filled_slots(directory, plan)
    if slots and not slots.are_the_models:
        return f"in its slots, {unlike_weights(plan.source, slots.head, plan.quantization)}"
    try:
        computed = run_graph(directory, fed, window, slots=slots.by_call(fed) if slots else None)
    except VocabtrimError as error:
        return str(error)
    with _as_written(directory, plan) as unlike, _head_columns(plan, slots):
        wanted = expected_outputs(plan.source.model, DTYPES[plan.dtype], fed, window, plan.features_given)
        if not unlike:
            if slots:
                wanted[LOGITS] = slots.with_empty(wanted[LOGITS], fed)
            elif plan.quantization == "none":
                wanted[LOGITS] = wanted[LOGITS][:, : plan.source.vocab_size]
                wanted[LOGITS] = wanted[LOGITS][:, slice(None) if plan.head_rows is None else plan.head_rows]
            return _first_difference(plan, fed, window, computed, wanted, slots)
    return unlike_weights(plan.source, unlike[0], plan.quantization)  # when the model has its own again


def _head_columns(plan: BundlePlan, slots: FilledSlots | None) -> AbstractContextManager[None]:
    """Give the plan's model the columns that its bundle with slots has; other bundles leave it as it is."""
    if slots is None:
        return nullcontext()
    kept = torch.from_numpy(plan.head_rows) if plan.quantization == "none" else None  # else the head has no others
    return slots.as_columns(plan.source.model.get_output_embeddings(), kept)


@contextmanager
def _as_written(directory: Path, plan: BundlePlan) -> Iterator[list[str]]:
    """Give the plan's model the weights of its quantised bundle for the block.

    Yields:
        The layers whose written weights are not the model's, rounded.
    """
    model = plan.source.model
    if plan.quantization == "none":
        yield []
        return
    rows = None if plan.head_rows is None else torch.from_numpy(plan.head_rows)
    head = model.get_output_embeddings()
    with dequantized(model, directory / MODEL_NAME, plan.quantization, {head: rows}) as unlike:
        yield unlike


def _first_difference(
    plan: BundlePlan,
    fed: Calls,
    window: Window | None,
    computed: Computed,
    wanted: Mapping[str, FloatArray],
    slots: FilledSlots | None,
) -> str | None:
    logits = wanted[LOGITS]
    if broken := (np.isnan(logits) | np.isposinf(logits)).any(0).sum():
        raise VocabtrimError(
            f"{plan.source.name}: PyTorch computes NaN or infinite logits for {broken:,} of its tokens: its weights "
            "are damaged or overflow; download them again, or try another --dtype"
        )
    for name, rows in wanted.items():
        off = deviation(computed.outputs[name], rows)
        if not off <= TOLERANCE[plan.dtype]:
            if name == LOGITS and slots and _are_equal(computed, wanted, plan, columns=-plan.slots):
                return f"the logits of its slots are off by {off:.2g} of their spread"
            return _where(plan, fed, window, computed) or f"its {name} are off by {off:.2g} of their spread"
    best = computed.outputs[LOGITS].argmax(-1)
    head_tokens = slots or plan.vocab_map
    tokens = best if head_tokens is None else head_tokens.kept_token_ids[best]
    if not np.array_equal(computed.outputs[TOKEN_IDS], tokens):
        return "its token_ids are not those of its largest logits"
    return None


def _are_equal(computed: Computed, wanted: Mapping[str, FloatArray], plan: BundlePlan, columns: int) -> bool:
    """Returns whether these columns of the logits are what is wanted, to rounding."""
    return deviation(computed.outputs[LOGITS][:, :columns], wanted[LOGITS][:, :columns]) <= TOLERANCE[plan.dtype]


def _where(plan: BundlePlan, fed: Calls, window: Window | None, computed: Computed) -> str | None:
    """Name the first layer whose cached keys or values differ, or state that all agree.

    Returns:
        None for a model with another kind of cache.
    """
    layers = expected_cache(plan.source.model, DTYPES[plan.dtype], fed, window)
    if not layers or len(layers) * 2 != len(computed.cache):
        return None
    for index, layer in enumerate(layers):
        for part, wanted in layer.items():
            error = deviation(_last(computed.cache[f"{PAST}{index}.{part}"], wanted), wanted)
            if not error <= TOLERANCE[plan.dtype]:
                return f"the {part}s of layer {index} are the first to differ, by {error:.2g} of their spread"
    return f"what follows the keys and values of layer {len(layers) - 1} differs"


def _last(cached: NDArray[Any], wanted: NDArray[np.float32]) -> NDArray[Any]:
    """Returns the last tokens of a cache [kv_heads, S, head_dim], as many as `wanted` holds."""
    return cached[:, -wanted.shape[1] :]
