"""Calibration by a server with OpenAI's protocol: what it generates is counted, and what goes wrong is one line."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from engines.errors import VocabtrimError
from vocabtrim_export.calibration import Corpus, CountSettings, Document, Message, TokenCounts, calibrate
from vocabtrim_export.calibration.endpoint import Endpoint

CHATS = [Document("", (Message("user", f"the fox {index}"),)) for index in range(40)]
CORPUS = Corpus.of([*CHATS, Document("the lazy dog")], "test")


def answer(prompt):
    return f"the quick fox of {prompt} jumps over the lazy dog"


@contextmanager
def serve(tokenizer, fault=lambda _number: None, factor=1, retry_after=""):
    """A server of the model "m". fault: number of the request → a status, "cut" for half an answer, bytes, or None.

    A status 429 comes with the header `Retry-After` that `retry_after` states.
    """
    seen, lock = Counter(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.reply(200, {"data": [{"id": "m"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen["requests"] += 1
                number = seen["requests"]
                seen[self.headers.get("Authorization", "")] += 1
            if isinstance(fault(number), int):
                self.reply(fault(number), {"error": "not now"})
                return
            if isinstance(fault(number), bytes):
                self.send(200, fault(number))
                return
            is_chat = "messages" in body
            text = answer(body["messages"][-1]["content"] if is_chat else body["prompt"])
            usage = {"completion_tokens": factor * len(tokenizer(text, add_special_tokens=False)["input_ids"])}
            choice = {"finish_reason": "stop"} | ({"message": {"content": text}} if is_chat else {"text": text})
            self.reply(200, {"choices": [choice], "usage": usage}, cut=fault(number) == "cut")

        def reply(self, status, body, cut=False):
            self.send(status, json.dumps(body).encode(), cut)

        def send(self, status, data, cut=False):
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # seconds until a shutdown is seen
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", wait=0.01, key="secret"), seen
    finally:
        server.shutdown()
        server.server_close()


def count(tokenizer, endpoint, checkpoint=None, temperature=0.0):
    settings = CountSettings("target", max_tokens=10**6, endpoint=endpoint, temperature=temperature)
    return calibrate(None, tokenizer, CORPUS, settings, checkpoint=checkpoint)


def expected(tokenizer):
    asked = [each.prompt[0].content if each.prompt else each.text for each in CORPUS.documents]
    ids = [tokenizer(answer(each), add_special_tokens=False)["input_ids"] for each in asked]
    return np.bincount([token for each in ids for token in [*each, tokenizer.eos_token_id]], minlength=len(tokenizer))


@pytest.mark.parametrize(
    "fault", [lambda _: None, lambda n: 503 if n % 3 == 0 else None, lambda n: "cut" if n < 4 else None]
)
def test_what_the_server_generates_is_counted_once_whatever_fails_in_passing(tokenizer, fault):
    with serve(tokenizer, fault) as (endpoint, seen):
        found = count(tokenizer, endpoint)
    assert (found.counts + found.held_out).tolist() == expected(tokenizer).tolist()
    assert set(seen) == {"requests", "Bearer secret"}
    assert found.runs[0].model_digest == "endpoint:m"


def test_an_interrupted_run_goes_on(tokenizer, tmp_path):
    path = tmp_path / "counts"
    with (
        serve(tokenizer, lambda number: 401 if number > 20 else None) as (endpoint, _),
        pytest.raises(VocabtrimError, match=r"refuses the request: 401 .*not now"),
    ):
        count(tokenizer, endpoint, checkpoint=path)
    assert 0 < TokenCounts.load(path).total < expected(tokenizer).sum()  # what came before is kept
    with serve(tokenizer) as (endpoint, seen):
        found = count(tokenizer, endpoint, checkpoint=path)
    assert seen["requests"] == len(CORPUS.documents) - 20  # no answer is asked for twice
    assert (found.counts + found.held_out).tolist() == expected(tokenizer).tolist()


@pytest.mark.parametrize(
    ("choice", "usage", "counted"),
    [
        ({"content": "the fox \ufffd"}, {}, "the fox "),  # the limit cut a character
        ({"content": "the fox\ud83e"}, {}, "the fox"),
        ({"content": "a \ud83e fox"}, {}, "a ? fox"),
        ({"content": None}, {}, ""),
        ({"content": None, "reasoning_content": "a fox?"}, {}, "a fox?"),  # the limit cut the reasoning
        ({"content": "fox", "reasoning": "a dog?"}, {}, "a dog?\n\nfox"),
        ({"content": "fox", "reasoning": "a dog?", "reasoning_content": "a dog?"}, {}, "a dog?\n\nfox"),
        ({"content": "fox", "reasoning_content": 3}, {}, None),
        ({"content": [{"type": "text", "text": "the fox"}]}, {}, None),
        ({"content": 3}, {}, None),
        ({"content": "fox"}, {"completion_tokens": float("inf")}, None),
        ({"content": "fox"}, {"completion_tokens": -3}, "fox"),
    ],
)
def test_the_text_of_an_odd_answer_is_counted_or_refused(choice, usage, counted):
    reply = {"choices": [{"finish_reason": "length", "message": choice}], "usage": usage}
    endpoint = Endpoint("http://localhost/v1", "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "_request", lambda *_: reply)
        if counted is None:
            with pytest.raises(VocabtrimError, match="answers in another form than OpenAI's"):
                endpoint.answer(CHATS[0], 8, 0.0, seed=0)
        else:
            assert endpoint.answer(CHATS[0], 8, 0.0, seed=0).text == counted


@pytest.mark.parametrize("reply", [b'{"choices": "n\xc3', b"[" * 200_000, b""], ids=["cut character", "deep", "empty"])
def test_an_answer_that_is_no_json_is_one_line(tokenizer, reply):
    with (
        serve(tokenizer, lambda number: reply if number > 20 else None) as (endpoint, _),
        pytest.raises(VocabtrimError, match=r"failed 5 times \(.*: the counts so far are kept") as error,
    ):
        count(tokenizer, endpoint)
    assert "\n" not in str(error.value)


def test_a_server_that_answers_with_nothing_is_one_line(tokenizer, tmp_path):
    empty = b'{"choices": [{"finish_reason": "length", "message": {"content": null}, "text": ""}]}'
    path = tmp_path / "counts"
    with (
        serve(tokenizer, lambda number: empty if number > 20 else None) as (endpoint, seen),
        pytest.raises(VocabtrimError, match=r"answers 9 prompts with no text; the counts so far are kept"),
    ):
        count(tokenizer, endpoint, path, temperature=1.0)
    assert seen["requests"] == len(CORPUS.documents)
    assert TokenCounts.load(path).total > 0


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7),
        (lambda: formatdate(time.time() + 30.5, usegmt=True), 30),
        (lambda: formatdate(0), 0.01),  # a time that has passed
        ("99999", 300),  # no longer than an answer may take
        ("0", 0.01),
        ("soon", 0.01),
        ("-3", 0.01),
    ],
)
def test_a_busy_server_is_left_alone_as_long_as_it_asks_for(tokenizer, monkeypatch, asked, seconds):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    asked = asked() if callable(asked) else asked
    with serve(tokenizer, {1: 429, 2: 503}.get, retry_after=asked) as (endpoint, _):
        assert endpoint.answer(CHATS[0], 8, 0.0, seed=0).text == answer("the fox 0")
    assert waits == [pytest.approx(seconds, abs=1.5 if seconds == 30 else 1e-9), 0.02]  # the second states nothing


def test_a_url_or_a_key_that_cannot_be_one_is_refused_at_once():
    for url in (
        "localhost",
        "http://",
        "http://[",
        "http://a b/",
        "http://host:port",
        "http://host:99999",
        "file:///x",
        "http://host/v1?version=1",
        "http://host/v1#models",
    ):
        with pytest.raises(VocabtrimError, match="give a URL such as"):
            Endpoint(url, "m").check()
    with pytest.raises(VocabtrimError, match="OPENAI_API_KEY holds a character") as error:
        Endpoint("http://localhost:9/v1", "m", key="secret\n").check()
    assert "secret" not in str(error.value)


def test_a_server_that_is_wrong_is_one_line(tokenizer):
    with serve(tokenizer) as (endpoint, _), pytest.raises(VocabtrimError, match="has no model 'other', it serves m"):
        count(tokenizer, replace(endpoint, model="other"))
    with (
        serve(tokenizer, factor=2) as (endpoint, _),
        pytest.raises(VocabtrimError, match="it serves another model than the one to calibrate for"),
    ):
        count(tokenizer, endpoint)
    with (
        serve(tokenizer, lambda _: b'{"error": "out of memory"}') as (endpoint, _),
        pytest.raises(
            VocabtrimError, match=r"another form than OpenAI's \({\"error\": \"out of memory\"}\): check the URL"
        ),
    ):
        count(tokenizer, endpoint)
    silent = b'{"choices": [{"message": {"content": null}, "text": ""}], "usage": {"completion_tokens": 64}}'
    with (
        serve(tokenizer, lambda _: silent) as (endpoint, _),
        pytest.raises(VocabtrimError, match=r"counts 1024 tokens in answers that have 0 .* keeps a part"),
    ):
        count(tokenizer, endpoint)
    with (
        serve(tokenizer, lambda _: 500) as (endpoint, _),
        pytest.raises(VocabtrimError, match=r"failed 5 times \(500 .*: the counts so far are kept"),
    ):
        count(tokenizer, endpoint)
    down = Endpoint("http://127.0.0.1:9/v1", "m", wait=0.0)
    with pytest.raises(VocabtrimError, match=r"127.0.0.1:9/v1/models failed 5 times .*refused"):
        count(tokenizer, down)
