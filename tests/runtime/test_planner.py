"""Decisions from numbers, and a plan against an exhaustive sweep of engines whose steps take a known time."""

import json

import pytest

from engines.bundle.experts import Experts
from engines.errors import VocabtrimError
from runtime.measure.plan_measurement import make_plan
from runtime.measure.planner import DrafterTimes, RoundTimes, expected_block_efficiency, plan
from runtime.measure.sweep import SweepSettings, sweep

LENGTHS = (1, 2, 4, 8)
PROMPTS = [[3, 4], [5, 6, 7], [8]]


def drafter(name="trimmed", acceptance=(0.8, 0.6, 0.2, 0.1), step=2.0, verify=11.0, head_share=0.4, trimmed=True):
    rounds = tuple(RoundTimes(n, step, verify + n / 4, n * step + verify + n / 4) for n in (1, 2, 4))
    return DrafterTimes(name, 8192 if trimmed else 49152, trimmed, head_share, acceptance, rounds)


def test_expected_tokens_follow_from_acceptance_by_position():
    assert [expected_block_efficiency((0.5, 0.25), n) for n in (1, 2, 3)] == [1.5, 1.75, 1.75]


def test_the_fastest_comes_first_with_what_it_is_worth():
    made = plan(10.0, [drafter(), drafter("full", step=3.0, trimmed=False)])
    assert len(made.candidates) == 6
    best = made.best
    assert (best.drafter, best.draft_length) == ("trimmed", 2)
    assert best.block_efficiency == pytest.approx(2.4)
    assert best.tokens_per_second == pytest.approx(2.4e3 / 15.5)
    assert best.speedup == pytest.approx(24 / 15.5)
    assert made.speculation_pays
    assert made.trimming_pays
    assert made.trimming_gain == pytest.approx(17.5 / 15.5)
    assert made.reasons == ()
    assert json.loads(json.dumps(made.to_dict()))["best"]["draft_length"] == 2


@pytest.mark.parametrize(
    ("changes", "pays", "reason"),
    [
        ({"verify": 30.0}, False, "bound by compute"),
        ({"acceptance": (0.1, 0.0, 0.0, 0.0)}, False, "only 10% of the first drafted tokens"),
        ({"step": 9.0}, False, "a draft step takes 90%"),
        ({}, True, None),
    ],
)
def test_why_speculation_does_not_pay(changes, pays, reason):
    made = plan(10.0, [drafter(**changes)])
    assert made.speculation_pays is pays
    assert made.trimming_pays is None
    assert [text for text in made.reasons if reason and reason in text] if reason else made.reasons == ()


def test_a_mixture_whose_verification_reads_more_experts_is_a_reason_of_its_own(make_target):
    """A step reads 1,000 bytes, 600 of them experts' of which it picks 2 of 8; three tokens pick 7."""
    target = make_target(experts=(Experts(8, 2, 2400, (2.0, 5.0, 7.0)),)).manifest
    made = plan(10.0, [drafter(verify=25.0)], target)
    assert (made.best.draft_length, made.speculation_pays) == (2, False)
    assert made.reasons == (
        "the target is a mixture of experts: 3 tokens read 7.0 experts of a layer where one token reads 2, and 2.50 "
        "times its weights (measured along text); a verification takes 2.5 of its steps",
    )
    assert "bound by compute" in plan(10.0, [drafter(verify=60.0)], target).reasons[1]
    same = make_target(experts=(Experts(8, 2, 2400, (2.0, 2.0, 2.0)),)).manifest
    assert plan(10.0, [drafter()], same).reasons == ()


def test_why_a_trim_does_not_pay():
    full = drafter("full", step=2.1, head_share=0.1, trimmed=False)
    made = plan(10.0, [drafter(acceptance=(0.6, 0.4, 0.2, 0.1)), full])
    assert made.best.drafter == "full"
    assert made.trimming_pays is False
    assert any("head is 10% of what a draft step reads" in text for text in made.reasons)
    assert any("loses 20% of the first" in text for text in made.reasons)


def test_the_plan_is_within_five_percent_of_an_exhaustive_sweep(make_target, make_drafter, clock):
    target = clock.engine(make_target(), lambda tokens: 20.0 + 2.0 * (tokens - 1))
    drafters = {
        "few": clock.engine(make_drafter(range(2, 24), noise=0.3), lambda tokens: 1.0 + tokens),
        "many": clock.engine(make_drafter(range(2, 44), noise=0.3), lambda tokens: 2.0 + tokens),
        "full": clock.engine(make_drafter(noise=0.3), lambda tokens: 5.0 + tokens),
    }
    settings = SweepSettings(LENGTHS, (), 90, 1)
    steps = []
    planned = make_plan(target, drafters, PROMPTS, settings, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, 22) for i in range(22)]  # 3 drafters on 3 prompts, then 13 ways
    swept = sweep(target, drafters, PROMPTS, settings, bandwidth=1e9)
    speeds = {(row.drafter, row.draft_length): row.report.decode_tokens_per_second for row in swept.rows}
    chosen = speeds[planned.plan.best.drafter, planned.plan.best.draft_length]
    assert chosen >= 0.95 * max(speeds.values())
    assert chosen > 1.05 * min(speed for (name, _), speed in speeds.items() if name != "target_only")
    for candidate in planned.plan.candidates:
        measured = speeds[candidate.drafter, candidate.draft_length]
        assert candidate.tokens_per_second == pytest.approx(measured, rel=0.15)


def test_a_plan_refuses_what_it_cannot_use(make_target, make_drafter):
    for settings in SweepSettings(contexts=(8, 16)), SweepSettings(force_accepted=1):
        with pytest.raises(VocabtrimError, match="a plan needs"):
            make_plan(make_target(), {"d": make_drafter()}, PROMPTS, settings)
    with pytest.raises(VocabtrimError, match="a plan needs"):
        make_plan(make_target(), {}, PROMPTS, SweepSettings())
