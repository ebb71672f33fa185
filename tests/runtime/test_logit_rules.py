"""Rules on logits: transformers' processors are the definition, and speculation leaves them as they are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from engines.arguments import LARGEST
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from engines.generation_rules import GenerationRules
from runtime import SamplingParams, SpeculativeDecoder
from runtime.logit_rules import Columns, LogitRules
from runtime.logprobs import token_logprobs
from runtime.sampling import distribution
from runtime.verification.greedy import verify
from runtime.verification.sampled import verify_sampling

EOS, VOCAB = 1, 48
CONFIG = GenerationRules(
    repetition_penalty=1.3,
    no_repeat_ngram_size=2,
    bad_words_ids=((4,), (5, 6), (7, 8, 9), (EOS,)),
    min_length=9,
    min_new_tokens=3,
    suppress_tokens=(10, 11),
    begin_suppress_tokens=(12,),
)


def processors(rules, prompt_length, bias):
    made = theirs.LogitsProcessorList()
    if bias:
        made.append(theirs.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    made.append(theirs.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    if rules.no_repeat_ngram_size:
        made.append(theirs.NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    made.append(theirs.NoBadWordsLogitsProcessor([list(word) for word in rules.bad_words_ids], [EOS]))
    made.append(theirs.MinLengthLogitsProcessor(rules.min_length, [EOS]))
    made.append(theirs.MinNewTokensLengthLogitsProcessor(prompt_length, rules.min_new_tokens, [EOS]))
    made.append(theirs.SuppressTokensLogitsProcessor(list(rules.suppress_tokens)))
    made.append(theirs.SuppressTokensAtBeginLogitsProcessor(list(rules.begin_suppress_tokens), prompt_length))
    return made


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([0, 4, 5, 6, 7, 8, 12, 20]), min_size=1, max_size=90),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ngram=st.integers(0, 3),
    bias=st.sampled_from([{}, {5: 2.0, 30: -3.0}]),
    kept=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1),
)
def test_rules_are_those_of_transformers_after_any_text_and_draft(make_target, tokens, cuts, ngram, bias, kept):
    """A text that grows in blocks; before each, drafts of another content are looked at and taken back."""
    rules = replace(CONFIG, no_repeat_ngram_size=ngram)
    target = replace(make_target().manifest, rules=rules)
    prompt, output = tokens[: max(1, len(tokens) // 3)], tokens[max(1, len(tokens) // 3) :]
    mine = LogitRules(SamplingParams(logit_bias=bias), target, prompt)
    vocab_map = None if kept is None else VocabMap.from_ids(kept, VOCAB)
    columns = slice(None) if kept is None else vocab_map.kept_token_ids
    head = Columns(VOCAB if kept is None else len(vocab_map), vocab_map)
    rng, done = np.random.default_rng(len(tokens)), 0
    made = processors(rules, len(prompt), bias)
    for cut in [*cuts, len(output)]:
        for draft in ([], output[done : done + cut], [20, 4, 5], [20]):
            row = 3 * rng.standard_normal(VOCAB, np.float32)
            text = torch.tensor([[*prompt, *output[:done], *draft]])
            expected = made(text, torch.from_numpy(row[None]))[0].numpy()[columns]
            before = row.copy()
            np.testing.assert_allclose(mine.apply(row[columns], draft, head), expected, rtol=1e-6)
            np.testing.assert_array_equal(row, before)
        mine.extend(output[done : done + cut])
        done = min(len(output), done + cut)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)])
def test_an_enormous_repetition_penalty_gives_the_values_of_transformers(make_target, penalty):
    """Infinite ones among them, and no warning."""
    row, text = np.linspace(-40, 40, VOCAB, dtype=np.float32), list(range(2, VOCAB))
    rules = LogitRules(SamplingParams(repetition_penalty=penalty), make_target().manifest, text)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), torch.from_numpy(row[None]))
    assert expected.isinf().any()
    np.testing.assert_array_equal(rules.apply(row, [], Columns(VOCAB)), expected[0].numpy())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"frequency_penalty": LARGEST}, [-LARGEST, -np.inf, 1.0, -1.0]),  # of tokens that occur once, twice, never
        ({"frequency_penalty": -LARGEST}, [LARGEST, np.inf, 1.0, -1.0]),
        ({"frequency_penalty": LARGEST, "presence_penalty": -LARGEST}, [1.0, -LARGEST, 1.0, -1.0]),
        ({"frequency_penalty": -LARGEST, "repetition_penalty": LARGEST}, [LARGEST, -np.inf, 1.0, -LARGEST]),
        ({"logit_bias": {2: LARGEST, 3: -LARGEST}}, [LARGEST, -LARGEST, 1.0, -1.0]),
    ],
)
def test_enormous_penalties_and_biases_give_no_nan_and_no_warning(make_target, params, expected):
    rules = LogitRules(SamplingParams(**params), make_target().manifest, [5])
    rules.extend([2, 3, 3])
    row = np.ones(VOCAB, np.float32)
    row[[3, 5]] = -1e3, -1.0
    np.testing.assert_array_equal(rules.apply(row, [], Columns(VOCAB))[2:6], expected)


@pytest.mark.filterwarnings("error")
def test_an_enormous_bias_decides_and_an_infinite_logit_is_refused(make_target, make_drafter):
    def generate(**params):
        decoder = SpeculativeDecoder(make_target(eos_bias=-100.0), make_drafter(), draft_length=4)
        return decoder.generate([5], max_new_tokens=9, sampling=SamplingParams(0.5, seed=1, **params)).token_ids

    assert generate(logit_bias={7: LARGEST, 8: -LARGEST}) == (7,) * 9
    assert len(set(generate(repetition_penalty=LARGEST, frequency_penalty=LARGEST))) == 9
    with pytest.raises(VocabtrimError, match="make a logit infinite: give presence_penalty"):
        generate(frequency_penalty=-LARGEST)


@pytest.mark.parametrize("min_p", [0.05, 0.5, 1.0])
def test_min_p_is_that_of_transformers(min_p):
    logits = 2 * np.random.default_rng(3).standard_normal((2, 500), np.float32)
    scores = theirs.TopPLogitsWarper(0.9)(None, theirs.TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits)))
    expected = theirs.MinPLogitsWarper(min_p)(None, scores).softmax(-1).numpy()
    np.testing.assert_allclose(distribution(logits, SamplingParams(0.7, top_p=0.9, min_p=min_p)), expected, rtol=1e-5)


def plain(engine, prompt, new, params):
    """Greedy decoding under rules without cache, drafter or rounds, by transformers' processors."""
    rules = params.rules(engine.manifest.rules)
    made = processors(replace(rules, bad_words_ids=rules.bad_words_ids or ((47,),)), len(prompt), params.logit_bias)
    text = list(prompt)
    while len(text) < len(prompt) + new and text[-1] != EOS:
        text.append(int(made(torch.tensor([text]), torch.from_numpy(engine.logits(text)[None])).argmax()))
    return tuple(text[len(prompt) :])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    noise=st.sampled_from([0.0, 1.0]),
    kept=st.sampled_from([None, range(0, 48, 2), [4, 10]]),
    draft_length=st.integers(1, 6),
    eos_bias=st.sampled_from([-100.0, 3.0]),
)
def test_greedy_output_under_rules_is_the_targets_own(
    make_target, make_drafter, seed, noise, kept, draft_length, eos_bias
):
    """[4, 10]: a drafter that has only tokens which the rules forbid drafts nothing."""
    target, drafter = make_target(seed=seed, eos_bias=eos_bias, rules=CONFIG), make_drafter(kept, noise)
    drafter.seed, drafter.eos_bias = seed, eos_bias
    params = SamplingParams(logit_bias={20: 1.0, 7: 2.0}, min_new_tokens=5)
    result = SpeculativeDecoder(target, drafter, draft_length=draft_length).generate(
        [5, 6, 5], max_new_tokens=20, sampling=params
    )
    assert result.token_ids == plain(target, [5, 6, 5], 20, params)
    assert EOS not in result.token_ids[:5]
    if kept == [4, 10]:
        assert result.stats.drafted == 0
    if noise == 0 and kept is None:
        assert result.stats.accepted == result.stats.drafted


