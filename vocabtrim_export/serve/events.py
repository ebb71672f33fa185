"""`EventStream`: an answer as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime import Generation
from vocabtrim_export.serve.answers import Form
from vocabtrim_export.serve.echo import Echo
from vocabtrim_export.serve.errors import as_api_error, to_json
from vocabtrim_export.serve.job import Job
from vocabtrim_export.serve.running import Item

Event: TypeAlias = tuple[int, Item]  # of a choice
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back


class EventStream(StreamingResponse):
    """A streamed answer. Whatever ends it, its generation then ends after the round that runs."""

    def __init__(
        self,
        job: Job,
        form: Form,
        first: Event,
        rest: AsyncGenerator[Event, None],
        end: Callable[[bool], None],
        seconds: float,
    ) -> None:
        """Begin an answer.

        Args:
            job: The request.
            form: The objects of the answer.
            first: The first event; errors up to it have had a status of their own.
            rest: The others.
            end: Called once, when the answer has ended, with whether an error broke it off.
            seconds: The time after which a client that does not read the answer loses it.
        """
        self._job, self._form, self._first, self._rest, self._end = job, form, first, rest, end
        self._is_broken, self._seconds = False, seconds
        self._body = self._sent()
        super().__init__(self._body, media_type="text/event-stream", headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # the server closes the connection of an answer without an end
            self._is_broken = True
        finally:  # here, because a generator that was never begun, or is abandoned, would not run its own `finally` now
            try:
                await self._body.aclose()
                await self._rest.aclose()
            finally:
                self._end(self._is_broken)

    async def _sent(self) -> AsyncGenerator[bytes, None]:
        try:
            no_numbers = {"usage": None} if self._job.with_usage else {}
            async for data in self._objects():
                yield _event(no_numbers | data)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status has gone out already
            self._is_broken = True
            yield _event(as_api_error(error).to_dict())

    async def _objects(self) -> AsyncIterator[dict[str, Any]]:
        generations: list[Generation] = []
        event: Event | None = self._first
        begun, offset = -1, 0
        while event is not None:
            index, item = event
            if index > begun:
                begun, offset = index, 0
                if self._form.is_chat:
                    yield self._form.role(index)
            if isinstance(item, Generation):
                generations.append(item)
                yield self._form.end(index, item)
            elif isinstance(item, Echo) or item.text or item.logprob:
                piece, offset = self._form.piece(index, item, offset)
                yield piece
            event = await anext(self._rest, None)
        if self._job.with_usage:
            yield self._form.numbers(generations, self._job.prompts)


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
