"""The rows that a trimmed head keeps: token counts and K in, a `VocabMap` out."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions, ChatTemplates
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.calibrate import CALIBRATION_DATE
from vocabtrim_export.calibration.counts import TokenCounts
from vocabtrim_export.calibration.likely_order import likely_order
from vocabtrim_export.calibration.prompts import encode
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

MULTIPLE = 64
# Special tokens that models reserve and never learn: Llama 3 has 250 of them, Gemma 3 over 6,000.
PLACEHOLDER = re.compile(r"unused|reserved", re.IGNORECASE)
PROBE = "vocabtrim-probe"
# Conversations that show what a template writes: some templates have no system role, and some no second turn.
_PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))


@dataclass(frozen=True, slots=True)
class Coverage:
    """Chooses the smallest K that keeps this share of the held-out calibration tokens.

    Attributes:
        share: Above 0 and at most 1.

    Raises:
        VocabtrimError: The share is out of range.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise VocabtrimError(f"the coverage is {self.share}: give a number above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen map and facts about it.

    Attributes:
        vocab_map: The kept tokens.
        coverage: Share of the held-out tokens that are kept; None where nothing was held out.
        requested_coverage: The coverage that was requested; None where K was a number. `coverage` is below it only
            where too few tokens are `available`.
        counted: Rows of tokens that occurred in the counts.
        always_kept: Rows of `always_keep`; some of them may also be in `counted`.
        filler: Rows that are neither: likely by their ids alone.
        is_noop: Every token is kept, nothing is trimmed.
        lost_token_ids: int64[n], ascending, the ids that a larger K would keep.
    """

    vocab_map: VocabMap
    coverage: float | None
    requested_coverage: float | None
    counted: int
    always_kept: int
    filler: int
    is_noop: bool
    lost_token_ids: NDArray[np.int64] = field(compare=False, repr=False)


def select_vocab(
    counts: TokenCounts,
    k: int | Coverage,
    *,
    always_keep: Iterable[int],
    full_vocab: int | None = None,
    available: NDArray[np.int64] | None = None,
) -> Selection:
    """Keep the K tokens that are the likeliest by their counts.

    First come the ids of `always_keep`, then the others by `likely_order`: by their counts, of equal counts the smaller
    id first, and where the text is long, low ids before high ones that it has only a few times.

    Args:
        counts: The counts of each token.
        k: The number of rows, rounded up to a multiple of 64 but never beyond the vocabulary; or a `Coverage`. Where
            the counted tokens do not reach the coverage, K includes filler: too short a calibration shows as a large K.
        always_keep: Ids that are kept before all others.
        full_vocab: Rows of the drafter's embedding, where the counts are of a model with another number; None: that of
            the counts. Ids from there up are never kept, not even those of `always_keep`.
        available: int64[n], the only ids that can be kept: those with a row in the head and a token that means the same
            to the target; None: all.

    Raises:
        VocabtrimError: K is out of range, or too small for `always_keep`.
    """
    limit = counts.full_vocab if full_vocab is None else full_vocab
    counts = counts.resized(max(limit, counts.full_vocab))
    rank, always = kept_order(counts, always_keep, limit, available)
    kept_rows = _kept_rows(counts, rank, k, len(always))
    kept = rank[:kept_rows]
    held_out = int(counts.held_out.sum())
    seen = counts.counts[kept] > 0
    return Selection(
        vocab_map=VocabMap.from_ids(kept, limit),
        coverage=int(counts.held_out[kept].sum()) / held_out if held_out else None,
        requested_coverage=k.share if isinstance(k, Coverage) else None,
        counted=int(seen.sum()),
        always_kept=len(always),
        filler=int((~seen[len(always) :]).sum()),
        is_noop=kept_rows == limit,
        lost_token_ids=np.sort(rank[kept_rows:]),
    )


def structural_token_ids(
    tokenizer: "PreTrainedTokenizerFast", generation_config: "GenerationConfig | None"
) -> frozenset[int]:
    """Returns the ids that end or structure text, which a trimmed head must keep whatever was counted.

    These are every EOS of the generation config, the tokenizer's special and added tokens (but not reserved ones that
    no model learns, unless one of them is an EOS), and the tokens that each chat template writes around the messages'
    contents.

    Args:
        tokenizer: A transformers fast tokenizer.
        generation_config: The model's; None where it has none.
    """
    named = [(token, entry.content) for token, entry in tokenizer.added_tokens_decoder.items()]
    named += zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    special = {token for token, name in named if not PLACEHOLDER.search(name)}
    markers = _template_markers(tokenizer)
    return frozenset(special | markers | eos_token_ids(tokenizer, generation_config))


def _template_markers(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """Returns the tokens of rendered conversations that are not in their contents; none where a template refuses."""
    chat, markers = runtime_tokenizer(tokenizer).chat, set()
    for name in chat.names:
        options = ChatOptions(name, now=CALIBRATION_DATE)
        rendered = next((text for roles in _PROBES if (text := _try_render(chat, roles, options))), "")
        between = re.split(rf"{PROBE}-(?:system|user|assistant)", rendered)
        texts = [*between, "".join(between)]  # where a message is empty, its markers meet and may be other tokens
        markers |= {token for ids in encode(tokenizer, texts, add_special_tokens=False) for token in ids}
    return markers


def _try_render(chat: ChatTemplates, roles: Sequence[str], options: ChatOptions) -> str:
    """Returns a rendered conversation of these roles; "" where the template refuses it."""
    try:
        return chat.render([{"role": role, "content": f"{PROBE}-{role}"} for role in roles], options)
    except VocabtrimError:
        return ""


def kept_order(
    counts: TokenCounts, always_keep: Iterable[int], limit: int, available: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the tokens as they are kept when K grows.

    Args:
        counts: The counts of each token.
        always_keep: Ids that are kept before all others.
        limit: Rows of the drafter's embedding: no id from there up is kept.
        available: See `select_vocab`.

    Returns:
        int64[n], all ids that can be kept, and int64[·], ascending, those of `always_keep` among them.
    """
    always = np.unique(np.fromiter((token for token in always_keep if 0 <= token < limit), np.int64))
    seen = counts.resized(max(limit, counts.full_vocab)).counts[:limit]
    order = likely_order(seen)
    order = np.concatenate([always, order[~np.isin(order, always)]])
    if available is None:
        return order, always
    return order[np.isin(order, available)], always[np.isin(always, available)]


