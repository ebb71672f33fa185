"""`Workers`: decoders over the same weights, each of which answers one request at a time in a thread of its own."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from runtime import Generation, SamplingParams, SpeculativeDecoder
from vocabtrim_export.serve.cache_store import LEAST_TOKENS, CacheStore
from vocabtrim_export.serve.errors import ApiError
from vocabtrim_export.serve.job import Job
from vocabtrim_export.serve.running import Count, Item, Running

_RETRY_SECONDS = 2  # the Retry-After of a client that finds the queue full


@dataclass(slots=True)
class Worker:
    """A decoder, and when it was used last."""

    decoder: SpeculativeDecoder
    last_use: int = 0


class Workers:
    """A fair queue in front of the workers: the first request to come is the first to be answered.

    A request gets the free worker whose KV cache holds most of its prompt, otherwise the one that was used longest ago.
    Before it generates, the store takes what the worker is about to forget, and gives it the prompt's beginning where
    it holds more of that. Without a store the free worker must hold half of the prompt: a short system prompt in common
    must not evict a long conversation.

    Attributes:
        all: The workers.
        store: The KV caches that no worker holds any more.
        admitted: Requests that run or wait, or whose bodies are being read.
        waiting: Answers that wait for a worker.
    """

    def __init__(self, decoder: SpeculativeDecoder, number: int, waiting: int, cache_bytes: int) -> None:
        """Make the workers.

        Args:
            decoder: The first worker's; the others are forks of it.
            number: The number of workers.
            waiting: The most requests that may wait for one.
            cache_bytes: The most bytes of the store; 0: there is none.
        """
        self._free = [Worker(decoder), *(Worker(decoder.fork()) for _ in range(number - 1))]
        self.all = tuple(self._free)
        self.store = CacheStore(cache_bytes)
        self._threads = ThreadPoolExecutor(number, "vocabtrim-serve")
        self._turn = asyncio.Semaphore(number)  # wakes those who wait in the order in which they came
        self._most, self._uses = number + waiting, count(1)
        self.admitted = self.waiting = 0

    @property
    def busy(self) -> int:
        """Workers that generate now."""
        return len(self.all) - len(self._free)

    def enter(self) -> None:
        """Take a place for a request; `leave` gives it back at the end of its answer.

        Raises:
            ApiError: The queue is full.
        """
        if self.admitted >= self._most:
            wait = {"Retry-After": str(_RETRY_SECONDS)}
            raise ApiError(429, f"{self.admitted} requests are running or waiting: try again later", headers=wait)
        self.admitted += 1

    def leave(self) -> None:
        """Give back the place of a request."""
        self.admitted -= 1

    async def generate(
        self, job: Job, prompt: list[int], sampling: SamplingParams, count: Count
    ) -> AsyncGenerator[Item, None]:
        """Yields the items of one answer as they come.

        A generation that is left early, by its client or by an error, ends after the round that runs. Its worker is
        free for others only then.

        Args:
            job: The request.
            prompt: Token ids of the prompt that the answer continues.
            sampling: The settings that choose the answer's tokens.
            count: See `Running.run`; called in the worker's thread.

        Raises:
            ApiError: The server is shutting down.
            VocabtrimError: The prompt or an argument cannot be used.
        """
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        loop = asyncio.get_running_loop()
        worker, running = self._take(prompt), Running(job, prompt, sampling, loop)
        try:
            done = loop.run_in_executor(self._threads, running.run, worker.decoder, self.store, count)
        except RuntimeError as error:  # the threads are shut down
            self._release(worker)
            raise ApiError(503, "the server is shutting down") from error
        done.add_done_callback(lambda _: self._release(worker))
        try:
            while True:
                event = await running.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Generation):
                    return
        finally:
            running.cancel()

    def close(self) -> None:
        """Close the decoders; no generation may run any more."""
        self._threads.shutdown()
        for worker in self.all:
            worker.decoder.close()

    def _take(self, prompt: list[int]) -> Worker:
        longest = max(self._free, key=lambda worker: worker.decoder.kept_prefix(prompt))
        kept = longest.decoder.kept_prefix(prompt)
        least = len(prompt) / 2
        if self.store.most_bytes:  # the others' texts are not lost with their worker
            least = max(min(least, LEAST_TOKENS), self.store.longest_prefix(prompt) - LEAST_TOKENS + 1)
        if kept < least:
            longest = min(self._free, key=lambda worker: worker.last_use)
        self._free.remove(longest)
        longest.last_use = next(self._uses)
        return longest

    def _release(self, worker: Worker) -> None:
        self._free.append(worker)
        self._turn.release()
