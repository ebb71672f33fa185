"""The proof of `draft.onnx`: its steps draft what `model.onnx`, step by step, does."""

from pathlib import Path

import numpy as np

from engines.base import MOST_UNREAD
from engines.bundle.graph_io import LOGITS, TOKEN_IDS
from engines.bundle.read import DRAFT_MODEL_NAME, MODEL_NAME
from engines.deviation import TOLERANCE
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.proof.computed import proof_session
from vocabtrim_export.proof.decoding import Decoding
from vocabtrim_export.proof.slots import filled_slots
from vocabtrim_export.proof.tokens import calls


def unrolled_difference(directory: Path, plan: BundlePlan) -> str | None:
    """Returns how the drafts of `draft.onnx` differ from those of `model.onnx`, to end a sentence.

    It is None where they do not differ, and for a bundle without `draft.onnx`.
    """
    if not (directory / DRAFT_MODEL_NAME).exists():
        return None
    text = calls(plan.source, plan.context_length, None).token_ids[: plan.context_length // 2]
    with proof_session(directory / MODEL_NAME, None) as session:
        decoding = Decoding(session)
        slots = filled_slots(directory, plan)
        filled = slots.filled if slots else None
        decoding.feed(text[:-MOST_UNREAD], slots=filled)
        cache = decoding.cache
        outputs = decoding.feed(text[-MOST_UNREAD:], slots=filled)
        try:
            with proof_session(directory / DRAFT_MODEL_NAME, None) as unrolled:
                drafting = Decoding(unrolled)
                drafting.cache, drafting.length = cache, len(text) - MOST_UNREAD
                drafted = drafting.feed(text[-MOST_UNREAD:], slots=filled)[TOKEN_IDS].astype(np.int64)
        except VocabtrimError as error:
            return f"in {DRAFT_MODEL_NAME}, {error}"
        head_tokens = slots or plan.vocab_map
        rows = drafted if head_tokens is None else head_tokens.inverse[drafted]
        for step, row in enumerate(rows):
            logits = outputs[LOGITS][-1]
            spread = logits[np.isfinite(logits)].std()
            if row < 0 or not logits.max() - logits[row] <= TOLERANCE[plan.dtype] * spread:
                return f"step {step + 1} of {DRAFT_MODEL_NAME} does not draft the token of {MODEL_NAME}'s largest logit"
            if step + 1 < len(rows):
                outputs = decoding.feed(drafted[step : step + 1], slots=filled)
    return None
