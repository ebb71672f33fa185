"""The alarm for a drafter that hardly anything is accepted of."""

import json
import logging

import numpy as np
import pytest

from runtime import SamplingParams, SpeculativeDecoder
from runtime.alarm import FALSE_ALARM, WINDOW, AcceptanceAlarm, find_collapse, is_collapse
from runtime.measure.bench import bench
from runtime.round import Round

ROUNDS = 2 * WINDOW  # hardly anything accepted: a round gives a token


def rounds(accepted):
    return [Round((0,), False, 4, 2 * count, 0, 0, 0, 1, None) for count in accepted]


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "runtime")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "runtime"]


def collapsing(make_target, make_drafter):
    drafter = make_drafter(range(2, 40), context=512)
    drafter.seed = 77  # random weights of another model
    return SpeculativeDecoder(make_target(context=512), drafter, draft_length=4)


@pytest.mark.statistical
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.2, seed=1)])
def test_a_drafter_of_another_model_is_said_once(make_target, make_drafter, warnings, sampling):
    decoder = collapsing(make_target, make_drafter)
    before = decoder.generate([3], max_new_tokens=WINDOW // 2, sampling=sampling)
    assert (before.stats.collapse, warnings()) == (None, [])  # and it counts on in the next generation
    for _ in range(3):
        result = decoder.generate([3, 4], max_new_tokens=ROUNDS, sampling=sampling)
    (warning,) = warnings()
    assert "keeps 90.0% of the calibration's tokens" in warning
    assert "not made for this target" in warning
    written = json.loads(json.dumps(result.to_dict()))["stats"]["collapse"]
    assert written == {"accepted": result.stats.collapse.accepted, "rounds": WINDOW, "coverage": 0.9}
    assert f"in only {written['accepted']} of {WINDOW} rounds" in warning


def test_a_bench_reports_it(make_target, make_drafter):
    decoder = collapsing(make_target, make_drafter)
    drafters = {"bad": decoder.drafter, "good": make_drafter(range(2, 40), noise=0.5, context=512)}
    options = {"max_new_tokens": ROUNDS, "draft_length": 4, "repeats": 1, "bandwidth": 1e9}
    report = bench(decoder.target, drafters, [[3, 4]], **options)
    assert report.modes["bad"].collapse.accepted < WINDOW / 10
    assert report.modes["good"].collapse is report.modes["target_only"].collapse is None


@pytest.mark.statistical
def test_a_normal_pair_is_never_accused(make_target, make_drafter, warnings):
    """Half of the vocabulary, and noise as large as half of the logits: a first token is accepted in a third."""
    drafter = make_drafter(range(0, 48, 2), noise=1.0, context=512)
    decoder = SpeculativeDecoder(make_target(context=512), drafter, draft_length=4)
    for seed in range(2):
        result = decoder.generate([3, seed], max_new_tokens=500, sampling=SamplingParams(1.0, seed=seed))
    assert 0.2 < result.stats.acceptance[0] < 0.6
    assert (result.stats.collapse, warnings()) == (None, [])


def binomial(rate):
    """Returns the chance of each number of accepted first tokens in a window: float64[WINDOW + 1]."""
    law = np.ones(1)
    for _ in range(WINDOW):
        law = np.convolve(law, [1 - rate, rate])
    return law


@pytest.mark.parametrize("coverage", [None, 0.95, 0.7, 0.3])
def test_windows_are_accused_as_seldom_as_stated_and_found_as_often(coverage):
    """Exactly, by the binomial law of drafts that begin right with the least sound chance, coverage / 4."""
    limit = sum(is_collapse(count, coverage) for count in range(WINDOW + 1))  # fewer accepted are a collapse
    assert not any(is_collapse(count, coverage) for count in range(limit, WINDOW + 1))
    law = binomial(0.25 * (coverage or 1))
    assert law[:limit].sum() <= FALSE_ALARM < law[: limit + 1].sum()
    if coverage == 0.95:
        assert binomial(0.02)[:limit].sum() > 0.998


def test_each_window_is_judged_by_itself(make_drafter):
    manifest = make_drafter(range(2, 40)).manifest
    good, bad = [True] * WINDOW, [False] * WINDOW
    assert find_collapse(rounds(good + bad), manifest).accepted == 0
    assert find_collapse(rounds(bad[1:]), manifest) is None
    silent = [Round((0,), False, 0, 0, 0, 0, 0, 1, None)] * 500  # nothing drafted: nothing to judge
    assert find_collapse(silent, manifest) is None
    alarm = AcceptanceAlarm(manifest)
    assert [alarm.observe(entry) is None for entry in rounds(bad + bad)].count(False) == 1
