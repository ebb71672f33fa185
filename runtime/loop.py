"""The draft/verify loop: one `Round` per call of the target."""

from collections.abc import Callable, Generator, Sequence
from time import perf_counter

from engines.base import Engine
from engines.exclusive_use import Claim
from engines.outputs import Accepted, StepOutput
from engines.sampling_params import SamplingParams
from runtime.constraint import Constraint, Masks
from runtime.draft_length import DraftLength, FixedLength
from runtime.drafting import Draft, Drafting
from runtime.kept_prefix import note_text, restart
from runtime.logprobs import TokenLogprob, token_logprobs
from runtime.profiling import NO_PROFILER, TARGET, Profiler
from runtime.round import FinishReason, Round
from runtime.rules import Rule, make_rule

GREEDY = SamplingParams()


def decode_rounds(
    target: Engine,
    drafter: Engine | None,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    draft_length: int | DraftLength,
    sampling: SamplingParams = GREEDY,
    logprobs: int | None = None,
    force_accepted: int | None = None,
    keep_prefix: bool = False,
    profiler: Profiler = NO_PROFILER,
    constraint: Constraint | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Generator[Round, None, None]:
    """Generate after a prompt, one round at a time.

    The first round is the target's prefill and gives one token. Each later round drafts up to `draft_length` tokens,
    verifies them in one target call and gives 1 to `draft_length + 1` tokens; with nothing to draft it gives one.
    Generation ends after an EOS of the target's manifest, or when the target's cache is full. Drafting stops at the
    end of the drafter's cache. Both engines belong to this generator until it ends or is closed: a later generation of
    the same thread ends this one.

    Args:
        target: The engine whose output is generated.
        drafter: The engine that drafts; None: only the text itself drafts, where `draft_length` looks it up.
        prompt: Token ids: at least one, and no more than the target's cache holds.
        max_new_tokens: The most tokens to generate, at least one.
        draft_length: γ, or what decides it round by round.
        sampling: The settings that choose tokens.
        logprobs: Alternatives to give with each token's log-probability; None gives no log-probabilities.
        force_accepted: Accept this many drafted tokens in every round, or all if fewer were drafted, whatever the
            target says, and stop at no EOS. This measures latency only, and is for greedy decoding; the tokens mean
            nothing.
        keep_prefix: Do not read again what the engines' caches hold of the prompt from the generation before; otherwise
            both start empty.
        profiler: Records the phases of each round.
        constraint: The tokens that may come next, from the first new one on, for this generation alone. The target's
            distribution is then that of the allowed tokens, before the rules of `sampling`, and so are `logprobs`.
        is_cancelled: Asked between the parts of a long prompt whether to stop reading it.

    Yields:
        One `Round` for each call of the target.

    Raises:
        VocabtrimError: Another thread's unfinished generation holds one of the engines, or the prompt was cancelled.
        ValueError: `force_accepted` is negative, or goes with sampling or a constraint.
    """
    if force_accepted is not None and (not sampling.is_greedy or constraint or force_accepted < 0):
        raise ValueError("force_accepted is a number from 0 up, and goes with greedy decoding without a constraint")
    masks = Masks(constraint) if constraint else None
    length = FixedLength(draft_length) if isinstance(draft_length, int) else draft_length
    # Forced runs have their full length: the EOS that they may meet is none that the target chose.
    stop = frozenset(target.manifest.eos_token_ids if force_accepted is None else ())
    rule = make_rule(sampling, target, drafter, prompt, force_accepted, masks)
    drafting = Drafting(target, drafter, prompt, length, rule, stop, masks, profiler)
    loop = _Loop(target, drafting, rule, prompt, max_new_tokens, stop, masks, logprobs, profiler)
    claim = Claim([engine.use for engine in (target, drafter) if engine], is_cancelled)
    yield from _claimed_rounds(loop, claim, keep_prefix)


def _claimed_rounds(loop: "_Loop", claim: Claim, keep_prefix: bool) -> Generator[Round, None, None]:
    """Run the rounds of `loop`, each with the engines of `claim`, which is released when the last one has run."""
    try:
        with claim, loop.profiler.span("round", length=0):
            entry = loop.prefill(keep_prefix)
        yield entry  # never within a span: what the caller does meanwhile is not the round's
        while not loop.finish_reason:
            with claim, loop.profiler.span("round", length=len(loop.sequence)):
                entry = loop.round()
            yield entry
    finally:
        claim.release()


class _Loop:
    """The state between rounds. `sequence` is the prompt and what was generated.

    Between rounds `target.length == len(sequence) - 1`: the last token is not in the cache yet, the next call feeds it.
    """

    def __init__(
        self,
        target: Engine,
        drafting: Drafting,
        rule: Rule,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop: frozenset[int],
        masks: Masks | None,
        logprobs: int | None,
        profiler: Profiler,
    ) -> None:
        self.target, self.drafting, self.rule = target, drafting, rule
        self.stop, self.masks, self.logprobs, self.profiler = stop, masks, logprobs, profiler
        self.sequence = list(prompt)
        self.end = len(self.sequence) + max_new_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        """The reason why the text ends with its last token; None while it goes on."""
        if self.sequence[-1] in self.stop:
            return "stop"
        is_full = self.target.length >= self.target.capacity
        return "length" if is_full or len(self.sequence) >= self.end else None

    def prefill(self, keep_prefix: bool) -> Round:
        """Read the prompt. Returns the first round, with one token."""
        start = perf_counter()
        cached = restart(self.target, self.drafting.drafter, self.sequence, keep_prefix)
        self.drafting.begin()
        unread = self.sequence[cached:]
        with self.profiler.span("prefill", TARGET, tokens=len(unread)):
            output = self.target.feed(unread)
        fed = perf_counter()
        with self.profiler.span("accept", drafted=0):
            token = self.rule.accept([], [], output).next_token
        self.drafting.observe(output, len(unread), [token])
        self.sequence.append(token)
        note_text(self.target, self.drafting.drafter, self.sequence)
        times = fed - start, 0.0, 0.0, perf_counter() - start
        logprobs = self.logprobs_of([token], output)
        return Round((token,), True, 0, 0, *times, self.finish_reason, logprobs, cached=cached)

    def round(self) -> Round:
        """Draft, verify, and take back what was rejected. Returns the round."""
        start = perf_counter()
        draft = self.drafting.propose(self.sequence, self.room())
        output, accepted, verify_seconds = self.verify(draft)
        tokens = draft.tokens[: accepted.count]
        if not tokens or tokens[-1] not in self.stop:
            tokens.append(accepted.next_token)
        self.sequence += tokens
        with self.profiler.span("rewind"):
            self.target.rewind(len(self.sequence) - 1)
            self.drafting.observe(output, len(tokens), tokens)
            self.drafting.rewind(len(self.sequence) - 1)
            note_text(self.target, self.drafting.drafter, self.sequence)
        entry = Round(
            tuple(tokens),
            False,
            len(draft.tokens),
            accepted.count,
            draft.prefill_seconds,
            draft.seconds,
            verify_seconds,
            perf_counter() - start,
            self.finish_reason,
            self.logprobs_of(tokens, output),
            draft.looked_up,
            draft.is_paused,
        )
        self.drafting.learn(entry)
        return entry

    def room(self) -> int:
        """Returns the most drafted tokens that can be used, as the target adds one, and that its cache holds."""
        return min(self.end - len(self.sequence) - 1, self.target.capacity - self.target.length - 1)

    def verify(self, draft: Draft) -> tuple[StepOutput, Accepted, float]:
        """Returns what the target gives for the last token and the draft, what it accepts, and the call's seconds."""
        if speculation := draft.speculation:
            output, accepted, seconds = speculation.verified, speculation.accepted, speculation.verify_seconds
        else:
            start, accepted = perf_counter(), None
            with self.profiler.span("verify", TARGET, tokens=len(draft.tokens) + 1):
                output = self.target.feed([self.sequence[-1], *draft.tokens], keep=len(draft.tokens) + 1)
            seconds = perf_counter() - start
        with self.profiler.span("accept", drafted=len(draft.tokens)):
            return output, accepted or self.rule.accept(draft.tokens, draft.q, output), seconds

    def logprobs_of(self, tokens: Sequence[int], output: StepOutput) -> tuple[TokenLogprob, ...]:
        """Returns the log-probabilities of a round's tokens.

        There are none where none were asked for, so that an engine need not hand its logits over.
        """
        if self.logprobs is None:
            return ()
        logits = self.masks.of_last_tokens(output.logits) if self.masks else output.logits
        return token_logprobs(logits, tokens, self.logprobs)
