"""Rules to propose and accept tokens: greedy, sampled, or a number of accepted tokens that is set beforehand."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.errors import VocabtrimError
from engines.outputs import Accepted, StepOutput
from engines.sampling_params import Sampling, SamplingParams
from runtime.accept import accept_forced, accept_greedy, accept_sampled
from runtime.constraint import ConstrainedRules, Masks
from runtime.logit_rules import FORBIDDEN, Columns, LogitRules, make_logit_rules
from runtime.sampling import distribution, largest_probability, sample

# float32[rows], the distribution that a drafted token was drawn from; None for a token that was not drawn.
Q = NDArray[np.float32] | None


class Proposal(NamedTuple):
    """A token that the drafter proposes. It is valid until the drafter's next call.

    Attributes:
        token: The token's id.
        confidence: Returns the drafter's probability of its most likely token.
        q: The distribution that it was drawn from.
    """

    token: int
    confidence: Callable[[], float]
    q: Q = None


class Rule(Protocol):
    """A rule to propose a round's tokens and to accept them."""

    @property
    def runs_on_device(self) -> bool:
        """Whether engines may draft and judge by themselves, as `sampling` says."""

    @property
    def sampling(self) -> Sampling | None:
        """The parameters with which a device can do both by itself; None where it takes the most likely tokens."""

    def propose(self, draft: list[int], output: StepOutput) -> Proposal | None:
        """Returns the drafter's next token after the text and `draft`; None where no token may be chosen."""

    def accept(self, draft: list[int], q: Sequence[Q], output: StepOutput) -> Accepted:
        """Accept a draft, and append what stays to the text.

        Args:
            draft: The drafted tokens; an empty draft only asks for the target's next token.
            q: The distribution that each of them was drawn from.
            output: The target's output, with keep = len(draft) + 1.
        """


class Greedy:
    """Reads token ids only, so that an engine need not hand its logits over."""

    runs_on_device = True
    sampling: Sampling | None = None

    def propose(self, draft: list[int], output: StepOutput) -> Proposal | None:  # noqa: ARG002
        return Proposal(int(output.token_ids[-1]), lambda: largest_probability(output.logits[-1]))

    def accept(
        self,
        draft: list[int],
        q: Sequence[Q],  # noqa: ARG002
        output: StepOutput,
    ) -> Accepted:
        return accept_greedy(draft, output.token_ids)


class ForcedAcceptance(Greedy):
    """Proposes as `Greedy` does and accepts the same number each time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def accept(
        self,
        draft: list[int],
        q: Sequence[Q],  # noqa: ARG002
        output: StepOutput,
    ) -> Accepted:
        return accept_forced(draft, output.token_ids, self.count)


class RuledGreedy:
    """Takes the most likely token that `rules` leave, on both sides."""

    runs_on_device = False
    sampling: Sampling | None = None

    def __init__(self, rules: LogitRules | ConstrainedRules, drafter: Engine | None, vocab_size: int) -> None:
        self.rules, self.columns = rules, Columns(vocab_size)
        self.head = DrafterHead(drafter, vocab_size)

    def propose(self, draft: list[int], output: StepOutput) -> Proposal | None:
        head = self.head
        row = self.rules.apply(output.logits[-1, : head.columns.width], draft, head.columns)
        best = int(row.argmax())
        return None if row[best] == FORBIDDEN else Proposal(head.token(best), lambda: largest_probability(row))

    def accept(
        self,
        draft: list[int],
        q: Sequence[Q],  # noqa: ARG002
        output: StepOutput,
    ) -> Accepted:
        logits, chosen = output.logits, list[int]()
        for i in range(len(draft) + 1):
            row = require_choice(self.rules.apply(logits[i], draft[:i], self.columns))
            chosen.append(int(row.argmax()))
            if draft[i : i + 1] != chosen[-1:]:  # nothing behind it is needed
                break
        accepted = accept_greedy(draft, np.array(chosen))
        self.rules.extend([*draft[: accepted.count], accepted.next_token])
        return accepted


class Sampled:
    """Draws tokens, and accepts by the distributions that they were drawn from."""

    def __init__(
        self,
        params: SamplingParams,
        rules: LogitRules | ConstrainedRules | None,
        drafter: Engine | None,
        vocab_size: int,
    ) -> None:
        self.sampling = Sampling(params, np.random.default_rng(params.seed))
        self.rules, self.runs_on_device = rules, rules is None
        self.columns, self.head = Columns(vocab_size), DrafterHead(drafter, vocab_size)

    def propose(self, draft: list[int], output: StepOutput) -> Proposal | None:
        row = output.logits[-1, : self.head.columns.width]
        if self.rules:
            row = self.rules.apply(row, draft, self.head.columns)
            if row.max() == FORBIDDEN:
                return None
        q = self.warped(row)
        return Proposal(self.head.token(sample(q, self.sampling.rng)), lambda: float(q.max()), q)

    def accept(self, draft: list[int], q: Sequence[Q], output: StepOutput) -> Accepted:
        logits = output.logits

        def p(i: int) -> NDArray[np.float32]:
            if self.rules is None:
                return self.warped(logits[i])
            return self.warped(require_choice(self.rules.apply(logits[i], draft[:i], self.columns)))

        accepted = accept_sampled(draft, q, p, self.head.tokens, self.sampling.rng)
        if self.rules:
            self.rules.extend([*draft[: accepted.count], accepted.next_token])
        return accepted

    def warped(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the probabilities of the next token, float32[n].

        Args:
            logits: float32[n], after the rules on logits.

        Raises:
            VocabtrimError: Penalties made a logit infinite, or no token is left.
        """
        if self.rules and logits.max() == np.inf:
            raise VocabtrimError(
                "the penalties make a logit infinite: give presence_penalty and frequency_penalty nearer to 0, "
                "repetition_penalty nearer to 1"
            )
        probabilities: NDArray[np.float32] = distribution(logits[None], self.sampling.params)[0]
        return probabilities


