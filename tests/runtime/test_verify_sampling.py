"""The test of the sampled law: exact where it can be, and how often it is wrong, both ways."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.accept
import runtime.rules
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from runtime.accept import Accepted, accept_sampled, residual
from runtime.sampling import sample
from runtime.verification import chi_square
from runtime.verification.sampled import ALPHA, verify_sampling
from runtime.verification.uniformity import BINS, point_of, statistic_of

SETTINGS = [SamplingParams(1.0), SamplingParams(1.3, top_k=10, top_p=0.9)]
FREEDOM = BINS - 1


@pytest.mark.parametrize(
    ("statistic", "freedom", "expected"),
    [(26.2962, 16, 0.05), (39.2524, 16, 0.001), (5.9915, 2, 0.05), (0, 16, 1), (18.307, 10, 0.05)],
)
def test_the_chi_square_tail_is_that_of_the_tables(statistic, freedom, expected):
    assert chi_square.survival(statistic, freedom) == pytest.approx(expected, rel=1e-4)
    if statistic:
        assert chi_square.critical(expected, freedom) == pytest.approx(statistic, rel=1e-4)


def test_the_power_is_that_of_a_noncentral_chi_square():
    drawn = np.random.default_rng(0).noncentral_chisquare(FREEDOM, 45, 200_000)
    measured = (drawn >= chi_square.critical(ALPHA, FREEDOM)).mean()
    assert chi_square.power(45, ALPHA, FREEDOM) == pytest.approx(measured, abs=0.004)
    assert chi_square.power(0, ALPHA, FREEDOM) == pytest.approx(ALPHA)
    wanted = chi_square.noncentrality_for(0.99, ALPHA, FREEDOM)
    assert chi_square.power(wanted, ALPHA, FREEDOM) == pytest.approx(0.99)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_the_parts_of_all_tokens_tile_the_unit_interval(size, seed):
    """Each as wide as its probability: so a point is uniform exactly if the token has the law p."""
    rng = np.random.default_rng(seed)
    p, q = rng.integers(0, 3, (2, size)).astype(np.float32)  # many equal, some zero
    p[rng.integers(size)] += 1
    p, q = p / p.sum(), q / max(q.sum(), 1)
    parts = sorted((point_of(token, p, q, 0.0), point_of(token, p, q, 1.0), token) for token in np.flatnonzero(p))
    edges = np.array([0.0, *(end for _, end, _ in parts)])
    np.testing.assert_allclose([start for start, _, _ in parts], edges[:-1], atol=1e-6)
    np.testing.assert_allclose(edges[-1], 1, atol=1e-6)
    ratios = [q[token] / p[token] for _, _, token in parts]
    assert ratios == sorted(ratios)


@pytest.mark.statistical
def test_p_values_are_uniform_where_nothing_is_wrong():
    points = np.random.default_rng(1).random((4000, 400))
    values = np.sort([chi_square.survival(statistic_of(row), FREEDOM) for row in points])
    distance = np.abs(values - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.95 / np.sqrt(4000)  # Kolmogorov and Smirnov's, at 0.001


@pytest.mark.statistical
def test_the_stated_total_variation_is_found_as_often_as_stated():
    """The hardest shape to detect: half of the bins are too likely by as much, half too rare."""
    draws, distance = 1000, np.sqrt(chi_square.noncentrality_for(0.99, ALPHA, FREEDOM) / 4000)
    law = np.full(BINS, 1 / BINS) + distance * np.array([2 / 16] * 8 + [0] + [-2 / 16] * 8)
    counts = np.random.default_rng(2).multinomial(draws, law, 3000)
    statistics = ((counts - draws / BINS) ** 2).sum(axis=1) / (draws / BINS)
    found = (statistics >= chi_square.critical(ALPHA, FREEDOM)).mean()
    assert found > 0.98


@pytest.fixture
def decoder(make_target, make_drafter):
    """The drafter keeps every third token."""
    return SpeculativeDecoder(make_target(), make_drafter(range(0, 48, 3), noise=1.0), draft_length=3)


@pytest.mark.statistical
def test_the_right_rule_passes(decoder):
    report = verify_sampling(decoder, [[5, 6], [7]], SETTINGS, draws=600)
    assert report.passed
    written = json.loads(json.dumps(report.to_dict()))
    assert [setting["draws"] for setting in written["settings"]] == [600, 600]
    assert all(setting["missed_mass"] > 0.4 for setting in written["settings"])
    assert report == verify_sampling(decoder, [[5, 6], [7]], SETTINGS, draws=600)
    for wrong, message in (({"draws": 10}, "at least 85 draws"), ({"prompts": []}, "needs a drafter, a prompt")):
        with pytest.raises(VocabtrimError, match=message):
            verify_sampling(decoder, **{"prompts": [[5]]} | wrong)


def wrong_ratio(draft, q, p, vocab_map, rng):
    for i, token in enumerate(draft):
        if rng.random() * p(i)[token] >= q[i][vocab_map.inverse[token]]:
            return Accepted(i, sample(residual(p(i), q[i], vocab_map), rng))
    return Accepted(len(draft), sample(p(len(draft)), rng))


def accept_all(draft, q, p, vocab_map, rng):
    return Accepted(len(draft), sample(p(len(draft)), rng))


def wrong_row(draft, q, p, vocab_map, rng):
    return accept_sampled(draft, q, lambda i: p(min(i + 1, len(draft))), vocab_map, rng)


def keep_rejected(draft, q, p, vocab_map, rng):
    right = accept_sampled(draft, q, p, vocab_map, rng)
    return Accepted(right.count, draft[right.count]) if right.count < len(draft) else right


RULES = [wrong_ratio, accept_all, wrong_row, keep_rejected]


@pytest.mark.statistical
@pytest.mark.parametrize("wrong", RULES)
def test_a_wrong_rule_fails(decoder, monkeypatch, wrong):
    monkeypatch.setattr(runtime.rules, "accept_sampled", wrong)
    assert not verify_sampling(decoder, [[5, 6], [7]], SETTINGS[:1], draws=600).passed


def greedy_after_whole_drafts(draft, q, p, vocab_map, rng):
    right = accept_sampled(draft, q, p, vocab_map, rng)
    return right if right.count < len(draft) else Accepted(right.count, int(p(right.count).argmax()))


@pytest.mark.statistical
def test_what_follows_a_whole_draft_is_tested(make_target, make_drafter, monkeypatch):
    decoder = SpeculativeDecoder(make_target(), make_drafter(noise=0.3), draft_length=8)
    monkeypatch.setattr(runtime.rules, "accept_sampled", greedy_after_whole_drafts)
    assert not verify_sampling(decoder, [[5, 6], [7]], SETTINGS[:1], draws=600).passed


def target_itself(p, q, vocab_map):
    return p


def not_clipped(p, q, vocab_map):
    rest = p.copy()
    rest[vocab_map.kept_token_ids] -= q
    return np.abs(rest)


def without_the_map(p, q, vocab_map):
    return residual(p, q, None)


@pytest.mark.statistical
@pytest.mark.parametrize("wrong", [target_itself, not_clipped, without_the_map])
def test_a_wrong_residual_fails(decoder, monkeypatch, wrong):
    monkeypatch.setattr(runtime.accept, "residual", wrong)
    assert not verify_sampling(decoder, [[5, 6], [7]], SETTINGS[:1], draws=600).passed


def test_tokens_that_the_target_cannot_give_fail_at_once(decoder, monkeypatch):
    """A rule that is right 199 times of 200: too rare for the chi-square."""
    calls = iter(range(10**9))

    def rarely(weights, rng):
        return int(weights.argmin()) if next(calls) % 200 == 199 else sample(weights, rng)

    monkeypatch.setattr(runtime.accept, "sample", rarely)
    (setting,) = verify_sampling(decoder, [[5, 6], [7]], SETTINGS[1:], draws=600).settings
    assert setting.impossible > 0
    assert not setting.passed
