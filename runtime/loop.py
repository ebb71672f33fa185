"""The draft/verify loop: one `Round` per call of the target."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter

from engines.base import Engine
from engines.exclusive_use import Claim
from engines.outputs import Accepted, StepOutput
from engines.sampling_params import SamplingParams
from runtime.constraint import Constraint, Masks
from runtime.draft_length import DraftLength, FixedLength, RoundPlan
from runtime.drafting import TokenReader, make_reader
from runtime.kept_prefix import note_text, restart
from runtime.logprobs import TokenLogprob, token_logprobs
from runtime.profiling import DRAFTER, NO_PROFILER, TARGET, Profiler
from runtime.prompt_lookup import NO_MATCH, PromptLookup
from runtime.round import FinishReason, Round
from runtime.rules import make_rule

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
        sampling: How tokens are chosen.
        logprobs: Alternatives to give with each token's log-probability; None gives no log-probabilities.
        force_accepted: Accept this many drafted tokens in every round, or all if fewer were drafted, whatever the
            target says, and stop at no EOS. This measures latency only, and is for greedy decoding; the tokens mean
            nothing.
        keep_prefix: Do not read again what the engines' caches hold of the prompt from the generation before; otherwise
            both start empty.
        profiler: Records the phases of each round.
        constraint: Which tokens may come next, from the first new one on; it serves this generation alone. The target's
            distribution is then that of the allowed tokens, before the rules of `sampling`, and so are `logprobs`.

    Yields:
        One `Round` for each call of the target.

    Raises:
        VocabtrimError: Another thread's unfinished generation holds one of the engines.
        ValueError: `force_accepted` is negative, or goes with sampling or a constraint.
    """
    if force_accepted is not None and (not sampling.is_greedy or constraint or force_accepted < 0):
        raise ValueError("force_accepted is a number from 0 up, and goes with greedy decoding without a constraint")
    masks = Masks(constraint) if constraint else None
    loop = _Loop(
        target, drafter, prompt, max_new_tokens, draft_length, sampling, logprobs, force_accepted, profiler, masks
    )
    claim = Claim([engine.use for engine in (target, drafter) if engine])
    try:
        with claim, profiler.span("round", length=0):
            entry = loop.prefill(keep_prefix)
        yield entry  # never within a span: what the caller does meanwhile is not the round's
        while not loop.finish_reason:
            with claim, profiler.span("round", length=len(loop.sequence)):
                entry = loop.round()
            yield entry
    finally:
        claim.release()


@dataclass(frozen=True, slots=True)
class _Move:
    """A draft and its verification.

    Attributes:
        draft: The drafted tokens that can be used.
        verified: The target's output for the token before the draft and at least all of `draft`.
        prefill_seconds: See `Round`.
        draft_seconds: See `Round`.
        verify_seconds: See `Round`.
        accepted: The outcome, where the device has decided it already.
        looked_up: See `Round`.
        is_paused: See `Round`.
    """

    draft: list[int]
    verified: StepOutput
    prefill_seconds: float
    draft_seconds: float
    verify_seconds: float
    accepted: Accepted | None = None
    looked_up: int = 0
    is_paused: bool = False


