"""Calibration on a Ray cluster (the extra `ray`): its actors make batches' tokens, and their work is saved here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.generations import BatchDocuments, BatchTokens, whole_texts
from vocabtrim_export.calibration.model_facts import ModelFacts
from vocabtrim_export.calibration.partial_batch import PartialBatch
from vocabtrim_export.calibration.ray_actors import ModelWorker, SavedWork, TextWorker
from vocabtrim_export.calibration.ray_cluster import connected, first_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ATTEMPTS = 4  # workers that may die of one batch
_AHEAD = 2  # batches of a worker: it starts the next one while its last one travels
# A worker sets the work on its batch aside so often, and so often the driver fetches and saves it, in seconds. What a
# killed driver loses is the sum of both, for each of a worker's batches.
_ASIDE, _FETCH = 8.0, 5.0
_PATIENCE = 2.0  # seconds that the driver waits for what it fetches; what comes later is saved the next time
_FETCHING = "fetching"  # methods of this group run while the actor works on a batch


@dataclass(slots=True)
class RayWorkers:
    """The actors of a calibration. A batch whose actor dies goes to another; its tokens are taken once.

    Attributes:
        start: Makes an actor.
        actors: Those that work.
        facts: The model that they hold; None for text.
        digest: Identifies the model's weights.
        unfinished: The storage of the batches that were given out, by the number of each handing-out; what an actor
            still does for an earlier one is ignored.
    """

    start: Any
    actors: list[Any]
    facts: ModelFacts | None = None
    digest: str = ""
    unfinished: dict[int, PartialBatch] = field(default_factory=dict, init=False)
    _turn: int = field(default=0, init=False)
    _fetched: float = field(default_factory=monotonic, init=False)
    _fetches: dict[Any, Any] = field(default_factory=dict, init=False)

    @property
    def ahead(self) -> int:
        return _AHEAD * len(self.actors) - 1

    def submit(self, batch: BatchDocuments, unfinished: PartialBatch | None) -> "_Work":
        """Give a batch to the actors in turn."""
        return _Work(self, batch, unfinished if self.facts else None)

    def next_turn(self) -> tuple[int, Any]:
        """Returns the number of the next handing-out, and the actor whose turn it is."""
        self._turn += 1
        return self._turn, self.actors[self._turn % len(self.actors)]

    def replace(self, actor: Any) -> None:
        """Start another actor in the place of one that died."""
        self._fetches.pop(actor, None)
        if actor in self.actors:
            self.actors[self.actors.index(actor)] = self.start()

    def save(self) -> None:
        """Fetch what the actors have set aside of their batches' work, and save it, where it is time."""
        import ray

        if not self.unfinished or monotonic() - self._fetched < _FETCH:
            return
        self._fetches |= {
            actor: actor.fetch.options(concurrency_group=_FETCHING).remote()
            for actor in self.actors
            if actor not in self._fetches
        }
        ray.wait(list(self._fetches.values()), num_returns=len(self._fetches), timeout=_PATIENCE)
        for actor, reference in list(self._fetches.items()):
            if ray.wait([reference], timeout=0)[0]:
                del self._fetches[actor]
                with suppress(ray.exceptions.RayError):  # it died: whoever waits for its batch starts another
                    self._append(ray.get(reference))
        self._fetched = monotonic()

    def _append(self, segments: Mapping[int, Sequence[bytes]]) -> None:
        for number in segments.keys() & self.unfinished.keys():
            for segment in segments[number]:
                self.unfinished[number].append(segment)


class _Work:
    """A batch whose tokens an actor is making."""

    def __init__(self, workers: RayWorkers, batch: BatchDocuments, unfinished: PartialBatch | None) -> None:
        self.workers, self.batch, self.unfinished = workers, batch, unfinished
        self._begin()

    def _begin(self) -> None:
        self.number, self.actor = self.workers.next_turn()
        work = None
        if self.unfinished is not None:
            self.workers.unfinished[self.number] = self.unfinished
            work = SavedWork(self.number, self.unfinished.key, tuple(self.unfinished.stored()))
        self.reference = self.actor.tokens.remote(self.batch, work)

    def _end(self) -> None:
        self.workers.unfinished.pop(self.number, None)

    def result(self) -> BatchTokens:
        """Wait for the tokens.

        Raises:
            VocabtrimError: The work fails, or actors die of it again and again.
        """
        import ray

        for _ in range(_ATTEMPTS):
            try:
                while not ray.wait([self.reference], timeout=_FETCH)[0]:
                    self.workers.save()
                self.workers.save()
                tokens: BatchTokens = ray.get(self.reference)
                self._end()
                return tokens
            except ray.exceptions.RayActorError:
                self._end()
                self.workers.replace(self.actor)
                self._begin()
            except ray.exceptions.RayTaskError as error:
                raise _one_line(error) from error
        raise VocabtrimError(
            f"{_ATTEMPTS} Ray workers died at one batch, perhaps because memory ran out; the counts so far are kept: "
            "run it again with more memory"
        )

    def cancel(self) -> None:
        """Drop the work, if it has not begun."""
        import ray

        self._end()
        if self.unfinished is not None:
            self.unfinished.clear()
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
    with connected(address) as ray:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cpus = [each for each in nodes if each]
        if not cpus:
            raise VocabtrimError("the Ray cluster has no CPU to calibrate on: start a node with some")
        if spec is None:
            make = ray.remote(num_cpus=1)(TextWorker)
            state = whole_texts(tokenizer).to_str()
            workers = RayWorkers(lambda: make.remote(state), [make.remote(state) for _ in range(sum(cpus))])
        else:
            make = ray.remote(num_cpus=min(cpus), concurrency_groups={_FETCHING: 1})(ModelWorker)
            workers = RayWorkers(lambda: make.remote(spec, _ASIDE), [make.remote(spec, _ASIDE) for _ in cpus])
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
        raise VocabtrimError(f"a Ray worker died as it started: {first_words(error)}") from error
    if any(each != facts[0] for each in facts):
        raise VocabtrimError(
            "the machines of the Ray cluster have different models or compute in different dtypes, so counts would "
            "depend on where they are made: give all of them the same files and hardware; "
            f"found {facts[0]} and {next(each for each in facts if each != facts[0])}"
        )
    if facts[0] is not None:
        workers.facts, workers.digest = facts[0]


def _one_line(error: Any) -> VocabtrimError:
    """Returns a worker's error without its traceback."""
    cause = error.cause
    if isinstance(cause, VocabtrimError):
        return VocabtrimError(str(cause))
    return VocabtrimError(f"a Ray worker failed: {type(cause).__name__}: {first_words(cause)}")
