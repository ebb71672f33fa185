"""Held-out prompts of the calibration data, the target's own continuations, and the drafter's logits for them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from runtime import decode_rounds
from vocabtrim_export.calibration import Corpus
from vocabtrim_export.calibration.calibrate import CALIBRATION_DATE
from vocabtrim_export.calibration.counting import CalibrationInput, CalibrationSettings
from vocabtrim_export.calibration.counts import is_held_out
from vocabtrim_export.calibration.document import Document
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.head_choice.replay import Text, preferred

_FEWEST_PER_DOMAIN, _TEXTS = 3, 12
_PROMPT_TOKENS, _NEW_TOKENS = 256, 48
_FEWEST = 8  # tokens that a continuation must have to say anything
_Place = tuple[Sequence[Document], int]  # where a document is


def held_out_prompts(
    data: CalibrationInput, tokenizer: Tokenizer, rows: int, settings: CalibrationSettings
) -> list[tuple[str, list[int]]]:
    """Returns the domain and the last token ids of some held-out prompts, drawn at random, as many of each domain.

    Args:
        data: The calibration data; their held-out documents chose no row.
        tokenizer: The target's.
        rows: Rows of the target's embedding.
        settings: The settings of the chat template that renders the prompts.

    Raises:
        VocabtrimError: There is no prompt, or no chat template of the name in `settings`.
    """
    options = ChatOptions(settings.chat_template, None, settings.template_args, now=CALIBRATION_DATE)
    tokenizer.chat.check(options)
    domains = held_out_places(data)
    most = max(_FEWEST_PER_DOMAIN, _TEXTS // max(1, len(domains)))
    prompts: list[tuple[str, list[int]]] = []
    for domain, places in domains.items():
        fitting = _fitting((documents[index] for documents, index in places), tokenizer, rows, options)
        prompts += [(domain, ids) for ids in islice(fitting, most)]
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


def held_out_places(data: CalibrationInput) -> dict[str, list[_Place]]:
    """Returns where the held-out documents of each domain are, in random order.

    Domains without a name are files, or all files together where they are many, as in a tree of sources.
    """
    domains: dict[str, list[_Place]] = {domain.name: _held_out_of(domain.corpus) for domain in data.domains}
    if data.corpus:
        places = _held_out_of(data.corpus)
        for documents, index in places:
            file = Path(documents[index].where.rsplit(", ", 1)[0]).name or data.corpus.source
            domains.setdefault(file, []).append((documents, index))
        if len(domains) > _TEXTS // _FEWEST_PER_DOMAIN:
            domains = {data.corpus.source: places}
    for places in domains.values():
        Random(0).shuffle(places)
    return domains


def _held_out_of(corpus: Corpus) -> list[_Place]:
    documents = corpus.documents
    return [(documents, index) for index in range(len(documents)) if is_held_out(index, len(documents))]


def _fitting(
    documents: Iterable[Document], tokenizer: Tokenizer, rows: int, options: ChatOptions
) -> Iterator[list[int]]:
    """Yield the last token ids of each prompt that the template renders and the embedding has rows for."""
    for document in documents:
        try:
            ids = encode_document(tokenizer, document, options)[-_PROMPT_TOKENS:]
        except VocabtrimError:  # calibration has named it
            continue
        if ids and max(ids) < rows:
            yield ids


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
