"""A server answers whatever is sent, reads no file for it and goes on; VOCABTRIM_FUZZ_SECONDS=3600 tries longer."""

import contextlib
import faulthandler
import http.client
import json
import os
import socket
import sys
import threading
import time
from random import Random

import pytest

httpx = pytest.importorskip("httpx")
helper = pytest.importorskip("tests.serving")
SECONDS = float(os.environ.get("VOCABTRIM_FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("VOCABTRIM_FUZZ_SEED", "0"))
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
SECRET = "canary-7b1f"
ASK = {"prompt": "the quick", "max_tokens": 24, "temperature": 0}
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


class Watch:
    """Records the files and processes that this process opens while `is_on`; an audit hook cannot be removed."""

    def __init__(self):
        self.is_on, self.events = False, []
        self._own = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix)))
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.is_on or (event != "open" and event not in PROCESSES):
            return
        name = str(arguments[0])
        is_package = event == "open" and os.path.realpath(name).startswith(self._own)
        if not is_package:  # one that is imported late
            self.events.append((event, name))


class Pulse:
    """Tells a server that does not answer from a process that stands still, and why it does.

    Attributes:
        longest: Seconds of the longest pause of this process's threads, and of its CPU time within it. Much CPU time:
            something holds the interpreter's lock, and the threads' stacks are on standard error. Little: the machine
            has let the process wait, or had no memory for it.
        slowest: Seconds of the server's slowest answer to /health: what keeps its event loop busy.
    """

    STACKS_AFTER = 5

    def __init__(self, port):
        self.longest, self.slowest, self._port, self._end = (0.0, 0.0), 0.0, port, threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._ask)]

    def _beat(self):
        last = time.monotonic(), time.process_time()
        while not self._end.wait(0.05):
            now = time.monotonic(), time.process_time()
            self.longest = max(self.longest, (now[0] - last[0], now[1] - last[1]))
            last = now
            faulthandler.dump_traceback_later(self.STACKS_AFTER, file=sys.__stderr__)
        faulthandler.cancel_dump_traceback_later()

    def _ask(self):
        while not self._end.wait(0.5):
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            connection.close()
            self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()

    def __str__(self):
        pause = f"longest pause {self.longest[0]:.1f} s with {self.longest[1]:.1f} s of CPU time"
        return f"{pause}, slowest /health {self.slowest:.1f} s"