class DrafterHead:
    """The tokens of the rows of a drafter's head.

    Rows of tokens that the target lacks (padding) can never be accepted: `columns` leaves them out. Slots are filled
    from the target's text alone.
    """

    def __init__(self, drafter: Engine | None, vocab_size: int) -> None:
        self.tokens = drafter.head_tokens if drafter else None
        kept = self.tokens.kept_token_ids if self.tokens else None
        width = min(vocab_size, drafter.manifest.head_rows) if drafter else vocab_size
        if kept is not None:
            width = int(np.append(np.flatnonzero(kept >= vocab_size), len(kept))[0])
        self.columns = Columns(width, self.tokens)

    def token(self, row: int) -> int:
        """Returns the token id of a row of the head."""
        return int(self.tokens.kept_token_ids[row]) if self.tokens else row


def make_rule(
    params: SamplingParams,
    target: Engine,
    drafter: Engine | None,
    prompt: Sequence[int],
    force_accepted: int | None = None,
    masks: Masks | None = None,
) -> Rule:
    """Returns the rule of one generation.

    Args:
        params: The settings that choose tokens. Where they give no rules on logits, those of the target's bundle apply.
        target: The target.
        drafter: The drafter; None: only the text itself drafts.
        prompt: Token ids of the prompt.
        force_accepted: The number of tokens to accept in every round, for measuring times alone: neither `params` nor
            `masks` apply then. None: the target decides.
        masks: The tokens that a constraint allows, which come before the rules on logits; None: all.

    Raises:
        VocabtrimError: `params` name token ids that the target lacks.
    """
    if force_accepted is not None:
        return ForcedAcceptance(force_accepted)
    vocab_size = target.manifest.vocab_size
    logit_rules = make_logit_rules(params, target.manifest, prompt)
    rules = ConstrainedRules(masks, logit_rules) if masks else logit_rules
    if not params.is_greedy:
        return Sampled(params, rules, drafter, vocab_size)
    return RuledGreedy(rules, drafter, vocab_size) if rules else Greedy()


def require_choice(row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns `row`, the logits of a position, if a token can be chosen.

    Raises:
        VocabtrimError: The rules forbid every token.
    """
    if row.max() == FORBIDDEN:
        raise VocabtrimError(
            "the rules forbid every token: relax suppress_tokens, no_repeat_ngram_size, min_new_tokens, bad_words_ids, "
            "or the JSON schema if there is one"
        )
    return row
