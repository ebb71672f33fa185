"""How a drafter catches up with the text: by its tokens alone, or by the target's features as well."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine, StepOutput


class TokenReader:
    """Of a drafter that reads tokens. Its cache holds a beginning of the text, its accepted drafts included."""

    def __init__(self, drafter: Engine, vocab_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size

    def target_fed(self, output: StepOutput, kept: int) -> None:
        """The target made `output`, and `kept` of the tokens fed for it are part of the text."""

    def unread(self, sequence: Sequence[int]) -> list[int]:
        """What the drafter has not been fed of the text: at least one token."""
        return self._known(sequence[self.drafter.length :])

    def read(self, tokens: list[int]) -> StepOutput:
        """Feed what `unread` gave."""
        return self.drafter.feed(tokens)

    def rewind(self, length: int) -> None:
        """Forget drafted tokens. length: tokens of the text that the target has read."""
        self.drafter.rewind(min(self.drafter.length, length))

    def _known(self, tokens: Sequence[int]) -> list[int]:
        last = self.drafter.manifest.vocab_size - 1
        # A head of the target's padded further may name a token that the drafter lacks. What stands in for it
        # changes what is drafted, never what comes out.
        return list(tokens) if last + 1 >= self.vocab_size else [min(token, last) for token in tokens]


class FeatureReader(TokenReader):
    """Of a head: row t of its cache is made of the target's features of token t and of token t + 1.

    Between rounds the cache holds such rows only. What the head fed itself while drafting is forgotten even where it
    was accepted: the target has given the true features meanwhile.
    """

    def __init__(self, drafter: Engine, vocab_size: int) -> None:
        super().__init__(drafter, vocab_size)
        self.features: list[NDArray[np.float32]] = []  # of the tokens from number `rows` on that the target has read
        self.rows = 0

    def target_fed(self, output: StepOutput, kept: int) -> None:
        self.features.append(output.features[:kept].copy())  # valid until the target's next call only

    def unread(self, sequence: Sequence[int]) -> list[int]:
        return self._known(sequence[self.rows + 1 :])

    def read(self, tokens: list[int]) -> StepOutput:
        output = self.drafter.feed_features(tokens, np.concatenate(self.features))
        self.features.clear()
        self.rows = self.drafter.length
        return output

    def rewind(self, length: int) -> None:  # noqa: ARG002
        self.drafter.rewind(self.rows)


def make_reader(drafter: Engine, vocab_size: int) -> TokenReader:
    """vocab_size: the target's."""
    return (FeatureReader if drafter.features_read else TokenReader)(drafter, vocab_size)
