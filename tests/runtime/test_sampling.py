import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.sampling import distribution, sample


def warped_by_transformers(logits, params):
    scores = TemperatureLogitsWarper(params.temperature)(None, torch.from_numpy(logits))
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(top_k).standard_normal((3, 1000), np.float32)
    params = SamplingParams(temperature, top_k, top_p)
    ours, theirs = distribution(logits, params), warped_by_transformers(logits, params)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_ties_with_the_kth_logit_are_kept_as_transformers_keeps_them():
    logits = np.array([[1, 5, 3, 3, 3, 0]], np.float32)
    params = SamplingParams(1.0, top_k=2)
    assert np.flatnonzero(distribution(logits, params)).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(distribution(logits, params), warped_by_transformers(logits, params), rtol=1e-6)


def test_top_p_keeps_the_token_that_crosses_and_prefers_smaller_ids():
    logits = np.log(np.array([[0.25, 0.25, 0.25, 0.25]], np.float32))
    assert distribution(logits, SamplingParams(1.0, top_p=0.6)).tolist() == [[pytest.approx(1 / 3)] * 3 + [0]]


@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(0.8, 50, 0.9), SamplingParams(1.0, top_p=0.95)])
def test_a_vocabulary_of_262k_is_never_sorted(params, monkeypatch):
    """Peaked as a language model's logits are, top-p looks at few candidates."""
    logits = 4 * np.random.default_rng(0).standard_normal((1, 262_144), np.float32)
    sorted_sizes = []
    sort = np.sort
    monkeypatch.setattr(np, "sort", lambda array: sorted_sizes.append(len(array)) or sort(array))
    monkeypatch.setattr(np, "argsort", None)
    start = time.perf_counter()
    row = distribution(logits, params)[0]
    sample(row, np.random.default_rng(0))
    assert time.perf_counter() - start < 0.1
    assert all(size < 40_000 for size in sorted_sizes)
    np.testing.assert_allclose(row.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(VocabtrimError, match="not finite"):
        distribution(np.array([bad], np.float32), SamplingParams(1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(VocabtrimError, match=next(iter(wrong))) as caught:
        SamplingParams(**wrong)
    assert "\n" not in str(caught.value)


class Scripted:
    """Stands in for a Generator: `random()` gives the next of `numbers`."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_a_sample_is_where_the_running_sum_passes_the_uniform_number(size, uniform, seed):
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < 0.2)).astype(np.float32)
    weights[rng.integers(size)] = 1
    index = sample(weights, Scripted(uniform))
    sums = np.concatenate([[0], weights.cumsum(dtype=np.float64)])
    assert weights[index] > 0
    assert sums[index] - 1e-6 <= uniform * sums[-1] <= sums[index + 1] + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_uniform_number_draws_the_last_possible_token(seed):
    weights = np.zeros(1000, np.float32)
    weights[:300] = np.exp(-30 * np.random.default_rng(seed).random(300))  # so far apart that sums round
    assert sample(weights, Scripted(1 - 2**-53)) == 299
