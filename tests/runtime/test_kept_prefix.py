"""The prefix that is kept for the next text, on engines that notice every token that they should not hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.sampling_params import SamplingParams
from runtime import SpeculativeDecoder
from tests.runtime.test_loop import plain_greedy

TURN = st.tuples(st.integers(0, 40), st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(1, 12))


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(TURN, min_size=2, max_size=5),
    kept=st.none() | st.sets(st.integers(0, 47), min_size=8),
    draft_length=st.integers(1, 5),
    drafter_context=st.sampled_from([128, 20]),
    rows=st.sampled_from([46, 48]),
)
def test_a_text_that_begins_as_the_one_before_is_read_from_where_it_differs(
    make_target, make_drafter, turns, kept, draft_length, drafter_context, rows
):
    """Each prompt is a beginning of the text so far, of any length, and a few more tokens."""
    target = make_target(eos_bias=0.0)
    drafter = make_drafter(kept, 0.5, drafter_context, rows=48 if kept else rows)
    decoder, text = SpeculativeDecoder(target, drafter, draft_length=draft_length), []
    for shared, more, new in turns:
        prompt = [*text[:shared], *more]
        held = text[: target.length]
        common = next((i for i, (a, b) in enumerate(zip(held, prompt, strict=False)) if a != b), len(held))
        target.fed.clear()
        result = decoder.generate(prompt, max_new_tokens=new)
        assert list(result.token_ids) == plain_greedy(target, prompt, new)
        assert result.stats.cached == min(common, len(prompt) - 1)
        assert target.fed[0] == len(prompt) - result.stats.cached
        text = [*prompt, *result.token_ids]


def foreign_feed(decoder, text):
    decoder.target.feed([9, 9])


def foreign_text_of_the_same_length(decoder, text):
    decoder.target.rewind(2)
    decoder.target.feed([9] * (len(text) - 3))


def another_decoder(decoder, text):
    other = SpeculativeDecoder(decoder.target, draft_length=4)
    other.generate([9] * (len(text) - 6), max_new_tokens=6)


def a_round_that_breaks_off(decoder, text):
    decoder.target.fails_at = len(decoder.target.fed) + 3
    with pytest.raises(RuntimeError, match="the device is gone"):
        decoder.generate([*text[:10], 9, 9], max_new_tokens=20)


@pytest.mark.parametrize(
    "between", [foreign_feed, foreign_text_of_the_same_length, another_decoder, a_round_that_breaks_off]
)
def test_a_cache_that_something_else_wrote_to_is_not_taken_for_the_text(make_target, make_drafter, between):
    decoder = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)
    text = [3, 4, 5, *decoder.generate([3, 4, 5], max_new_tokens=20).token_ids]
    between(decoder, text)
    for role in (decoder.target, decoder.drafter):
        role.fails_at = None
    result = decoder.generate([*text, 7], max_new_tokens=12)
    assert list(result.token_ids) == plain_greedy(decoder.target, [*text, 7], 12)
    fresh = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4).generate([*text, 7], max_new_tokens=12)
    assert (result.stats.drafted, result.stats.accepted) == (fresh.stats.drafted, fresh.stats.accepted)


def test_a_cancelled_stream_leaves_what_it_has_read(make_target, make_drafter):
    decoder = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)
    with decoder.stream([3, 4, 5], max_new_tokens=30) as stream:
        text = [3, 4, 5, *(next(stream).id for _ in range(7))]
    assert decoder.kept_prefix([*text, 7]) >= 9  # but for the last token, which may not have been fed
    result = decoder.generate([*text, 7], max_new_tokens=9)
    assert list(result.token_ids) == plain_greedy(decoder.target, [*text, 7], 9)
    assert result.stats.cached >= 9


def test_a_seed_starts_over_so_that_logits_round_the_same_each_time(make_target):
    decoder = SpeculativeDecoder(make_target())
    for seed, cached in ((3, 0), (3, 0), (None, 2)):
        sampling = SamplingParams(1.0, seed=seed)
        assert decoder.generate([5, 6, 7], max_new_tokens=4, sampling=sampling).stats.cached == cached
    decoder.generate([5, 6, 7], max_new_tokens=4)
    assert decoder.generate([5, 6, 7], max_new_tokens=4, sampling=SamplingParams(seed=3)).stats.cached == 2  # greedy
