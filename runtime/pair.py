"""Check that two engines belong together, and choose how far one may draft for the other."""

from typing import Literal

import numpy as np

from engines.arguments import whole_number
from engines.base import MAX_KEEP, Engine
from engines.bundle.vocabulary import Vocabulary, shared_tokens
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.adaptive_length import AdaptiveLength
from runtime.draft_length import DraftLength, FixedLength
from runtime.draft_tiers import TieredLength, tiers_up_to
from runtime.lookup_length import LookupLength
from runtime.round_costs import GivenCosts, MeasuredCosts

DEFAULT_DRAFT_LENGTH = 4
LONGEST_DRAFT = 16  # of an adaptive length
_SEEDED_COSTS = GivenCosts(step=0.15, row=0.04)  # typical of a trimmed int4 drafter and a target in fp32

Auto = Literal["auto"]


def resolve_draft_length(target: Engine, drafter: Engine | None, draft_length: int | None) -> int:
    """Returns γ: `draft_length`, or by default DEFAULT_DRAFT_LENGTH or as many tokens as the engines can.

    Args:
        target: The engine that verifies.
        drafter: The engine that drafts; None for the target alone.
        draft_length: The number of tokens asked for; None for the default.

    Raises:
        VocabtrimError: The drafter cannot draft, or the target cannot verify, so many tokens.
    """
    most = (target.max_keep if drafter else MAX_KEEP) - 1
    if not most:
        raise VocabtrimError("the target's engine verifies no drafts: export it with a --draft-length of 1 or more")
    drafted = drafter.max_draft if drafter else None
    if drafted is not None and (draft_length or 0) > drafted:
        raise VocabtrimError(
            f"draft_length is {draft_length}: the drafter drafts as many tokens as it has heads; "
            f"give a number from 1 to {drafted}"
        )
    most = min(most, drafted or most)
    if draft_length is None:
        return min(DEFAULT_DRAFT_LENGTH, most)
    if not 1 <= draft_length <= most:
        can_be_more = draft_length > most != MAX_KEEP - 1
        longer = f", or export the target with --draft-length {draft_length}" if can_be_more else ""
        raise VocabtrimError(f"draft_length is {draft_length}: give a number from 1 to {most}{longer}")
    return draft_length


def make_draft_length(
    target: Engine, drafter: Engine | None, draft_length: int | Auto | None, prompt_lookup: bool = True
) -> DraftLength:
    """Choose the draft length of a pair.

    Args:
        target: The engine that verifies.
        drafter: The engine that drafts, None for the target alone.
        draft_length: A number as in `resolve_draft_length`. "auto" and None: as many tokens as are worth their time, up
            to LONGEST_DRAFT where both engines draft step by step on the CPU, else one of a few lengths. Without a
            drafter, "auto" drafts what the text itself repeats, and None drafts nothing.
        prompt_lookup: Whether an adaptive length also drafts what the text itself repeats.

    Raises:
        VocabtrimError: The target verifies fewer tokens.
    """
    if draft_length not in (None, "auto"):
        draft_length = whole_number("draft_length", draft_length)
    fixed = resolve_draft_length(target, drafter, None if draft_length == "auto" else draft_length)
    costs = MeasuredCosts(target.rows_computed)
    if drafter is None and draft_length == "auto" and prompt_lookup and target.max_keep > 1:
        return LookupLength(min(target.max_keep - 1, LONGEST_DRAFT), costs=costs)
    if drafter is None or isinstance(draft_length, int):
        return FixedLength(fixed)
    most = min(target.max_keep - 1, LONGEST_DRAFT, drafter.max_draft or LONGEST_DRAFT)
    # Engines that draft without the host in between, or all at once, do not stop within a draft.
    if "cuda" in (target.device, drafter.device) or drafter.unrolled:
        return TieredLength(tiers_up_to(most, drafter.unrolled), prompt_lookup, costs)
    return AdaptiveLength(most, prompt_lookup, costs)


def length_for(length: DraftLength, sampling: SamplingParams) -> DraftLength:
    """Returns the draft length of one generation.

    Where a seed promises the same text, neither measured times nor what was learnt from earlier texts may count.

    Args:
        length: The draft length of all generations of a decoder.
        sampling: The settings that choose the generation's tokens.
    """
    return length.afresh(_SEEDED_COSTS) if length.adapts and sampling.must_repeat_itself else length


def check_pair(target: Engine, drafter: Engine | None) -> None:
    """Check that `drafter` can draft for `target`. A target's bundle may draft as well: such a pair tests the loop.

    Raises:
        VocabtrimError: It cannot.
    """
    manifest = target.manifest
    if manifest.role != "target" or target.vocab_map is not None:
        raise VocabtrimError("the target's bundle holds a drafter: give the bundle of the whole model")
    if drafter is None:
        return
    if drafter is target:
        raise VocabtrimError("target and drafter are one engine: load the bundle twice, each needs its own cache")
    _check_tokens(target, drafter)
    if drafter.features_read:
        _check_features(target, drafter)
    if drafter.vocab_map and drafter.vocab_map.kept_token_ids[-1] >= manifest.vocab_size:
        raise VocabtrimError(
            f"the drafter keeps token ids beyond the target's vocabulary of {manifest.vocab_size}: export it again"
        )


def _check_tokens(target: Engine, drafter: Engine) -> None:
    """Check that shared tokens mean the same to both, and that all that the drafter can propose are the target's."""
    if drafter.manifest.tokenizer == target.manifest.tokenizer:
        return
    files = target.tokenizer_file, drafter.tokenizer_file
    if files[0] is None or files[1] is None:
        raise VocabtrimError("the drafter was made for another tokenizer than the target's: export it for this target")
    sizes = target.manifest.vocab_size, drafter.manifest.vocab_size
    sides = [Vocabulary.load(files[0], sizes[0]), Vocabulary.load(files[1], sizes[1])]
    try:
        shared = shared_tokens(*sides)
    except VocabtrimError as error:
        raise VocabtrimError(f"the drafter cannot draft for this target: {error}") from error
    kept = np.fromiter(sides[1].tokens, np.int64)
    if drafter.vocab_map is not None:
        kept = drafter.vocab_map.kept_token_ids
    if foreign := np.setdiff1d(kept, shared.token_ids).size:
        raise VocabtrimError(
            f"the drafter can propose {foreign} tokens that the target does not have or that mean something else to "
            "it: export it for this target"
        )


def _check_features(target: Engine, drafter: Engine) -> None:
    reads = drafter.features_read, drafter.manifest.feature_layers
    if (target.features_given, target.manifest.feature_layers) != reads:
        layers = ", ".join(map(str, drafter.manifest.feature_layers))
        raise VocabtrimError(
            f"the drafter is a head that reads {reads[0]} features of the target's layers {layers}, which this "
            "target does not give: export both together"
        )
    dtypes = target.manifest.dtype, drafter.manifest.dtype
    if target.device == drafter.device == "cuda" and dtypes[0] != dtypes[1]:
        raise VocabtrimError(
            f"on CUDA a head reads features of its own dtype only: the target is {dtypes[0]}, the head "
            f"{dtypes[1]}; export both together"
        )
