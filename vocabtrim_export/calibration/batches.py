"""Choose the documents that a calibration counts next, from its progress alone: an interruption changes nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.counts import TokenCounts
from vocabtrim_export.calibration.document import Document
from vocabtrim_export.calibration.document_file import prompt_lengths

# Batches are formed within windows of this many: prompts of similar length share a batch, and every window has prompts
# of all lengths.
BATCHES_A_WINDOW = 8
MIN_BATCH = 8
# Texts that are counted together: fewer would add up arrays of a whole vocabulary more often.
TEXT_BATCH = 256
_TEXT_GROUP = 64  # texts of similar length that follow each other in the order


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes of a calibration's batches.

    Attributes:
        batch_size: Prompts that are sampled at once.
        max_prompt_tokens: Tokens that are kept of a prompt, from its end.
        max_new_tokens: Tokens that are generated for each.
    """

    batch_size: int = 64
    max_prompt_tokens: int = 128
    max_new_tokens: int = 128

    def within(self, context: int | None) -> "BatchLimits":
        """Returns these limits, lowered where the model's context, in tokens, is shorter."""
        if context is None:
            return self
        new = min(self.max_new_tokens, context // 2)
        return replace(self, max_new_tokens=new, max_prompt_tokens=min(self.max_prompt_tokens, context - new))


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents that are counted together.

    Attributes:
        pass_number: The number of the pass over the corpus.
        indices: The documents' places in the corpus.
    """

    pass_number: int
    indices: tuple[int, ...]


class Batches:
    """The batches of a corpus. The next one depends on the counts alone, so interruptions do not change it.

    Args:
        documents: The documents of the corpus.
        run: The settings of the calibration.
        max_tokens: The number of tokens to count.
    """

    def __init__(self, documents: Sequence[Document], run: CalibrationRun, max_tokens: int) -> None:
        self.run, self.max_tokens = run, max_tokens
        self._lengths = prompt_lengths(documents)
        self._pass_number = -1
        self._order = self._lengths[:0]

    def next(self, documents_done: int, tokens: int) -> Batch | None:
        """Choose the next batch.

        Args:
            documents_done: Documents counted so far, those of earlier passes included.
            tokens: Tokens counted so far.

        Returns:
            The batch; None when the counting is done.
        """
        if not len(self._lengths) or tokens >= self.max_tokens:
            return None
        pass_number, start = divmod(documents_done, len(self._lengths))
        repeats = self.run.source != "text" and self.run.temperature > 0 and tokens > 0
        if pass_number > 0 and not repeats:
            return None
        size = TEXT_BATCH
        if self.run.source != "text":  # the last batch is as small as the missing tokens allow
            missing = -(-(self.max_tokens - tokens) // self.run.max_new_tokens)
            size = min(self.run.batch_size, max(MIN_BATCH, missing))
        if pass_number != self._pass_number:
            self._pass_number, self._order = pass_number, self._ordered(pass_number)
        return Batch(pass_number, tuple(self._order[start : start + size].tolist()))

    def likely_after(self, batch: Batch, documents_done: int, tokens: int) -> Iterator[Batch]:
        """Yield the batches that probably follow, if this one and the others have as many tokens as those before.

        Args:
            batch: The next batch.
            documents_done: Documents counted before it.
            tokens: Tokens counted before it.
        """
        likely = tokens / documents_done if documents_done else self.run.max_new_tokens
        following: Batch | None = batch
        while following:
            documents_done += len(following.indices)
            tokens += round(likely * len(following.indices))
            if following := self.next(documents_done, tokens):
                yield following

    def _ordered(self, pass_number: int) -> NDArray[np.int64]:
        """Returns a random order of the documents in which neighbours have similar lengths, which limits padding.

        Windows of a shuffled corpus are sorted by length and their batches shuffled, so that stopping early still
        leaves short and long prompts.
        """
        random = np.random.default_rng([self.run.seed, pass_number])
        shuffled = random.permutation(len(self._lengths))
        size = self.run.batch_size or _TEXT_GROUP
        order: list[NDArray[np.int64]] = []
        for start in range(0, len(shuffled), BATCHES_A_WINDOW * size):
            window = shuffled[start : start + BATCHES_A_WINDOW * size]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            order += [batches[batch] for batch in random.permutation(len(batches))]
        return np.concatenate(order)


def draws(run: CalibrationRun, batch: Batch) -> NDArray[np.float64]:
    """Returns float64[B, max_new_tokens] in [0, 1), the same numbers for a document in whatever batch it is."""
    seeds = ([run.seed, batch.pass_number, index] for index in batch.indices)
    return np.array([np.random.default_rng(seed).random(run.max_new_tokens) for seed in seeds])


def count_batch(
    counts: TokenCounts,
    tokens: Sequence[NDArray[np.int64]],
    held: Sequence[bool],
    max_tokens: int,
) -> tuple[TokenCounts, list[NDArray[np.int64]]]:
    """Add one more batch to `counts`, up to `max_tokens`.

    Args:
        counts: The counts so far.
        tokens: The tokens of each document.
        held: Whether each is held out.
        max_tokens: The number of tokens to count.

    Returns:
        The counts, and the counted tokens of each document, up to the document that the limit cut.
    """
    run, left = counts.runs[0], max_tokens - counts.total
    begun, done, parts = run.next_done, 0, []
    for ids in tokens:
        if len(ids) - begun > left:
            parts.append(ids[begun : begun + left])
            begun += left
            break
        parts.append(ids[begun:])
        left -= len(parts[-1])
        begun, done = 0, done + 1
    sums = []
    for part, before in ((False, counts.counts), (True, counts.held_out)):
        mine = [np.empty(0, np.int64), *(ids for ids, is_held in zip(parts, held, strict=False) if is_held is part)]
        sums.append(before + np.bincount(np.concatenate(mine), minlength=counts.full_vocab))
    total = run.tokens + sum(map(len, parts))
    run = replace(run, documents_done=run.documents_done + done, next_done=begun, tokens=total)
    return TokenCounts(sums[0], sums[1], counts.tokenizer_digest, (run,)), parts
