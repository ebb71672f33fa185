from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.sampling_params import SamplingParams
from runtime.loop import GREEDY, decode_rounds
from runtime.sampling import distribution

PROMPT = [5, 6, 7]


def decode(target, drafter, max_new_tokens=40, draft_length=4, prompt=PROMPT, sampling=GREEDY):
    return list(
        decode_rounds(
            target, drafter, prompt, max_new_tokens=max_new_tokens, draft_length=draft_length, sampling=sampling
        )
    )


def tokens_of(rounds):
    return [token for entry in rounds for token in entry.tokens]


def plain_greedy(engine, prompt, new):
    """The definition, without cache, drafter or rounds."""
    sequence = list(prompt)
    while len(sequence) < len(prompt) + new and sequence[-1] not in engine.manifest.eos_token_ids:
        sequence.append(int(engine.logits(sequence).argmax()))
    return sequence[len(prompt) :]


def test_a_target_that_drafts_for_itself_accepts_everything(make_target):
    rounds = decode(make_target(), make_target(), max_new_tokens=41, draft_length=4)
    assert [len(entry.tokens) for entry in rounds] == [1] + [5] * 8
    assert all(entry.accepted == entry.drafted == 4 for entry in rounds[1:])


@settings(max_examples=150, deadline=None)
@given(
    kept=st.none() | st.sets(st.integers(0, 47), min_size=1),
    noise=st.sampled_from([0.0, 0.5, 2.0]),
    draft_length=st.integers(1, 9),
    new=st.sampled_from([40, 7, 2, 1]),
    seed=st.integers(0, 1000),
    eos_bias=st.sampled_from([-100.0, 2.0]),
    rows=st.sampled_from([46, 48, 50]),
    drafter_context=st.sampled_from([128, 20, 2]),
)
def test_greedy_output_is_the_targets_own(
    make_target, make_drafter, kept, noise, draft_length, new, seed, eos_bias, rows, drafter_context
):
    """Whatever is drafted: trimmed, noisy, from a head padded otherwise, from a smaller context."""
    target = make_target(seed=seed, eos_bias=eos_bias)
    drafter = make_drafter(kept, noise, drafter_context, rows=48 if kept else rows)
    drafter.seed, drafter.eos_bias = seed, eos_bias
    rounds = decode(target, drafter, new, draft_length)
    assert tokens_of(rounds) == plain_greedy(target, PROMPT, new) == tokens_of(decode(target, None, new))
    assert [entry.finish_reason is None for entry in rounds] == [True] * (len(rounds) - 1) + [False]
    assert max(entry.drafted for entry in rounds) <= draft_length
    for entry in rounds[1:]:  # nothing is drafted that could not be used
        assert entry.accepted <= len(entry.tokens) <= entry.accepted + 1


@pytest.mark.parametrize("rows", [40, 46, 50, 64])
def test_a_head_padded_otherwise_drafts_only_tokens_that_both_have(make_target, make_drafter, rows):
    target, drafter = make_target(), make_drafter(noise=0.5, rows=rows)
    assert tokens_of(decode(target, drafter, 60)) == plain_greedy(target, PROMPT, 60)


def test_an_eos_inside_an_accepted_block_ends_generation_at_it(make_target):
    """The first EOS that a self-drafting target meets is a drafted token, within its block."""
    for seed in range(100):
        target, drafter = (make_target(seed=seed, eos_bias=2.0) for _ in range(2))
        rounds = decode(target, drafter, draft_length=6)
        if rounds[-1].finish_reason == "stop" and 1 < rounds[-1].accepted == len(rounds[-1].tokens) < 6:
            break
    assert tokens_of(rounds) == plain_greedy(target, PROMPT, 40)
    assert tokens_of(rounds).index(1) == len(tokens_of(rounds)) - 1
    assert rounds[-1].drafted == rounds[-1].accepted  # and it drafted nothing after the EOS


