"""Held-out prompts of the calibration data, the target's own continuations, and the drafter's logits for them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from runtime import decode_rounds
from vocabtrim_export.calibration import Corpus
from vocabtrim_export.calibration.calibrate import CALIBRATION_DATE
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.calibration.counts import is_held_out
from vocabtrim_export.calibration.document import Document
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.head_choice.replay import Text, preferred

_PER_DOMAIN, _MOST = 3, 12  # texts
_PROMPT_TOKENS, _NEW_TOKENS = 256, 48
_FEWEST = 8  # tokens that a continuation must have to say anything


def held_out_prompts(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, rows: int, settings: CalibrationSettings
) -> list[tuple[str, list[int]]]:
    """Returns the file and the last token ids of some held-out prompts, the same number of each file.

    Args:
        corpora: The calibration's corpora, one for each domain; their held-out documents chose no row.
        tokenizer: The target's.
        rows: Rows of the target's embedding.
        settings: Which chat template renders the prompts.

    Raises:
        VocabtrimError: There is none.
    """
    options = ChatOptions(settings.chat_template, None, settings.template_args, now=CALIBRATION_DATE)
    taken: Counter[str] = Counter()
    prompts: list[tuple[str, list[int]]] = []
    for domain, document in _held_out(corpora):
        if taken[domain] == _PER_DOMAIN or len(prompts) == _MOST:
            continue
        try:
            ids = encode_document(tokenizer, document, options)[-_PROMPT_TOKENS:]
        except VocabtrimError:  # calibration has named it
            continue
        if ids and max(ids) < rows:
            taken[domain] += 1
            prompts.append((domain, ids))
    if not prompts:
        raise VocabtrimError(
            "--k auto replays held-out documents, and the calibration data has none that fits: give at least eight "
            "prompts, or K as a number"
        )
    return prompts


def replayed_texts(
    prompts: Sequence[tuple[str, list[int]]],
    target: Engine,
    drafter: Engine,
    progress: Callable[[int, int], None],
) -> list[Text]:
    """Let the target continue the prompts greedily, and the full drafter propose each next token.

    Args:
        prompts: See `held_out_prompts`.
        target: The target's engine.
        drafter: The engine of the drafter with its full head.
        progress: Called with (texts done, texts).

    Raises:
        VocabtrimError: The target ends all of its answers at once.
    """
    texts = []
    for done, (domain, prompt) in enumerate(prompts):
        progress(done, len(prompts))
        capacity = min(target.capacity, drafter.capacity)
        ids = prompt[-max(1, capacity - _NEW_TOKENS) :]
        first, tokens, logits = _replay(target, drafter, ids, min(_NEW_TOKENS, capacity - len(ids)))
        if len(tokens) >= _FEWEST:
            texts.append(Text(domain, [*ids, first], tokens, preferred(logits, tokens)))
    progress(len(prompts), len(prompts))
    if not texts:
        raise VocabtrimError("--k auto: the target ends its answers at once, so nothing can be replayed: give a number")
    return texts


def _held_out(corpora: Sequence[Corpus]) -> Iterator[tuple[str, Document]]:
    """Yield the held-out documents, each with the name of its file."""
    for corpus in corpora:
        for index in range(len(corpus.documents)):
            if is_held_out(index, len(corpus.documents)):
                document = corpus.documents[index]
                yield Path(document.where.rsplit(", ", 1)[0]).name or corpus.source, document


def _replay(
    target: Engine, drafter: Engine, prompt: Sequence[int], new_tokens: int
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """Decode with the target alone; before each of its steps the drafter reads the last token and proposes the next.

    A drafter that shares the target's cache reads the target's keys and values, as it does when it drafts.

    Returns:
        The first token, for which nothing is drafted; int64[n], the later ones; and the drafter's logits before each of
        these, float32[n, vocabulary], -inf for tokens that it may not propose.
    """
    unread, shares_cache = list(prompt), drafter.cache is target.cache
    drafter.rewind(0)
    tokens: list[int] = []
    rows: list[NDArray[np.float32]] = []
    for entry in decode_rounds(target, None, prompt, max_new_tokens=new_tokens, draft_length=1):
        tokens += entry.tokens
        unread += entry.tokens
        if shares_cache:
            drafter.adopt(target.length)
            unread = unread[-1:]
        rows.append(drafter.feed(unread).logits[-1].copy())
        unread = []
    kept = np.arange(len(rows[0])) if drafter.vocab_map is None else drafter.vocab_map.kept_token_ids
    logits = np.full((len(tokens) - 1, max(int(kept[-1]), *tokens) + 1), -np.inf, np.float32)
    logits[:, kept] = np.array(rows[:-1]).reshape(len(tokens) - 1, len(kept))
    return tokens[0], np.array(tokens[1:], np.int64), logits
