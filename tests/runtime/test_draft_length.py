"""Adaptive draft lengths: the policy on simulated machines and texts, and in the loop."""

import random

import pytest

from runtime import SamplingParams, SpeculativeDecoder
from runtime.adaptive_length import AdaptiveLength
from runtime.draft_length import DraftLength, FixedLength
from runtime.draft_tiers import TIERS, TieredLength, tiers_up_to
from runtime.round import Round
from runtime.round_costs import GivenCosts, MeasuredCosts

STEP, OVERHEAD = 5.0, 0.2  # ms of a draft step, and of a round outside the engines


def memory_bound(rows):
    """ms of a verification where rows cost little, as of SmolLM2 in fp32 on two cores."""
    return 18.5 + 2.0 * (rows > 1) + 0.25 * rows


def compute_bound(rows):
    """ms of a verification where each row costs, as of SmolLM2 in int8."""
    return 8.0 + 2.4 * rows


def in_pairs(rows):
    """ms of a verification whose rows are computed in pairs, as of a 1.5B model in int8 on two AVX2 cores."""
    return 14.0 + 8.0 * even(rows)


def even(rows):
    return rows + rows % 2


def always(share):
    """A text in which each drafted token is accepted with the chance `share`, as the drafter's confidence says."""
    return lambda rng, position: [(share, rng.random() < share) for _ in range(16)]


def by_confidence(share):
    """A text of which `share` is easy, and the drafter knows where."""

    def draft(rng, position):
        sure = [0.97 if rng.random() < share else rng.choice([0.3, 0.5, 0.7]) for _ in range(16)]
        return [(confidence, rng.random() < confidence) for confidence in sure]

    return draft


def changing(rng, position):
    """A text that is hard for 500 tokens and easy for 500."""
    return always(0.95 if position // 500 % 2 else 0.05)(rng, position)


def undisturbed(made):
    """Returns how many times longer drafting and verifying take after `made` tokens."""
    return 1, 1


def speed(length: DraftLength, text, verify, tokens=4000, slowed=undisturbed, begin=0):
    """Tokens a ms of rounds whose lengths `length` decides, from the token `begin` on."""
    rng, spent, made, counted = random.Random(0), 0.0, 0, 0
    while made < tokens:
        room, draft = length.begin().drafted, []
        for confidence, is_right in text(rng, made)[:room]:
            draft.append(is_right)
            if len(draft) < room and not length.goes_on(confidence):
                break
        accepted = draft.index(False) if False in draft else len(draft)
        slow_draft, slow_verify = slowed(made)
        drafting = STEP * len(draft) * slow_draft
        verifying = verify(len(draft) + 1) * rng.uniform(0.97, 1.03) * slow_verify
        seconds = drafting + verifying + OVERHEAD
        length.observe(Round((), False, len(draft), accepted, 0.0, drafting, verifying, seconds, None))
        if made >= begin:
            spent += seconds
            counted += accepted + 1
        made += accepted + 1
    return counted / spent


@pytest.mark.parametrize("verify", [memory_bound, compute_bound])
@pytest.mark.parametrize("text", [always(0.0), always(0.2), always(0.8), always(0.95), by_confidence(0.6), changing])
def test_level_with_the_best_fixed_length_and_never_below_decoding_alone(text, verify):
    fixed = max(speed(FixedLength(n), text, verify) for n in (1, 2, 3, 4, 6, 8, 12, 16))
    adaptive = speed(AdaptiveLength(16), text, verify)
    assert adaptive > 0.96 * fixed
    assert adaptive > 0.97 / (verify(1) + OVERHEAD)


def test_matches_that_cost_nothing_put_off_no_probe():
    """Drafting stops on a hard text in which every place has a match that is wrong, and begins again on an easy one."""
    length, drafts = AdaptiveLength(16, costs=MeasuredCosts(even)), []
    for share in [0.02] * 300 + [0.95] * 300:
        plan = length.begin((0.1, 0.05))
        own = min(plan.drafted, 1)
        while 0 < own < plan.drafted and length.goes_on(share):
            own += 1
        drafted, accepted = plan.looked_up + own, own if share > 0.5 else 0
        times = (STEP * own, in_pairs(drafted + 1))
        seconds = sum(times) + OVERHEAD
        length.observe(Round((), False, drafted, accepted, 0.0, *times, seconds, None, looked_up=plan.looked_up))
        drafts.append(own)
    assert sum(map(bool, drafts[200:300])) < 5
    assert sum(map(bool, drafts[500:])) > 60


def test_confidence_gains_over_every_fixed_length():
    best = max(speed(FixedLength(n), by_confidence(0.85), memory_bound) for n in (1, 2, 3, 4, 6, 8, 12, 16))
    assert speed(AdaptiveLength(16), by_confidence(0.85), memory_bound) > 1.05 * best


@pytest.mark.parametrize("text", [always(0.5), always(0.7), always(0.9)])
def test_a_row_that_is_computed_anyway_is_used(text):
    """A draft ends at an odd number of tokens: with the target's own they are even."""
    fixed = max(speed(FixedLength(n), text, in_pairs) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16))
    paired = speed(AdaptiveLength(16, costs=MeasuredCosts(even)), text, in_pairs)
    assert paired > 0.98 * fixed
    assert paired > 1.02 * speed(AdaptiveLength(16), text, in_pairs)


@pytest.mark.parametrize(
    ("text", "verify", "factors"), [(always(0.8), memory_bound, (6, 1)), (always(0.7), compute_bound, (1, 3))]
)
def test_times_that_another_program_lengthened_are_forgotten(text, verify, factors):
    """One side is slow for 200 tokens, so that drafting seems not to pay, or seems to pay where it does not."""
    slowed = {"slowed": lambda made: factors if 300 <= made < 500 else (1, 1)}
    quiet, after = (speed(AdaptiveLength(16), text, verify, 1000, begin=600, **each) for each in ({}, slowed))
    assert after > 0.95 * quiet


