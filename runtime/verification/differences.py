"""Find the tokens of a text that a model would not have chosen, and tell near-ties from errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.bundle.read import Manifest

EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}  # from 1 to the next number
# Between two float32 runtimes a logit of SmolLM2, 30 layers, was off by 30 epsilons of the row's largest at most, the
# gap of two logits by twice that: 2 epsilons a layer. Twice as many are allowed.
ROUNDINGS_PER_LAYER = 4

Verdict = Literal["equal", "near-tie", "different"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A generated token that is not the reference's choice after the same tokens.

    Attributes:
        position: Its index among the new tokens.
        found: The id of the generated token.
        expected: The id of the reference's token.
        gap: By how much the reference's logit of `expected` exceeds that of `found`.
        tolerance: The gap that rounding explains.
    """

    position: int
    found: int
    expected: int
    gap: float
    tolerance: float

    @property
    def verdict(self) -> Verdict:
        """Whether rounding explains the gap ("near-tie") or not ("different")."""
        return "near-tie" if self.gap <= self.tolerance else "different"  # a gap that is NaN is no tie


def differences(rows: NDArray[np.float32], tokens: Sequence[int], manifest: Manifest) -> list[Difference]:
    """Find the positions where `tokens` are not the most likely ones.

    Args:
        rows: float32[len(tokens), columns], the logits of the same positions.
        tokens: Token ids.
        manifest: The manifest of the model that generated the tokens. Its dtype and depth say what rounding explains.
    """
    chosen = rows.argmax(axis=1).tolist()
    return [
        difference_at(index, token, row, manifest)
        for index, (token, best, row) in enumerate(zip(tokens, chosen, rows, strict=True))
        if token != best
    ]


def tolerance(row: NDArray[np.float32], manifest: Manifest) -> float:
    """Returns the gap between two logits of `row`, float32[columns], that rounding explains.

    It is ROUNDINGS_PER_LAYER · layers · ε of the dtype · the largest absolute logit.
    """
    scale = float(np.abs(row[np.isfinite(row)]).max(initial=0.0))
    return ROUNDINGS_PER_LAYER * manifest.num_layers * EPSILON[manifest.dtype] * scale


def difference_at(index: int, token: int, row: NDArray[np.float32], manifest: Manifest) -> Difference:
    """Describe a generated token that is not the most likely one.

    Args:
        index: Its position in the generated text.
        token: Its id.
        row: float32[columns], the logits at that position.
        manifest: The manifest of the model that generated it.
    """
    best = int(row.argmax())
    gap = float(row[best]) - float(row[token]) if token < len(row) else float("inf")
    return Difference(index, token, best, gap, tolerance(row, manifest))
