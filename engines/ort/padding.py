"""Rows of padding, which make a quantised target one model in steps of every length."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engines.base import Engine
from engines.bundle.manifest import Manifest

_NEVER_LONE = 16  # rows: no tile of attention is shorter than these, so that an odd number of them leaves none alone


@dataclass(frozen=True, slots=True)
class Padding:
    """Tells how many rows are computed so that no kernel computes one row alone.

    A quantised target's products round their inputs to 8 bits, which makes another order of additions, 1e-7 of a sum, a
    difference of several per cent of the logits. A lone row has kernels of its own, which add in another order:
    attention always, products in 4 bits, and on some processors products in 8 bits.

    Attributes:
        part: What gets a row of padding where one row would be computed alone: attention where its products are exact
            to the bit in any number of rows; otherwise the whole step, which costs far more.
        in_pairs: Whether products take rows two at a time, so that the last of an odd number is alone.
    """

    part: Literal["nothing", "attention", "step"]
    in_pairs: bool = False

    @classmethod
    def of_steps(cls, manifest: Manifest) -> "Padding":
        """Returns the padding of whole steps for a bundle on the CPU: nothing but for quantised targets."""
        is_needed = manifest.role == "target" and manifest.quantization != "none"
        return cls("step", manifest.quantization == "int8") if is_needed else cls("nothing")

    def step_rows(self, rows: int) -> int:
        """Returns how many rows a step of `rows` computes."""
        return rows + (self.part == "step" and self._is_lone(rows))

    def attention_rows(self, rows: int) -> int:
        """Returns how many rows attention alone computes in addition to those of the step."""
        return int(self.part == "attention" and self._is_lone(rows))

    def _is_lone(self, rows: int) -> bool:
        return rows == 1 or (rows % 2 == 1 and (self.in_pairs or rows > _NEVER_LONE))


NO_PADDING = Padding("nothing")


def is_row_exact(engine: Engine) -> bool:
    """Returns whether an engine gives a token the same logits, bit for bit, in one row, in three and in four.

    On some processors rows are computed in pairs, and the last of three by another kernel. The cache is emptied.
    """
    if engine.capacity < 4:
        return False
    ids = np.arange(4) % engine.manifest.vocab_size
    rows = []
    for count in (1, 3, 4):
        engine.rewind(0)
        rows.append(engine.feed(ids[:count], keep=count).logits.copy())
    engine.rewind(0)
    return all(np.array_equal(few, rows[-1][: len(few)]) for few in rows)
