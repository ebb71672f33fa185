"""How a round proposes tokens and judges them: greedily, by sampling, or by a number given beforehand."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.base import Accepted, Engine, StepOutput
from engines.sampling_params import Sampling, SamplingParams
from runtime.accept import accept_forced, accept_greedy, accept_sampled
from runtime.sampling import distribution, sample


class Rule(Protocol):
    """How a draft is proposed and judged."""

    @property
    def sampling(self) -> Sampling | None:
        """What a device needs to do both by itself; None where it takes the most likely tokens."""

    def propose(self, output: StepOutput) -> int:
        """The drafter's next token."""

    def accept(self, draft: list[int], output: StepOutput) -> Accepted:
        """The target's verdict; with an empty `draft`, its next token."""


class Greedy:
    """Reads token ids only, so that an engine need not hand its logits over."""

    sampling: Sampling | None = None

    def propose(self, output: StepOutput) -> int:
        return int(output.token_ids[-1])

    def accept(self, draft: list[int], output: StepOutput) -> Accepted:
        return accept_greedy(draft, output.token_ids)


class Forced(Greedy):
    """Proposes as `Greedy` does and accepts the same number each time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def accept(self, draft: list[int], output: StepOutput) -> Accepted:
        return accept_forced(draft, output.token_ids, self.count)


class Sampled:
    """Keeps the distribution behind each proposed token until the draft is judged."""

    def __init__(self, params: SamplingParams, drafter: Engine | None, vocab_size: int) -> None:
        self.sampling = Sampling(params, np.random.default_rng(params.seed))
        self.vocab_map = drafter.vocab_map if drafter else None
        # Head rows of tokens that the target lacks (padding) can never be accepted: leave them out of q.
        kept = self.vocab_map.kept_token_ids if self.vocab_map else None
        self.rows = vocab_size if kept is None else int(kept.searchsorted(vocab_size))
        self.q: list[NDArray[np.float32]] = []

    def propose(self, output: StepOutput) -> int:
        q = self.warped(output.logits[-1, : self.rows])
        self.q.append(q)
        row = sample(q, self.sampling.rng)
        return int(self.vocab_map.kept_token_ids[row]) if self.vocab_map else row

    def accept(self, draft: list[int], output: StepOutput) -> Accepted:
        logits, q, self.q = output.logits, self.q, []
        return accept_sampled(draft, q, lambda i: self.warped(logits[i]), self.vocab_map, self.sampling.rng)

    def warped(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = distribution(logits[None], self.sampling.params)[0]
        return probabilities