def test_the_output_is_the_targets_whatever_the_length(make_target, make_drafter):
    alone = SpeculativeDecoder(make_target()).generate([3, 4], max_new_tokens=40)
    for drafter in (make_drafter(noise=0.5), make_drafter(range(0, 48, 2)), make_target()):
        decoder = SpeculativeDecoder(make_target(), drafter, draft_length="auto")
        for _ in range(3):  # what it learned must not matter
            assert decoder.generate([3, 4], max_new_tokens=40).token_ids == alone.token_ids


@pytest.mark.parametrize("drafts", [True, False], ids=["drafter", "lookup alone"])
def test_the_target_is_asked_for_the_rows_that_it_computes(make_target, make_drafter, drafts):
    target, asked = make_target(), []
    target.rows_computed = lambda rows: asked.append(rows) or rows
    decoder = SpeculativeDecoder(target, make_drafter() if drafts else None, draft_length="auto")
    decoder.generate([3, 4], max_new_tokens=20)
    assert asked


def test_the_target_as_its_own_drafter_is_accepted(make_target):
    decoder = SpeculativeDecoder(make_target(), make_target(), draft_length="auto")
    stats = decoder.generate([3], max_new_tokens=40).stats
    assert stats.accepted == stats.drafted > 0


def test_a_seed_repeats_the_text(make_target, make_drafter):
    decoder = SpeculativeDecoder(make_target(), make_drafter(noise=0.5), draft_length="auto")
    sampling = SamplingParams(temperature=1.0, seed=3)
    texts = {decoder.generate([3], max_new_tokens=40, sampling=sampling).token_ids for _ in range(3)}
    assert len(texts) == 1
    assert decoder.generate([3], max_new_tokens=9, sampling=SamplingParams(temperature=1.0)).stats.tokens > 0
    assert decoder.draft_length == 16


def test_auto_adapts_and_looks_up_and_a_number_stays(make_target, make_drafter):
    for default in (
        SpeculativeDecoder(make_target(), make_drafter(), **given) for given in ({}, {"draft_length": "auto"})
    ):
        assert default.length.adapts
        assert default.length.lookups is not None
    assert SpeculativeDecoder(make_target(), make_drafter(), prompt_lookup=False).length.lookups is None
    assert SpeculativeDecoder(make_target(), make_drafter(), draft_length=3).length == FixedLength(3)
    assert SpeculativeDecoder(make_target()).length == FixedLength(4)


@pytest.mark.parametrize("verify", [memory_bound, compute_bound])
@pytest.mark.parametrize("text", [always(0.0), always(0.2), always(0.8), always(0.95), changing])
def test_tiers_are_level_with_the_best_of_them_and_never_below_decoding_alone(text, verify):
    fixed = max(speed(FixedLength(n), text, verify) for n in TIERS)
    tiered = speed(TieredLength(TIERS), text, verify)
    assert tiered > 0.96 * fixed
    assert tiered > 0.97 / (verify(1) + OVERHEAD)


def test_tiers_follow_the_text():
    """Stretches of 100 tokens that are easy and hard in turn: the best single length serves neither."""

    def text(rng, position):
        return always(0.97 if position // 100 % 2 else 0.2)(rng, position)

    best = max(speed(FixedLength(n), text, memory_bound) for n in range(1, 8))
    assert speed(TieredLength(TIERS), text, memory_bound) > 1.05 * best


def test_a_gpu_drafts_in_tiers_up_to_what_the_target_verifies(make_target, make_drafter):
    drafter = make_drafter()
    drafter.device = "cuda"
    for given in ({}, {"draft_length": "auto"}):
        length = SpeculativeDecoder(make_target(), drafter, **given).length
        assert (length.tiers, length.adapts, length.is_stepwise) == ((1, 3, 7), True, False)
        assert length.lookups is not None
    assert SpeculativeDecoder(make_target(), drafter, prompt_lookup=False).length.lookups is None
    assert SpeculativeDecoder(make_target(), drafter, draft_length=5).length == FixedLength(5)
    assert [tiers_up_to(most) for most in (1, 2, 3, 4, 7, 255)] == [
        *((1,), (1, 2), (1, 3), (1, 3, 4), (1, 3, 7), (1, 3, 7))
    ]
    drafter.unrolled = 4
    assert SpeculativeDecoder(make_target(), drafter).length.tiers == (4,)
    drafter.unrolled = 0
    alone = SpeculativeDecoder(make_target()).generate([3, 4], max_new_tokens=60)
    decoder = SpeculativeDecoder(make_target(), drafter)
    found = [decoder.generate([3, 4], max_new_tokens=60).token_ids for _ in range(3)]
    assert found == [alone.token_ids] * 3
    sampling = SamplingParams(temperature=1.0, seed=3)
    texts = {decoder.generate([3], max_new_tokens=40, sampling=sampling).token_ids for _ in range(3)}
    assert len(texts) == 1


def test_a_drafter_that_is_never_right_rests_and_the_stats_say_so(make_target, make_drafter):
    """Each feed costs the same here: a round with a draft takes twice as long as one without."""
    drafter = make_drafter(context=512)
    drafter.seed = 77  # random weights of another model
    decoder = SpeculativeDecoder(make_target(context=512), drafter, draft_length="auto")
    decoder.length = AdaptiveLength(16, costs=GivenCosts(step=0.5, row=0.05))
    stats = decoder.generate([3], max_new_tokens=400).stats
    assert stats.paused > 0.9 * stats.rounds
    assert 2 < stats.drafted < 40  # probes
