"""Prompt lookup: the index against a search of the whole text, and in the loop."""

import random
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.sampling_params import SamplingParams
from runtime import SpeculativeDecoder
from runtime.adaptive_length import AdaptiveLength
from runtime.lookup_length import LookupLength
from runtime.loop import GREEDY, decode_rounds
from runtime.prompt_lookup import LOOKUP_PRIORS, NO_MATCH, PromptLookup
from runtime.round_costs import GivenCosts
from runtime.shares import Shares
from runtime.stats import summarize


def searched(text):
    """Search for the last earlier place of the longest suffix, of up to six tokens, and return what followed it."""
    for size in (6, 4, 3, 2):
        for end in range(len(text) - 1, size - 1, -1):
            if size < len(text) and text[end - size : end] == text[-size:]:
                followed = list(text)
                for i in range(8):
                    followed.append(followed[end + i])
                return tuple(followed[len(text) :])
    return ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5))
def test_finds_what_a_search_of_the_whole_text_finds(text, step):
    lookup = PromptLookup(text[:1], 8, Shares(LOOKUP_PRIORS))
    assert lookup.match() == NO_MATCH
    for start in range(1, len(text), step):
        lookup.extend(text[start : start + step])
        assert lookup.match().tokens == searched(text[: start + step])


def test_longer_matches_are_surer_and_experience_counts():
    shares = Shares(LOOKUP_PRIORS)
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 4, shares)
    before = lookup.match()
    assert before.tokens == (3, 4, 5, 6)
    assert list(before.chances) == sorted(before.chances)
    lookup.extend([7])  # the match was wrong
    assert PromptLookup([1, 2, 3, 1, 2], 1, shares).match().chances < before.chances[:1]


def decoded(target, drafter, prompt, length, sampling=GREEDY, tokens=60):
    rounds = list(decode_rounds(target, drafter, prompt, max_new_tokens=tokens, draft_length=length, sampling=sampling))
    return [token for entry in rounds for token in entry.tokens], summarize(rounds)


def repeating(engine):
    """`engine`, which goes on with the token that stood seven places before."""
    plain = engine.logits

    def logits(prefix):
        row = plain(prefix)
        row[prefix[-7] if len(prefix) > 6 else 0] += 40
        return row

    engine.logits = logits
    return engine


GIVEN = GivenCosts(step=0.3, row=0.02)
PROMPT = [3, 4, 5, 6, 7, 8, 9, 3, 4, 5]


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(repetition_penalty=1.01), SamplingParams(no_repeat_ngram_size=3)],
    ids=["greedy", "penalty", "no n-gram again"],
)
def test_greedy_output_is_the_targets(make_target, make_drafter, sampling):
    alone, _ = decoded(repeating(make_target()), None, PROMPT, 1, sampling)
    for drafter in (make_drafter(noise=3.0), make_drafter(range(0, 48, 2)), None):
        length = AdaptiveLength(8, costs=GIVEN) if drafter else LookupLength(8, costs=GIVEN)
        for _ in range(2):
            tokens, stats = decoded(repeating(make_target()), drafter, PROMPT, length, sampling)
            assert tokens == alone
        assert stats.looked_up_accepted <= stats.looked_up
        if not sampling.no_repeat_ngram_size:
            assert stats.looked_up_accepted > 40  # of 60: nearly all of the text repeats


def test_an_eos_that_was_looked_up_ends_the_text(make_target, make_drafter):
    prompt = [1 if token == 9 else token for token in PROMPT]  # 1 is the EOS
    tokens, stats = decoded(repeating(make_target(eos_bias=0)), make_drafter(), prompt, AdaptiveLength(8, costs=GIVEN))
    assert tokens == [6, 7, 8, 1]
    assert stats.looked_up == stats.looked_up_accepted > 0  # nothing behind the EOS was verified


def test_useless_matches_are_not_drafted_for_long(make_target, make_drafter):
    """The target's text is random: what matches says nothing of what follows."""
    rng, length = random.Random(0), AdaptiveLength(8, costs=GivenCosts(step=0.3, row=0.1))
    prompt = [rng.randrange(2, 5) for _ in range(40)]  # every pair of tokens stands there
    decoded(make_target(), make_drafter(noise=9.0), prompt, length)
    _, stats = decoded(make_target(), make_drafter(noise=9.0), prompt, length)
    assert stats.looked_up < 6


class RecordedCosts(GivenCosts):
    """Records the tokens that the drafter is said to have drafted, and those verified, of each round."""

    rounds: ClassVar[list[tuple[int, int]]] = []

    def observe(self, drafted, verified, draft_seconds, verify_seconds, seconds):
        self.rounds.append((drafted, verified))
        return False


def test_looked_up_tokens_are_no_steps_of_the_drafter(make_target, make_drafter, monkeypatch):
    monkeypatch.setattr(RecordedCosts, "rounds", [])
    length = AdaptiveLength(8, costs=RecordedCosts(step=0.3, row=0.02))
    _, stats = decoded(repeating(make_target()), make_drafter(), PROMPT, length)
    stepped, verified = map(sum, zip(*RecordedCosts.rounds, strict=True))
    assert stats.looked_up > 0
    assert (stepped, verified) == (stats.drafted - stats.looked_up, stats.drafted)


def test_off_by_a_flag(make_target, make_drafter):
    decoder = SpeculativeDecoder(repeating(make_target()), make_drafter(), draft_length="auto", prompt_lookup=False)
    assert decoder.generate(PROMPT, max_new_tokens=40).stats.looked_up == 0


def test_without_a_drafter_auto_looks_up_and_none_does_not(make_target):
    looked_up = {}
    for draft_length in ("auto", None, 4):
        with SpeculativeDecoder(repeating(make_target()), draft_length=draft_length) as decoder:
            looked_up[draft_length] = decoder.generate(PROMPT, max_new_tokens=60).stats.looked_up
    assert looked_up["auto"] > 0
    assert looked_up[None] == looked_up[4] == 0
