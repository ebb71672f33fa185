"""The tokens that a proof feeds, and the calls in which it feeds them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from vocabtrim_export.drafters.base import FeatureHead
from vocabtrim_export.sources.source import Source
from vocabtrim_export.tracing.experts import expert_modules

_CALLS = (5, 1)  # after the prefill: a block after a past, and a decode step after the block
_PREFILL = 12
_REACHED = 64  # tokens: a sliding window of more is narrowed for the proof, so that few tokens reach past it
_NARROWED = 8
_PICKS = 4  # how often an expert is picked on average in a proof: 98 of 100 experts are then picked at least once


@dataclass(frozen=True, slots=True)
class Window:
    """The sliding window of a model.

    Attributes:
        size: Its tokens.
        narrowed: The tokens that attention reaches back in the proof.
    """

    size: int
    narrowed: int


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of a graph feeds.

    Attributes:
        begin: Tokens in the KV cache before it.
        token_ids: int64[S].
        hidden: float32[S, hidden], see `Calls`.
    """

    begin: int
    token_ids: NDArray[np.int64]
    hidden: NDArray[np.float32] | None = None

    @property
    def end(self) -> int:
        """Tokens in the KV cache after the call."""
        return self.begin + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Calls:
    """The input of a proof's run.

    Attributes:
        token_ids: int64[S].
        lengths: The number of tokens that each call feeds; the first call is the prefill.
        hidden: float32[S, hidden], the hidden states that a head reads with the tokens; None for other models.
    """

    token_ids: NDArray[np.int64]
    lengths: tuple[int, ...]
    hidden: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[Call]:
        begin = 0
        for length in self.lengths:
            call = slice(begin, begin := begin + length)
            yield Call(call.start, self.token_ids[call], None if self.hidden is None else self.hidden[call])


def window_of(model: PreTrainedModel, context_length: int, narrow: bool) -> Window | None:
    """Returns the sliding window that a KV cache reaches past; None where there is none.

    Args:
        model: The model.
        context_length: The tokens that the KV cache holds.
        narrow: Whether the proof makes a window that is too long for its few tokens narrower.
    """
    size = getattr(model.config.get_text_config(), "sliding_window", None)
    if not isinstance(size, int) or not 0 < size < context_length:
        return None
    return Window(size, _NARROWED if narrow and size > _REACHED else size)


def calls(source: Source, context_length: int, window: Window | None) -> Calls:
    """Choose the tokens of a proof and its calls.

    A prefill reaches past the window and picks most experts; the calls of a draft/verify loop follow.

    Args:
        source: The model; a head gets random hidden states as well.
        context_length: The tokens that the KV cache holds, the most that are chosen.
        window: See `window_of`.
    """
    prefill = max(_PREFILL, window.narrowed + 4 if window else 0, _expert_tokens(source.model))
    total = min(prefill + sum(_CALLS), context_length)
    known = np.fromiter(source.tokenizer.get_vocab().values(), np.int64)
    ordinary = np.setdiff1d(known[known < source.vocab_size], source.tokenizer.all_special_ids)
    random = np.random.default_rng(0)
    ids = random.choice(ordinary if ordinary.size else np.zeros(1, np.int64), total)
    if not isinstance(source.model, FeatureHead):
        return Calls(ids, _split(total))
    return Calls(ids, _split(total), random.standard_normal((total, source.model.config.hidden_size), np.float32))


def _expert_tokens(model: PreTrainedModel) -> int:
    """Returns the tokens that pick nearly all experts of each layer; 0 for a dense model."""
    picked = max(1, getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1)
    most = max((len(module.gate_up_proj) for _, module in expert_modules(model)), default=0)
    return _PICKS * most // picked


def _split(total: int) -> tuple[int, ...]:
    lengths: Sequence[int] = (total - sum(_CALLS), *_CALLS) if total > sum(_CALLS) else (1,) * total
    return tuple(lengths)
