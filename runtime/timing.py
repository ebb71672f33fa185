"""One generation, with the time that each call of an engine took."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine, StepOutput
from runtime.loop import Round, decode_rounds


class Feed(NamedTuple):
    """One call of `Engine.feed` or `Engine.draft`: tokens fed, positions predicted after, seconds.

    A draft of γ tokens counts as the γ steps of one token that it stands for.
    """

    tokens: int
    keep: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """One generation. target, drafter: the feeds of each engine. seconds: of the whole, by the clock."""

    rounds: tuple[Round, ...]
    target: tuple[Feed, ...]
    drafter: tuple[Feed, ...]
    seconds: float

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for entry in self.rounds for token in entry.tokens)

    @property
    def engine_seconds(self) -> float:
        return sum(feed.seconds for feed in self.target + self.drafter)


class TimedEngine(Engine):
    """Passes everything on to `engine`, which stays the caller's to close, and notes each feed in `feeds`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.manifest, engine.vocab_map)
        self.capacity, self.length = engine.capacity, engine.length
        self.cache = engine.cache
        self.max_keep, self.unrolled = engine.max_keep, engine.unrolled
        self.engine = engine
        self.feeds: list[Feed] = []

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        start = perf_counter()
        output = self.engine.feed(token_ids, keep)
        self.feeds.append(Feed(len(token_ids), keep, perf_counter() - start))
        self.length = self.engine.length
        return output

    def draft(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:
        start = perf_counter()
        drafted = self.engine.draft(token_ids)
        if drafted is not None:
            steps = len(drafted)
            self.feeds += [Feed(1, 1, (perf_counter() - start) / steps)] * steps
            self.length = self.engine.length
        return drafted

    def rewind(self, length: int) -> None:
        self.engine.rewind(length)
        self.length = length

    def adopt(self, length: int) -> None:
        self.engine.adopt(length)
        self.length = length

    def close(self) -> None:
        """Nothing: the engine is not this one's."""


def timed_run(
    target: Engine, drafter: Engine | None, prompt: Sequence[int], max_new_tokens: int, draft_length: int
) -> Run:
    """Generate greedily, as `decode_rounds` does."""
    timed_target = TimedEngine(target)
    timed_drafter = None if drafter is None else TimedEngine(drafter)
    start = perf_counter()
    rounds = tuple(
        decode_rounds(timed_target, timed_drafter, prompt, max_new_tokens=max_new_tokens, draft_length=draft_length)
    )
    seconds = perf_counter() - start
    return Run(rounds, tuple(timed_target.feeds), tuple(timed_drafter.feeds) if timed_drafter else (), seconds)
