"""`vocabtrim serve` through the clients that people use: what they get is what `generate` gives."""

import argparse
import asyncio
import contextlib
import gc
import gzip
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import replace

import pytest

from engines.bundle.chat_template import ChatTemplates
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from runtime.stream import Stream
from tests.engines.chat_templates import TEMPLATES
from vocabtrim_export.cli.main import main
from vocabtrim_export.cli.serve_command import memory_size
from vocabtrim_export.memory import all_memory
from vocabtrim_export.serve.cache_store import CacheStore
from vocabtrim_export.serve.settings import ServeSettings

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
ClientDisconnect = pytest.importorskip("starlette.requests").ClientDisconnect
Server = pytest.importorskip("vocabtrim_export.serve.app").Server
read_job = pytest.importorskip("vocabtrim_export.serve.job").read_job
Running = pytest.importorskip("vocabtrim_export.serve.running").Running
helper = pytest.importorskip("tests.serving")

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
KEY = helper.KEY


@pytest.fixture(scope="module")
def decoder(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def server(pair):
    """Two workers, a queue of one, in a thread of this process."""
    with helper.serving(pair, workers=2, waiting=1, body_mb=0.01) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def post(server):
    """post(body as bytes, path) → the response."""

    def send(body, path="/v1/chat/completions", key=KEY):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return httpx.post(server.url + path, content=body, headers=headers)

    return send


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "seed": 7, "top_p": 0.9}])
def test_the_text_is_that_of_generate(client, decoder, sampling):
    ours = decoder.generate(MESSAGES, max_new_tokens=24, sampling=SamplingParams(**sampling))
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, **sampling}
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == ours.text
    assert answer.choices[0].finish_reason == ours.finish_reason
    assert answer.usage.completion_tokens == len(ours.token_ids)
    assert answer.usage.prompt_tokens == len(decoder.encode(MESSAGES))
    longest = decoder.generate(MESSAGES, max_new_tokens=999, sampling=SamplingParams(**sampling))
    to_the_end = client.chat.completions.create(**{**ask, "max_tokens": None})
    assert to_the_end.choices[0].message.content == longest.text
    raw = client.chat.completions.with_raw_response.create(**ask, stream=True, stream_options={"include_usage": True})
    assert raw.headers["x-accel-buffering"] == "no"  # a proxy passes each event on
    *pieces, last = raw.parse()
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ours.text
    assert pieces[-1].choices[0].finish_reason == ours.finish_reason
    assert last.usage.completion_tokens == len(ours.token_ids)
    assert {piece.usage for piece in pieces} == {None}
    assert all("usage" in piece.model_fields_set for piece in pieces)  # as OpenAI's events have it


CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
CALLED = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sun", "tool_call_id": "call12345"},
    {"role": "assistant", "content": "It is"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", ["qwen", "llama", "smollm", "granite", "gemma", "chatml"])
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"tools": TOOLS, "tool_choice": "none"}, {}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
        ({"add_generation_prompt": False}, {"template_args": {"add_generation_prompt": False}}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "date_string": "1 Jan"}},
            {"template_args": {"enable_thinking": False, "date_string": "1 Jan"}},
        ),
    ],
)
def test_a_conversation_is_rendered_as_generate_renders_it(template, fields, options, decoder, monkeypatch):
    monkeypatch.setattr(decoder.tokenizer, "chat", ChatTemplates({"default": TEMPLATES[template]}, {"bos_token": ""}))
    for messages in (CALLED, CALLED[:2], CALLED[1:2], [*CALLED[1:2], CALLED[-1]]):
        body = json.dumps({"messages": messages, **fields}).encode()
        try:
            wanted = decoder.encode(messages, **options)
        except VocabtrimError as error:
            with pytest.raises(VocabtrimError, match=re.escape(str(error))):
                read_job(body, True, decoder, "tiny")
        else:
            assert read_job(body, True, decoder, "tiny").prompts == (wanted,)


