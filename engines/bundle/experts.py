"""The routed experts of a mixture, and how many of them a step of several tokens reads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# `Experts.distinct` by (experts of a layer, experts that one token picks)
Picks = Mapping[tuple[int, int], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of which a layer's router picks a few for each token.

    Attributes:
        num_experts: The experts of a layer.
        per_token: Those that one token picks.
        bytes: Bytes of the weights of all of them, in all layers of this form.
        distinct: The mean number of distinct experts of a layer that 1, 2, 3, … consecutive tokens of a text picked, as
            measured; empty where it was not.
    """

    num_experts: int
    per_token: int
    bytes: int
    distinct: tuple[float, ...] = ()

    @property
    def is_possible(self) -> bool:
        """Whether a token picks at least one expert, and no more than there are."""
        return 0 < self.per_token <= self.num_experts >= max(self.distinct, default=0)

    def expected_distinct(self, tokens: float) -> float:
        """Distinct experts of a layer that a step of several tokens is expected to read.

        Between two measured numbers of tokens it is interpolated. Beyond them, each further token picks independently
        of the others, which is also what is supposed where nothing was measured.
        """
        known = (0.0, *self.distinct)
        last = len(known) - 1
        if tokens < last:
            below = math.floor(tokens)
            return known[below] + (tokens - below) * (known[below + 1] - known[below])
        untouched: float = (1 - self.per_token / self.num_experts) ** (tokens - last)
        return self.num_experts - (self.num_experts - known[-1]) * untouched

    def expected_bytes(self, tokens: float) -> float:
        """Returns the bytes that a step of several tokens is expected to read of these experts, in all layers."""
        return self.bytes * self.expected_distinct(tokens) / self.num_experts
