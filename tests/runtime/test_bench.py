import json

import pytest

from engines.bundle.experts import Experts
from engines.errors import VocabtrimError
from engines.generation_rules import GenerationRules
from runtime import SamplingParams, SpeculativeDecoder, mbsu
from runtime.draft_length import FixedLength
from runtime.measure.bandwidth import read_bandwidth
from runtime.measure.bench import bench
from runtime.measure.expert_reads import ExpertReads
from runtime.measure.outputs import output_differences
from runtime.measure.summary import mode_report
from runtime.measure.sweep import SweepSettings, sweep
from runtime.measure.timing import Feed, TimedGeneration
from runtime.round import Round
from runtime.stats import summarize

PROMPTS = [[3, 4], [5, 6, 7], [8]]


def test_every_mode_is_measured_against_the_target_alone(make_target, make_drafter):
    steps = []
    report = bench(
        make_target(),
        {"full_drafter": make_drafter(noise=0.3), "trimmed_drafter": make_drafter(range(2, 40), noise=0.3)},
        PROMPTS,
        max_new_tokens=20,
        draft_length=4,
        repeats=2,
        bandwidth=1e9,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i + 1, 18) for i in range(18)]
    data = json.loads(json.dumps(report.to_dict()))
    assert list(data["modes"]) == ["target_only", "full_drafter", "trimmed_drafter"]
    assert data["lossless"]
    alone, trimmed = data["modes"]["target_only"], data["modes"]["trimmed_drafter"]
    assert (alone["speedup"], alone["block_efficiency"], alone["mbsu"], alone["draft_step_ms"]) == (1, 1, 1, None)
    assert trimmed["equal_prompts"] == 3
    assert trimmed["speedup"] == trimmed["tokens_per_second"] / alone["tokens_per_second"]
    context = 2 + 20 / 2  # a prompt's mean length, and half of what is generated
    assert trimmed["bytes_per_step"] == 200 + 8 * context
    ratio = (200 + 8 * context) / (1000 + 8 * context)
    assert trimmed["mbsu"] == pytest.approx(mbsu(trimmed["block_efficiency"], ratio, 4))
    assert trimmed["bandwidth_fraction"] == pytest.approx(296 / (trimmed["draft_step_ms"] / 1e3) / 1e9)
    assert 1 < trimmed["block_efficiency"] <= 5
    assert trimmed["verify_ms"] > alone["verify_ms"]  # five positions of a fake cost more than one
    assert 0 < trimmed["overhead"] < 1
    assert data["environment"]["tool_versions"] == {"fake": "1"}


def test_a_mixture_reads_more_for_a_verification(make_target, make_drafter):
    """Of 1,000 bytes of weights 600 are two experts; five tokens pick three and a half."""
    experts = (Experts(4, 2, 1200, (2.0, 3.0, 3.25, 3.375, 3.5)),)
    report = bench(
        make_target(experts=experts), {"drafter": make_drafter(noise=0.3)}, PROMPTS, max_new_tokens=20, draft_length=4,
        bandwidth=1e9,
    )  # fmt: skip
    mode, context = report.modes["drafter"], 2 + 20 / 2
    target = 1000 + 8 * context
    assert mode.mbsu == mbsu(mode.block_efficiency, (200 + 8 * context) / target, 4, 1 + 450 / target)
    assert mode.expert_reads == ExpertReads(5, 2, 3.5, 1.45, is_measured=True)
    assert report.modes["target_only"].expert_reads is None
    beyond = ExpertReads.of(make_target(experts=experts).manifest, 6)
    assert (beyond.distinct, beyond.is_measured) == (3.75, False)


def test_by_default_drafts_are_as_long_as_a_decoders(make_target, make_drafter):
    """A drafter that is always right and costs a tenth of its target."""
    report = bench(
        make_target(context=256), {"drafter": make_target(context=256)}, [[3], [4]], max_new_tokens=100, bandwidth=1e9
    )
    mode = report.modes["drafter"]
    assert (report.draft_length, report.adapts, report.lossless) == (16, True, True)
    assert mode.drafted_per_round == pytest.approx(mode.block_efficiency - 1, abs=0.2)
    assert mode.verify_ms > 0
    assert mode.round_percentiles_ms.p50 > 0


def test_a_mode_whose_tokens_differ_is_reported(make_target, make_drafter):
    """A target that answers otherwise after a rewind, as a broken rollback would make it."""
    target, drafter = make_target(), make_drafter(noise=2.0)
    rewind = target.rewind

    def broken(length):
        if length and length < target.length:
            target.seed += 1
        rewind(length)

    target.rewind = broken
    report = bench(
        target, {"trimmed_drafter": drafter}, PROMPTS, max_new_tokens=20, draft_length=4, repeats=1, bandwidth=1e9
    )
    assert not report.lossless
    trimmed = report.modes["trimmed_drafter"]
    assert trimmed.differing_prompts == tuple(dict.fromkeys(each.prompt for each in trimmed.differences))
    assert all(each.gap > each.tolerance > 0 for each in trimmed.differences)
    assert report.modes["target_only"].differing_prompts == ()


