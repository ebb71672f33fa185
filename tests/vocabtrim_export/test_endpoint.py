"""Calibration by a server with OpenAI's protocol: what it generates is counted, and what goes wrong is one line."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
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
def serve(tokenizer, fault=lambda _number: None, factor=1):
    """A server of the model "m". fault: number of the request → a status, "cut" for half an answer, or None."""
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
            is_chat = "messages" in body
            text = answer(body["messages"][-1]["content"] if is_chat else body["prompt"])
            usage = {"completion_tokens": factor * len(tokenizer(text, add_special_tokens=False)["input_ids"])}
            choice = {"finish_reason": "stop"} | ({"message": {"content": text}} if is_chat else {"text": text})
            self.reply(200, {"choices": [choice], "usage": usage}, cut=fault(number) == "cut")

        def reply(self, status, body, cut=False):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", wait=0.01, key="secret"), seen
    finally:
        server.shutdown()
        server.server_close()


def count(tokenizer, endpoint, checkpoint=None):
    settings = CountSettings("target", max_tokens=10**6, endpoint=endpoint, temperature=0)
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
    assert seen["requests"] < len(CORPUS.documents)
    assert (found.counts + found.held_out).tolist() == expected(tokenizer).tolist()


def test_a_server_that_is_wrong_is_one_line(tokenizer):
    with serve(tokenizer) as (endpoint, _), pytest.raises(VocabtrimError, match="has no model 'other', it serves m"):
        count(tokenizer, replace(endpoint, model="other"))
    with (
        serve(tokenizer, factor=2) as (endpoint, _),
        pytest.raises(VocabtrimError, match="it serves another model than the one to calibrate for"),
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
    with pytest.raises(VocabtrimError, match="give a URL such as"):
        count(tokenizer, Endpoint("localhost", "m"))
