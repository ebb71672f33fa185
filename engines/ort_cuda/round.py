"""`CudaRound`: γ draft steps and their verification as one piece of work for the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import INPUT_IDS, POSITION_IDS, SEQLENS_K
from engines.errors import VocabtrimError
from engines.ort_cuda.binding import BoundSession, Place, Work
from engines.ort_cuda.graphs.sampling import NO_TOKEN
from engines.ort_cuda.mirrored import MirroredBlock, allocate_mirrored
from engines.outputs import Accepted, Speculation, StepOutput
from engines.sampling_params import Sampling

if TYPE_CHECKING:
    from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
    from engines.ort_cuda.sampler import DeviceSampler


@dataclass(frozen=True, slots=True)
class Layout:
    """The offsets of a round's numbers, in values of 8 bytes, in one block on the host and one on the device.

    The host sends: seqlens_k of the γ draft steps and of the verification, in the low half of each value; position_ids,
    from the first position that the drafter reads to the last that the target reads; what sampling needs; the `unread`
    tokens. The device sends back, right behind: the γ drafted tokens; the γ + 1 verified ones; the number accepted and
    the next token.
    """

    positions: int
    chances: int
    tokens: int
    drafted: int
    verified: int
    verdict: int
    end: int


def make_layout(unread: int, draft_length: int, lag: int, chances: int) -> Layout:
    """Lay out a round.

    Args:
        unread: Tokens that the drafter has not read.
        draft_length: γ.
        lag: The drafter's `lag`.
        chances: The number of values of 8 bytes that sampling needs.
    """
    positions = draft_length + 1
    first = positions + lag + unread + draft_length
    tokens = first + chances
    drafted = tokens + unread
    verified = drafted + draft_length
    verdict = verified + draft_length + 1
    return Layout(positions, first, tokens, drafted, verified, verdict, verdict + 2 * bool(chances))


class CudaRound:
    """γ draft steps and their verification.

    Each draft step reads its token where the step before wrote it, and the verification reads all of them there. One
    copy sends what the host knows beforehand, and one brings all token ids back. An EAGLE head's steps also read and
    write hidden states: the first reads the target's features, each further one what the step before wrote. A sampler
    chooses the tokens instead of the engines, which take the most likely ones.
    """

    def __init__(
        self,
        target: "OnnxRuntimeCudaEngine",
        drafter: "OnnxRuntimeCudaEngine",
        unread: int,
        draft_length: int,
        sampler: "DeviceSampler | None" = None,
    ) -> None:
        self._unread, self._draft_length, self._lag, self._sampler = unread, draft_length, drafter.lag, sampler
        self._stream = target.gpu.stream
        at = self._at = make_layout(unread, draft_length, drafter.lag, sampler.chances if sampler else 0)
        block = self._block = allocate_mirrored(target.gpu, at.end)
        self._events = [self._stream.event() for _ in range(3)]
        self._draft: list[Work] = drafter.prepare(target, unread)
        for i in range(draft_length):
            first, count = (unread + i - 1, 1) if i else (0, unread)
            places = _places(block, at, i, first, first, count) | drafter.beside_tokens(i, unread)
            step = drafter.bind_model(places, block.place(at.drafted + i, np.int64, (1, 1)))
            self._draft.append(step)
            if sampler:
                self._draft += sampler.propose(i, step.logits, block.address(at.chances), block.address(at.drafted + i))
        places = _places(block, at, draft_length, unread - 1 + drafter.lag, unread - 1, draft_length + 1)
        self._verify = target.bind_model(places, block.place(at.verified, np.int64, (1, draft_length + 1)))
        self._judge: list[BoundSession] = []
        if sampler:
            addresses = [block.address(index) for index in (at.chances, at.drafted, at.verdict)]
            self._judge = sampler.judge(self._verify.logits, *addresses)
        self._work = target.replayed(self._enqueue, (drafter,))

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._work.has_graph

    def run(
        self, token_ids: Sequence[int] | NDArray[np.int64], length: int, sampling: Sampling | None = None
    ) -> Speculation:
        """Run the round and wait for it.

        Args:
            token_ids: int64[unread], what the drafter has not read.
            length: Tokens in the target's cache, which lacks only the last of `token_ids`.
            sampling: The settings to draw tokens with; needed with a sampler.
        """
        at, host = self._at, self._block.host
        first = length - self._unread + 1 - self._lag  # position of the first unread token, in the drafter's cache
        steps = self._draft_length + 1
        host[:steps] = np.arange(length, length + steps)
        host[: self._draft_length] -= self._lag
        host[steps : at.chances] = np.arange(first, length + steps)
        if self._sampler and sampling:
            self._sampler.write_chances(host[at.chances : at.tokens], sampling)
        host[at.tokens : at.drafted] = token_ids
        self._work.run()
        self._stream.synchronize()
        received = host[at.drafted :].copy()
        drafted, verified, verdict = np.split(received, [self._draft_length, 2 * self._draft_length + 1])
        draft_seconds, verify_seconds = (self._stream.seconds_between(*self._events[i : i + 2]) for i in range(2))
        output = StepOutput(verified, self._verify.read_logits)
        return Speculation(drafted, output, draft_seconds, verify_seconds, _accepted(verdict) if sampling else None)

    def close(self) -> None:
        """Free the graph and the events, once."""
        self._work.close()
        for event in self._events:
            self._stream.discard_event(event)
        self._events.clear()

    def _enqueue(self) -> None:
        stream = self._stream
        self._block.send(self._at.drafted)
        stream.record(self._events[0])
        for step in self._draft:
            step.enqueue()
        stream.record(self._events[1])
        for step in (self._verify, *self._judge):
            step.enqueue()
        stream.record(self._events[2])
        self._block.receive(self._at.drafted)


def _places(block: MirroredBlock, at: Layout, step: int, position: int, token: int, count: int) -> dict[str, Place]:
    """Returns the inputs of a step of a round.

    Args:
        block: The numbers of the round.
        at: Their places in the block.
        step: The number of the step; γ is the verification.
        position: The first of its positions, counted from the round's first one.
        token: The first of its tokens, counted from the first unread one.
        count: The tokens that it reads.
    """
    return {
        SEQLENS_K: block.place(step, np.int32, (1,)),
        POSITION_IDS: block.place(at.positions + position, np.int64, (1, count)),
        INPUT_IDS: block.place(at.tokens + token, np.int64, (1, count)),
    }


def _accepted(verdict: NDArray[np.int64]) -> Accepted:
    count, token = verdict.tolist()
    if token == NO_TOKEN:
        raise VocabtrimError("the model's logits are not finite: export it again with a wider --dtype")
    return Accepted(count, token)
