"""Held-out prompts of the calibration data, the target's own continuations, and what the drafter makes of them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.errors import VocabtrimError
from vocabtrim_export.calibration import Corpus
from vocabtrim_export.calibration.calibrate import CALIBRATION_DATE
from vocabtrim_export.calibration.counting import CalibrationSettings
from vocabtrim_export.calibration.counts import is_held_out
from vocabtrim_export.calibration.document import Document
from vocabtrim_export.calibration.generate import NO_TOKEN, generate_batch
from vocabtrim_export.calibration.prompts import encode_document
from vocabtrim_export.planning.replay import Text, preferred
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.precision import calibration_model
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer
from vocabtrim_export.sources.source import Source

_PER_DOMAIN, _MOST = 4, 16  # texts
_PROMPT_TOKENS, _NEW_TOKENS = 256, 64
_FEWEST = 8  # tokens that a continuation must have to say anything


def replayed_texts(
    corpus: Corpus,
    target: Source,
    drafter: Source,
    available: NDArray[np.int64],
    settings: CalibrationSettings,
    progress: Callable[[int, int], None],
) -> list[Text]:
    """Let the target continue held-out prompts greedily, and the full drafter read the result.

    Args:
        corpus: What was calibrated on; its held-out documents chose no row.
        target: The target.
        drafter: The language model that drafts.
        available: int64[n], the ids that the drafter may propose.
        settings: Which chat template renders the prompts.
        progress: Called with (texts done, texts).

    Raises:
        VocabtrimError: No held-out document gives a text.
    """
    prompts = _prompts(corpus, target, ChatOptions(settings.chat_template, None, settings.template_args))
    if not prompts:
        raise VocabtrimError(
            "--k auto replays held-out documents, and the calibration data has none that fits: give at least eight "
            "prompts, or K as a number"
        )
    progress(0, len(prompts))
    with calibration_model(target.model) as model:
        made = generate_batch(
            model,
            [ids for _, ids in prompts],
            np.zeros((len(prompts), _NEW_TOKENS)),
            temperature=0,
            eos_token_ids=eos_token_ids(target.tokenizer, target.model.generation_config),
        )
    texts = []
    with calibration_model(drafter.model) as model:
        for done, ((domain, ids), row) in enumerate(zip(prompts, made, strict=True)):
            tokens = row[row != NO_TOKEN]
            if len(tokens) >= _FEWEST:
                texts.append(Text(domain, ids, tokens, preferred(_logits(model, ids, tokens, available), tokens)))
            progress(done + 1, len(prompts))
    if not texts:
        raise VocabtrimError("--k auto: the target ends its answers at once, so nothing can be replayed: give a number")
    return texts


def _prompts(corpus: Corpus, target: Source, chat: ChatOptions) -> list[tuple[str, list[int]]]:
    """The domain and the end of some held-out prompts, as many of each domain."""
    tokenizer, rows = runtime_tokenizer(target.tokenizer), target.vocab_size
    options = ChatOptions(chat.template, None, chat.template_args, now=CALIBRATION_DATE)
    taken: Counter[str] = Counter()
    prompts: list[tuple[str, list[int]]] = []
    for index, document in enumerate(corpus.documents):
        domain = _domain(document, corpus)
        if not is_held_out(index, len(corpus.documents)) or taken[domain] == _PER_DOMAIN or len(prompts) == _MOST:
            continue
        try:
            ids = encode_document(tokenizer, document, options)[-_PROMPT_TOKENS:]
        except VocabtrimError:  # calibration has named it
            continue
        if ids and max(ids) < rows:
            taken[domain] += 1
            prompts.append((domain, ids))
    return prompts


def _domain(document: Document, corpus: Corpus) -> str:
    """The file's name."""
    return Path(document.where.rsplit(", ", 1)[0]).name or corpus.source


@torch.inference_mode()
def _logits(
    model: torch.nn.Module, prompt: list[int], tokens: NDArray[np.int64], available: NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32[n, vocabulary], before each of `tokens`; -inf for what the drafter may not propose."""
    ids = torch.tensor([[*prompt, *tokens[:-1].tolist()]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().numpy()
    allowed = np.zeros(logits.shape[1], bool)
    allowed[available[available < logits.shape[1]]] = True
    return np.where(allowed, logits, np.float32("-inf"))