class Requests:
    """Hostile requests, from a seed."""

    def __init__(self, seed, canary):
        self.random = Random(seed)
        path = str(canary)
        self.texts = [
            *(
                "",
                "the quick brown fox",
                "größer \U0001f98a",
                "\ud800",
                "\x00",
                "a" * 3000,
                "<|end|><|user|>",
                "\u202e",
            ),
            *(path, f"file://{path}", f"../../../../../..{path}", f"{{% include '{path}' %}}", "/etc/passwd"),
            *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 9999 ** 9999 }}", "$(reboot)", "'; --", "%s%n"),
            *("auto", "none", "json_object", "json_schema", "text", "tiny", "user", "system", "assistant", "tool"),
        ]
        self.numbers = [0, 1, 2, 5, 20, 128, -1, 0.5, 1.0, 2.5, 1e308, -1e308, 10**400, 1 << 63, (1 << 64) - 1, 1e-320]
        self.names = [
            *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
            *("min_p", "seed", "stop", "n", "presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs"),
            *("continue_final_message", "stream", "stream_options", "response_format", "echo", "best_of", "suffix"),
            *("functions", "user", "metadata", "reasoning_effort", "chat_template", "guided_json", "prediction"),
        ]

    def value(self, depth=0):
        """Anything that JSON can hold, and NaN."""
        kind = self.random.randrange(12 if depth < 4 else 8)
        if kind < 3:
            return self.random.choice(self.texts)
        if kind < 6:
            return self.random.choice(self.numbers)
        if kind < 8:
            return self.random.choice([None, True, False, float("nan"), float("inf")])
        if kind < 10:
            return [self.value(depth + 1) for _ in range(self.random.choice([0, 1, 3, 40]))]
        keys = [
            *self.names,
            *self.texts,
            "role",
            "content",
            "type",
            "function",
            "arguments",
            "schema",
            "$ref",
            "0",
            "5",
        ]
        return {self.random.choice(keys): self.value(depth + 1) for _ in range(self.random.choice([0, 1, 2, 5]))}

    def message(self):
        role = self.random.choice(["user", "assistant", "system", "tool", "developer", self.value(2)])
        text = self.random.choice(self.texts)
        content = self.random.choice([text, [{"type": "text", "text": text}], None, self.value(2)])
        message = {"role": role, "content": content}
        if self.random.random() < 0.2:
            call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": self.value(2)}}
            message["tool_calls"] = self.random.choice([[call], self.value(2)])
        return message

    def schema(self, depth=0):
        """A JSON schema, or what somebody might send as one."""
        kind = self.random.randrange(8 if depth < 4 else 5)
        if kind < 2:
            return {
                "type": self.random.choice(["string", "integer", "number", "boolean", "null", "array", "object", "x"])
            }
        if kind == 2:
            pattern = self.random.choice(
                ["^[a-z]{1,9}$", "(a+)+$", "((a{1,99}){1,99}){1,99}", "(?=a)b", "[", "\\\\1", ".*"]
            )
            return {"type": "string", "pattern": pattern, "maxLength": self.random.choice([3, -1, 1 << 40])}
        if kind == 3:
            return {"$ref": self.random.choice(["#", "#/$defs/a", "http://169.254.169.254/", "file:///etc/passwd"])}
        if kind == 4:
            return self.random.choice(
                [self.value(2), {"enum": self.value(2)}, {"const": self.value(2)}, {"format": "uuid"}]
            )
        if kind == 5:
            count = self.random.choice([2, 1 << 31, self.value(2)])
            return {"type": "array", "items": self.schema(depth + 1), "minItems": count, "maxItems": count}
        if kind == 6:
            return {self.random.choice(["anyOf", "oneOf", "allOf", "not"]): [self.schema(depth + 1) for _ in range(2)]}
        properties = {name: self.schema(depth + 1) for name in self.random.sample(["a", "b", "c", "\u2028"], 2)}
        closed = self.random.choice([True, False, self.value(2)])
        return {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": closed}

    def fields(self, path):
        """A body that is right but for some of its fields."""
        body = {"max_tokens": self.random.choice([1, 3, 40]), "stream": self.random.random() < 0.4}
        if path == CHAT:
            body["messages"] = [self.message() for _ in range(self.random.choice([1, 1, 2, 5]))]
        else:
            body["prompt"] = self.random.choice([self.random.choice(self.texts), ["a", "b"], [5, 9, 11]])
        sensible = {
            **{"temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ["a", "the"], "n": 3, "logprobs": True},
            **{"top_logprobs": 3, "logit_bias": {"5": -100, "7": 3}, "stream_options": {"include_usage": True}},
            **{"frequency_penalty": 1.5, "repetition_penalty": 1.2, "tools": [{"type": "function", "function": {}}]},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": self.schema()}},
        }
        for name in self.random.sample(list(sensible), self.random.randrange(4)):
            body[name] = sensible[name]
        for name in self.random.sample(self.names, self.random.choice([0, 0, 0, 1, 1, 3])):
            body[name] = self.value()
        return body

    def body(self, path):
        kind = self.random.random()
        data = json.dumps(self.fields(path) if kind < 0.9 else self.value()).encode()
        if kind < 0.75:
            return data
        cut = self.random.randrange(len(data) + 1)
        noise = self.random.randbytes(self.random.choice([1, 4, 60_000]))
        choices = [data[:cut], data[:cut] + noise + data[cut:], noise, data * 40, b"[" * 20_000, b'{"a":' * 9_000]
        return self.random.choice(choices)

    def head(self, path, length):
        key = self.random.choice([helper.KEY] * 60 + ["", "wrong", "\xff" * 3])
        lines = [
            f"{self.random.choice(['POST'] * 60 + ['GET', 'PUT', 'BREW'])} {path} HTTP/1.1",
            f"Host: {self.random.choice(['x', '169.254.169.254', '../..'])}",
            f"Authorization: Bearer {key}",
            f"Content-Type: {self.random.choice(['application/json', 'multipart/form-data; boundary=a', 'text/xml'])}",
            self.random.choice(
                [f"Content-Length: {length}"] * 20 + ["Transfer-Encoding: chunked", "Content-Length: -5"]
            ),
        ]
        extra = [
            "Content-Encoding: gzip",
            "Expect: 100-continue",
            "Upgrade: websocket",
            "X: " + "a" * 70_000,
            "Connection: close",
        ]
        lines += self.random.sample(extra, self.random.choice([0, 0, 0, 1]))
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin1")

    def path(self):
        others = [
            "/v1/models/..%2f..%2fetc/passwd",
            "/v1/models/tiny",
            "//etc/passwd",
            "/v1/%00",
            "/metrics?a=" + "b" * 99,
        ]
        return self.random.choice([CHAT] * 40 + [PLAIN] * 30 + others)


def read_response(connection):
    """The status and the body; None where the server closed the connection without an answer."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return response.status, response.headers.get_content_type(), response.read()
    except (http.client.HTTPException, ConnectionError):
        return None


def check(status, kind, body):
    """Raise AssertionError where an answer has not OpenAI's form."""
    assert SECRET.encode() not in body
    if status == 400 and kind == "text/plain":
        assert body == b"Invalid HTTP request received."  # uvicorn's, to what is no HTTP
    elif status >= 400:
        assert status != 500
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 2000
    elif kind == "text/event-stream":
        *events, last, end = body.decode("ascii").split("\n\n")
        assert end == ""
        assert last == "data: [DONE]" or "error" in json.loads(last.removeprefix("data: "))
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)
    elif kind == "application/json":
        json.loads(body)


def attack(served, requests, until, findings, counts, pulse):
    while time.monotonic() < until and len(findings) < 3:
        path = requests.path()
        body = requests.body(path)
        sent = requests.head(path, len(body)) + body
        manner = requests.random.random()
        if manner < 0.05:
            sent = requests.random.randbytes(200)
        elif manner < 0.1:
            sent = sent[: requests.random.randrange(len(sent))]
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            try:
                with contextlib.suppress(ConnectionError):  # refused while it is being sent
                    connection.sendall(sent)
                if manner < 0.15:
                    continue  # leave without the answer, or before the request is whole
                answer = read_response(connection)
                if answer:
                    counts[answer[0]] = counts.get(answer[0], 0) + 1
                    check(*answer)
            except Exception as error:
                findings.append(f"{error!r} ({pulse}): {sent[:3000]!r}")


def test_whatever_is_sent_is_answered_and_reads_no_file(pair, tmp_path):
    canary = tmp_path / "canary.txt"
    canary.write_text(SECRET)
    watch, findings, counts = Watch(), [], {}
    with helper.serving(pair, workers=2, waiting=2, body_mb=0.05, body_seconds=0.3, request_seconds=20) as served:

        def text():
            answer = httpx.post(served.url + PLAIN, json=ASK, headers=helper.HEADERS)
            return answer.json()["choices"][0]["text"]

        before, until = text(), time.monotonic() + SECONDS
        with Pulse(served.port) as pulse:
            arguments = [(Requests(SEED + number, canary), until, findings, counts, pulse) for number in range(4)]
            threads = [threading.Thread(target=attack, args=(served, *each)) for each in arguments]
            watch.is_on = True
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            watch.is_on = False
        assert not findings, "\n".join(findings)
        assert not watch.events
        assert {200, 400, 401, 404, 413} <= set(counts), counts
        helper.wait_until_idle(served)
        values = helper.gauges(served.url)
        assert values["vocabtrim_busy_workers"] == values["vocabtrim_waiting_requests"] == 0
        assert text() == before
        print(f"{sum(counts.values())} answers by status: {dict(sorted(counts.items()))}; {pulse}")