def check_k(k: int | Coverage) -> None:
    """Check K, before any long work begins.

    Raises:
        VocabtrimError: No head can have this K.
    """
    how = "give a number of rows such as 32000, or a coverage such as 0.95"
    if not isinstance(k, int | np.integer | Coverage) or isinstance(k, bool):
        raise VocabtrimError(f"K = {k!r} is neither a whole number nor a Coverage: {how}")
    if not isinstance(k, Coverage) and k <= 0:
        raise VocabtrimError(f"K = {k} must be positive: {how}")


def rows_to_choose(k: "int | Coverage | Literal['auto']") -> int | float | None:
    """Returns K in the form that a calibration stops by: a number of rows, a share of tokens, or None for auto."""
    if k == "auto":
        return None
    return k.share if isinstance(k, Coverage) else int(k)


def _kept_rows(counts: TokenCounts, rank: NDArray[np.int64], k: int | Coverage, always: int) -> int:
    """Returns how many leading ids of `rank` are kept, `always` of them whatever was counted.

    Raises:
        VocabtrimError: K is out of range, or smaller than `always`.
    """
    check_k(k)
    rows = _rows_to_cover(counts, rank, k.share, always) if isinstance(k, Coverage) else int(k)
    kept_rows = min(_round_up(rows), len(rank))
    if kept_rows < always:
        raise VocabtrimError(
            f"K = {rows} is too small: {always} special and structural tokens are always kept; "
            f"give at least {min(_round_up(always), len(rank))}"
        )
    return kept_rows


def _rows_to_cover(counts: TokenCounts, rank: NDArray[np.int64], coverage: float, always: int) -> int:
    """Returns how many leading ids of `rank` keep this share of the held-out tokens, at least `always`."""
    total = int(counts.held_out.sum())
    if total == 0:
        raise VocabtrimError(
            "coverage cannot be measured: nothing was held out; calibrate on several documents, or give K as a number"
        )
    covered = np.cumsum(counts.held_out[rank])
    enough = int(np.searchsorted(covered, coverage * total * (1 - 1e-12)))  # without the rounding error of the product
    return min(max(always, enough + 1), len(rank))


def _round_up(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
