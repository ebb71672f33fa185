"""The tokens that a drafter may propose to its target."""

from dataclasses import replace

import numpy as np

from engines.bundle.vocabulary import SharedTokens, shared_tokens
from engines.errors import VocabtrimError
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.sources.source import Source


def proposable_tokens(drafter: Source, target: Source) -> SharedTokens:
    """Returns the ids that mean the same to both models and that the drafter's LM head has a row for.

    Raises:
        VocabtrimError: The models have different vocabularies.
    """
    try:
        shared = shared_tokens(target.vocabulary, drafter.vocabulary)
    except VocabtrimError as error:
        raise VocabtrimError(f"{drafter.name} cannot draft for {target.name}: {error}") from error
    if isinstance(drafter, HeadSource):
        return replace(shared, token_ids=np.intersect1d(shared.token_ids, drafter.row_token_ids))
    return shared


def differing_note(shared: SharedTokens) -> tuple[str, ...]:
    """Returns a note where ids are a token of one model only, or different tokens in the two models."""
    if not shared.differing:
        return ()
    return (
        f"{shared.differing} token ids are a token of one model only, or mean different things to the two: they are "
        "never drafted",
    )
