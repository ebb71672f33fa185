"""Forced acceptance: counts that do not depend on the target, and latency by the formula."""

import pytest

from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime import latency_speedup
from runtime.loop import decode_rounds
from runtime.measure.bench import bench
from runtime.measure.timing import TimedGeneration
from runtime.round import Round
from runtime.stats import Percentiles, round_tokens_per_second

PROMPT = [5, 6, 7]


def forced(target, drafter, accepted, new=41, draft_length=4):
    return list(
        decode_rounds(target, drafter, PROMPT, max_new_tokens=new, draft_length=draft_length, force_accepted=accepted)
    )


@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_every_round_accepts_what_is_forced(make_target, make_drafter, accepted, noise):
    """One drafter is always right, one never is. The last rounds draft what is left to generate."""
    rounds = forced(make_target(), make_drafter(noise=noise), accepted)
    assert all(entry.accepted == min(accepted, entry.drafted) for entry in rounds[1:])
    full = [entry for entry in rounds[1:] if entry.drafted == 4]
    assert [len(entry.tokens) for entry in full] == [accepted + 1] * len(full)
    assert len(full) >= 40 // (accepted + 1) - 4
    assert sum(len(entry.tokens) for entry in rounds) == 41


def test_a_forced_run_has_full_length_whatever_the_target_would_end(make_target, make_drafter):
    target, drafter = make_target(eos_bias=100.0), make_drafter(noise=0.0)
    drafter.eos_bias = 100.0
    rounds = forced(target, drafter, 2)
    assert sum(len(entry.tokens) for entry in rounds) == 41
    assert rounds[-1].finish_reason == "length"
    alone = forced(target, None, 0)
    assert [len(entry.tokens) for entry in alone] == [1] * 41


def test_forcing_goes_with_greedy_decoding(make_target):
    for accepted, sampling in (1, SamplingParams(1.0)), (-1, SamplingParams()):
        with pytest.raises(ValueError, match="greedy"):
            next(
                decode_rounds(
                    make_target(),
                    None,
                    PROMPT,
                    max_new_tokens=4,
                    draft_length=2,
                    sampling=sampling,
                    force_accepted=accepted,
                )
            )


@pytest.mark.parametrize("accepted", [0, 2, 3])
def test_forced_speed_is_what_the_formula_says(make_target, make_drafter, clock, accepted):
    """An engine whose steps take a known time: tokens/s = (N + 1) / (γ·draft + verify + overhead)."""
    target = clock.engine(make_target(), lambda tokens: 20.0 + 2.0 * (tokens - 1))
    drafter = clock.engine(make_drafter(noise=0.5), lambda tokens: 4.0)
    report = bench(target, {"trimmed_drafter": drafter}, [PROMPT], max_new_tokens=101, repeats=1, bandwidth=1e9,
                   draft_length=4, force_accepted=accepted)  # fmt: skip
    mode = report.modes["trimmed_drafter"]
    assert (mode.draft_step_ms, mode.verify_ms) == (pytest.approx(4, abs=0.01), pytest.approx(28, abs=0.01))
    by_hand = 1e3 * (accepted + 1) / (4 * 4 + 28)
    assert mode.predicted_tokens_per_second == pytest.approx(by_hand, rel=0.02)
    assert mode.decode_tokens_per_second == pytest.approx(by_hand, rel=0.1)
    assert mode.decode_speedup == pytest.approx(mode.latency_speedup, rel=0.1)
    assert report.modes["target_only"].decode_tokens_per_second == pytest.approx(50, rel=0.01)
    assert report.force_accepted == accepted
    assert report.lossless is None
    assert mode.equal_prompts is None
    assert mode.differing_prompts == ()


def test_all_of_a_draft_can_be_forced_but_no_more(make_target, make_drafter):
    report = bench(make_target(), {"d": make_drafter(noise=5.0)}, [PROMPT], max_new_tokens=16, repeats=1,
                   bandwidth=1e9, draft_length=3, force_accepted="all")  # fmt: skip
    assert (report.force_accepted, report.modes["d"].block_efficiency) == (3, 15 / 4)
    with pytest.raises(VocabtrimError, match="give a number from 0 to 3"):
        bench(make_target(), {"d": make_drafter()}, [PROMPT], draft_length=3, force_accepted=4)


def test_decoding_is_timed_without_the_prefills():
    """The target's, in the first round, and the drafter's, in the second."""
    first = Round((0,), True, 0, 0, 5.0, 0.0, 0.0, 5.0, None)
    second = Round((0, 0, 0), False, 2, 2, 3.0, 0.5, 0.5, 4.5, None)
    third = Round((0, 0), False, 2, 1, 0.0, 0.5, 0.5, 1.5, "length")
    run = TimedGeneration((first, second, third), (), (), 12.0)
    assert (run.decoded, run.decode_seconds) == (5, 3.0)


def test_percentiles_interpolate():
    assert Percentiles.of(range(101)) == Percentiles(50, 90, 99)
    assert Percentiles.of([]) is None


def test_the_formulas():
    assert latency_speedup(3.0, draft_step=2.0, verify=12.0, target_step=10.0, draft_length=4) == 1.5
    assert round_tokens_per_second(3, draft_step_ms=2, verify_ms=20, overhead_ms=2, draft_length=4) == 100
    # with a verification that costs one step, it is Leviathan's: τ / (c·γ + 1)
    assert latency_speedup(3.0, 1.0, 10.0, 10.0, 5) == 2.0