def test_no_engine_drafts_or_judges_by_itself_under_rules(make_target, make_drafter, monkeypatch):
    target, drafter = make_target(rules=CONFIG), make_drafter()
    drafter.unrolled, asked = 4, []
    monkeypatch.setattr(target, "speculate", lambda *given: asked.append("speculate"))
    monkeypatch.setattr(drafter, "draft", lambda *given: asked.append("draft"))
    decoder = SpeculativeDecoder(target, drafter, draft_length=4)
    decoder.generate([5], max_new_tokens=9)
    decoder.generate([5], max_new_tokens=9, sampling=SamplingParams(1.0, seed=1))
    assert not asked
    target.manifest = make_target().manifest
    decoder.generate([5], max_new_tokens=9)
    assert {*asked} == {"speculate", "draft"}


def test_verify_judges_by_the_rules(make_target, make_drafter, monkeypatch):
    decoder = SpeculativeDecoder(make_target(rules=CONFIG), make_drafter(range(0, 48, 2)), draft_length=4)
    report = verify(decoder, [[5, 6, 7]], max_new_tokens=30)
    assert report.prompts[0].verdict == "equal"
    sampled = verify_sampling(decoder, [[5, 6, 7]], [SamplingParams(1.0, seed=3, presence_penalty=1.0)], draws=600)
    assert sampled.passed
    monkeypatch.setattr(LogitRules, "extend", lambda self, tokens: None)  # the text never grows
    assert verify(decoder, [[5, 6, 7]], max_new_tokens=30).passed is False
    sharp = [SamplingParams(0.7, seed=3, presence_penalty=3.0, no_repeat_ngram_size=0)]
    assert verify_sampling(decoder, [[5, 6, 7]], sharp, draws=600).passed is False


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"repetition_penalty": 1e308}, "repetition_penalty is 1e\\+308: give a number above 0 and up to 3.4e\\+38"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 is nan"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"logit_bias": {48: 1.0}}, "logit_bias names token 48"),
        ({"suppress_tokens": [-1]}, "suppress_tokens names token -1"),
        ({"suppress_tokens": range(48)}, "the rules forbid every token"),
        ({"suppress_tokens": "56"}, "suppress_tokens is '56'"),
        ({"suppress_tokens": [5.9]}, "a token id of suppress_tokens is 5.9: give a whole number"),
        ({"logit_bias": {5.7: 1.0}}, "a token id of logit_bias is 5.7"),
        ({"logit_bias": {5: None}}, "logit_bias of token 5 is None: give a number"),
        ({"logit_bias": {5: 1e39}}, "logit_bias of token 5 is 1e\\+39"),
        ({"logit_bias": None}, "logit_bias is None"),
        ({"presence_penalty": 1e39}, "presence_penalty is 1e\\+39"),  # infinite in float32, and NaN times no occurrence
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
        ({"temperature": "0.8"}, "temperature is '0.8': give a number"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": None}, "top_p is None: give a number"),
        ({"top_k": 1.5}, "top_k is 1.5: give a whole number"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"min_new_tokens": float("nan")}, "min_new_tokens is nan"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_rules_out_of_range_are_refused_in_one_line(make_target, wrong, message):
    with pytest.raises(VocabtrimError, match=message) as caught:
        SpeculativeDecoder(make_target()).generate([5], sampling=SamplingParams(**wrong))
    assert "\n" not in str(caught.value)


def test_scalars_of_other_libraries_and_ids_as_text_are_numbers():
    given = SamplingParams(np.float32(0.5), np.int64(3), seed=torch.tensor(7), logit_bias={"5": np.float64(2)})
    assert given == SamplingParams(0.5, 3, seed=7, logit_bias={5: 2.0})
    assert [type(value) for value in (given.temperature, given.top_k, given.seed)] == [float, int, int]


def test_a_sequence_with_a_negative_id_is_refused():
    with pytest.raises(VocabtrimError, match="bad_words_ids has a negative token id"):
        GenerationRules(bad_words_ids=((5, -1),))  # as an index it would forbid the last token of the vocabulary


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0, seed=2, presence_penalty=2.0)])
def test_logprobs_are_the_models_log_softmax(make_target, make_drafter, sampling):
    decoder = SpeculativeDecoder(make_target(), make_drafter(noise=0.3), draft_length=4)
    result = decoder.generate([5, 6], max_new_tokens=15, sampling=sampling, logprobs=3)
    text = [5, 6]
    for token, found in zip(result.token_ids, result.logprobs, strict=True):
        expected = torch.from_numpy(decoder.target.logits(text)).log_softmax(-1)
        assert (found.token_id, found.logprob) == (token, pytest.approx(float(expected[token]), abs=1e-5))
        best = expected.topk(3)
        assert [each for each, _ in found.top] == best.indices.tolist()
        np.testing.assert_allclose([value for _, value in found.top], best.values, atol=1e-5)
        text.append(token)
    streamed = list(decoder.stream([5, 6], max_new_tokens=15, sampling=sampling, logprobs=3))
    assert tuple(token.logprob for token in streamed) == result.logprobs
    assert decoder.generate([5, 6], max_new_tokens=2, logprobs=True).logprobs[0].top == ()
    assert decoder.generate([5, 6], max_new_tokens=2).logprobs is None
    with pytest.raises(VocabtrimError, match="logprobs is -1"):
        decoder.stream([5], logprobs=-1)


def test_of_equally_likely_alternatives_the_smaller_ids_come_first():
    (found,) = token_logprobs(np.array([[0, 1, 1, 1, -5]], np.float32), [4], 2)
    assert [token for token, _ in found.top] == [1, 2]
