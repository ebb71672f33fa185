"""Decoding under a constraint is plain decoding of the masked target: by computation of laws, and token by token."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.adaptive_length import AdaptiveLength
from runtime.loop import decode_rounds
from runtime.round_costs import GivenCosts
from runtime.sampling import distribution
from tests.runtime.conftest import EOS, VOCAB
from tests.runtime.test_exact_law import MAPS, SlottedDrafter, bare, every_way, rows_outside, ruled, total_variation

__all__ = ["rows_outside"]  # a fixture


class ByRule:
    """Allows the tokens rule(output so far); it is told of no other token, but for what follows an EOS."""

    def __init__(self, rule, size):
        self.rule, self.size, self.output = rule, size, []

    def allowed(self):
        mask = np.zeros(self.size, bool)
        mask[[*self.rule(self.output)]] = True
        return mask

    def advance(self, token):
        assert EOS in self.output or token in self.rule(self.output)
        self.output.append(token)

    def rewind(self, count):
        assert 0 <= count <= len(self.output)
        del self.output[len(self.output) - count :]

    def fitting(self, tokens):
        output = list(self.output)
        for count, token in enumerate(tokens):
            if token not in self.rule(output):
                return count
            output.append(token)
        return len(tokens)


def random_rule(seed, size, share):
    """Each token may follow a text with the chance `share`, and always at least one."""

    def rule(output):
        rng = np.random.Generator(np.random.PCG64([seed, *output]))  # `every_way` replaces default_rng
        return {int(rng.integers(size)), *np.flatnonzero(rng.random(size) < share).tolist()}

    return rule


def masked_law(logits_by_last, prompt, params, rule, length):
    """The law of up to `length` tokens: the mask, then the rules, then temperature and the like."""
    law, stack = defaultdict(float), [((), 1.0)]
    while stack:
        output, chance = stack.pop()
        if len(output) == length or EOS in output:
            law[output] += chance
            continue
        row = np.full(3, -np.inf, np.float32)
        allowed = [*rule(output)]
        row[allowed] = logits_by_last[(*prompt, *output)[-1]][allowed]
        p = distribution(ruled(row, prompt, output, params)[None], params)[0]
        stack += [((*output, token), chance * float(p[token])) for token in range(3) if p[token] > 0]
    return law


SAMPLINGS = {
    "plain": SamplingParams(1.0),
    "top-k": SamplingParams(0.5, top_k=2),
    "top-p": SamplingParams(2.0, top_p=0.8),
    "penalties": SamplingParams(0.8, logit_bias={0: 1.5}, repetition_penalty=1.7, presence_penalty=0.4, min_p=0.1),
}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    draft_length=st.integers(1, 3),
    drafter=st.sampled_from([*MAPS, "slots"]),
    share=st.sampled_from([0.2, 0.6]),
    params=st.sampled_from(list(SAMPLINGS)),
    prompt=st.sampled_from([[0], [0, 2] * 9]),
    is_adaptive=st.booleans(),
)
def test_the_law_of_whole_generations_is_the_masked_targets(
    make_target, make_drafter, rows_outside, seed, draft_length, drafter, share, params, prompt, is_adaptive
):
    """Any drafter: trimmed, with slots, or a prompt's repetitions, as adaptive lengths draft them."""
    rng, params, rule = np.random.default_rng(seed), SAMPLINGS[params], random_rule(seed, 3, share)
    mine, its = (2 * rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    target = bare(make_target(rows=3), mine, None)
    if drafter == "slots":
        engine = SlottedDrafter(make_drafter([0], rows=3), its, rows_outside([0]), 1)
    else:
        engine = bare(make_drafter(MAPS[drafter], rows=3), its, MAPS[drafter])
    law = defaultdict(float)
    for way in every_way():
        length = AdaptiveLength(3, costs=GivenCosts(step=0.4, row=0.02)) if is_adaptive else draft_length
        rounds = decode_rounds(
            target,
            engine,
            prompt,
            max_new_tokens=4,
            draft_length=length,
            sampling=params,
            constraint=ByRule(rule, 3),
        )
        law[tuple(token for entry in rounds for token in entry.tokens)] += way.weight
    assert total_variation(law, masked_law(mine, prompt, params, rule, 4)) < 1e-6


def plain_greedy(engine, prompt, new, rule):
    """The definition, without cache, drafter or rounds, and the log-probabilities of all tokens at each position."""
    text, laws = list(prompt), []
    while len(text) < len(prompt) + new and text[-1] != EOS:
        row = torch.full((VOCAB,), -torch.inf)
        allowed = sorted(rule(text[len(prompt) :]))
        row[allowed] = torch.from_numpy(engine.logits(text))[allowed]
        laws.append(row.log_softmax(-1))
        text.append(int(row.argmax()))
    return text[len(prompt) :], laws


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kept=st.none() | st.sets(st.integers(0, 47), min_size=1),
    rows=st.sampled_from([46, 48, 50]),
    noise=st.sampled_from([0.0, 0.5, 2.0]),
    draft_length=st.integers(1, 7) | st.just("adaptive"),
    share=st.sampled_from([0.0, 0.1, 0.7]),
    prompt=st.sampled_from([[5, 6, 7], [5, 6, 7, 8] * 4]),
)
def test_greedy_output_is_the_masked_targets_own(
    make_target, make_drafter, seed, kept, rows, noise, draft_length, share, prompt
):
    """share = 0: one token is possible everywhere, and what the prompt repeats mostly is not."""
    target = make_target(seed=seed, eos_bias=2.0)
    drafter = make_drafter(kept, noise, rows=48 if kept else rows)
    drafter.seed, drafter.eos_bias, rule = seed, 2.0, random_rule(seed, VOCAB, share)
    length = AdaptiveLength(6, costs=GivenCosts(step=0.2, row=0.02)) if draft_length == "adaptive" else draft_length
    rounds = list(
        decode_rounds(
            target,
            drafter,
            prompt,
            max_new_tokens=20,
            draft_length=length,
            logprobs=3,
            constraint=ByRule(rule, VOCAB),
        )
    )
    expected, laws = plain_greedy(target, prompt, 20, rule)
    assert [token for entry in rounds for token in entry.tokens] == expected
    entries = [each for entry in rounds for each in entry.logprobs]
    for token, entry, law in zip(expected, entries, laws, strict=True):
        assert (entry.token_id, entry.logprob) == (token, pytest.approx(float(law[token]), abs=1e-5))
        tops = law.topk(min(3, int(law.isfinite().sum())))
        np.testing.assert_allclose([value for _, value in entry.top], tops.values, atol=1e-5)
    if noise == 0 and kept is None and rows == 48 and draft_length != "adaptive":
        assert all(entry.accepted == entry.drafted for entry in rounds)


