"""The sources of a batch's tokens: threads that encode text, a model, a server, or workers elsewhere."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vocabtrim_export.calibration.batches import Batch, Batches
from vocabtrim_export.calibration.corpus import Corpus
from vocabtrim_export.calibration.count_settings import CountEvents, CountSettings
from vocabtrim_export.calibration.counts import TokenCounts
from vocabtrim_export.calibration.generations import (
    BatchDocuments,
    BatchTokens,
    Generator,
    asked_tokens,
    text_tokens,
    whole_texts,
)
from vocabtrim_export.calibration.lookahead import Lookahead, Pending
from vocabtrim_export.calibration.model_facts import ModelFacts
from vocabtrim_export.calibration.partial_batch import PartialBatch
from vocabtrim_export.calibration.saving import Saver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_TEXT_AHEAD = 2  # the library encodes a batch on all cores; two more keep these busy while one is counted

Produce = Callable[[TokenCounts, Batch], BatchTokens]


class CountWorkers(Protocol):
    """Processes elsewhere that make the tokens of batches."""

    @property
    def facts(self) -> ModelFacts | None:
        """The model that they generate with; None where they count text."""

    @property
    def ahead(self) -> int:
        """The number of batches that they should be at beyond the one that is needed next."""

    def submit(self, batch: BatchDocuments, unfinished: PartialBatch | None) -> Pending:
        """Give a batch to a worker.

        Args:
            batch: The documents.
            unfinished: The storage of its segments.
        """


@dataclass(frozen=True, slots=True)
class CountTask:
    """One counting of a corpus.

    Attributes:
        model: The model that generates, if it is in this process.
        tokenizer: Its tokenizer.
        workers: The processes that make the tokens, if this one does not.
        corpus: The documents.
        settings: The settings of the counting.
        batches: The batches of the corpus.
        saver: Keeps the work on an unfinished batch.
        events: Functions to call as tokens come in.
    """

    model: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerFast"
    workers: CountWorkers | None
    corpus: Corpus
    settings: CountSettings
    batches: Batches
    saver: Saver
    events: CountEvents

    def documents(self, batch: Batch) -> BatchDocuments:
        """Returns a batch with its documents."""
        documents = tuple(self.corpus.documents[index] for index in batch.indices)
        return BatchDocuments(documents, batch, self.batches.run, self.settings.chat)

    def on_step(self, counts: TokenCounts) -> Callable[[int], None]:
        """Returns a function that reports the tokens of the batch after these counts."""
        before, most = counts.total, self.settings.max_tokens
        return lambda in_batch: self.events.progress(min(before + in_batch, most), most)


@contextmanager
def producer(task: CountTask) -> Iterator[Produce]:
    """Give a function that makes the tokens of the next batch, given the counts so far."""
    if task.workers is not None:
        workers, saver = task.workers, task.saver
        yield _ahead(task, lambda batch: workers.submit(task.documents(batch), saver.unfinished(batch)), workers.ahead)
    elif task.settings.endpoint is not None:
        endpoint = task.settings.endpoint
        yield lambda counts, batch: asked_tokens(
            endpoint, task.tokenizer, task.documents(batch), task.on_step(counts), task.saver.unfinished(batch)
        )
    elif task.model is not None:
        generator = Generator(task.model, task.tokenizer)
        yield lambda counts, batch: generator.tokens(
            task.documents(batch), task.on_step(counts), task.saver.unfinished(batch), task.events.on_prompts
        )
    else:
        with _text_threads(task) as produce:
            yield produce


@contextmanager
def _text_threads(task: CountTask) -> Iterator[Produce]:
    tokenizer = whole_texts(task.tokenizer)
    executor = ThreadPoolExecutor(_TEXT_AHEAD)
    try:
        yield _ahead(task, lambda batch: executor.submit(text_tokens, tokenizer, task.documents(batch)), _TEXT_AHEAD)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _ahead(task: CountTask, submit: Callable[[Batch], Pending], ahead: int) -> Produce:
    lookahead = Lookahead(task.batches, submit, ahead)
    return lambda counts, batch: lookahead.tokens(batch, counts.runs[0].documents_done, counts.runs[0].tokens)
