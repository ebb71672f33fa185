"""`vocabtrim serve` when things break: slow clients, a killed process, a bundle that is replaced underneath."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engines.bundle.atomic_replace import ASIDE, commit
from runtime import SpeculativeDecoder
from runtime.stream import Stream
from vocabtrim_export.serve.settings import ServeSettings

httpx = pytest.importorskip("httpx")
app = pytest.importorskip("vocabtrim_export.serve.app")
helper = pytest.importorskip("tests.serving")
ASK = {"prompt": "the quick brown", "max_tokens": 60, "temperature": 0, "logit_bias": {"1": -100}}


@pytest.fixture(scope="module")
def server(pair):
    with helper.serving(pair, workers=1, waiting=3, body_seconds=0.5) as served:
        yield served


@pytest.fixture
def connect(server):
    """connect(bytes) → a socket on which these were sent."""
    opened = []

    def send(data):
        opened.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        opened[-1].sendall(data)
        return opened[-1]

    yield send
    for each in opened:
        each.close()


def head(length, key=helper.KEY):
    headers = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{headers}".encode()


def read_all(connection):
    with contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_slow_clients_keep_nobody_out(server, connect):
    """Half of a request's head, half of its body: neither holds a worker, nor for long a place in the queue."""
    for _ in range(20):
        connect(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    slow = [connect(head(100) + b'{"prompt"') for _ in range(2)]
    while server.workers.admitted < 2:
        time.sleep(0.01)
    assert helper.gauges(server.url)["vocabtrim_waiting_requests"] == 0  # for a worker
    answer = httpx.post(f"{server.url}/v1/completions", json=ASK, headers=helper.HEADERS)
    assert answer.json()["usage"]["completion_tokens"] == 60
    for connection in slow:
        response = read_all(connection)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"
    helper.wait_until_idle(server)


def test_requests_that_wait_are_counted(server, monkeypatch):
    step = Stream.__next__
    monkeypatch.setattr(Stream, "__next__", lambda stream: time.sleep(0.02) or step(stream))  # as a large model is
    with httpx.Client(headers=helper.HEADERS, timeout=20) as client:
        url = f"{server.url}/v1/completions"
        asks = [
            threading.Thread(target=client.post, args=[url], kwargs={"json": ASK | {"max_tokens": 20}})
            for _ in range(2)
        ]
        for thread in asks:
            thread.start()
        while server.workers.waiting < 1:
            time.sleep(0.01)
        values = helper.gauges(server.url)
        assert (values["vocabtrim_busy_workers"], values["vocabtrim_waiting_requests"]) == (1, 1)
        for thread in asks:
            thread.join()


def test_a_huge_body_is_refused_before_it_has_come(server, connect):
    connection = connect(head(1 << 40))
    with contextlib.suppress(ConnectionError):
        for _ in range(6):
            connection.sendall(bytes(1 << 20))
    assert (read_all(connection) or b"HTTP/1.1 413 ").startswith(b"HTTP/1.1 413 ")
    helper.wait_until_idle(server)


def test_a_client_that_does_not_read_loses_its_answer(pair, monkeypatch):
    monkeypatch.setattr(app, "_READING_SECONDS", 0.1)
    scope = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1"},
        **{"method": "POST", "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions"},
        **{"query_string": b"", "root_path": "", "headers": []},
    }

    async def call():
        requests = [{"type": "http.request", "body": json.dumps(ASK | {"stream": True}).encode()}]

        async def receive():
            return requests.pop() if requests else await asyncio.Event().wait()

        async def send(_message):
            await asyncio.Event().wait()

        decoder = SpeculativeDecoder.load(pair.target, pair.drafter)
        alone = app.Server(decoder, ServeSettings("tiny", request_seconds=0.5))
        await asyncio.wait_for(alone.app()(scope, receive, send), 20)
        assert alone.workers.admitted == 0
        alone.workers.close()

    asyncio.run(call())


def test_a_bundle_that_is_replaced_changes_no_answer(random_model, export_pair, pair):
    """A running server goes on with the files that it opened; one that starts afterwards reads the new ones."""
    old, new = export_pair(random_model("llama")), export_pair(random_model("llama", seed=1))
    with SpeculativeDecoder.load(new.target, new.drafter) as decoder:
        changed = decoder.generate(ASK["prompt"], max_new_tokens=20, chat=False).text

    def text(served):
        ask = ASK | {"max_tokens": 20, "logit_bias": {}}
        answer = httpx.post(f"{served.url}/v1/completions", json=ask, headers=helper.HEADERS)
        return answer.json()["choices"][0]["text"]

    with helper.serving(old, workers=2) as served:
        before = text(served)
        aside = old.target.parent / f"{ASIDE}test"
        new.target.parent.rename(aside.with_name("other"))
        aside.mkdir()
        aside.with_name("other").rename(aside / "new")
        commit(old.target.parent, aside, ["target", "drafter"])
        assert [text(served) for _ in range(3)] == [before] * 3
    with helper.serving(old) as served:
        assert text(served) == changed != before


def loopback():
    """Returns IPv6's address of this machine; where it has none, that of IPv4."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return "127.0.0.1"
    return "::1"


def start(pair, port):
    code = "import sys; from vocabtrim_export.cli.main import main; c = main(); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(c)"
    options = ["serve", "--target", pair.target, "--drafter", pair.drafter, "--host", loopback(), "--port", port]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    return process, process.stderr.readline().split()[-1]


def test_a_server_that_is_killed_starts_again_and_one_that_is_told_to_stop_stops(pair):
    process, url = start(pair, 0)
    with httpx.stream("POST", f"{url}/completions", json=ASK | {"stream": True, "n": 64}) as answer:
        pieces = answer.iter_lines()
        next(pieces)
        process.kill()
        with pytest.raises(httpx.TransportError):
            list(pieces)
    process.wait()
    process.stderr.close()
    process, again = start(pair, url.rpartition(":")[2].partition("/")[0])
    assert again == url
    assert httpx.post(f"{url}/completions", json=ASK).json()["usage"]["completion_tokens"] == 60
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, process.stderr.read()
    process.stderr.close()
