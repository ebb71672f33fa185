"""Snapshots on engines that notice every token that they should not hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from tests.runtime.test_loop import plain_greedy

STEP = st.tuples(
    st.integers(0, 30), st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(1, 9), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(STEP, min_size=2, max_size=6), rows=st.sampled_from([46, 48]), context=st.sampled_from([128, 20]))
def test_a_text_goes_on_from_any_snapshot_of_any_text(make_target, make_drafter, steps, rows, context):
    """Between generations the decoder takes over the first tokens of an earlier text, whatever it holds itself."""
    target = make_target(eos_bias=0.0)
    decoder = SpeculativeDecoder(target, make_drafter(None, 0.5, context, rows=rows), draft_length=3)
    snapshots = []
    for number, (length, more, new, takes_all) in enumerate(steps):
        prompt = more
        if snapshots:
            snapshot = snapshots[number * 7 % len(snapshots)]
            length = snapshot.target.length if takes_all else min(length, snapshot.target.length)
            decoder.restore(snapshot, length)
            drafter, read = decoder.drafter, min(length, snapshot.drafter.length)
            fed = np.minimum(snapshot.token_ids[:read], rows - 1)  # it is fed its last token for those that it lacks
            assert drafter.tokens[: drafter.length] == fed.tolist()
            prompt = [*snapshot.token_ids[:length].tolist(), *more]
        target.fed.clear()
        result = decoder.generate(prompt, max_new_tokens=new)
        assert list(result.token_ids) == plain_greedy(target, prompt, new)
        assert target.fed[0] == len(prompt) - result.stats.cached
        assert result.stats.cached >= min(length, len(prompt) - 1) * bool(snapshots)
        snapshots.append(decoder.snapshot())
        assert snapshots[-1].nbytes == decoder.snapshot_bytes > 0
        assert snapshots[-1].token_ids.tolist() == [*prompt, *result.token_ids]


def test_a_seed_starts_over_after_a_restored_text_too(make_target):
    decoder, sampling = SpeculativeDecoder(make_target()), SamplingParams(1.0, seed=3)
    expected = decoder.generate([5, 6, 7, 8], max_new_tokens=6, sampling=sampling)
    decoder.restore(decoder.snapshot())
    again = decoder.generate([5, 6, 7, 8], max_new_tokens=6, sampling=sampling)
    assert (again.token_ids, again.stats.cached) == (expected.token_ids, 0)


def test_what_holds_no_text_gives_no_snapshot_and_others_are_refused(make_target, make_drafter):
    decoder = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)
    assert (decoder.snapshot(), decoder.snapshot_bytes) == (None, 0)
    decoder.generate([3, 4, 5], max_new_tokens=9)
    snapshot = decoder.snapshot()
    with pytest.raises(ValueError, match="the snapshot holds"):
        decoder.restore(snapshot, snapshot.target.length + 1)
    decoder.target.feed([9])
    assert (decoder.snapshot(), decoder.snapshot_bytes) == (None, 0)
    for other in (
        SpeculativeDecoder(make_target(source_digest="1" * 64), make_drafter(), draft_length=4),
        SpeculativeDecoder(make_target()),
    ):
        with pytest.raises(VocabtrimError, match="made with other bundles"):
            other.restore(snapshot)


def test_two_texts_or_half_a_copy_give_no_snapshot(make_target, make_drafter, monkeypatch):
    """The drafter has read for another target since, or cannot copy its cache."""
    drafter = make_drafter()
    decoder, other = (SpeculativeDecoder(make_target(), drafter, draft_length=4) for _ in range(2))
    decoder.generate([3, 4, 5], max_new_tokens=9)
    assert decoder.snapshot()
    other.generate([6, 7, 8], max_new_tokens=9)
    assert (decoder.snapshot(), decoder.snapshot_bytes) == (None, 0)
    monkeypatch.setattr(drafter, "snapshot", lambda: None)
    assert other.snapshot() is None


def test_a_drafter_that_shares_the_targets_cache_takes_over_as_much(make_target, make_drafter):
    target, drafter = make_target(), make_drafter(noise=0.0)
    drafter.cache = target.cache
    decoder = SpeculativeDecoder(target, drafter)
    target.feed([3, 4, 5, 6])
    target.text = drafter.text = [3, 4, 5, 6, 7]
    snapshot = decoder.snapshot()
    target.rewind(0)
    decoder.restore(snapshot, 3)
    assert (target.length, drafter.length, snapshot.drafter) == (3, 3, None)


def test_a_restored_decoder_has_no_stream_of_another_text(make_target):
    decoder = SpeculativeDecoder(make_target())
    decoder.generate([3, 4, 5], max_new_tokens=9)
    snapshot, stream = decoder.snapshot(), decoder.stream([6, 7, 8], max_new_tokens=9)
    next(stream)
    decoder.restore(snapshot)
    with pytest.raises(VocabtrimError, match="has ended this stream"):
        list(stream)
