"""The connection to a Ray cluster (the extra `ray`): one that does not answer is an error within seconds."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engines.errors import VocabtrimError

_SECONDS = 5.0  # for a cluster's first answer
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)  # the first bytes of gRPC


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster; a connection that this process has already is used, and stays.

    Raises:
        VocabtrimError: Ray is not installed, or no cluster answers at `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise VocabtrimError("--ray needs Ray: pip install 'vocabtrim-export[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    _check_answers(address)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or None, log_to_driver=False, configure_logging=False, include_dashboard=_dashboard(address))
    except Exception as error:  # it raises many kinds
        raise VocabtrimError(f"--ray {address}: cannot connect: {first_words(error)}".replace(" :", ":")) from error
    if in_main:
        signal.signal(signal.SIGTERM, before)  # Ray would end the program, where it must save the counts first
    try:
        yield ray
    finally:
        ray.shutdown()


def _dashboard(address: str) -> bool | None:
    return None if address else False  # it may not be asked of a cluster that runs


def _check_answers(address: str) -> None:
    """See that a gRPC server answers: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        if address not in ("", "auto", "local"):
            raise VocabtrimError(f"--ray {address}: give the address of a Ray cluster, such as head:6379")
        return
    try:
        with socket.create_connection((host, int(port)), _SECONDS) as connection:
            connection.sendall(_HELLO)
            if not os.environ.get("RAY_USE_TLS") and connection.recv(4)[3:] != _SETTINGS:
                raise OSError("what answers is no Ray cluster")
    except (OSError, ValueError) as error:
        raise VocabtrimError(f"--ray {address}: no Ray cluster answers there ({error})") from error


def first_words(error: BaseException) -> str:
    """Returns the beginning of an error of Ray's, in one line."""
    return " ".join(str(error).split())[:200]