def test_completions_stops_choices_and_logprobs(client, decoder):
    prompts = ["the quick", decoder.encode("the lazy dog", chat=False)]
    whole = [decoder.generate(prompt, max_new_tokens=16, chat=False, logprobs=2) for prompt in prompts]
    answer = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=16, temperature=0, logprobs=2)
    assert answer.choices[0].text == whole[0].text
    expected = [entry.logprob for entry in whole[0].logprobs]
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    logprobs = answer.choices[0].logprobs
    for token, entry, top in zip(logprobs.tokens, whole[0].logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 2  # by text; a token with the same text as another goes by its id
        assert top[token] == pytest.approx(entry.logprob, abs=1e-4)
    both = client.completions.create(model="tiny", prompt=["the quick", "the lazy dog"], max_tokens=16, temperature=0)
    assert [choice.text for choice in both.choices] == [each.text for each in whole]
    stop = whole[0].text[4:6]
    stopped = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=16, temperature=0, stop=stop)
    assert stopped.choices[0].text == whole[0].text[: whole[0].text.index(stop)]
    three = client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=1, max_tokens=12)
    assert len({choice.message.content for choice in three.choices}) == 3
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=1
    )
    assert [entry.logprob for entry in chat.choices[0].logprobs.content] == [
        entry.top_logprobs[0].logprob for entry in chat.choices[0].logprobs.content
    ]


@pytest.mark.parametrize("new", [0, 3])
def test_an_echo_has_the_prompt_and_its_logprobs(client, decoder, new):
    prompts = [decoder.encode(text, chat=False) for text in ("the quick brown fox", "the lazy dog")]
    ask = {"model": "tiny", "max_tokens": new, "temperature": 0, "echo": True}
    answer = client.completions.create(**ask, prompt=prompts, logprobs=1)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        with decoder.fork() as fresh:
            scores = fresh.prompt_logprobs(prompt, 1)
            whole = fresh.generate(prompt, max_new_tokens=new, chat=False, logprobs=1) if new else None
        entries = [*scores, *(whole.logprobs if whole else ())]
        assert choice.text == decoder.tokenizer.decode(prompt) + (whole.text if whole else "")
        assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx([entry.logprob for entry in entries], abs=1e-4)
        top = [max(names.values()) for names in choice.logprobs.top_logprobs[1:]]
        assert top == pytest.approx([entry.top[0][1] for entry in entries], abs=1e-4)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(entries) + 1
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert client.completions.create(**ask, prompt=prompts[0]).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**{**ask, "echo": False, "max_tokens": 0}, prompt="the")


