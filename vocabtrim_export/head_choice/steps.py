"""Times of a pair's steps on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np

from engines.base import Engine
from runtime.measure.sweep import at_context

# The numbers of tokens that a verification is timed for: those of every draft that is tried. A target may compute rows
# in pairs, so the time of an odd number says little of an even one.
_ROWS = (1, 2, 3, 4, 5, 7, 9, 13, 17)
_REPEATS, _WARM_UP = 15, 2
_CONTEXT = 16  # tokens in the caches


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Median times of a pair's steps, in seconds, and the bytes that a draft step reads.

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
        """Returns the seconds of a draft step with fewer rows and with slots, by the bytes that it reads."""
        read = self.step_bytes - rows_less * self.row_bytes + slots * self.slot_bytes
        return self.draft_step * read / self.step_bytes

    def verification(self, tokens: int) -> float:
        """Returns the seconds of a target's call on `tokens` tokens, interpolated between the measured numbers."""
        rows = sorted(self.verify)
        return float(np.interp(tokens, rows, [self.verify[n] for n in rows]))


def measure_steps(target: Engine, drafter: Engine, hidden: int, text: Sequence[int]) -> StepTimes:
    """Time a pair's engines on a text: what a verification reads of a mixture of experts depends on its tokens.

    Args:
        target: The target's engine.
        drafter: The engine of the drafter with its full head.
        hidden: The width of the drafter's head.
        text: Token ids, repeated where they are few.
    """
    capacity = min(target.capacity, drafter.capacity)
    context = min(_CONTEXT, capacity // 2)
    rows = [n for n in _ROWS if n <= target.max_keep and context + n <= capacity]
    ids = at_context(text, context + max(rows))
    calls = [(drafter, 1), *((target, n) for n in rows)]
    for engine in (drafter, target):
        engine.rewind(0)
        engine.feed(ids[:context])
    # All calls in turn: a machine that slows down in between slows all of them.
    rounds = [[_seconds(engine, ids[context : context + n]) for engine, n in calls] for _ in range(_WARM_UP + _REPEATS)]
    step, *verify = (median(times) for times in zip(*rounds[_WARM_UP:], strict=True))
    manifest = drafter.manifest
    itemsize = 2 if manifest.dtype == "fp16" else 4
    return StepTimes(
        dict(zip(rows, verify, strict=True)),
        step,
        manifest.weight_bytes_per_step + manifest.kv_bytes_per_token * context,
        manifest.head_bytes / manifest.head_rows,
        float(hidden * itemsize),
    )


def _seconds(engine: Engine, token_ids: Sequence[int]) -> float:
    """Time one call on tokens after the context that is in the cache."""
    context = engine.length
    start = perf_counter()
    engine.feed(token_ids, keep=len(token_ids))
    seconds = perf_counter() - start
    engine.rewind(context)
    return seconds
