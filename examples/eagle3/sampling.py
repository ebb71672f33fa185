"""Batched generation by the target: every row is at the same position, so nothing is padded and nothing is masked.

A row's prompt is fed a token a step, as forced tokens. A row may also leave a gap in its prompt, the user's message,
for the target to write (Magpie, arXiv 2406.08464).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from target import Target
from torch import Tensor


@dataclass(slots=True)
class Rows:
    """Rows to generate. forced: int64 [rows, length], padded at the right. gap: int64 [rows], forced tokens before the
    user's message that the target writes; equal to end where the message is given. end: int64 [rows], forced tokens
    in all; after a gap they go on with the token that ends a turn. temperature: float32 [rows], 0 is greedy."""

    forced: Tensor
    gap: Tensor
    end: Tensor
    temperature: Tensor

    @classmethod
    def of_prompts(cls, prompts: list[list[int]], temperature: list[float], device: torch.device) -> "Rows":
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
        forced = torch.zeros(len(prompts), int(ends.max()), dtype=torch.int64)
        for row, prompt in zip(forced, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return cls(forced.to(device), ends, ends.clone(), torch.tensor(temperature, device=device))


@dataclass(frozen=True, slots=True)
class Limits:
    """length: tokens of a sequence. answer, message: new tokens of the target's, as assistant and as user.
    deadline: time.monotonic() at which to stop. stragglers: stop once this share of the rows is left."""

    length: int
    answer: int
    message: int = 0
    deadline: float = float("inf")
    stragglers: float = 0.0


@dataclass(frozen=True, slots=True)
class Sequence:
    """tokens: int32 on the CPU. answer: where the answer starts. row: which of the rows it was."""

    tokens: Tensor
    answer: int
    row: int


@dataclass(slots=True)
class _State:
    """Rows under way; every field has a row for each."""

    row: Tensor
    forced: Tensor
    gap: Tensor
    end: Tensor
    temperature: Tensor
    at: Tensor  # forced tokens consumed
    answer: Tensor  # where the answer starts, 0 if it has not
    length: Tensor  # of the finished sequence, 0 while it grows
    dropped: Tensor  # the message is over-long or empty
    tokens: Tensor

    def select(self, keep: Tensor) -> "_State":
        return _State(*(getattr(self, field.name)[keep] for field in fields(self)))


CHECK_EVERY = 16  # steps between looks at the clock and at finished rows: each look waits for the device
CANDIDATES = 64


@torch.no_grad()
def generate(target: Target, rows: Rows, limits: Limits) -> Iterator[Sequence]:
    """Sequences as they are noticed to be finished, cut off or, at the limits, under way; dropped ones are left out."""
    eos = torch.tensor(target.sizes.eos, device=rows.forced.device)
    count, device = len(rows.forced), rows.forced.device
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    state = _State(
        torch.arange(count, device=device), rows.forced, rows.gap, rows.end, rows.temperature,
        zeros.clone(), zeros.clone(), zeros.clone(), zeros.bool(), zeros.new_zeros(count, limits.length),
    )  # fmt: skip
    cache = target.new_cache(count, limits.length)
    logits = torch.zeros(count, target.sizes.vocab, device=device)
    position = 0
    while position < limits.length:
        token = _next_token(state, logits, position, limits, eos)
        state.tokens[:, position] = token
        position += 1
        if position % CHECK_EVERY == 0:
            active = state.length == 0
            left = int(active.sum())
            if left <= limits.stragglers * count or time.monotonic() > limits.deadline:
                break
            if left < 0.75 * len(active):
                yield from _finished(state.select(~active), position)
                state, token = state.select(active), token[active]
                for layer, (keys, values) in enumerate(cache):
                    cache[layer] = keys[active], values[active]
        if position < limits.length:
            logits = target.decode(token, position - 1, cache)
    yield from _finished(state, position)


def _next_token(state: _State, logits: Tensor, position: int, limits: Limits, eos: Tensor) -> Tensor:
    """The token at `position`: forced or sampled. Moves the state on."""
    writes_message = (state.at == state.gap) & (state.gap < state.end)
    writes_answer = state.at == state.end
    state.answer = torch.where(writes_answer & (state.answer == 0), position, state.answer)
    sampled = sample(logits, torch.where(writes_message, 1.0, state.temperature))
    given = state.forced.gather(1, state.at.clamp(max=state.forced.shape[1] - 1)[:, None])[:, 0]
    free = writes_message | writes_answer
    token = torch.where(free, sampled, given)
    ends = torch.isin(token, eos)
    message_ends = writes_message & ends
    state.at = torch.where(~free | message_ends, state.at + 1, state.at)
    written = position - state.gap + 1  # tokens of the message, its end counted
    state.dropped |= writes_message & torch.where(ends, written < 4, written > limits.message)
    finished = writes_answer & (ends | (position + 1 - state.answer >= limits.answer))
    state.length = torch.where((state.length == 0) & (finished | state.dropped), position + 1, state.length)
    return token


def _finished(state: _State, position: int) -> Iterator[Sequence]:
    lengths = torch.where(state.length == 0, position, state.length).tolist()
    tokens, answers, dropped = state.tokens.int().cpu(), state.answer.tolist(), state.dropped.tolist()
    for index, row in enumerate(state.row.tolist()):
        if answers[index] and not dropped[index]:
            yield Sequence(tokens[index, : lengths[index]].clone(), answers[index], row)


def sample(logits: Tensor, temperature: Tensor, top_p: float = 0.95) -> Tensor:
    """One token a row from the likeliest 64, cut to `top_p`; where the temperature is 0, the likeliest."""
    values, tokens = logits.topk(min(CANDIDATES, logits.shape[-1]))
    shares = (values.float() / temperature.clamp(min=1e-3)[:, None]).softmax(-1)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0)
    chosen = (shares / torch.empty_like(shares).exponential_()).argmax(-1)
    chosen = torch.where(temperature == 0, 0, chosen)
    return tokens.gather(1, chosen[:, None])[:, 0]
