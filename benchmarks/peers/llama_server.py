"""A client of llama.cpp's server, which it starts and ends."""

import atexit
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

CONTEXT = 2048  # tokens
THREADS = 2
_PATIENCE = 600  # seconds, for the model to load


class LlamaServer:
    """A server with one model, on a free port of this machine, for one request at a time.

    Attributes:
        pid: The server's process.
    """

    def __init__(self, program: Path, model: Path, options: Sequence[str]) -> None:
        """Start a server and wait until it is ready.

        Args:
            program: The file `llama-server`.
            model: A GGUF file.
            options: Further options, such as those of a drafter.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        threads = ("--threads", str(THREADS), "--threads-batch", str(THREADS))
        # Nothing of an earlier prompt may help the next one.
        uncached = ("--no-cache-prompt", "--cache-ram", "0", "--parallel", "1", "--ctx-size", str(CONTEXT))
        command = [str(program), "--model", str(model), "--port", port, *threads, *uncached, *options]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(self._server.terminate)
        self.pid = self._server.pid
        self._connection = http.client.HTTPConnection("127.0.0.1", int(port))
        self._wait()

    def decode(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Returns the greedy tokens after a prompt of token ids."""
        request = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        headers = {"Content-Type": "application/json"}
        self._connection.close()  # the server ends a connection that was idle while the others had their turns
        self._connection.request("POST", "/completion", json.dumps(request), headers)
        reply = json.load(self._connection.getresponse())
        decoded: list[int] = reply["tokens"]
        return decoded

    def _wait(self) -> None:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and self._server.poll() is None:
            try:
                self._connection.request("GET", "/health")
                response = self._connection.getresponse()
                response.read()
                if response.status == 200:
                    return
            except OSError:
                self._connection.close()
            time.sleep(0.01)
        raise SystemExit("llama-server did not start: run its command by hand to see why")
