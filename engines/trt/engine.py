"""`StaticEngine`: a bundle whose graph has fixed shapes, driven by any `Executor` that runs them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.base import MOST_UNREAD, DeviceName, Engine
from engines.bundle.read import Bundle, Profile, TensorRT
from engines.outputs import StepOutput, join_outputs
from engines.slots import Slots


class Executor(Protocol):
    """Runs the fixed shapes of one bundle over a KV cache that it owns.

    `device`, `slots` and `environment` are as an `Engine`'s.
    """

    device: DeviceName
    slots: Slots | None

    def environment(self) -> dict[str, str]: ...

    def step(
        self,
        profile: Profile,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_positions: NDArray[np.int64],
    ) -> StepOutput:
        """Write `profile.tokens` tokens to the cache from slot `position_ids[0]` on, and predict after some of them.

        Everything that the tokens see must be within the first `profile.span` slots.

        Args:
            profile: The fixed shape to run.
            input_ids: int64[profile.tokens].
            position_ids: int64[profile.tokens].
            logits_positions: int64[profile.keep], indices into `input_ids`.
        """

    def draft(self, span: int, input_ids: NDArray[np.int64], position_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draft after MOST_UNREAD tokens.

        They are written from slot `position_ids[0]` on, and all drafted tokens but the last behind them. Everything
        that the tokens see must be within the first `span` slots.

        Returns:
            int64[γ].
        """

    def close(self) -> None:
        """Release everything. Calling it again does nothing."""


class Call(NamedTuple):
    """One call of an executor: the tokens of a feed from `start` to `stop`, of which the last `keep` predict."""

    profile: Profile
    start: int
    stop: int
    keep: int


def plan_calls(profiles: Sequence[Profile], fed: int, keep: int, room: int) -> list[Call]:
    """Cut a feed into calls of `profiles`.

    Each call takes the profile that gets furthest, and of these the smallest. It may be longer than what is left to
    feed, and is padded then.

    Args:
        profiles: Profiles of one span.
        fed: Tokens to feed, the last `keep` of which predict.
        keep: Positions to predict after.
        room: Free slots of the cache: at least `fed`, and the shortest profile's tokens less one.
    """
    calls: list[Call] = []
    start = 0
    while start < fed:
        options = []
        for profile in profiles:
            if start + profile.tokens <= room:
                stop = min(start + profile.tokens, fed, max(start, fed - keep) + profile.keep)
                options.append((stop, -profile.tokens, profile))
        stop, _, profile = max(options, key=lambda option: option[:2])
        calls.append(Call(profile, start, stop, max(0, stop - max(start, fed - keep))))
        start = stop
    return calls


class StaticEngine(Engine):
    """Runs feeds of any length as calls of a few fixed shapes.

    A step takes as long as the slots that it attends to, whether they hold tokens or not, so each takes the shortest
    span that it can.
    """

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        super().__init__(bundle.manifest, bundle.vocab_map, bundle.tokenizer_file)
        assert bundle.manifest.tensorrt is not None
        self._plans: TensorRT = bundle.manifest.tensorrt
        self._executor = executor
        self.device, self.slots = executor.device, executor.slots
        self.max_keep = max(profile.keep for profile in self._plans.profiles)
        self.unrolled = self._plans.draft_length
        self._padding = min(profile.tokens for profile in self._plans.profiles) - 1
        self._tokens = np.zeros(self.capacity, np.int64)  # what the cache holds

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        ids = np.asarray(token_ids, np.int64)
        self.check_feed(len(ids), keep)
        span = self._span(self.length + len(ids) + self._padding)
        profiles = [profile for profile in self._plans.profiles if profile.span == span]
        calls = plan_calls(profiles, len(ids), keep, self._plans.spans[-1] - self.length)
        outputs = []
        for call in calls:
            output = self._call(call, ids[call.start : call.stop])
            outputs.append(output if call.stop == len(ids) else output.copied())
        return join_outputs(outputs)

    def _call(self, call: Call, ids: NDArray[np.int64]) -> StepOutput:
        profile, count = call.profile, len(ids)
        padded = np.zeros(profile.tokens, np.int64)
        padded[:count] = ids
        # Padding stands on a position that there is a table for, and on a slot that it sees: with a sliding window it
        # would else see none, and the NaN that it left in the cache would reach every token, weighed by 0 or not.
        last = min(self.capacity, profile.span) - 1
        positions = np.minimum(np.arange(self.length, self.length + profile.tokens), last)
        rows = np.minimum(np.arange(profile.keep) + count - max(call.keep, 1), count - 1)
        output = self._executor.step(profile, padded, positions, rows)
        self._tokens[self.length : self.length + count] = ids
        self.length += count
        kept = call.keep
        return StepOutput(output.token_ids[:kept], lambda: output.logits[:kept])

    def draft(self, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64] | None:
        again = MOST_UNREAD - len(token_ids)  # tokens fed before, whose keys and values are computed again
        begin, steps = self.length - again, self.unrolled
        end = self.length + len(token_ids) + steps - 1
        if not steps or again < 0 or begin < 0 or end > self.capacity:
            return None
        self._tokens[self.length : begin + MOST_UNREAD] = token_ids
        positions = np.arange(begin, begin + MOST_UNREAD)
        drafted = self._executor.draft(
            self._span(begin + MOST_UNREAD), self._tokens[begin : begin + MOST_UNREAD], positions
        )
        self._tokens[begin + MOST_UNREAD : end] = drafted[:-1]
        self.length = end
        return drafted

    def environment(self) -> dict[str, str]:
        return self._executor.environment()

    def _release(self) -> None:
        self._executor.close()

    def _span(self, slots: int) -> int:
        return next(span for span in self._plans.spans if span >= slots)