@pytest.mark.parametrize("draft_length", [1, 3, 8])
@pytest.mark.parametrize("drafter_context", [16, 20, 128])
def test_a_full_context_ends_generation_without_an_error(make_target, make_drafter, draft_length, drafter_context):
    """The last token is predicted from a full cache: one more than the cache holds."""
    target = make_target(context=20)
    rounds = decode(target, make_drafter(noise=0.3, context=drafter_context), 99, draft_length)
    assert tokens_of(rounds) == plain_greedy(target, PROMPT, 20 - len(PROMPT) + 1)
    assert rounds[-1].finish_reason == "length"


def test_a_drafter_whose_context_is_full_falls_silent(make_target):
    """3 tokens of prompt, 1, 4 drafted and 1: 9. With 4 more drafted, the last of which is not fed, its 12 are full."""
    drafter = make_target(context=12)
    rounds = decode(make_target(), drafter, 14)
    assert [entry.drafted for entry in rounds] == [0, 4, 4, 0, 0, 0]
    assert drafter.length == 12


def test_drafting_is_cut_to_what_is_left_to_generate(make_target):
    rounds = decode(make_target(), make_target(), max_new_tokens=8, draft_length=4)
    assert [entry.drafted for entry in rounds] == [0, 4, 1]
    assert [len(entry.tokens) for entry in decode(make_target(), make_target(), max_new_tokens=1)] == [1]


def test_each_token_is_fed_once(make_target):
    """The prompt once to either engine; then the target is fed γ+1 tokens a round, the drafter γ and what it lacks."""
    target, drafter = make_target(), make_target()
    decode(target, drafter, max_new_tokens=11, draft_length=4)
    assert target.fed == [3, 5, 5]
    assert drafter.fed == [4, 1, 1, 1, 2, 1, 1, 1]


def test_greedy_decoding_reads_no_logits(make_target, make_drafter, monkeypatch):
    """An engine on a device need not copy them."""
    engines = [make_target(), make_drafter()]
    for engine in engines:
        feed = engine.feed
        monkeypatch.setattr(
            engine, "feed", lambda *given, feed=feed, **how: OnlyTokenIds(feed(*given, **how).token_ids)
        )
    assert tokens_of(decode(*engines)) == plain_greedy(make_target(), PROMPT, 40)


class OnlyTokenIds:
    def __init__(self, token_ids):
        self.token_ids = token_ids


@pytest.mark.parametrize("kept", [None, range(0, 48, 3)])
def test_a_seed_gives_the_same_tokens_again(make_target, make_drafter, kept):
    first, again, other = (
        tokens_of(decode(make_target(), make_drafter(kept), sampling=SamplingParams(1.0, seed=seed)))
        for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.statistical
@pytest.mark.parametrize(("kept", "rows"), [(None, 12), (range(0, 12, 2), 12), (None, 16), (None, 10)])
def test_sampled_tokens_follow_the_targets_law(make_target, make_drafter, kept, rows):
    """Chi-square of three tokens, a prefill and a round or two of drafting, against their law by enumeration."""
    sampling = SamplingParams(1.3, top_k=10, top_p=0.9)
    target, drafter = make_target(rows=12, seed=8), make_drafter(kept, rows=rows)
    drafter.seed = 8  # there much of what a head of 16 rows would draft is beyond the target's 12
    law = {}
    for i, p in enumerate(distribution(target.logits(PROMPT)[None], sampling)[0]):
        for j, p_next in enumerate(distribution(target.logits([*PROMPT, i])[None], sampling)[0]):
            for k, p_last in enumerate(distribution(target.logits([*PROMPT, i, j])[None], sampling)[0]):
                law[i, j, k] = float(p) * float(p_next) * float(p_last)
    runs, counts = 2000, Counter()
    for seed in range(runs):
        rounds = decode(target, drafter, 3, 2, sampling=SamplingParams(1.3, 10, 0.9, seed))
        counts[tuple(tokens_of(rounds))] += 1
    assert all(law[outcome] > 0 for outcome in counts)
    cells = [(counts[outcome], runs * chance) for outcome, chance in law.items() if runs * chance >= 5]
    rest = (runs - sum(count for count, _ in cells), runs - sum(mean for _, mean in cells))
    statistic = sum((count - mean) ** 2 / mean for count, mean in [*cells, rest])
    freedom = len(cells)
    assert statistic < freedom + 3.5 * np.sqrt(2 * freedom)
