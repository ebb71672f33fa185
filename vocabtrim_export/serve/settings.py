"""`ServeSettings`: the server's address and its limits."""

import re
from dataclasses import dataclass, field

from engines.errors import VocabtrimError
from vocabtrim_export.serve.cache_store import default_cache_bytes

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """The server's address and its limits.

    Attributes:
        model_name: The name that clients give as `model`.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        api_key: The bearer token that clients must send; "" requires none.
        origins: The origins whose web pages may ask, such as "http://localhost:3000"; "*": every page.
        workers: Requests that are generated at a time, each with KV caches of its own.
        waiting: Requests that may wait for a worker; the next one is answered with 429.
        cache_bytes: The most bytes of KV caches that are kept of conversations which no worker holds; 0 keeps none.
        body_mb: The largest request body, in MiB.
        request_seconds: The longest time from a request's arrival to the end of its answer, waiting included.
        body_seconds: The longest time in which a request's body must arrive, so that slow clients fill no queue.
        shutdown_seconds: The time that running requests may continue after the signal to stop.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    origins: tuple[str, ...] = ()
    workers: int = 1
    waiting: int = 64
    cache_bytes: int = field(default_factory=default_cache_bytes)
    body_mb: float = 4.0
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    shutdown_seconds: float = 30.0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--slots-in-parallel", self.workers, 1),
            ("--queue", self.waiting, 0),
            ("--port", self.port, 0),
        ):
            if value < least:
                raise VocabtrimError(f"{option} is {value}: give {least} or more")
        if self.port > 65535:
            raise VocabtrimError(f"--port is {self.port}: give at most 65535")
        for origin in self.origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
                raise VocabtrimError(f"--allow-origin is {origin!r}: give one such as http://localhost:3000, or '*'")
        if not self.host:
            raise VocabtrimError("--host is empty: give an address, or 0.0.0.0 for every one")
        if not re.fullmatch("[!-~]*", self.api_key):
            raise VocabtrimError("the API key has spaces, or characters that are not ASCII: no client could send it")
        if not (self.body_mb > 0 and self.request_seconds > 0):
            raise VocabtrimError("--max-body and --timeout must be more than 0")
