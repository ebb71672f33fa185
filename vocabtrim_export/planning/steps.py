"""What the steps of a pair take on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np

from engines.base import Engine

_ROWS = (1, 2, 3, 5, 9, 17)  # that a verification is timed with
_CONTEXT, _REPEATS, _WARM_UP = 64, 9, 3


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians of a pair's steps, in seconds, and what a draft step reads.

    Attributes:
        verify: Seconds of a target's call by its number of tokens.
        draft_step: Seconds of a step of the drafter with its full head.
        step_bytes: Bytes that this step reads.
        row_bytes: Bytes of one row of its head.
        slot_bytes: Bytes of one in-context slot.
    """

    verify: dict[int, float]
    draft_step: float
    step_bytes: float
    row_bytes: float
    slot_bytes: float

    def draft(self, rows_less: int, slots: int) -> float:
        """Seconds of a draft step whose head has so many rows less and so many slots, by the bytes that it reads."""
        read = self.step_bytes - rows_less * self.row_bytes + slots * self.slot_bytes
        return self.draft_step * read / self.step_bytes

    def verification(self, tokens: int) -> float:
        """Seconds of a target's call on so many tokens; between measured numbers on a line."""
        rows = sorted(self.verify)
        return float(np.interp(tokens, rows, [self.verify[n] for n in rows]))


def measure_steps(target: Engine, drafter: Engine, hidden: int) -> StepTimes:
    """Time a pair's engines.

    Args:
        target: The target's engine.
        drafter: The engine of the drafter with its full head.
        hidden: The width of the drafter's head.
    """
    rows = [n for n in _ROWS if n <= target.max_keep and _CONTEXT + n < target.capacity]
    verify = {n: _seconds(target, n) for n in rows}
    manifest = drafter.manifest
    itemsize = 2 if manifest.dtype == "fp16" else 4
    return StepTimes(
        verify,
        _seconds(drafter, 1),
        manifest.weight_bytes_per_step + manifest.kv_bytes_per_token * _CONTEXT,
        manifest.head_bytes / manifest.head_rows,
        float(hidden * itemsize),
    )


def _seconds(engine: Engine, tokens: int) -> float:
    """The median of calls on so many tokens behind a short context."""
    context = min(_CONTEXT, engine.capacity - tokens - 1)
    engine.rewind(0)
    engine.feed([1] * context)
    times = [_timed(lambda: engine.feed([1] * tokens, keep=tokens), engine, context) for _ in range(_REPEATS)]
    return median(times[_WARM_UP:])


def _timed(call: Callable[[], object], engine: Engine, context: int) -> float:
    start = perf_counter()
    call()
    seconds = perf_counter() - start
    engine.rewind(context)
    return seconds