class _Loop:
    """The state between rounds. `sequence` is the prompt and what was generated.

    Between rounds `target.length == len(sequence) - 1`: the last token is not in the cache yet, the next call feeds it.
    `drafter.length` is at most that: what it lacks `reader` feeds it when it next drafts, unless it shares the
    target's cache.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Engine | None,
        prompt: Sequence[int],
        max_new_tokens: int,
        draft_length: int | DraftLength,
        sampling: SamplingParams,
        logprobs: int | None,
        force_accepted: int | None,
        profiler: Profiler,
        masks: Masks | None,
    ) -> None:
        self.profiler, self.masks = profiler, masks
        self.target, self.drafter = target, drafter
        self.length = FixedLength(draft_length) if isinstance(draft_length, int) else draft_length
        self.vocab_size = target.manifest.vocab_size
        lookups = self.length.lookups
        self.lookup = None if lookups is None else PromptLookup(prompt, self.length.longest, lookups)
        # Forced runs have their full length: the EOS that they may meet is none that the target chose.
        self.stop = frozenset(target.manifest.eos_token_ids if force_accepted is None else ())
        self.greedy, self.logprobs = sampling.is_greedy, logprobs
        self.rule = make_rule(sampling, target, drafter, prompt, force_accepted, masks)
        self.reader = make_reader(drafter, self.vocab_size) if drafter else None
        # A drafter of the target's own weights reads the target's keys and values: nothing to prefill or to catch up
        # on, and better ones than its own. What it writes ahead, the verification overwrites.
        self.one_cache = drafter is not None and drafter.cache is target.cache
        self.has_drafted = self.one_cache  # otherwise the first draft reads what the drafter lacks of the prompt
        self.sequence = list(prompt)
        self.end = len(self.sequence) + max_new_tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.sequence[-1] in self.stop:
            return "stop"
        is_full = self.target.length >= self.target.capacity
        return "length" if is_full or len(self.sequence) >= self.end else None

    def prefill(self, keep_prefix: bool) -> Round:
        start = perf_counter()
        cached = restart(self.target, self.drafter, self.sequence, keep_prefix)
        unread = self.sequence[cached:]
        with self.profiler.span("prefill", TARGET, tokens=len(unread)):
            output = self.target.feed(unread)
        fed = perf_counter()
        if self.reader:
            self.reader.begin()
            self.reader.target_fed(output, len(unread))
        with self.profiler.span("accept", drafted=0):
            token = self.rule.accept([], output).next_token
        self.append([token])
        note_text(self.target, self.drafter, self.sequence)
        times = fed - start, 0.0, 0.0, perf_counter() - start
        logprobs = self.logprobs_of([token], output)
        return Round((token,), True, 0, 0, *times, self.finish_reason, logprobs, cached=cached)

    def round(self) -> Round:
        start = perf_counter()
        move = self.move()
        draft, output = move.draft, move.verified
        with self.profiler.span("accept", drafted=len(draft)):
            accepted = move.accepted or self.rule.accept(draft, output)
        if self.drafter or self.lookup:
            spent = perf_counter() - start - move.prefill_seconds
            self.length.observe(len(draft), accepted.count, move.draft_seconds, move.verify_seconds, spent)
        tokens = draft[: accepted.count]
        if not tokens or tokens[-1] not in self.stop:
            tokens.append(accepted.next_token)
        self.append(tokens)
        with self.profiler.span("rewind"):
            self.target.rewind(len(self.sequence) - 1)
            if self.reader:
                self.reader.target_fed(output, len(tokens))
                self.reader.rewind(len(self.sequence) - 1)
            note_text(self.target, self.drafter, self.sequence)
        return Round(
            tuple(tokens),
            False,
            len(draft),
            accepted.count,
            move.prefill_seconds,
            move.draft_seconds,
            move.verify_seconds,
            perf_counter() - start,
            self.finish_reason,
            self.logprobs_of(tokens, output),
            move.looked_up,
            move.is_paused,
        )

    def append(self, tokens: Sequence[int]) -> None:
        """Add `tokens` to the text."""
        self.sequence += tokens
        if self.lookup:
            self.lookup.extend(tokens)

    def logprobs_of(self, tokens: Sequence[int], output: StepOutput) -> tuple[TokenLogprob, ...]:
        """Returns nothing where none were asked for, so that an engine need not hand its logits over."""
        if self.logprobs is None:
            return ()
        logits = self.masks.of_last_tokens(output.logits) if self.masks else output.logits
        return token_logprobs(logits, tokens, self.logprobs)

    def move(self) -> _Move:
        """Draft and verify: in one call where the engines can, else one after the other."""
        room = self.room()
        match = self.lookup.match() if self.lookup and room > 0 else NO_MATCH
        plan = self.length.begin(match.chances) if room > 0 else RoundPlan(0, 0)
        steps = min(plan.drafted, room)
        if self.reader and steps > 0:
            if self.one_cache:
                self.reader.drafter.adopt(self.target.length)
            if move := self.speculate(self.reader, steps, is_paused=not plan.pays):
                return move
        start = perf_counter()
        draft = self.usable(list(match.tokens[: min(plan.looked_up, room)]))
        if self.masks:
            draft = draft[: self.masks.fitting(draft)]
        looked_up, prefill_seconds = len(draft), 0.0
        self.rule.look_up(looked_up)
        if self.reader and steps > 0:
            with self.profiler.span("draft", DRAFTER, length=len(self.sequence)):
                draft, prefill_seconds = self.draft(self.reader, steps)
        drafted = perf_counter()
        with self.profiler.span("verify", TARGET, tokens=len(draft) + 1):
            if self.reader:
                self.reader.hold()
            output = self.target.feed([self.sequence[-1], *draft], keep=len(draft) + 1)
        times = prefill_seconds, drafted - start - prefill_seconds, perf_counter() - drafted
        return _Move(draft, output, *times, None, looked_up, not plan.pays)

    def speculate(self, reader: TokenReader, room: int, is_paused: bool) -> _Move | None:
        """Draft and verify in one call for both engines.

        Args:
            reader: The drafter's reader.
            room: The number of tokens to draft.
            is_paused: See `Round`.

        Returns:
            The draft and its verification; None where the engines cannot do this, or the drafter may lack the prompt.
        """
        if not self.has_drafted or not self.rule.runs_on_device or self.length.is_stepwise:
            return None
        unread = reader.unread(self.sequence)
        with self.profiler.span("speculate", TARGET, length=len(self.sequence)):
            speculation = self.target.speculate(reader.drafter, unread, room, self.rule.sampling)
        if speculation is None:
            return None
        reader.was_fed(len(unread))
        draft, accepted = self.usable(speculation.drafted.tolist()), speculation.accepted
        if accepted is not None and accepted.count > len(draft):  # the accepted draft goes on after an EOS
            accepted = Accepted(len(draft), accepted.next_token)
        times = 0.0, speculation.draft_seconds, speculation.verify_seconds
        return _Move(draft, speculation.verified, *times, accepted, is_paused=is_paused)

    def draft(self, reader: TokenReader, room: int) -> tuple[list[int], float]:
        """Returns the drafted tokens, and the seconds of the drafter's prefill if this was its first draft."""
        draft: list[int] = []
        drafter, start = reader.drafter, perf_counter()
        unread, is_first = reader.unread(self.sequence), not self.has_drafted
        self.has_drafted = True
        at_once = self.greedy and self.rule.runs_on_device and not is_first and drafter.unrolled == room
        at_once = at_once and not self.length.is_stepwise
        if at_once and (drafted := drafter.draft(unread)) is not None:
            return self.usable(drafted.tolist()), 0.0
        with self.profiler.span("prefill" if is_first else "catch_up", DRAFTER, tokens=len(unread)):
            output = reader.read(unread)
        prefill_seconds = perf_counter() - start if is_first else 0.0
        while (token := self.rule.propose(draft, output)) is not None:
            if token >= self.vocab_size:  # a head padded further than the target's
                break
            draft.append(token)
            if len(draft) == room or token in self.stop:  # nothing after an EOS can be used
                break
            if self.length.is_stepwise and not self.length.goes_on(self.rule.confidence(output)):
                break
            output = drafter.feed(draft[-1:])
        return draft, prefill_seconds

    def usable(self, drafted: list[int]) -> list[int]:
        """Returns what drafting one by one would have given: the tokens up to an EOS or one that the target lacks."""
        for index, token in enumerate(drafted):
            if token >= self.vocab_size:
                return drafted[:index]
            if token in self.stop:
                return drafted[: index + 1]
        return drafted

    def room(self) -> int:
        """Returns the most tokens to draft: as many as can be used, since the target adds one, and the caches hold."""
        if not (self.drafter or self.lookup):
            return 0
        length = len(self.sequence)
        most = min(self.length.longest, self.end - length - 1, self.target.capacity - self.target.length - 1)
        if self.drafter is None:
            return most
        most = min(most, self.drafter.capacity - length + 1)  # the last drafted token is not fed
        return most if self.drafter.max_draft is None else min(most, self.drafter.max_draft)