@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_streamed_echo_is_the_one_that_is_not_streamed(client, decoder, new, logprobs):
    """The prompt comes first, in one event; a prompt of one token has nothing that predicts it."""
    prompts = [decoder.encode(text, chat=False) for text in ("the quick brown fox", "the")]
    ask = {"model": "tiny", "max_tokens": new, "temperature": 0, "echo": True, "logprobs": logprobs, "prompt": prompts}
    whole = client.completions.create(**ask)
    events = list(client.completions.create(**ask, stream=True))
    for index, (prompt, wanted) in enumerate(zip(prompts, whole.choices, strict=True)):
        first, *rest = pieces = [event.choices[0] for event in events if event.choices[0].index == index]
        assert first.text == decoder.tokenizer.decode(prompt)
        assert len(rest) >= 1 + new * (logprobs is not None)
        assert "".join(piece.text for piece in pieces) == wanted.text
        assert [piece.finish_reason for piece in pieces] == [None] * len(rest) + ["length"]
        if logprobs is None:
            assert {piece.logprobs for piece in pieces} == {None} == {wanted.logprobs}
            continue
        joined = {
            name: [each for piece in pieces if piece.logprobs for each in getattr(piece.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert joined["tokens"] == wanted.logprobs.tokens
        assert joined["text_offset"] == wanted.logprobs.text_offset
        assert joined["top_logprobs"][0] is joined["token_logprobs"][0] is wanted.logprobs.token_logprobs[0] is None
        assert joined["token_logprobs"][1:] == pytest.approx(wanted.logprobs.token_logprobs[1:], abs=1e-4)
        assert len(joined["top_logprobs"]) == len(wanted.logprobs.tokens) == len(prompt) + new


def test_answers_at_once_are_each_their_own(client, decoder):
    prompts = [f"fox {number} jumps" for number in range(3)]
    wanted = [decoder.generate(prompt, max_new_tokens=40, chat=False).text for prompt in prompts]
    found = {}

    def ask(prompt):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0)
        found[prompt] = answer.choices[0].text

    for _ in range(3):
        threads = [threading.Thread(target=ask, args=[prompt]) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found.pop(prompt) for prompt in prompts] == wanted


def test_a_full_queue_and_clients_that_leave(client, server, monkeypatch):
    step = Stream.__next__
    monkeypatch.setattr(Stream, "__next__", lambda stream: time.sleep(0.02) or step(stream))  # as a large model is
    ask = {"model": "tiny", "prompt": "the", "max_tokens": 200, "stream": True, "logit_bias": {"1": -100}}
    streams = [client.completions.create(**ask) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    while server.workers.admitted < 2:
        time.sleep(0.01)
    server.workers.enter()  # the one that may wait
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="tiny", prompt="the", max_tokens=1)
    assert int(refused.value.response.headers["retry-after"]) > 0
    server.workers.leave()
    for stream in streams:
        stream.close()
    helper.wait_until_idle(server)
    assert max(worker.decoder.target.length for worker in server.workers.all) < 64  # of 128
    assert client.completions.create(model="tiny", prompt="the", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize("message", ["http.response.start", "http.response.body"])
@pytest.mark.parametrize(
    "version", ["2.3", "2.4"]
)  # of ASGI: starlette learns of the client from receive, or from send
def test_a_stream_that_nobody_takes_gives_its_place_back(decoder, message, version):
    """Before its first event and within one, without a collection of garbage.

    By the version of ASGI, starlette learns that the client has gone from `receive` or from `send`.
    """
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": version}, "http_version": "1.1"},
        **{"method": "POST", "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions"},
        **{"query_string": b"", "root_path": "", "headers": [(b"authorization", f"Bearer {KEY}".encode())]},
    }
    body = json.dumps({"prompt": "the", "max_tokens": 100, "stream": True}).encode()

    async def call():
        requests, left = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive():
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(sent):
            if sent["type"] == message:
                left.set()
                if version == "2.4":
                    raise OSError("the client has gone")
                await asyncio.Event().wait()

        alone = Server(decoder.fork(), ServeSettings("tiny", api_key=KEY))
        with contextlib.suppress(ClientDisconnect):
            await asyncio.wait_for(alone.app()(scope, receive, send), 20)
        assert alone.workers.admitted == 0
        alone.workers.close()

    gc.disable()
    try:
        asyncio.run(call())
    finally:
        gc.enable()


USER = b'{"role": "user", "content": "a"}'
BAD = {
    "not JSON": (b"{", 400, "is not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "is not UTF-8"),
    "a list": (b"[]", 400, "no JSON object"),
    "a number that is none": (b'{"temperature": NaN}', 400, "no number of JSON"),
    "no messages": (b"{}", 400, "messages is missing"),
    "empty messages": (b'{"messages": []}', 400, "messages"),
    "messages of numbers": (b'{"messages": [1, {}]}', 400, ""),
    "unknown role content": (b'{"messages": [{"role": "user", "content": 5}]}', 400, "content"),
    "another model": (b'{"model": "gpt-4o", "messages": []}', 404, "there is no model 'gpt-4o' here"),
    "unknown field": (b'{"messages": [{"role": "user", "content": "a"}], "min_tokens": 3}', 400, "min_tokens"),
    "a temperature": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": -1}', 400, "temperature"),
    "too long": (
        json.dumps({"messages": [{"role": "user", "content": "fox " * 999}]}).encode(),
        400,
        "the target's context holds",
    ),
    "too large": (b'{"messages": "' + b"a" * 20_000 + b'"}', 413, "larger than 0.01 MiB"),
    "nested": (b"[" * 9_000, 400, "is not JSON"),
    "options without a stream": (
        b'{"messages": [%s], "stream_options": {"include_usage": true}}' % USER,
        400,
        "goes with",
    ),
    "options of a stream": (
        b'{"messages": [%s], "stream": true, "stream_options": {"include_usage": 1}}' % USER,
        400,
        'stream_options has {"include_usage": 1}: give include_usage, true or false',
    ),
    "a flag that is none": (b'{"messages": [%s], "add_generation_prompt": 1}' % USER, 400, "must be true or false"),
    "tools that the template does not read": (b'{"messages": [%s], "tools": [{}]}' % USER, 400, "reads no tools"),
    "half of a pair": (b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', 400, "unrecognized request"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_answered_in_openais_form(name, post):
    body, status, message = BAD[name]
    response = post(body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br, gzip", 415), ("Identity", 200), ("", 200)])
def test_a_body_that_is_encoded_is_named_so(server, encoding, status):
    body = json.dumps({"prompt": "the", "max_tokens": 1}).encode()
    body = gzip.compress(body) if status == 415 else body
    headers = helper.HEADERS | {"Content-Encoding": encoding}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    if status == 415:
        message = f"the request's body is encoded as {encoding}; this server reads no encoding: send it as it is"
        assert answer.json()["error"]["message"] == message
        assert answer.headers["accept-encoding"] == "identity"


def test_routes_keys_and_figures(post, server, client):
    assert post(b"{}", "/v1/embeddings").json()["error"]["message"].endswith("nothing at this address")
    assert post(b"{}", "/chat/completions").json()["error"]["message"].endswith("the API is under /v1/")
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    client.completions.create(model="tiny", prompt="the quick", max_tokens=4)  # other tests may run elsewhere
    helper.wait_until_idle(server)
    values = helper.gauges(server.url)
    assert values["vocabtrim_generated_tokens_total"] > 0
    assert values["vocabtrim_busy_workers"] == values["vocabtrim_waiting_requests"] == 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        *((f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200), ("Bearer wrong", 401), (KEY, 401), (f"Basic {KEY}", 401)),
        *((f"Bearer {KEY}\xff", 401), ("Bearer", 401), (f"Bearer {KEY.upper()}", 401), (f"Bearer Bearer {KEY}", 401)),
    ],
)
def test_a_key_counts_in_the_form_of_a_bearer_token(server, sent, status):
    answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": sent.encode("latin-1")})
    assert answer.status_code == status
    assert answer.headers.get("www-authenticate") == (None if status == 200 else "Bearer")


def test_without_a_key_pages_that_are_not_named_make_no_work(pair):
    """A browser sends such requests, even where it hides the answers; programs send no origin."""
    for origins, wanted in (((), [200, 403]), (("http://here:3000",), [200, 200]), (("*",), [200, 200])):
        with helper.serving(pair, origins=origins) as served:
            served._settings = replace(served._settings, api_key="")
            url, body = f"{served.url}/v1/completions", json.dumps({"prompt": "the", "max_tokens": 1})
            pages = {}, {"Origin": "http://here:3000"}
            headers = [{"Content-Type": "text/plain"} | page for page in pages]
            assert [httpx.post(url, content=body, headers=each).status_code for each in headers] == wanted


def test_only_pages_of_origins_that_are_named_may_ask(pair, server):
    page = "http://localhost:3000"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    ask = {"prompt": "the", "max_tokens": 1}

    def allowed(url, origin):
        before = httpx.options(f"{url}/v1/completions", headers=preflight | {"Origin": origin})
        keys = {"Origin": origin}, {"Origin": origin} | helper.HEADERS
        answers = [httpx.post(f"{url}/v1/completions", json=ask, headers=key) for key in keys]
        assert [answer.status_code for answer in answers] == [401, 200]
        return before, {answer.headers.get("access-control-allow-origin") for answer in (before, *answers)}

    with helper.serving(pair, origins=(page,)) as served:
        before, origins = allowed(served.url, page)
        assert (before.status_code, origins) == (200, {page})
        assert "authorization" in before.headers["access-control-allow-headers"]
        before, origins = allowed(served.url, "http://elsewhere")
        assert (before.status_code, origins) == (400, {None})
    before, origins = allowed(server.url, page)
    assert (before.status_code, before.headers["allow"], origins) == (405, "POST", {None})


def test_figures_are_the_sums_of_what_answers_say(pair):
    """The figures count a whole answer, a streamed one, one that is refused, and one that breaks off."""
    with (
        helper.serving(pair, draft_length=2, workers=2) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):

        def figures():
            helper.wait_until_idle(server)
            values = helper.gauges(server.url)
            return {name.removeprefix("vocabtrim_").removesuffix("_total"): value for name, value in values.items()}

        before, began = figures(), time.monotonic()
        prompt = "the quick brown fox jumps over the lazy dog"
        ask = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0}
        whole = client.completions.create(**ask, n=2).usage
        *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{**ask, "max_tokens": 0})
        server.metrics.streamed(is_broken=True)
        after, seconds = figures(), time.monotonic() - began
        grown = {name: after[name] - before.get(name, 0) for name in after}
        usages = [whole, last.usage]
        details = [usage.completion_tokens_details for usage in usages]
        accepted = sum(each.accepted_prediction_tokens for each in details)
        assert grown["generated_tokens"] == sum(usage.completion_tokens for usage in usages) == 60
        assert grown["prompt_tokens"] == whole.prompt_tokens * 2 + last.usage.prompt_tokens
        assert grown["cached_tokens"] == sum(usage.prompt_tokens_details.cached_tokens for usage in usages) > 0
        assert grown["accepted_tokens"] == accepted > 0
        assert grown["drafted_tokens"] == accepted + sum(each.rejected_prediction_tokens for each in details) > accepted
        assert (
            grown["rounds"] == 60 - accepted
        )  # no answer ends within a draft: every round adds a token of the target's
        assert grown['requests_total{status="200"}'] == 2 + 1  # the figures before
        assert grown['requests_total{status="400"}'] == 1
        assert grown["first_token_seconds_count"] == 2
        assert all(0 < grown[name] < seconds for name in ("first_token_seconds_sum", "generation_seconds"))
        assert (grown["broken_streams"], grown["collapses"]) == (1, 0)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_figures_count_what_was_generated_for_a_client_that_left(pair, is_streamed, monkeypatch):
    begun, step = threading.Event(), Stream.__next__

    def slow(stream):
        token = step(stream)
        if stream.stats.accepted:  # so that the figures below are of something
            begun.set()
            time.sleep(0.02)
        return token

    monkeypatch.setattr(Stream, "__next__", slow)
    with helper.serving(pair, draft_length=2) as server:
        decoder = server.workers.all[0].decoder
        prompt = decoder.encode("the quick brown fox", chat=False)
        ask = {"prompt": prompt, "max_tokens": 100, "temperature": 0, "stream": is_streamed, "logit_bias": {"1": -100}}
        began, connection = time.monotonic(), http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps(ask), helper.HEADERS)
        assert begun.wait(20)
        connection.close()
        helper.wait_until_idle(server)
        seconds, values = time.monotonic() - began, helper.gauges(server.url)
        figure = {name.removeprefix("vocabtrim_").removesuffix("_total"): value for name, value in values.items()}
        generated = len(decoder.target.text) - len(prompt)
        assert 1 < generated < 100
        assert (figure["prompt_tokens"], figure["generated_tokens"]) == (len(prompt), generated)
        assert 0 < figure["accepted_tokens"] <= figure["drafted_tokens"]
        assert figure["rounds"] == generated - figure["accepted_tokens"]
        assert 0 < figure["generation_seconds"] < seconds


def test_a_wait_for_a_worker_is_no_time_of_generating(pair, monkeypatch):
    step = Stream.__next__
    monkeypatch.setattr(Stream, "__next__", lambda stream: time.sleep(0.02) or step(stream))  # as a large model is
    with helper.serving(pair, workers=1) as server:
        ask = {"prompt": "the", "max_tokens": 10, "logit_bias": {"1": -100}}
        with httpx.Client(headers=helper.HEADERS, timeout=20) as client:
            url = f"{server.url}/v1/completions"
            threads = [threading.Thread(target=client.post, args=[url], kwargs={"json": ask}) for _ in range(4)]
            began = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        helper.wait_until_idle(server)
        assert 0.8 <= helper.gauges(server.url)["vocabtrim_generation_seconds_total"] < time.monotonic() - began


def leave(server, ask, when):
    """Send a request, and leave once `when` holds."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(ask), helper.HEADERS)
    until = time.monotonic() + 20
    while not when():
        assert time.monotonic() < until
        time.sleep(0.01)
    connection.close()


def test_for_a_client_that_leaves_in_the_queue_nothing_is_generated(pair, monkeypatch):
    step = Stream.__next__
    monkeypatch.setattr(Stream, "__next__", lambda stream: time.sleep(0.02) or step(stream))  # as a large model is
    with helper.serving(pair, workers=1) as server:
        ask, held = {"max_tokens": 60, "logit_bias": {"1": -100}}, server.workers.all[0].decoder.target

        def queued():
            leave(server, ask | {"prompt": "jumps over the lazy dog"}, lambda: server.workers.waiting)
            return True

        leave(server, ask | {"prompt": "the"}, lambda: held.length and queued())
        helper.wait_until_idle(server)
        prompt = server.workers.all[0].decoder.encode("the", chat=False)
        assert list(held.text[: len(prompt)]) == prompt
        assert helper.gauges(server.url)["vocabtrim_prompt_tokens_total"] == len(prompt)


def test_an_answer_that_is_cancelled_before_it_begins_generates_nothing(pair):
    """As where its client leaves while a schema is compiled."""
    counted = []
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        job = read_job(b'{"prompt": "the", "response_format": {"type": "json_object"}}', False, decoder, "tiny")
        running = Running(job, job.prompts[0], job.sampling, asyncio.new_event_loop())
        running.cancel()
        running.run(decoder, CacheStore(0), lambda *count: counted.append(count))
        assert decoder.target.length == 0
    ((stats, prompt_tokens, _),) = counted
    assert (stats.tokens, prompt_tokens) == (0, 0)


def test_a_turn_goes_on_where_the_last_one_ended(client):
    first = [{"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 3}]
    ask = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    begun = client.chat.completions.create(**ask, messages=first)
    turns = [{"role": "assistant", "content": "jumps"}, {"role": "user", "content": "over"}]
    client.chat.completions.create(**ask, messages=[{"role": "user", "content": "another conversation"}])
    second = client.chat.completions.create(**ask, messages=[*first, *turns])
    assert second.usage.prompt_tokens_details.cached_tokens >= begun.usage.prompt_tokens - 4
    for prompt in ("fox dog lazy", "system over the lazy", "fox dog lazy"):  # short, and each with its own worker
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, temperature=0)
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


def test_a_mistake_is_one_line(pair, capsys):
    listener = socket.create_server(("127.0.0.1", 0))
    for options, message in (
        (["--port", str(listener.getsockname()[1])], "cannot listen on 127.0.0.1"),
        (["--slots-in-parallel", "0"], "--slots-in-parallel is 0"),
        (["--queue", "-1"], "--queue is -1"),
        (["--host", ""], "--host is empty"),
        (["--host", "a" * 70], "cannot listen on aaa"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "schlüssel"], "the API key has spaces, or characters that are not ASCII"),
        (["--allow-origin", "localhost:3000/"], "--allow-origin is 'localhost:3000/': give one such as http://"),
    ):
        # There is no such bundle: what can be known before the bundles are loaded is said before.
        assert main(["serve", "--target", str(pair.target / "none"), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    listener.close()


def test_amounts_of_memory():
    assert ServeSettings("tiny").cache_bytes == all_memory() // 8
    amounts = {"500MB": 500_000_000, "1.5GB": 1_500_000_000, "0": 0}
    assert {text: memory_size(text) for text in amounts} == amounts
    for text in ("", "5", "-1GB", "1 GB", "1TB", "GB"):
        with pytest.raises(argparse.ArgumentTypeError, match="give a number and its unit"):
            memory_size(text)
