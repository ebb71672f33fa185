"""Batched sampling from a causal language model, with a KV cache and without `transformers.generate`."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from engines.errors import VocabtrimError

NO_TOKEN = -1
BLOCK = 512


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: NDArray[np.float64],
    *,
    temperature: float,
    eos_token_ids: frozenset[int],
    on_step: Callable[[int], None] = lambda _: None,
) -> NDArray[np.int64]:
    """Continue every prompt until an EOS or for `uniforms.shape[1]` tokens.

    Args:
        model: A transformers causal LM.
        prompts: B non-empty lists of token ids; similar lengths waste the least on padding.
        uniforms: float64[B, steps] in [0, 1): the only source of randomness, so that a row's tokens do not depend on
            the batch it runs in (apart from rounding).
        temperature: Temperature of sampling; 0 is greedy.
        eos_token_ids: The ids that end a continuation.
        on_step: Called with the number of tokens so far after each step.

    Returns:
        int64[B, steps]: the new tokens, an EOS included, and `NO_TOKEN` after it.
    """
    steps, device = uniforms.shape[1], model.device
    tokens, mask = (array.to(device) for array in _left_pad(prompts, steps))
    width = tokens.shape[1]
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_(min=0)
    cache = _BufferedCache(width + steps)
    stops = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
    draws = torch.from_numpy(uniforms).to(device)
    rows = torch.arange(len(prompts), device=device)  # the prompt that each row of the batch continues
    alive = torch.ones_like(rows, dtype=torch.bool)
    generated = torch.full((len(prompts), steps), NO_TOKEN, device=device)
    count = 0
    for step in range(steps):
        logits = _last_logits(model, tokens, mask[:, : width + step], positions, cache)
        chosen = sample(logits, draws[rows, step], temperature)
        generated[rows[alive], step] = chosen[alive]
        count += int(alive.sum())
        on_step(count)
        alive &= ~torch.isin(chosen, stops)
        remaining = int(alive.sum())
        if remaining == 0:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        # Rows that ended still cost their share of a step, dropping them one copy of the cache.
        if remaining <= len(rows) * 3 // 4:
            cache.batch_select_indices(alive.nonzero().squeeze(-1))
            tokens, positions, mask, rows, alive = (part[alive] for part in (tokens, positions, mask, rows, alive))
    return generated.cpu().numpy()


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Draw one token a row: the first whose cumulative probability exceeds the row's uniform number.

    The sums run in two levels, the second in float64, because one running float32 sum loses the rare tail of 262k
    tokens. This is cheaper than `torch.multinomial`, which draws a random number for each of the B·vocab entries.

    Args:
        logits: [B, vocab], any float dtype.
        temperature: 0 takes the most likely token.
        uniforms: float64[B] in [0, 1).

    Returns:
        int64[B].

    Raises:
        VocabtrimError: The logits hold NaN or infinity.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    blocks = functional.pad(probabilities, (0, -probabilities.shape[1] % BLOCK)).view(len(logits), -1, BLOCK)
    block_sums = blocks.sum(-1).double().cumsum(-1)  # [B, blocks]
    if not bool(block_sums[:, -1].isfinite().all()):
        raise VocabtrimError("the model's logits are not finite: load it in float32 or bfloat16")
    target = uniforms[:, None] * block_sums[:, -1:]
    block = _first_above(block_sums, target)
    before = torch.where(block > 0, block_sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)  # [B, BLOCK]
    # The block's own total, as float32 had it, may be a rounding below what is looked for: then its last token.
    within = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    return (block * BLOCK + _first_above(inside, within))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """int64[B, 1]: in each row the first index whose value exceeds `target: [B, 1]`; never one that adds nothing."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)


def _last_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """[B, vocab]: run tokens [B, new] at positions [B, new] after the cache; mask: [B, cached + new]."""
    # A prefill's logits would fill gigabytes: only the last position's are asked for, where the model can be asked.
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    logits: Tensor = model(**inputs, use_cache=True, **keep).logits
    return logits[:, -1]


def _left_pad(prompts: Sequence[Sequence[int]], steps: int) -> tuple[Tensor, Tensor]:
    """int64[B, width] ids, zero where padded, and the attention mask int64[B, width + steps], one for real tokens."""
    width = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.ones((len(prompts), width + steps), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    return tokens, mask


class _BufferedLayer(DynamicLayer):
    """A layer's keys and values in buffers of a known capacity.

    `DynamicLayer` concatenates, copying the whole cache at every step (44% of the time at batch 64); `StaticLayer`
    attends over its full capacity from the first step on. Attention sees `keys[:, :, :length]`, a view.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = (
            state.new_empty((*state.shape[:2], self.capacity, state.shape[3])) for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, head_dim] and return views of everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]
        self.keys, self.values = keys, values
        return keys, values


class _BufferedCache(Cache):
    """As many buffered layers as the model turns out to have."""

    def __init__(self, capacity: int) -> None:
        new_layer = cast(type[DynamicLayer], partial(_BufferedLayer, capacity))  # it is only ever called
        super().__init__(layer_class_to_replicate=new_layer)
