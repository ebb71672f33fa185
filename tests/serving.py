"""A server in a thread of this process, on a free port."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import httpx
import uvicorn

from runtime import SpeculativeDecoder
from vocabtrim_export.serve.app import Server
from vocabtrim_export.serve.settings import ServeSettings

KEY = "a-secret"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


@contextmanager
def serving(pair: Any, draft_length: int | Literal["auto"] = "auto", **settings: Any) -> Iterator[Any]:
    """Yield the server of a pair, with its `url`; its model is "tiny", its key `KEY`."""
    decoder = SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=draft_length)
    served: Any = Server(decoder, ServeSettings("tiny", api_key=KEY, **settings))
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(served.app(), log_level="critical"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    served.port = listener.getsockname()[1]
    served.url = f"http://127.0.0.1:{served.port}"
    while not running.started:
        time.sleep(0.01)
    try:
        yield served
    finally:
        running.should_exit = True
        thread.join()


def gauges(url: str) -> dict[str, float]:
    """Returns what the server counts, by name."""
    text = httpx.get(f"{url}/metrics", headers=HEADERS).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def wait_until_idle(served: Any, seconds: float = 20) -> None:
    """Wait until nothing runs or waits; fail where something still does after so many seconds."""
    until = time.monotonic() + seconds
    while served.workers.admitted or served.workers.busy or served.workers.waiting:
        assert time.monotonic() < until, "an answer goes on that nobody reads"
        time.sleep(0.01)
