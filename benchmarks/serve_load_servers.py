"""The servers that `serve_load.py` asks: ours, and llama.cpp's."""

import argparse
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from engines.cores import usable_cores

PACKAGES = ("onnxruntime", "starlette", "uvicorn")


@dataclass(frozen=True, slots=True)
class Served:
    """A running server.

    Attributes:
        port: Where it listens.
        process: Its process.
        is_ours: Its texts are compared, and it has gauges.
    """

    port: int
    process: "subprocess.Popen[str]"
    is_ours: bool

    @property
    def resident_mb(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def figures(self) -> dict[str, float]:
        """Returns what our server counts, by name without the prefix; nothing for another server."""
        if not self.is_ours:
            return {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        named = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("vocabtrim_"): float(value) for name, value in named}

    def figures_afterwards(self) -> dict[str, float]:
        """Returns what it counts once nothing runs or waits, or ten seconds after the last client has left."""
        for _ in range(100):
            if not held(now := self.figures()):
                break
            time.sleep(0.1)
        return now


def held(figures: Mapping[str, float]) -> float:
    """Workers that generate, and answers that wait for one."""
    return figures.get("busy_workers", 0) + figures.get("waiting_requests", 0)


@contextmanager
def our_server(options: argparse.Namespace) -> Iterator[Served]:
    """Yield `vocabtrim serve`."""
    command = [sys.executable, "-m", "vocabtrim_export.cli.main", "serve", "--port", "0"]
    command += ["--target", str(options.target), "--slots-in-parallel", str(options.slots)]
    command += ["--drafter", str(options.drafter)] if options.drafter else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = process.stderr.readline()
        yield Served(int(line.rsplit(":", 1)[1].split("/")[0]), process, is_ours=True)
        process.terminate()


@contextmanager
def llama_server(options: argparse.Namespace) -> Iterator[Served]:
    """Yield llama.cpp's server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(options.llama_server), "--model", str(options.model), "--port", str(port)]
    command += ["--parallel", str(options.slots), "--ctx-size", str(2048 * options.slots)]
    command += ["--threads", str(usable_cores())]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, text=True, stdout=nowhere, stderr=nowhere) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        yield Served(port, process, is_ours=False)
        process.terminate()


def versions(llama: Path | None) -> dict[str, str]:
    """Returns the versions of what serves."""
    if llama is None:
        return {name: version(name) for name in PACKAGES}
    told = subprocess.run([llama, "--version"], capture_output=True, text=True)
    return {"llama.cpp": (told.stderr + told.stdout).splitlines()[0]}
