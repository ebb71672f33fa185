"""`Running`: one answer that a worker's thread generates."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TypeAlias

from runtime import Generation, SamplingParams, SpeculativeDecoder, Stats
from runtime.stream import Stream, Token
from vocabtrim_export.serve.cache_store import CacheStore
from vocabtrim_export.serve.echo import NOTHING, Echo
from vocabtrim_export.serve.job import Job

Item: TypeAlias = Echo | Token | Generation  # of one answer: its prompt where that is asked for, tokens, then all of it
Count: TypeAlias = Callable[[Stats, int, float], None]  # of one answer, its prompt's tokens, and its seconds


class Running:
    """One answer that a worker's thread generates. `run` is called in that thread, all else in the event loop's.

    Attributes:
        events: The items of the answer as they come, or the error that ended it.
    """

    def __init__(self, job: Job, prompt: list[int], sampling: SamplingParams, loop: asyncio.AbstractEventLoop) -> None:
        """Note what is asked for.

        Args:
            job: The request.
            prompt: The token ids of the prompt that this answer continues.
            sampling: The settings that choose this answer's tokens.
            loop: The event loop that reads `events`.
        """
        self.events: asyncio.Queue[Item | BaseException] = asyncio.Queue()
        self._job, self._prompt, self._sampling, self._loop = job, prompt, sampling, loop
        self._cancelled = threading.Event()
        self._stream: Stream | None = None  # None before the prompt is read

    def cancel(self) -> None:
        """End the generation after the round that runs, or after the part of the prompt that is read."""
        self._cancelled.set()
        if self._stream:
            self._stream.close()

    def run(self, decoder: SpeculativeDecoder, store: CacheStore, count: Count) -> None:
        """Generate, and send the items to the event loop. A cancelled answer ends without its last item.

        Args:
            decoder: The worker's decoder.
            store: The KV caches that no worker holds.
            count: Called once, whatever ends the answer, and before its last item is sent. It gets the sums over the
                rounds that ran, the prompt's tokens (0 where the prompt was not read whole) and the seconds.
        """
        began, generation, error = perf_counter(), None, None
        try:
            generation = self._generate(decoder, store)
        except BaseException as raised:  # the event loop raises it again
            error = raised
        stats = self._stats()
        read = len(self._prompt) if generation or stats.prefills else 0
        count(stats, read, perf_counter() - began)
        if error:
            self._send(error)
        elif generation:
            self._send(replace(generation, stats=stats))

    def _generate(self, decoder: SpeculativeDecoder, store: CacheStore) -> Generation | None:
        """Returns the whole answer, after its items were sent; None where it was cancelled."""
        job, prompt = self._job, self._prompt
        store.prepare(decoder, prompt, keeps_prefix=not (job.echo or self._sampling.must_repeat_itself))
        if job.echo:
            wanted, cancelled = job.logprobs, self._cancelled.is_set
            self._send(Echo(prompt, None if wanted is None else decoder.prompt_logprobs(prompt, wanted, cancelled)))
        if job.max_new_tokens == 0:
            return NOTHING
        with decoder.stream(
            prompt,
            max_new_tokens=job.max_new_tokens or decoder.target.capacity,  # to the end of the context
            sampling=self._sampling,
            stop=job.stop or None,
            logprobs=job.logprobs,
            json_schema=job.json_schema,
        ) as stream:
            self._stream = stream
            if self._cancelled.is_set():  # before `cancel` could close the stream
                return None
            for token in stream:
                self._send(token)
            return None if self._cancelled.is_set() else stream.finish()

    def _stats(self) -> Stats:
        """Returns the sums over the rounds so far. A prompt that was read for its log-probabilities is not cached."""
        stats = self._stream.stats if self._stream else NOTHING.stats
        is_read_before = self._job.echo and self._job.logprobs is not None
        return replace(stats, cached=0) if is_read_before else stats

    def _send(self, event: Item | BaseException) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)
