"""Serve a target and its drafter over HTTP, by OpenAI's protocol, which editors, chat pages and libraries speak."""

import argparse
import os
import re
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from engines.errors import VocabtrimError
from vocabtrim_export.cli.decoder_arguments import add_decoder_arguments, load_decoder

if TYPE_CHECKING:
    from vocabtrim_export.serve.settings import ServeSettings

EXAMPLE = "--target out/target --drafter out/drafter --port 8000"
_KEY = "VOCABTRIM_API_KEY"
_UNITS = {"MB": 10**6, "GB": 10**9}
_PACKAGES = {"starlette", "uvicorn", "prometheus_client"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_decoder_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: every address")
    group.add_argument("--port", type=int, default=8000, help="the port to listen on; 0: a free one")
    group.add_argument(
        "--api-key", help=f"a key that clients must send (default: that of the environment variable {_KEY}, if any)"
    )
    group.add_argument(
        "--allow-origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins whose web pages may ask, such as http://localhost:3000; '*': every page that this machine's "
        "browsers open (default: none)",
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="the name that clients ask for (default: the target's directory)"
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--slots-in-parallel", type=int, default=1, metavar="N", help="requests that are answered at the same time"
    )
    group.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait; beyond them the answer is 429"
    )
    group.add_argument(
        "--cache-memory",
        type=memory_size,
        metavar="SIZE",
        help="memory for the KV caches of conversations that no slot holds, such as 500MB or 1GB; the least recently "
        "used leave; 0 keeps none (default: an eighth of the machine's memory)",
    )
    group.add_argument("--max-body", type=float, default=4.0, metavar="MIB", help="the largest request, in MiB")
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="the longest time for one request"
    )


def memory_size(text: str) -> int:
    """Parse an amount of memory, such as "500MB" or "1.5GB", or "0". Returns bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(MB|GB)", text)
    if not match and text != "0":
        raise argparse.ArgumentTypeError(f"{text!r}: give a number and its unit, such as 500MB or 1GB, or 0")
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def run(options: argparse.Namespace) -> None:
    """Run the command, until Ctrl-C or SIGTERM."""
    try:
        import uvicorn

        from vocabtrim_export.serve.app import Server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _PACKAGES:
            raise VocabtrimError("a server needs more packages: pip install 'vocabtrim-export[serve]'") from error
        raise
    settings = _settings(options)
    with _listen(settings.host, settings.port) as listener:  # clients that come while the bundles load wait
        decoder = load_decoder(options)
        if decoder.tokenizer is None:
            decoder.close()
            raise VocabtrimError(f"{options.target} has no tokenizer: a server needs one")
        config = uvicorn.Config(
            Server(decoder, settings).app(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(settings.shutdown_seconds),
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {settings.model_name} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn has shut down and passes the signal on
            uvicorn.Server(config).run(sockets=[listener])


def _settings(options: argparse.Namespace) -> "ServeSettings":
    from vocabtrim_export.serve.settings import ServeSettings

    if options.api_key == "":
        raise VocabtrimError("--api-key is empty: give a key, or leave it out")
    limits = {} if options.cache_memory is None else {"cache_bytes": options.cache_memory}
    return ServeSettings(
        model_name=options.model_name or options.target.resolve().name,
        host=options.host,
        port=options.port,
        api_key=options.api_key if options.api_key is not None else os.environ.get(_KEY, ""),
        origins=tuple(options.allow_origin),
        workers=options.slots_in_parallel,
        waiting=options.queue,
        body_mb=options.max_body,
        request_seconds=options.timeout,
        **limits,
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # a name whose parts are too long is a UnicodeError
        why = str(getattr(error, "strerror", None) or error).partition(" (while ")[0]  # the address is named below
        raise VocabtrimError(f"cannot listen on {host}, port {port}: {why}; give another --host or --port") from error
