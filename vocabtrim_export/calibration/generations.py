"""The tokens of a batch of documents: its text's, or those that a model or a server continues its prompts with."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.document import Document, Skipped
from vocabtrim_export.calibration.endpoint import Endpoint, check_same_tokenizer
from vocabtrim_export.calibration.partial_batch import PartialBatch
from vocabtrim_export.calibration.prompts import encode, encode_document

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def text_tokens(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]) -> list[list[int]]:
    """Returns the tokens of each document's texts, each text encoded by itself."""
    texts = [text for document in documents for text in document.counted_texts]
    encoded = iter(encode(tokenizer, texts, add_special_tokens=False))
    return [[token for _ in document.counted_texts for token in next(encoded)] for document in documents]


def prompt_tokens(
    tokenizer: Tokenizer, documents: Sequence[Document], chat: ChatOptions, run: CalibrationRun, rows: int
) -> tuple[list[list[int]], list[Skipped]]:
    """Encode the prompts of documents, and cut them to their ends.

    Args:
        tokenizer: The runtime's tokenizer.
        documents: The documents.
        chat: How the chat template renders them.
        run: The settings of the calibration.
        rows: The rows of the model's embedding. An added token, such as an image's, may have an id beyond them.

    Returns:
        The prompts, empty for a document that cannot be one, and the documents that cannot.
    """
    prompts: list[list[int]] = []
    skipped: list[Skipped] = []
    for document in documents:
        try:
            prompt = encode_document(tokenizer, document, chat)[-run.max_prompt_tokens :]
            if max(prompt, default=0) >= rows:
                raise VocabtrimError(f"the model has no row for token {max(prompt)} of the prompt")
        except VocabtrimError as error:
            prompt = []
            skipped.append(Skipped(document.where, str(error)))
        prompts.append(prompt)
    return prompts, skipped


def sampled_tokens(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    numbers: NDArray[np.float64],
    run: CalibrationRun,
    eos: frozenset[int],
    on_step: Callable[[int], None],
    unfinished: PartialBatch | None,
) -> list[NDArray[np.int64]]:
    """Generate with `model` after each prompt. Returns the new tokens; none for an empty prompt."""
    from vocabtrim_export.calibration.generate import NO_TOKEN, generate_batch

    tokens = [np.empty(0, np.int64)] * len(prompts)
    rows = [row for row, prompt in enumerate(prompts) if prompt]
    if rows:
        generated = generate_batch(
            model,
            [prompts[row] for row in rows],
            numbers[rows],
            temperature=run.temperature,
            eos_token_ids=eos,
            on_step=on_step,
            partial_batch=unfinished,
        )
        for row, line in zip(rows, generated, strict=True):
            tokens[row] = line[line != NO_TOKEN]
    return tokens


def asked_tokens(
    endpoint: Endpoint,
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    run: CalibrationRun,
    batch: tuple[int, list[int]],
    on_step: Callable[[int], None],
) -> list[list[int]]:
    """Generate with a server after each document. Returns the new tokens, an EOS where the model ended included."""
    pass_number, indices = batch
    seeds = [int(np.random.default_rng([run.seed, pass_number, index]).integers(1 << 31)) for index in indices]
    answers = endpoint.answers(documents, run.max_new_tokens, run.temperature, seeds, on_step)
    tokens = encode(tokenizer, [answer.text for answer in answers], add_special_tokens=False)
    check_same_tokenizer(endpoint, answers, [len(ids) for ids in tokens])
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [ids + end * answer.is_ended for ids, answer in zip(tokens, answers, strict=True)]
