"""Batches that workers count ahead of the one that is needed next: threads, or processes of a cluster."""

from collections.abc import Callable
from itertools import islice
from typing import Protocol

from vocabtrim_export.calibration.batches import Batch, Batches
from vocabtrim_export.calibration.generations import BatchTokens


class Pending(Protocol):
    """A batch whose tokens a worker is making."""

    def result(self) -> BatchTokens:
        """Wait for the tokens. An error of the worker is raised here."""

    def cancel(self) -> object:
        """Drop the work, whose result is no longer needed."""


class Lookahead:
    """Returns the tokens of one batch after another, while workers make those of the batches that probably follow.

    Which batch follows depends on what was counted before it, so that a guess can be wrong: then its work is dropped,
    and none of its tokens is counted. Every batch that is requested yields its tokens once.

    Args:
        batches: The batches of the corpus.
        submit: Gives a batch to a worker.
        ahead: The number of batches that workers make besides the requested one.
    """

    def __init__(self, batches: Batches, submit: Callable[[Batch], Pending], ahead: int) -> None:
        self.batches, self.submit, self.ahead = batches, submit, ahead
        self._pending: dict[Batch, Pending] = {}

    def tokens(self, batch: Batch, documents_done: int, tokens: int) -> BatchTokens:
        """Returns the tokens of a batch.

        Args:
            batch: The next batch.
            documents_done: Documents counted before it.
            tokens: Tokens counted before it.
        """
        following = islice(self.batches.likely_after(batch, documents_done, tokens), self.ahead)
        wanted = [batch, *following]
        for unwanted in self._pending.keys() - set(wanted):
            self._pending.pop(unwanted).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self.submit(each)
        return self._pending.pop(batch).result()
