"""The tokens of a batch of documents: of their text, or generated after their prompts by a model or a server."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import Batch, draws
from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.document import Document, Skipped
from vocabtrim_export.calibration.endpoint import Endpoint, check_not_empty, check_same_tokenizer
from vocabtrim_export.calibration.kept_answers import KeptAnswers
from vocabtrim_export.calibration.model_facts import ModelFacts
from vocabtrim_export.calibration.partial_batch import Unfinished
from vocabtrim_export.calibration.prompts import encode, encode_document
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


_AT_ONCE = 1 << 20  # characters; what the library makes of a text takes a hundred times its size


@dataclass(frozen=True, slots=True)
class BatchDocuments:
    """A batch with its documents, and all that its tokens depend on besides the model.

    Attributes:
        documents: The documents.
        batch: Their places in the corpus.
        run: The settings of the calibration.
        chat: The options of the chat template that renders prompts.
    """

    documents: tuple[Document, ...]
    batch: Batch
    run: CalibrationRun
    chat: ChatOptions


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """The tokens of a batch.

    Attributes:
        tokens: int64[n] of each document.
        skipped: The documents that cannot be prompts.
    """

    tokens: list[NDArray[np.int64]]
    skipped: tuple[Skipped, ...] = ()


def whole_texts(tokenizer: "PreTrainedTokenizerFast") -> "BackendTokenizer":
    """Returns the library's tokenizer, set to neither pad nor truncate, as transformers sets it for plain calls."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def text_tokens(tokenizer: "BackendTokenizer", batch: BatchDocuments) -> BatchTokens:
    """Returns the tokens of each document's texts, each text encoded by itself.

    Args:
        tokenizer: A tokenizer that neither pads nor truncates.
        batch: The documents.
    """
    ids = _text_ids(tokenizer, [text for document in batch.documents for text in document.counted_texts])
    parts = (list(islice(ids, len(document.counted_texts))) for document in batch.documents)
    return BatchTokens([each[0] if len(each) == 1 else np.concatenate(each) for each in parts])


def _text_ids(tokenizer: "BackendTokenizer", texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Yield the token ids of each text. The library encodes a part of the texts at once, on all cores."""
    begin, size = 0, 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= _AT_ONCE or end == len(texts):
            for encoding in tokenizer.encode_batch_fast(texts[begin:end], add_special_tokens=False):
                yield np.array(array("I", encoding.ids), np.int64)  # several times faster than from the list
            begin, size = end, 0


class Generator:
    """Continues the prompts of batches with a model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
        self.model, self.tokenizer = model, runtime_tokenizer(tokenizer)
        self.eos = eos_token_ids(tokenizer, model.generation_config)
        self.rows = ModelFacts.of(model).rows

    def tokens(
        self,
        batch: BatchDocuments,
        on_step: Callable[[int], None] = lambda _tokens: None,
        unfinished: Unfinished | None = None,
        on_prompts: Callable[[int, int], None] = lambda _read, _total: None,
    ) -> BatchTokens:
        """Returns the new tokens after each prompt; none for a document that cannot be one.

        Args:
            batch: The documents.
            on_step: Called with the number of tokens so far.
            unfinished: The storage of the batch's segments.
            on_prompts: Called with (prompt tokens read, all of them) while the prompts are read.
        """
        from vocabtrim_export.calibration.generate import NO_TOKEN, generate_batch

        prompts, skipped = _prompt_tokens(self.tokenizer, batch, self.rows)
        tokens = [np.empty(0, np.int64)] * len(prompts)
        rows = [row for row, prompt in enumerate(prompts) if prompt]
        if rows:
            generated = generate_batch(
                self.model,
                [prompts[row] for row in rows],
                draws(batch.run, batch.batch)[rows],
                temperature=batch.run.temperature,
                eos_token_ids=self.eos,
                on_step=on_step,
                on_prompts=on_prompts,
                partial_batch=unfinished,
            )
            for row, line in zip(rows, generated, strict=True):
                tokens[row] = line[line != NO_TOKEN]
        return BatchTokens(tokens, tuple(skipped))


def _prompt_tokens(tokenizer: Tokenizer, batch: BatchDocuments, rows: int) -> tuple[list[list[int]], list[Skipped]]:
    """Encode the prompts of documents, and cut them to their ends.

    Args:
        tokenizer: The runtime's tokenizer.
        batch: The documents.
        rows: The rows of the model's embedding. An added token, such as an image's, may have an id beyond them.

    Returns:
        The prompts, empty for a document that cannot be one, and the documents that cannot.
    """
    prompts: list[list[int]] = []
    skipped: list[Skipped] = []
    for document in batch.documents:
        try:
            prompt = encode_document(tokenizer, document, batch.chat)[-batch.run.max_prompt_tokens :]
            if max(prompt, default=0) >= rows:
                raise VocabtrimError(
                    f"the prompt has the token id {max(prompt)}, and the model has rows up to {rows - 1} only"
                )
        except VocabtrimError as error:
            prompt = []
            skipped.append(Skipped(document.where, str(error)))
        prompts.append(prompt)
    return prompts, skipped


def asked_tokens(
    endpoint: Endpoint,
    tokenizer: "PreTrainedTokenizerFast",
    batch: BatchDocuments,
    on_step: Callable[[int], None],
    unfinished: Unfinished | None = None,
) -> BatchTokens:
    """Generate with a server after each document.

    Args:
        endpoint: The server.
        tokenizer: The model's tokenizer.
        batch: The documents.
        on_step: Called with the number of tokens so far.
        unfinished: The storage of the answers.

    Returns:
        The new tokens, with an EOS where the model ended.

    Raises:
        VocabtrimError: The server fails, has another tokenizer, or answers with nothing.
    """
    run, place = batch.run, batch.batch
    seeds = [int(np.random.default_rng([run.seed, place.pass_number, i]).integers(1 << 31)) for i in place.indices]
    kept = KeptAnswers(unfinished)
    _ask(endpoint, batch, seeds, kept, on_step)
    answers = [kept.answers[index] for index in range(len(seeds))]
    tokens = encode(tokenizer, [answer.text for answer in answers], add_special_tokens=False)
    check_same_tokenizer(endpoint, answers, [len(ids) for ids in tokens])
    check_not_empty(endpoint, answers)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    pairs = zip(tokens, answers, strict=True)
    return BatchTokens([np.array(ids + end * answer.is_ended, np.int64) for ids, answer in pairs])


def _ask(
    endpoint: Endpoint, batch: BatchDocuments, seeds: list[int], kept: KeptAnswers, on_step: Callable[[int], None]
) -> None:
    """Ask for the answers that are not kept yet. What came is kept, too, where one fails or the user interrupts."""
    run = batch.run
    with ThreadPoolExecutor(endpoint.concurrency) as executor:
        asked = {
            executor.submit(endpoint.answer, document, run.max_new_tokens, run.temperature, seed): index
            for index, (document, seed) in enumerate(zip(batch.documents, seeds, strict=True))
            if index not in kept.answers
        }
        try:
            for future in as_completed(asked):
                kept.add(asked[future], future.result())
                on_step(kept.tokens)
        except BaseException:
            kept.save()
            executor.shutdown(cancel_futures=True)
            left = [each for each, index in asked.items() if index not in kept.answers and not each.cancelled()]
            came = [each for each in left if each.exception() is None]
            for future in came:
                kept.add(asked[future], future.result())
            kept.save()
            raise
