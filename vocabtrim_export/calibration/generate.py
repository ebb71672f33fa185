"""Batched sampling from a causal language model, with a KV cache and without `transformers.generate`."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.buffered_cache import BufferedCache
from vocabtrim_export.calibration.partial_batch import Unfinished

NO_TOKEN = -1
BLOCK = 512


# Tokens of a prompt's batch that are read at once on a CPU, which takes seconds: between two of these steps work is
# saved, and Ctrl-C is noticed. Other devices read a batch's prompts in one step.
_PREFILL_TOKENS = 256


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: NDArray[np.float64],
    *,
    temperature: float,
    eos_token_ids: frozenset[int],
    on_step: Callable[[int], None] = lambda _: None,
    on_prompts: Callable[[int, int], None] = lambda _read, _total: None,
    partial_batch: Unfinished | None = None,
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
        on_prompts: Called with (prompt tokens read, all of them) while the prompts are read.
        partial_batch: The storage of the work on this batch. An earlier run's work there is continued: the
            result is the same, bit for bit.

    Returns:
        int64[B, steps]: the new tokens, an EOS included, and `NO_TOKEN` after it.
    """
    batch = _Batch(model, prompts, uniforms, temperature, eos_token_ids)
    if partial_batch is not None:
        for segment in partial_batch.load():
            batch.restore(segment)
    while not batch.done:
        batch.advance()
        if batch.read <= batch.width:
            on_prompts(*batch.prompt_tokens)
        on_step(int((batch.generated != NO_TOKEN).sum()))
        if partial_batch is not None and partial_batch.is_due and batch.cache.buffers:
            partial_batch.save(batch.segment())
    return batch.generated.cpu().numpy()


class _Batch:
    """The state of a batch: its first prompts' columns are read, then all rows grow by a token at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        uniforms: NDArray[np.float64],
        temperature: float,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.model, self.temperature = model, temperature
        self.steps, device = uniforms.shape[1], model.device
        self.prompts, self.mask = (array.to(device) for array in _left_pad(prompts, self.steps))
        self.width = self.prompts.shape[1]
        self.cache = BufferedCache(self.width + self.steps)
        self.stops = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
        self.draws = torch.from_numpy(uniforms).to(device)
        self.rows = torch.arange(len(prompts), device=device)  # the prompt that each row of the batch continues
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)
        self.last = torch.zeros_like(self.rows)  # each row's newest token
        self.generated = torch.full((len(prompts), self.steps), NO_TOKEN, device=device)
        self.read = 0  # columns of prompts and continuations that are in the cache
        self.saved_rows, self.saved = self.rows, 0

    @property
    def step(self) -> int:
        """Tokens that each living row has got; negative before the prompts are read."""
        return self.read - self.width + 1 if self.read >= self.width else -1

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """The prompts' tokens that were read, and all of them."""
        prompts = self.mask[:, : self.width]
        return int(prompts[:, : self.read].sum()), int(prompts.sum())

    @property
    def done(self) -> bool:
        return self.step == self.steps or (self.step > 0 and not bool(self.alive.any()))

    def advance(self) -> None:
        """Read the next columns of the prompts, or the newest tokens; where the prompts are read, add a token."""
        self._drop_ended()
        if self.read < self.width:
            most = self.width if self.model.device.type != "cpu" else max(1, _PREFILL_TOKENS // len(self.rows))
            tokens = self.prompts[:, self.read : min(self.width, self.read + most)]
        else:
            tokens = self.last[:, None]
        begin, self.read = self.read, self.read + tokens.shape[1]
        mask = self.mask[:, : self.read]
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)[:, begin:]
        logits = _last_logits(self.model, tokens, mask, positions, self.cache)
        if self.step < 0:
            return
        column = self.read - self.width
        self.last = sample(logits, self.draws[self.rows, column], self.temperature)
        self.generated[self.rows[self.alive], column] = self.last[self.alive]
        self.alive &= ~torch.isin(self.last, self.stops)

    def _drop_ended(self) -> None:
        """Drop the rows that ended: they cost their share of every step, dropping them costs one copy of the cache."""
        if int(self.alive.sum()) <= len(self.rows) * 3 // 4:
            self.cache.batch_select_indices(self.alive.nonzero().squeeze(-1))
            self.last, self.rows, self.mask = self.last[self.alive], self.rows[self.alive], self.mask[self.alive]
            self.alive = self.alive[self.alive]

    def segment(self) -> dict[str, Tensor]:
        """Returns the part of the cache that was computed since the last segment, and the other state."""
        kept = torch.searchsorted(self.saved_rows, self.rows)  # both ascend
        state = {"rows": self.rows, "alive": self.alive, "last": self.last, "generated": self.generated, "kept": kept}
        parts = {name: tensor.cpu() for name, tensor in state.items()} | self.cache.written(self.saved)
        self.saved_rows, self.saved = self.rows, self.read
        return parts

    def restore(self, segment: Mapping[str, Tensor]) -> None:
        """Take over the next segment of an earlier run."""
        device, kept = self.model.device, segment["kept"]
        self.cache.append(segment, kept, device)
        self.mask = self.mask[kept.to(device)]
        self.rows, self.alive, self.last, self.generated = (
            segment[name].to(device) for name in ("rows", "alive", "last", "generated")
        )
        self.read += segment["key.0"].shape[2]
        self.saved_rows, self.saved = self.rows, self.read


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
    # The block's float32 total may be a rounding error below the target: then its last token is drawn.
    within = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-12))
    return (block * BLOCK + _first_above(inside, within))[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Returns int64[B, 1], in each row the first index whose value exceeds `target: [B, 1]`.

    It is never the index of a token that adds nothing.
    """
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)


def _last_logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Run tokens [B, new] at positions [B, new] after the cache.

    `mask` is [B, cached + new]. Returns the last logits, [B, vocab].
    """
    # A prefill's logits would fill gigabytes: only the last position's are computed, where the model has the option.
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    with _contiguous_rows(model.get_output_embeddings()):
        logits: Tensor = model(**inputs, use_cache=True, **keep).logits
    return logits[:, -1]


@contextmanager
def _contiguous_rows(head: nn.Module | None) -> Iterator[None]:
    """Let the LM head read a copy of its input for the block.

    The last position of several is a view, which PyTorch multiplies row by row: it reads the whole head for each row of
    the batch, and in bfloat16 it copies the head for each, 30 GB for 64 rows of a head of 467 MB.
    """

    def contiguous(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].contiguous(), *inputs[1:]

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        handle.remove()


def _left_pad(prompts: Sequence[Sequence[int]], steps: int) -> tuple[Tensor, Tensor]:
    """Returns padded ids and their attention mask.

    The ids are int64[B, width], zero where padded; the mask is int64[B, width + steps], one for real tokens.
    """
    width = max(map(len, prompts))
    tokens = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.ones((len(prompts), width + steps), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    return tokens, mask