def test_a_drafter_without_an_allowed_row_drafts_nothing(make_target, make_drafter):
    """The token of its row 0 is 3: that token 0 is allowed says nothing of it."""
    rounds = list(
        decode_rounds(
            make_target(),
            make_drafter([3, 4]),
            [5],
            max_new_tokens=9,
            draft_length=4,
            constraint=ByRule(lambda _: [0, 2], VOCAB),
        )
    )
    assert [entry.drafted for entry in rounds] == [0] * 9
    assert {token for entry in rounds for token in entry.tokens} <= {0, 2}


def test_no_engine_drafts_or_judges_by_itself(make_target, make_drafter, monkeypatch):
    target, drafter = make_target(), make_drafter()
    drafter.unrolled = 4
    for engine, method in ((target, "speculate"), (drafter, "draft")):
        monkeypatch.setattr(engine, method, lambda *_: pytest.fail("a device knows no mask"))
    for sampling in (SamplingParams(), SamplingParams(1.0, seed=1)):
        list(
            decode_rounds(
                target,
                drafter,
                [5],
                max_new_tokens=9,
                draft_length=4,
                sampling=sampling,
                constraint=ByRule(lambda _: range(10, 20), VOCAB),
            )
        )


def test_rules_that_leave_nothing_of_what_is_allowed_are_named(make_target):
    constraint = ByRule(lambda output: [7] if len(output) < 2 else [EOS], VOCAB)
    rounds = decode_rounds(
        make_target(),
        None,
        [5],
        max_new_tokens=9,
        draft_length=1,
        sampling=SamplingParams(min_new_tokens=4),
        constraint=constraint,
    )
    with pytest.raises(VocabtrimError, match=r"forbid every token: .*JSON schema"):
        list(rounds)
