"""`Drafting`: what each round proposes to the target, from the text itself or from the drafter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from engines.base import Engine
from engines.outputs import Accepted, Speculation, StepOutput
from runtime.constraint import Masks
from runtime.draft_length import DraftLength, RoundPlan
from runtime.profiling import DRAFTER, TARGET, Profiler
from runtime.prompt_lookup import NO_MATCH, PromptLookup
from runtime.readers import TokenReader, make_reader
from runtime.round import Round
from runtime.rules import Q, Rule


@dataclass(frozen=True, slots=True)
class Draft:
    """The tokens that one round proposes.

    Attributes:
        tokens: The drafted tokens that can be used; none where the target decodes alone.
        q: See `Rule.accept`; empty where the engines decide what is accepted.
        seconds: The time to propose them, without `prefill_seconds`.
        prefill_seconds: The time of the drafter's prefill, if this was its first draft.
        looked_up: See `Round`.
        is_paused: See `Round`.
        speculation: The verification, where the engines drafted and verified in one call.
    """

    tokens: list[int]
    q: Sequence[Q]
    seconds: float
    prefill_seconds: float = 0.0
    looked_up: int = 0
    is_paused: bool = False
    speculation: Speculation | None = None


class Drafting:
    """Proposes tokens for one generation, by prompt lookup or by the drafter.

    Between rounds the drafter has read at most as much of the text as the target. What it lacks it is fed when it next
    drafts, unless it shares the target's cache.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Engine | None,
        prompt: Sequence[int],
        length: DraftLength,
        rule: Rule,
        stop: frozenset[int],
        masks: Masks | None,
        profiler: Profiler,
    ) -> None:
        """Make the state of a generation that has not begun.

        Args:
            target: The engine that verifies. It is asked only to draft and verify in one call.
            drafter: The engine that drafts; None: only prompt lookup drafts, where `length` has it.
            prompt: Token ids.
            length: Decides the number of tokens that a round drafts.
            rule: The rule that chooses the drafter's tokens.
            stop: The tokens that end the text: nothing after one is drafted.
            masks: The tokens that a constraint allows; None without one.
            profiler: Records the phases.
        """
        self.drafter = drafter
        self._target, self._length, self._rule = target, length, rule
        self._stop, self._masks, self._profiler = stop, masks, profiler
        self._vocab_size = target.manifest.vocab_size
        lookups = length.lookups
        self._lookup = None if lookups is None else PromptLookup(prompt, length.longest, lookups)
        self._reader = make_reader(drafter, self._vocab_size) if drafter else None
        # A drafter of the target's own weights reads the target's keys and values: nothing to prefill or to catch up
        # on, and better ones than its own. What it writes ahead, the verification overwrites.
        self._one_cache = drafter is not None and drafter.cache is target.cache
        self._has_drafted = self._one_cache  # otherwise the first draft reads what the drafter lacks of the prompt

    def begin(self) -> None:
        """Note that both engines have been made ready for the prompt."""
        if self._reader:
            self._reader.begin()

    def propose(self, text: Sequence[int], most: int) -> Draft:
        """Draft for the next round.

        Args:
            text: The prompt and what was generated. The target has read all of it but the last token.
            most: The most drafted tokens that the target and the text have room for.
        """
        room = self.room(len(text), most)
        match = self._lookup.match() if self._lookup and room > 0 else NO_MATCH
        plan = self._length.begin(match.chances) if room > 0 else RoundPlan(0, 0)
        steps, is_paused = min(plan.drafted, room), not plan.pays
        if self._reader and steps > 0:
            if self._one_cache:
                self._reader.drafter.adopt(self._target.length)
            if draft := self._speculate(self._reader, text, steps, is_paused):
                return draft
        start = perf_counter()
        tokens, q, prefill_seconds, looked_up = list[int](), list[Q](), 0.0, 0
        if self._reader and steps > 0:
            with self._profiler.span("draft", DRAFTER, length=len(text)):
                tokens, q, prefill_seconds = self._draft(self._reader, text, steps)
        elif plan.looked_up:
            tokens = self._look_up(match.tokens[: min(plan.looked_up, room)])
            q, looked_up = [None] * len(tokens), len(tokens)
        if self._reader:
            self._reader.hold()
        return Draft(tokens, q, perf_counter() - start - prefill_seconds, prefill_seconds, looked_up, is_paused)

    def learn(self, entry: Round) -> None:
        """Let the draft length learn from the round that the last `propose` began."""
        if self._reader or self._lookup:
            self._length.observe(entry)

    def observe(self, output: StepOutput, kept: int, tokens: Sequence[int]) -> None:
        """Note what the target's last call gave.

        Args:
            output: Its output.
            kept: The number of tokens fed to it that are part of the text.
            tokens: The tokens that the text gained.
        """
        if self._lookup:
            self._lookup.extend(tokens)
        if self._reader:
            self._reader.target_fed(output, kept)

    def rewind(self, length: int) -> None:
        """Forget drafted tokens that are not part of the text.

        Args:
            length: The number of tokens of the text that the target has read.
        """
        if self._reader:
            self._reader.rewind(length)

    def room(self, length: int, most: int) -> int:
        """Returns the most tokens to draft after a text of `length` tokens: no more than can be used, or cached."""
        most = min(most, self._length.longest)
        if self.drafter is None:
            return most if self._lookup else 0
        most = min(most, self.drafter.capacity - length + 1)  # the last drafted token is not fed
        return most if self.drafter.max_draft is None else min(most, self.drafter.max_draft)

    def _speculate(self, reader: TokenReader, text: Sequence[int], steps: int, is_paused: bool) -> Draft | None:
        """Draft and verify in one call for both engines.

        Returns:
            The draft with its verification; None where the engines cannot do this, or the drafter may lack the prompt.
        """
        if not self._has_drafted or not self._rule.runs_on_device or self._length.is_stepwise:
            return None
        unread = reader.unread(text)
        with self._profiler.span("speculate", TARGET, length=len(text)):
            speculation = self._target.speculate(reader.drafter, unread, steps, self._rule.sampling)
        if speculation is None:
            return None
        reader.was_fed(len(unread))
        tokens, accepted = self._usable(speculation.drafted.tolist()), speculation.accepted
        if accepted and accepted.count > len(tokens):  # the accepted draft goes on after an EOS
            speculation = replace(speculation, accepted=Accepted(len(tokens), accepted.next_token))
        return Draft(tokens, (), speculation.draft_seconds, is_paused=is_paused, speculation=speculation)

    def _draft(self, reader: TokenReader, text: Sequence[int], room: int) -> tuple[list[int], list[Q], float]:
        """Returns the drafted tokens, their q, and the seconds of the drafter's prefill if this was its first draft."""
        tokens, q = list[int](), list[Q]()
        drafter, start = reader.drafter, perf_counter()
        unread, is_first = reader.unread(text), not self._has_drafted
        self._has_drafted = True
        is_argmax = self._rule.runs_on_device and self._rule.sampling is None
        at_once = is_argmax and not is_first and drafter.unrolled == room and not self._length.is_stepwise
        if at_once and (drafted := drafter.draft(unread)) is not None:
            return self._usable(drafted.tolist()), q, 0.0
        with self._profiler.span("prefill" if is_first else "catch_up", DRAFTER, tokens=len(unread)):
            output = reader.read(unread)
        prefill_seconds = perf_counter() - start if is_first else 0.0
        while (proposal := self._rule.propose(tokens, output)) is not None:
            if proposal.token >= self._vocab_size:  # a head padded further than the target's
                break
            tokens.append(proposal.token)
            q.append(proposal.q)
            if len(tokens) == room or proposal.token in self._stop:  # nothing after an EOS can be used
                break
            if self._length.is_stepwise and not self._length.goes_on(proposal.confidence()):
                break
            output = drafter.feed(tokens[-1:])
        return tokens, q, prefill_seconds

    def _look_up(self, matched: Sequence[int]) -> list[int]:
        tokens = self._usable(list(matched))
        if self._masks:
            tokens = tokens[: self._masks.fitting(tokens)]
        return tokens

    def _usable(self, drafted: list[int]) -> list[int]:
        """Returns what drafting one by one would have given: the tokens up to an EOS or one that the target lacks."""
        for index, token in enumerate(drafted):
            if token >= self._vocab_size:
                return drafted[:index]
            if token in self._stop:
                return drafted[: index + 1]
        return drafted
