"""Generations, with the time that each call of an engine took; several ways of decoding, interleaved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.outputs import Speculation, StepOutput
from engines.sampling_params import Sampling, SamplingParams
from runtime.draft_length import DraftLength, FixedLength
from runtime.loop import GREEDY, decode_rounds
from runtime.round import Round

_WARM_UP_TOKENS = 16
_WARM_UP_ROUNDS = 6  # by the fifth of a shape, an engine may have made a CUDA graph of it


class Feed(NamedTuple):
    """One call of an `Engine`. A call that drafts γ tokens at once is recorded as γ steps of one token.

    Attributes:
        tokens: Tokens fed.
        keep: Positions predicted after.
        seconds: The time it took.
    """

    tokens: int
    keep: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TimedGeneration:
    """One generation.

    Attributes:
        rounds: Its rounds.
        target: The target's calls.
        drafter: The drafter's calls; empty where there is none.
        seconds: Wall-clock time of the whole.
    """

    rounds: tuple[Round, ...]
    target: tuple[Feed, ...]
    drafter: tuple[Feed, ...]
    seconds: float

    @property
    def tokens(self) -> tuple[int, ...]:
        """The new token ids."""
        return tuple(token for entry in self.rounds for token in entry.tokens)

    @property
    def engine_seconds(self) -> float:
        """The time of all calls of both engines."""
        return sum(feed.seconds for feed in self.target + self.drafter)

    @property
    def decode_seconds(self) -> float:
        """Without the target's prefill, and the drafter's."""
        return sum(entry.seconds - entry.prefill_seconds for entry in self.rounds if not entry.is_prefill)

    @property
    def decoded(self) -> int:
        """Tokens that the rounds after the prefill gave."""
        return sum(len(entry.tokens) for entry in self.rounds if not entry.is_prefill)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of decoding some prompts.

    Attributes:
        drafter: The drafter; None for the target alone.
        draft_length: γ, or what decides it; an adaptive one keeps what it learns from one generation to the next.
        prompts: Token ids of each prompt.
        max_new_tokens: The most tokens to generate for a prompt.
        force_accepted: See `decode_rounds`.
        sampling: Greedy, with rules on logits.
    """

    drafter: Engine | None
    draft_length: int | DraftLength
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    force_accepted: int | None = None
    sampling: SamplingParams = GREEDY

    @property
    def length(self) -> DraftLength:
        """The object that decides how long drafts are."""
        return FixedLength(self.draft_length) if isinstance(self.draft_length, int) else self.draft_length


class TimedEngine:
    """An engine whose calls are timed. All other members, to read and to set, are those of `engine`.

    It stands in for an `Engine` without being one: a member that `Engine` defines would hide the one of `engine`.

    Attributes:
        engine: The engine, which computes and stays the caller's to close.
        feeds: The calls so far.
    """

    engine: Engine
    feeds: list[Feed]

    def __init__(self, engine: Engine) -> None:
        self.__dict__.update(engine=engine, feeds=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.engine, name, value)

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        return self._timed(lambda: self.engine.feed(token_ids, keep), len(token_ids), keep)

    def feed_features(
        self, token_ids: Sequence[int] | NDArray[np.int64], features: NDArray[np.float32], keep: int = 1
    ) -> StepOutput:
        return self._timed(lambda: self.engine.feed_features(token_ids, features, keep), len(token_ids), keep)

    def draft(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:
        start = perf_counter()
        drafted = self.engine.draft(token_ids)
        if drafted is not None:
            steps = len(drafted)
            self.feeds.extend([Feed(1, 1, (perf_counter() - start) / steps)] * steps)
        return drafted

    def speculate(
        self,
        drafter: "TimedEngine",
        token_ids: Sequence[int] | NDArray[np.int64],
        draft_length: int,
        sampling: Sampling | None = None,
    ) -> Speculation | None:
        speculation = self.engine.speculate(drafter.engine, token_ids, draft_length, sampling)
        if speculation is not None:
            self.feeds.append(Feed(draft_length + 1, draft_length + 1, speculation.verify_seconds))
            drafter.feeds.extend([Feed(1, 1, speculation.draft_seconds / draft_length)] * draft_length)
        return speculation

    def _timed(self, feed: Callable[[], StepOutput], tokens: int, keep: int) -> StepOutput:
        start = perf_counter()
        output = feed()
        self.feeds.append(Feed(tokens, keep, perf_counter() - start))
        return output


def timed_run(
    target: Engine,
    drafter: Engine | None,
    prompt: Sequence[int],
    max_new_tokens: int,
    draft_length: int | DraftLength,
    force_accepted: int | None = None,
    sampling: SamplingParams = GREEDY,
) -> TimedGeneration:
    """Generate as `decode_rounds` does, whose arguments and errors these are, and time each call of an engine."""
    timed_target = TimedEngine(target)
    timed_drafter = None if drafter is None else TimedEngine(drafter)
    start = perf_counter()
    rounds = tuple(
        decode_rounds(
            cast(Engine, timed_target),
            cast("Engine | None", timed_drafter),
            prompt,
            max_new_tokens=max_new_tokens,
            draft_length=draft_length,
            force_accepted=force_accepted,
            sampling=sampling,
        )
    )
    seconds = perf_counter() - start
    return TimedGeneration(
        rounds, tuple(timed_target.feeds), tuple(timed_drafter.feeds) if timed_drafter else (), seconds
    )


def measure(
    target: Engine, ways: Mapping[str, Way], repeats: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[list[TimedGeneration]]]:
    """Time several ways of decoding the same prompts, after a warm-up.

    The ways take turns on each prompt, and in which comes first: a machine that slows down slows all of them.

    Args:
        target: The target.
        ways: The ways by name; all have the same number of prompts.
        repeats: The number of times that each prompt is decoded in each way.
        progress: Called with the number of generations done and of all, without the warm-up.

    Returns:
        By way, prompt and repeat: the runs.
    """
    for way in ways.values():
        tokens = max(_WARM_UP_TOKENS, _WARM_UP_ROUNDS * (way.length.longest + 1))
        _run(target, replace(way, max_new_tokens=min(way.max_new_tokens, tokens)), 0)
    prompts = len(next(iter(ways.values())).prompts)
    runs: dict[str, list[list[TimedGeneration]]] = {name: [[] for _ in range(prompts)] for name in ways}
    names, done = list(ways), 0
    for repeat in range(repeats):
        for index in range(prompts):
            first = (repeat + index) % len(names)
            for name in names[first:] + names[:first]:
                runs[name][index].append(_run(target, ways[name], index))
                done += 1
                if progress:
                    progress(done, len(names) * prompts * repeats)
    return runs


def _run(target: Engine, way: Way, prompt: int) -> TimedGeneration:
    tokens = way.prompts[prompt]
    limits = way.max_new_tokens, way.draft_length, way.force_accepted
    return timed_run(target, way.drafter, tokens, *limits, way.sampling)