RULES = [GenerationRules(), GenerationRules(suppress_tokens=tuple(range(24, 48)))]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("gap", "verdict"), [(0.0, "near-tie"), (1e-3, "different")])
def test_a_near_tie_is_listed_and_is_no_difference(gap, verdict, rules, make_target):
    """A target that likes two tokens alike; a mode that takes the other one at position 3, and its text after that."""
    target, start = make_target(rules=rules), [3, 4]

    def feed(token_ids, keep=1, feed=target.feed):
        output = feed(token_ids, keep)
        if target.length == len(start) + 3:
            first, second = [token for token in range(5, 24) if token not in target.tokens][:2]
            output.logits[-1, [first, second]] = 20, 20 - gap
            output.token_ids[-1] = first
        return output

    target.feed = feed

    def run(tokens):
        return [TimedGeneration((Round(tuple(tokens), True, 0, 0, 0, 0, 0, 1, "length"),), (), (), 1.0)]

    alone = list(SpeculativeDecoder(target).generate(start, max_new_tokens=8).token_ids)
    second = [token for token in range(5, 24) if token not in [*start, *alone[:3]]][1]
    other = [*alone[:3], second]
    other += SpeculativeDecoder(make_target(rules=rules)).generate([*start, *other], max_new_tokens=4).token_ids
    (found,) = output_differences(target, [start], [run(other)], [run(alone)])
    assert (found.prompt, found.position, found.found, found.expected) == (0, 3, second, alone[3])
    assert (found.verdict, found.gap) == (verdict, pytest.approx(gap, rel=0.1))
    wrong = [*other[:5], (other[5] + 1) % 48, *other[6:]]  # after a near-tie a wrong token is still one
    assert [each.position for each in output_differences(target, [start], [run(wrong)], [run(alone)])][:2] == [3, 5]
    (short,) = output_differences(target, [start], [run(alone[:4])], [run(alone)])
    assert (short.found, short.expected, short.verdict) == (-1, alone[4], "different")


def test_given_rules_apply_to_every_mode(make_target, make_drafter):
    """A target that would end each text at once, were its EOS not suppressed."""
    target, drafters = make_target(eos_bias=100.0), {"drafter": make_drafter(noise=0.3)}
    sampling = SamplingParams(suppress_tokens=(1,))
    report = bench(target, drafters, PROMPTS, max_new_tokens=20, repeats=1, bandwidth=1e9, sampling=sampling)
    assert report.lossless
    assert all(mode.verify_ms for mode in report.modes.values())  # there were steps after the prefill
    assert report.to_dict()["sampling"]["suppress_tokens"] == (1,)
    settings = SweepSettings((2,), max_new_tokens=20, repeats=1, sampling=sampling)
    swept = sweep(target, drafters, PROMPTS, settings, bandwidth=1e9)
    assert swept.lossless
    assert all(row.report.verify_ms for row in swept.rows)
    with pytest.raises(ValueError, match="greedily"):
        bench(target, {}, PROMPTS, sampling=SamplingParams(temperature=1.0))


def test_steps_are_timed_by_their_kind_and_runs_by_their_median(make_target, make_drafter):
    """Two prompts of two repeats; prefills, catch-ups and cut drafts do not count as steps."""

    def run(seconds, *, target, drafter=()):
        first = Round((0,), True, 0, 0, 0, 0, 0, 1, None)
        rest = Round((0, 0, 0), False, 2, 2, 0, 0, 0, 1, "length")
        return TimedGeneration((first, rest), (Feed(2, 1, 100.0), *target), drafter, seconds)

    alone = [[run(2.0, target=[Feed(1, 1, 0.2)]), run(4.0, target=[Feed(1, 1, 0.4)])]] * 2
    feeds = {"target": [Feed(3, 3, 0.5), Feed(2, 2, 9.0)], "drafter": (Feed(3, 1, 9.0), Feed(1, 1, 0.1))}
    drafted = [[run(1.0, **feeds), run(2.0, **feeds)]] * 2
    target, drafter = make_target().manifest, make_drafter().manifest
    report = mode_report(drafted, alone, target, drafter, FixedLength(2), bandwidth=1e4)
    assert (report.verify_ms, report.draft_step_ms) == (500, 100)
    assert report.tokens_per_second == 8 / 3
    assert report.speedup == 2
    assert report.bandwidth_fraction == pytest.approx((200 + 8 * (2 + 4 / 2)) / 0.1 / 1e4)
    assert mode_report(alone, alone, target, None, FixedLength(2), bandwidth=1e4).verify_ms == pytest.approx(300)


def test_a_bench_of_nothing_is_refused(make_target):
    for prompts, repeats in ([], 1), (PROMPTS, 0):
        with pytest.raises(VocabtrimError, match="at least one"):
            bench(make_target(), {}, prompts, repeats=repeats)


def test_acceptance_by_position_counts_rounds_that_drafted_so_far():
    def entry(drafted, accepted):
        return Round((0,) * (accepted + 1), False, drafted, accepted, 0, 0, 0, 1, None)

    stats = summarize([entry(2, 2), entry(2, 0), entry(1, 1), entry(0, 0)])
    assert stats.acceptance == (2 / 3, 1 / 2)
    assert stats.block_efficiency == 7 / 4


def test_mbsu_is_the_papers_formula():
    assert mbsu(3.0, 0.1, 5) == 2.0
    assert mbsu(3.0, 0.1, 5, verify_ratio=2.5) == 1.0


def test_memory_bandwidth_is_measured_in_bytes_per_second():
    assert 1e8 < read_bandwidth(buffer_bytes=1 << 24, seconds=0.02) < 1e13
