"""The verdicts of `verify` on right and on wrong loops."""

import json

import numpy as np
import pytest

import runtime.rules
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from runtime.accept import Accepted, accept_greedy
from runtime.verification.differences import differences, tolerance
from runtime.verification.greedy import verify
from runtime.verification.teacher_forcing import GivenText, stepped_logits, teacher_forced_logits

PROMPTS = [[5, 6, 7], [9]]


@pytest.fixture
def decoder(make_target, make_drafter):
    return SpeculativeDecoder(make_target(), make_drafter(range(0, 48, 2)), draft_length=4)


@pytest.mark.parametrize("max_keep", [1, 2, 5, 256])
@pytest.mark.parametrize("prompt", [[5, 6, 7], [9]])
@pytest.mark.parametrize("new", [1, 2, 11])
def test_forced_logits_are_those_after_each_prefix(make_target, max_keep, prompt, new):
    engine, tokens = make_target(), list(range(20, 20 + new))
    engine.max_keep = max_keep
    engine.feed([1, 2, 3])
    expected = np.stack([engine.logits([*prompt, *tokens[:i]]) for i in range(new)])
    text = GivenText(prompt, tokens)
    np.testing.assert_array_equal(teacher_forced_logits(engine, text), expected)
    engine.fed.clear()
    np.testing.assert_array_equal([row.copy() for row in stepped_logits(engine, text)], expected)
    assert engine.fed == [len(prompt)] + [1] * (new - 1)


def test_a_right_loop_is_equal(decoder):
    report = verify(decoder, PROMPTS, max_new_tokens=30)
    assert [prompt.verdict for prompt in report.prompts] == ["equal", "equal"]
    assert [prompt.tokens for prompt in report.prompts] == [30, 30]
    written = json.loads(json.dumps(report.to_dict()))
    assert written["passed"] is True
    first = written["prompts"][0]
    assert (first["differences"], first["target_only"], first["deviation"]) == ([], [], None)
    assert (first["step_deviation"], first["is_one_model"], written["is_independent"]) == (0, True, False)
    with pytest.raises(VocabtrimError, match="at least one prompt"):
        verify(decoder, [])


def test_the_distance_of_a_references_logits_is_stated_in_roundings(decoder):
    """One logit of each row off by 2⁻²⁰ of the row's largest: 8 epsilons of float32."""

    def predict(text):
        rows = teacher_forced_logits(decoder.target, text)
        rows[:, 2] += 2**-20 * np.abs(rows).max(axis=1)
        return rows

    report = verify(decoder, PROMPTS, max_new_tokens=9, predict=predict, reference="another")
    assert [prompt.deviation for prompt in report.prompts] == [pytest.approx(8, abs=1)] * 2
    assert (report.reference, report.is_independent, report.passed) == ("another", True, True)


def one_more(draft, verified):
    right = accept_greedy(draft, verified)
    return right if right.count == len(draft) else Accepted(right.count + 1, int(verified[right.count + 1]))


def row_before(draft, verified):
    right = accept_greedy(draft, verified)
    return Accepted(right.count, int(verified[max(0, right.count - 1)]))


def drafted_instead(draft, verified):
    right = accept_greedy(draft, verified)
    return Accepted(right.count, draft[right.count]) if right.count < len(draft) else right


@pytest.mark.parametrize("wrong", [one_more, row_before, drafted_instead])
def test_a_wrong_loop_is_different(decoder, monkeypatch, wrong):
    monkeypatch.setattr(runtime.rules, "accept_greedy", wrong)
    report = verify(decoder, PROMPTS, max_new_tokens=30)
    assert not report.passed
    found = report.prompts[0].differences[0]
    assert found.verdict == "different"
    assert found.gap > found.tolerance > 0


def test_one_wrong_token_does_not_spoil_the_rest(decoder):
    engine = decoder.target
    before = decoder.generate(PROMPTS[0], max_new_tokens=10).token_ids
    start = [*PROMPTS[0], *before, 40]
    tokens = (*before, 40, *decoder.generate(start, max_new_tokens=10).token_ids)
    (found,) = differences(teacher_forced_logits(engine, GivenText(PROMPTS[0], tokens)), tokens, engine.manifest)
    assert (found.position, found.found) == (10, 40)


