"""Calibration on a Ray cluster (the extra `ray`): actors that hold the tokenizer or the model make batches' tokens."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.generations import BatchDocuments, BatchTokens, Generator, text_tokens, whole_texts
from vocabtrim_export.calibration.model_facts import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SECONDS = 5.0  # for a cluster's first answer
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + bytes(5)  # the first bytes of gRPC
_ATTEMPTS = 4  # workers that may die of one batch
_AHEAD = 2  # batches of a worker: it starts the next one while its last one travels


class TextWorker:
    """Encodes text; it lives in a process of the cluster.

    Args:
        tokenizer: The library's tokenizer as JSON.
    """

    def __init__(self, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(tokenizer)

    def facts(self) -> None:
        """There is no model."""

    def tokens(self, batch: BatchDocuments) -> BatchTokens:
        """Returns the tokens of a batch's texts."""
        return text_tokens(self.tokenizer, batch)


class ModelWorker:
    """Generates with a model; it lives in a process of the cluster.

    Args:
        spec: MODEL, as every machine of the cluster finds it.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.generator: Generator | None = None

    def facts(self) -> tuple[ModelFacts, str]:
        """Load the model. Returns what a calibration must know of it, and the digest of its weights."""
        import torch

        from vocabtrim_export.sources.precision import calibration_model
        from vocabtrim_export.sources.source import load_source

        source = load_source(self.spec, torch.float32)
        with calibration_model(source.model) as model:
            self.generator = Generator(model, source.tokenizer)
            return ModelFacts.of(model), source.digest

    def tokens(self, batch: BatchDocuments) -> BatchTokens:
        """Returns the tokens that the model continues a batch's prompts with."""
        if self.generator is None:
            self.facts()
        assert self.generator is not None
        return self.generator.tokens(batch)


@dataclass(slots=True)
class RayWorkers:
    """The actors of a calibration. A batch whose actor dies goes to another; its tokens are taken once.

    Attributes:
        start: Makes an actor.
        actors: Those that work.
        facts: The model that they hold; None for text.
        digest: Identifies the model's weights.
    """

    start: Any
    actors: list[Any]
    facts: ModelFacts | None = None
    digest: str = ""
    _turn: int = field(default=0, init=False)

    @property
    def ahead(self) -> int:
        return _AHEAD * len(self.actors) - 1

    def submit(self, batch: BatchDocuments) -> "_Work":
        """Give a batch to the actors in turn."""
        return _Work(self, batch)

    def next_actor(self) -> Any:
        self._turn += 1
        return self.actors[self._turn % len(self.actors)]

    def replace(self, actor: Any) -> None:
        """Start another actor in the place of one that died."""
        if actor in self.actors:
            self.actors[self.actors.index(actor)] = self.start()


class _Work:
    """A batch whose tokens an actor is making."""

    def __init__(self, workers: RayWorkers, batch: BatchDocuments) -> None:
        self.workers, self.batch = workers, batch
        self._begin()

    def _begin(self) -> None:
        self.actor = self.workers.next_actor()
        self.reference = self.actor.tokens.remote(self.batch)

    def result(self) -> BatchTokens:
        """Wait for the tokens.

        Raises:
            VocabtrimError: The work fails, or actors die of it again and again.
        """
        import ray

        for _ in range(_ATTEMPTS):
            try:
                tokens: BatchTokens = ray.get(self.reference)
                return tokens
            except ray.exceptions.RayActorError:
                self.workers.replace(self.actor)
                self._begin()
            except ray.exceptions.RayTaskError as error:
                raise _one_line(error) from error
        raise VocabtrimError(
            f"{_ATTEMPTS} Ray workers died of one batch, for want of memory perhaps: the counts so far are kept"
        )

    def cancel(self) -> None:
        """Drop the work, if it has not begun."""
        import ray

        with suppress(Exception):
            ray.cancel(self.reference)


@contextmanager
def ray_workers(address: str, tokenizer: "PreTrainedTokenizerFast", spec: str | None) -> Iterator[RayWorkers]:
    """Start the actors of a calibration: for text one a CPU of the cluster, for a model one a machine.

    Args:
        address: The cluster's, "head:6379"; "" for the one that runs on this machine, or a new one.
        tokenizer: The model's tokenizer.
        spec: MODEL that generates, as every machine finds it; None counts text.

    Raises:
        VocabtrimError: Ray is not installed, the cluster does not answer, or the model cannot be loaded there.
    """
    with _connected(address) as ray:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cpus = [each for each in nodes if each]
        if not cpus:
            raise VocabtrimError("the Ray cluster has no CPU to calibrate on: start a node with some")
        if spec is None:
            make = ray.remote(num_cpus=1)(TextWorker)
            state = whole_texts(tokenizer).to_str()
            workers = RayWorkers(lambda: make.remote(state), [make.remote(state) for _ in range(sum(cpus))])
        else:
            make = ray.remote(num_cpus=min(cpus))(ModelWorker)
            workers = RayWorkers(lambda: make.remote(spec), [make.remote(spec) for _ in cpus])
        try:
            _check_same(workers, ray)
            yield workers
        finally:
            for actor in workers.actors:
                ray.kill(actor)


def _check_same(workers: RayWorkers, ray: Any) -> None:
    """Wait for all actors, and check that they hold one model."""
    try:
        facts = ray.get([actor.facts.remote() for actor in workers.actors])
    except ray.exceptions.RayTaskError as error:
        raise _one_line(error) from error
    except ray.exceptions.RayActorError as error:
        raise VocabtrimError(f"a Ray worker died as it started: {_first_words(error)}") from error
    if any(each != facts[0] for each in facts):
        raise VocabtrimError(
            "the machines of the Ray cluster have different models or compute in different dtypes, so that counts "
            f"would depend on where they are made: {facts[0]} and {next(each for each in facts if each != facts[0])}"
        )
    if facts[0] is not None:
        workers.facts, workers.digest = facts[0]


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to a cluster; a connection that this process has already is used, and stays."""
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
        raise VocabtrimError(f"--ray {address}: cannot connect: {_first_words(error)}".replace(" :", ":")) from error
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


def _one_line(error: Any) -> VocabtrimError:
    """Returns a worker's error without its traceback."""
    cause = error.cause
    if isinstance(cause, VocabtrimError):
        return VocabtrimError(str(cause))
    return VocabtrimError(f"a Ray worker failed: {type(cause).__name__}: {_first_words(cause)}")


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
