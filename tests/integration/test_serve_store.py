"""Conversations that take turns on one worker: each goes on where it ended, with the text of `generate`."""

import pytest

from runtime import SamplingParams, SpeculativeDecoder

openai = pytest.importorskip("openai")
helper = pytest.importorskip("tests.serving")
SYSTEM = {"role": "system", "content": "the quick brown fox jumps over the lazy dog " * 3}
SCHEMA = {"type": "object", "properties": {"fox": {"enum": ["quick"]}}, "required": ["fox"]}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
VARIANTS = [
    ({"temperature": 0}, {}),
    ({"temperature": 1.2, "seed": 7}, {}),
    ({"temperature": 0, "logit_bias": {"5": 30}}, {}),
    ({"temperature": 0, "frequency_penalty": 1.5}, {}),
    ({"temperature": 0}, {"json_schema": SCHEMA}),
]


def test_turns_go_on_whatever_was_asked_between(pair):
    """Each variant has a conversation; all share a system prompt, and each displaces the one before."""
    pytest.importorskip("llguidance")
    with (
        SpeculativeDecoder.load(pair.target, pair.drafter) as decoder,
        helper.serving(pair, workers=1, cache_bytes=1 << 24) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key=helper.KEY, max_retries=0) as client,
    ):
        words = ["fox", "lazy", "the", "over", "quick"]
        conversations = [[SYSTEM, {"role": "user", "content": f"{word} dog " * 16}] for word in words]
        cached = []
        for _ in range(2):
            for messages, (sampling, more) in zip(conversations, VARIANTS, strict=True):
                form = FORM if more else {"type": "text"}
                answer = client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=8, response_format=form, **sampling
                )
                with decoder.fork() as fresh:
                    text = fresh.generate(messages, max_new_tokens=8, sampling=SamplingParams(**sampling), **more).text
                assert answer.choices[0].message.content == text
                cached.append(answer.usage.prompt_tokens_details.cached_tokens)
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "jumps"}]
        print(cached, [len(decoder.encode(messages)) for messages in conversations])
        assert cached[0] == cached[1] == cached[6] == 0  # the first, and those with a seed
        assert min(cached[2:5]) >= 32  # the system prompt
        assert min(cached[5], *cached[7:]) > max(cached[2:5])  # the first turn as well
        figures = helper.gauges(served.url)
        assert figures["vocabtrim_cache_hits_total"] >= 4
        assert 0 < figures["vocabtrim_cache_bytes"] <= 1 << 24
        assert figures["vocabtrim_cache_evictions_total"] == 0