def test_what_rounding_explains_is_a_near_tie_and_is_listed(make_target):
    """The tolerance is for float32 and one layer: 4 · 2⁻²³ · 16, about 7.6e-6."""
    manifest = make_target().manifest
    rows = np.full((4, 48), -16, np.float32)
    rows[:, 7] = 4
    rows[:, 3] = np.float32(4) - np.array([7e-6, 9e-6, 0.5, 1], np.float32)
    rows[3, 9] = np.nan
    assert tolerance(rows[0], manifest) == 4 * 2**-23 * 16
    found = differences(rows, [3, 3, 7, 3], manifest)
    assert [(each.position, each.verdict) for each in found] == [(0, "near-tie"), (1, "different"), (3, "different")]
    assert [(each.found, each.expected) for each in found[:2]] == [(3, 7)] * 2


@pytest.fixture
def one_at_a_time_otherwise(monkeypatch):
    """one_at_a_time_otherwise(engine, change): calls on one token give logits that `change(logits)` has changed."""

    def install(engine, change):
        feed = engine.feed

        def otherwise(token_ids, keep=1):
            output = feed(token_ids, keep)
            if len(token_ids) == 1:
                change(output.logits[0])
                output.token_ids[0] = output.logits[0].argmax()
            return output

        monkeypatch.setattr(engine, "feed", otherwise)

    return install


@pytest.mark.parametrize("alone", [False, True])
def test_a_target_that_chooses_otherwise_one_token_at_a_time_is_different(
    alone, decoder, make_target, one_at_a_time_otherwise
):
    """It is two models, and what it verifies is not what it generates alone. A loop without a drafter shows it, too."""

    def favour(logits):
        logits[20] = logits.max() + 0.5

    decoder = SpeculativeDecoder(make_target()) if alone else decoder
    one_at_a_time_otherwise(decoder.target, favour)
    report = verify(decoder, PROMPTS[:1], max_new_tokens=30)
    (prompt,) = report.prompts
    assert not report.passed
    assert prompt.verdict == "different"
    found = prompt.differences if alone else prompt.target_only
    assert {(each.found if alone else each.expected) for each in found} == {20}
    assert all(each.verdict == "different" for each in found)
    assert {each.position for each in found} <= set(range(1, 30))
    assert not prompt.is_one_model


def test_a_target_whose_logits_depend_on_the_tokens_at_once_is_different_though_no_token_is(
    decoder, one_at_a_time_otherwise
):
    """Half of what the limit allows, and twice of it: 64 roundings a layer, of one layer."""
    for share, verdict in [(0.5, "equal"), (2, "different")]:

        def sink(logits, share=share):
            least = logits.argmin()
            logits[least] -= share * 64 * 2**-23 * abs(logits).max()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder.target, "feed", decoder.target.feed)
            one_at_a_time_otherwise(decoder.target, sink)
            (prompt,) = verify(decoder, PROMPTS[:1], max_new_tokens=6).prompts
        assert (prompt.verdict, prompt.differences, prompt.target_only) == (verdict, (), ())
        assert prompt.step_limit == 64


@pytest.mark.parametrize(
    ("tokens", "finish", "message"),
    [((8, 1, 9), "length", "an EOS at position 1"), ((8, 9), "length", "ended after 2 of 3 tokens")],
)
def test_a_generation_that_ends_in_the_wrong_place_is_different(decoder, monkeypatch, tokens, finish, message):
    result = decoder.generate(PROMPTS[0], max_new_tokens=3)
    changed = type(result)("", tokens, finish, result.stats)
    monkeypatch.setattr(decoder, "generate", lambda *given, **how: changed)
    rows = np.eye(48, dtype=np.float32)[list(tokens)]
    report = verify(decoder, PROMPTS[:1], max_new_tokens=3, predict=lambda _text: rows)
    assert report.prompts[0].verdict == "different"
    assert message in report.prompts[0].ending


def test_generations_end_at_an_eos_or_at_the_end_of_the_context(make_target, make_drafter):
    for target in (make_target(eos_bias=2.0), make_target(context=16)):
        decoder = SpeculativeDecoder(target, make_drafter(noise=0.5), draft_length=4)
        report = verify(decoder, [[seed, 4] for seed in range(8)], max_new_tokens=40)
        assert all(prompt.verdict == "equal" for prompt in report.prompts)
        assert all(prompt.tokens < 40 for prompt in report.prompts)


def test_greedy_settings_are_no_distribution(decoder):
    from runtime.verification.sampled import verify_sampling

    with pytest.raises(VocabtrimError, match="above 0"):
        verify_sampling(decoder, PROMPTS, [SamplingParams()])
