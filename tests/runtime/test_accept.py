import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bundle.vocab_map import VocabMap
from runtime.accept import Accepted, accept_greedy, accept_sampled, residual


class Scripted:
    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@pytest.mark.parametrize(
    ("draft", "accepted"),
    [
        ([], Accepted(0, 7)),
        ([7, 8, 9], Accepted(3, 5)),
        ([7, 0, 9], Accepted(1, 8)),
        ([0, 8, 9], Accepted(0, 7)),
    ],
)
def test_greedy_keeps_the_prefix_on_which_both_agree(draft, accepted):
    assert accept_greedy(draft, np.array([7, 8, 9, 5])[: len(draft) + 1]) == accepted


@st.composite
def pairs(draw):
    """p over n tokens, q over a drafter's rows, and its map or None: trimmed, equal, narrower or wider heads."""
    n = draw(st.integers(2, 12))
    kind = draw(st.sampled_from(["trimmed", "trimmed beyond p", "full", "narrower", "wider"]))
    width = {"narrower": n - 1, "wider": n + 2, "trimmed beyond p": n + 3}.get(kind, n)
    vocab_map = None
    if kind.startswith("trimmed"):
        vocab_map = VocabMap.from_ids(draw(st.sets(st.integers(0, width - 1), min_size=1)), width)
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 5.0]))
    p = np.exp(sharpness * rng.standard_normal(n)) * (rng.random(n) < 0.8)
    p[rng.integers(n)] += 0.5
    q = np.exp(sharpness * rng.standard_normal(len(vocab_map or range(width))))
    return (p / p.sum()).astype(np.float32), (q / q.sum()).astype(np.float32), vocab_map


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_the_law_of_what_comes_out_is_p(pair):
    """Σ q·accept + P(reject)·residual is p, and the code accepts exactly where u < p/q."""
    p, q, vocab_map = pair
    ids = np.arange(len(q)) if vocab_map is None else vocab_map.kept_token_ids
    p_kept = np.array([p[token] if token < len(p) else 0.0 for token in ids])
    accept = np.minimum(1, p_kept / q)
    rejects = 1 - float((q * accept).sum())
    law = np.zeros(len(p))
    inside = ids < len(p)
    law[ids[inside]] += (q * accept)[inside]
    left = residual(p, q, vocab_map).astype(np.float64)
    law += rejects * left / left.sum()
    assert 0.5 * np.abs(law - p).sum() < 1e-6

    bonus = np.eye(len(p), dtype=np.float32)[0]
    for token, ratio in zip(ids.tolist(), accept.tolist(), strict=True):
        if ratio > 1e-3:
            u = min(ratio * (1 - 1e-6), 1 - 2**-53)
            assert accept_sampled([token], [q], [p, bonus].__getitem__, vocab_map, Scripted(u, 0.5)) == Accepted(1, 0)
        if ratio < 1 - 1e-3:
            u = ratio * (1 + 1e-6) if ratio else 0.0
            outcome = accept_sampled([token], [q], [p, bonus].__getitem__, vocab_map, Scripted(u, 0.5))
            assert outcome.count == 0
            assert outcome.next_token != token
            assert p[outcome.next_token] > 0


def test_without_a_draft_the_next_token_is_the_targets():
    p = np.array([[0.0, 0.25, 0.75]], np.float32)
    assert accept_sampled([], [], p.__getitem__, None, Scripted(0.2)) == Accepted(0, 1)
    assert accept_sampled([], [], p.__getitem__, None, Scripted(0.3)) == Accepted(0, 2)
