import json
from itertools import product

import numpy as np
import pytest
import tokenizers

from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from runtime.stop_strings import StopStrings


@pytest.fixture
def tokenizer():
    """Byte-level, one token a byte, so that most generations break characters; EOS is special."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[-46:]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}aa"
    return Tokenizer(backend, {}, template)


@pytest.mark.parametrize("seed", range(5))
def test_streamed_texts_join_to_the_final_text(make_target, make_drafter, tokenizer, seed):
    with SpeculativeDecoder(
        make_target(seed=seed, eos_bias=0.0), make_drafter(noise=2.0), tokenizer, draft_length=4
    ) as decoder:
        stream = decoder.stream("aaa", max_new_tokens=30)
        tokens = list(stream)
        result = stream.finish()
        again = decoder.generate("aaa", max_new_tokens=30)
    assert "".join(token.text for token in tokens) == result.text == tokenizer.decode(result.token_ids)
    assert "\ufffd" in result.text  # the case is hard: bytes that are no character
    assert tuple(token.id for token in tokens) == result.token_ids == again.token_ids
    assert stream.stats.tokens == len(tokens)
    assert decoder.target.closed
    assert decoder.drafter.closed


@pytest.fixture
def letters():
    """Tokens of one to three letters, of five kinds only: strings repeat, and lie across tokens."""
    parts = ["a", "</s>", *("".join(part) for size in (1, 2, 3) for part in product("abcde", repeat=size))]
    vocabulary = {part: i for i, part in enumerate(dict.fromkeys(parts)) if i < 48}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, None)


@pytest.mark.parametrize("draft_length", [1, 3, 6])
def test_a_stop_string_ends_the_text_wherever_a_block_ends(make_target, letters, draft_length):
    """Every string of the text in turn, with a drafter that is always right: all but the first token come in blocks."""
    whole = SpeculativeDecoder(make_target(), tokenizer=letters).generate([0], max_new_tokens=24)
    ids, text = whole.token_ids, whole.text
    decoder = SpeculativeDecoder(make_target(), make_target(), letters, draft_length)
    strings = {text[at : at + length] for at in range(len(text)) for length in (1, 2, 5)}
    assert len(strings) > 40
    cut_blocks = 0
    for string in sorted(strings):
        stream = decoder.stream([0], max_new_tokens=24, stop=["never", string])
        streamed = "".join(token.text for token in stream)
        result = stream.finish()
        completed = next(count for count in range(25) if string in letters.decode(ids[:count]))
        assert streamed == result.text == text[: text.index(string)]
        assert (result.finish_reason, result.token_ids) == ("stop", ids[:completed])
        assert result.stats.tokens == completed
        cut_blocks += (completed - 1) % (draft_length + 1) != 0
    assert cut_blocks > 10


def test_a_stop_that_is_no_string_is_refused():
    with pytest.raises(VocabtrimError, match="stop is 5: give a string"):
        StopStrings(5)


def test_of_two_stop_strings_in_one_piece_the_one_that_begins_first_counts():
    assert StopStrings(["b", "ab"]).push("xab", "xab", is_last=False) == ("x", True)
    assert StopStrings(["ab", "b"]).push("xab", "xab", is_last=False) == ("x", True)


@pytest.mark.parametrize(
    ("stop", "text", "at"),
    [("</s>", "aba", 3), (["x", "</s>"], "aba", 3), ("s>b", "aba", 4), ("ba</s>b", "a", 4), ("a</", "ab", 3)],
)
def test_a_stop_string_meets_special_tokens_which_are_not_shown(letters, stop, text, at):
    backend = letters.backend
    ids = [backend.token_to_id(token) for token in ("a", "b", "a", "</s>", "b", "a")]
    strings, shown, whole = StopStrings(stop), letters.stream(), letters.stream(skip_special_tokens=False)
    given = [strings.push(whole.push(token), shown.push(token), is_last=False) for token in ids]
    ends = next(index for index, (_, stopped) in enumerate(given) if stopped)
    assert ("".join(text for text, _ in given[: ends + 1]), ends) == (text, at)


def test_a_plain_string_is_one_stop(make_target, letters):
    decoder = SpeculativeDecoder(make_target(), tokenizer=letters)
    whole = decoder.generate([0], max_new_tokens=24)
    string = whole.text[5:8]
    assert decoder.generate([0], max_new_tokens=24, stop=string).text == whole.text[: whole.text.index(string)]
    assert decoder.generate([0], max_new_tokens=24, stop=None).text == whole.text
    for stop, message in (("", "empty"), ([""], "empty"), ([3], "int, not text")):
        with pytest.raises(VocabtrimError, match=message):
            decoder.stream([0], stop=stop)


def test_text_that_only_begins_like_a_stop_string_is_given_out(make_target, letters):
    decoder = SpeculativeDecoder(make_target(), make_target(), letters, draft_length=4)
    whole = decoder.generate([0], max_new_tokens=24)
    for at in range(len(whole.text)):  # the last ones are still held back when generation ends
        stream = decoder.stream([0], max_new_tokens=24, stop=[whole.text[at:] + "!"])
        assert "".join(token.text for token in stream) == stream.finish().text == whole.text
        assert stream.finish().finish_reason == "length"
    with pytest.raises(VocabtrimError, match="a stop string is empty"):
        decoder.stream([0], stop=["a", ""])
    with pytest.raises(VocabtrimError, match="no tokenizer"):
        SpeculativeDecoder(make_target()).stream([0], stop=["a"])


def test_a_prompt_is_text_a_chat_or_ids(make_target, tokenizer):
    decoder = SpeculativeDecoder(make_target(), tokenizer=tokenizer)
    assert decoder.encode("a") == decoder.encode([{"role": "user", "content": "a"}]) == [0, 0, 0]
    assert decoder.encode("a", chat=False) == decoder.encode([0]) == [0]
    with pytest.raises(VocabtrimError, match="no tokenizer"):
        SpeculativeDecoder(make_target()).generate("a")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        (range(16), {}, "16 tokens .* holds 16"),
        ([48], {}, "48, for which the target has no row"),
        ([-1], {}, "-1, for which the target has no row"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([3], {"max_new_tokens": float("inf")}, "max_new_tokens is inf: give a whole number"),
        ([3], {"sampling": None}, "sampling is None: give SamplingParams"),
        ([3], {"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ([3], {"logprobs": 1.5}, "logprobs is 1.5"),
        (b"abc", {}, "got bytes"),  # whose items are numbers
        ([3.0], {}, "got a list of float"),
        (["a", "b"], {}, "got a list of str"),
        (None, {}, "got NoneType"),
        ({3, 4}, {}, "got set"),
        ([10**30], {}, "for which the target has no row"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_before_the_first_token(make_target, prompt, options, message):
    with pytest.raises(VocabtrimError, match=message):
        SpeculativeDecoder(make_target(context=16)).stream(prompt, **options)


def test_a_draft_length_is_a_whole_number_whoever_made_it(make_target, make_drafter):
    assert SpeculativeDecoder(make_target(), make_drafter(), draft_length=np.int64(3)).draft_length == 3
    for wrong in (1.5, True, "4"):  # none of them means "auto"
        with pytest.raises(VocabtrimError, match=f"draft_length is {wrong!r}: give a whole number"):
            SpeculativeDecoder(make_target(), make_drafter(), draft_length=wrong)


def test_the_longest_prompt_generates_until_the_context_is_full(make_target):
    result = SpeculativeDecoder(make_target(context=16)).generate(range(15), max_new_tokens=9)
    assert (len(result.token_ids), result.finish_reason) == (2, "length")


def test_engines_that_do_not_belong_together_are_refused(make_target, make_drafter):
    target = make_target()
    for drafter, message in [
        (make_drafter(tokenizer="another"), "another tokenizer"),
        (make_drafter([2, 60], rows=64), "beyond the target's vocabulary of 48"),
        (target, "one engine"),
    ]:
        with pytest.raises(VocabtrimError, match=message):
            SpeculativeDecoder(target, drafter, draft_length=4)
    with pytest.raises(VocabtrimError, match="holds a drafter"):
        SpeculativeDecoder(make_drafter(), target, draft_length=4)
    for draft_length in (0, 256):
        with pytest.raises(VocabtrimError, match=f"draft_length is {draft_length}"):
            SpeculativeDecoder(target, draft_length=draft_length)


@pytest.mark.parametrize("role", ["target", "drafter"])
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0, seed=7)])
def test_an_engine_that_raises_leaves_the_decoder_usable(make_target, make_drafter, role, sampling):
    fresh = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4).generate(
        [3, 4], max_new_tokens=20, sampling=sampling
    )
    decoder = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)
    broken = getattr(decoder, role)
    broken.fails_at = 3
    stream = decoder.stream([9], max_new_tokens=20, sampling=sampling)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(stream)
    with pytest.raises(VocabtrimError, match="broke off"):
        stream.finish()
    again = decoder.generate([3, 4], max_new_tokens=20, sampling=sampling)
    assert again.token_ids == fresh.token_ids


def test_nothing_of_a_former_prompt_leaks_into_the_next(make_target, make_drafter):
    decoder = SpeculativeDecoder(make_target(), make_drafter(), draft_length=4)
    first = decoder.generate([3, 4, 5], max_new_tokens=12)
    decoder.generate([3, 4, 9, 9], max_new_tokens=5)
    assert decoder.generate([3, 4, 5], max_new_tokens=12).token_ids == first.token_ids


def test_a_stream_that_another_overtook_says_so(make_target):
    decoder = SpeculativeDecoder(make_target())
    stream = decoder.stream([3], max_new_tokens=9)
    next(stream)
    decoder.generate([4], max_new_tokens=2)
    with pytest.raises(VocabtrimError, match="another generation"):
        next(stream)


def test_the_stats_add_up(make_target):
    """γ = 4 and a drafter that is always right: a prefill, two rounds of five tokens, one of two."""
    result = SpeculativeDecoder(make_target(), make_target(), draft_length=4).generate([3], max_new_tokens=13)
    stats = result.stats
    assert (stats.tokens, stats.prefills, stats.rounds, stats.drafted, stats.accepted) == (13, 1, 3, 9, 9)
    assert stats.block_efficiency == 12 / 3
    assert stats.acceptance == (1, 1, 1, 1)
    parts = stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds, stats.other_seconds
    assert min(parts) > 0
    assert stats.tokens_per_second == 13 / stats.seconds
    written = json.loads(json.dumps(result.to_dict()))
    assert written["token_ids"] == list(result.token_ids)
    assert written["stats"]["block_efficiency"] == 4
