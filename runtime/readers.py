"""Feed a drafter the text that it has not read: tokens alone, or with the target's features."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.outputs import StepOutput


class TokenReader:
    """Feeds a drafter that reads tokens, whose cache holds a beginning of the text, accepted drafts included."""

    def __init__(self, drafter: Engine, vocab_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size
        self.remembered = 0  # tokens of the text that the drafter was told of for its slots

    def begin(self) -> None:
        """Note that a text begins, the first `drafter.length` tokens of which the drafter has read."""

    def target_fed(self, output: StepOutput, kept: int) -> None:
        """Note that the target gave `output`, and that `kept` of the tokens fed for it are part of the text."""

    def hold(self) -> None:
        """Copy what is still to be read of the target's last call, before its next call overwrites it."""

    def unread(self, sequence: Sequence[int]) -> list[int]:
        """Returns the tokens of the text that the drafter has not been fed: at least one."""
        self._remember(sequence)
        return self._known(sequence[self.drafter.length :])

    def read(self, tokens: list[int]) -> StepOutput:
        """Feed the tokens that `unread` returned."""
        return self.drafter.feed(tokens)

    def was_fed(self, count: int) -> None:
        """Note that the drafter was fed the `count` tokens of `unread` by another call, and drafted after them."""

    def rewind(self, length: int) -> None:
        """Forget drafted tokens.

        Args:
            length: The tokens of the text that the target has read.
        """
        self.drafter.rewind(min(self.drafter.length, length))

    def _remember(self, sequence: Sequence[int]) -> None:
        self.drafter.remember(sequence[self.remembered :])
        self.remembered = len(sequence)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        last = self.drafter.manifest.vocab_size - 1
        # A head of the target's padded further may name a token that the drafter lacks. What stands in for it
        # changes what is drafted, never what comes out.
        return list(tokens) if last + 1 >= self.vocab_size else [min(token, last) for token in tokens]


class FeatureReader(TokenReader):
    """Feeds a head. Row t of the head's cache is made of the target's features of token t and of token t + 1.

    Between rounds the cache holds such rows only. What the head fed itself while drafting is forgotten even where it
    was accepted: the target has given the true features meanwhile. These are copied from where the target is as late
    as can be: a drafter on the same device reads them where they are.
    """

    def __init__(self, drafter: Engine, vocab_size: int) -> None:
        super().__init__(drafter, vocab_size)
        self.rows = self.received = 0  # tokens whose features were read, and were received, `last` not counted
        self.held: list[NDArray[np.float32]] = []  # of the tokens in between
        self.last: tuple[StepOutput, int] | None = None  # what the target gave last, and how many of its rows count

    def begin(self) -> None:
        self.rows = self.received = self.drafter.length

    def target_fed(self, output: StepOutput, kept: int) -> None:
        self.last = output, kept

    def hold(self) -> None:
        if self.last is None:
            return
        (output, kept), self.last = self.last, None
        self.received += kept
        if self.received < self.drafter.capacity:  # else it drafts no more
            self.held.append(output.features[:kept].copy())  # valid until the target's next call only

    def unread(self, sequence: Sequence[int]) -> list[int]:
        self._remember(sequence)
        return self._known(sequence[self.rows + 1 :])

    def read(self, tokens: list[int]) -> StepOutput:
        self.hold()
        output = self.drafter.feed_features(tokens, np.concatenate(self.held))
        self.was_fed(len(tokens))
        return output

    def was_fed(self, count: int) -> None:
        self.held.clear()
        self.last = None
        self.rows = self.received = self.rows + count

    def rewind(self, length: int) -> None:  # noqa: ARG002
        self.drafter.rewind(self.rows)


def make_reader(drafter: Engine, vocab_size: int) -> TokenReader:
    """Returns the reader that `drafter` needs.

    Args:
        drafter: The engine that drafts.
        vocab_size: The number of tokens of the target.
    """
    return (FeatureReader if drafter.features_read else TokenReader)(drafter, vocab_size)
