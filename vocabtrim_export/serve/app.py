"""The routes of the server, as an ASGI application."""

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from runtime import Generation, SamplingParams, SpeculativeDecoder
from vocabtrim_export.serve.answers import Form
from vocabtrim_export.serve.echo import Echo
from vocabtrim_export.serve.errors import ApiError, refusal
from vocabtrim_export.serve.events import Event, EventStream
from vocabtrim_export.serve.job import Job, read_job
from vocabtrim_export.serve.metrics import Metrics
from vocabtrim_export.serve.settings import MB, ServeSettings
from vocabtrim_export.serve.workers import Workers

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
_CLOSE = {"Connection": "close"}  # the rest of a body is not waited for
_READING_SECONDS = 5.0  # after a request's deadline, to take what was generated
_GONE = 499  # nginx's status for a client that left; only the metrics show it


class Server:
    """Answers requests with the workers' decoders.

    Args:
        decoder: The first worker's decoder; its forks are made here, and all are closed with the application.
        settings: The settings of the server.
    """

    def __init__(self, decoder: SpeculativeDecoder, settings: ServeSettings) -> None:
        self._decoder, self._settings = decoder, settings
        self.workers = Workers(decoder, settings.workers, settings.waiting, settings.cache_bytes)
        self.metrics = Metrics(self.workers)
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Returns the ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._models)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
        ]
        refusals = {404: _no_such_route, 405: _no_such_route}
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=refusals)
        if origins := self._settings.origins:
            app.add_middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        return app

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.workers.close()

    def _guarded(self, handler: Handler) -> Handler:
        """Check the API key, and turn every error into OpenAI's form."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_caller(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception as error:
                response = refusal(error)
            self.metrics.answered(response.status_code)
            return response

        return guarded

    def _check_caller(self, request: Request) -> None:
        """Check the API key. Where the server has none, refuse web pages of origins that it does not allow.

        Raises:
            ApiError: The caller may not ask.
        """
        wanted, origin = self._settings.api_key, request.headers.get("origin")
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if wanted:
            if scheme.lower() != "bearer" or not hmac.compare_digest(wanted.encode(), sent.strip().encode()):
                why = "the API key is missing or wrong"
                raise ApiError(401, why, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        # A browser hides the answer from such a page, but only after the work; and not where the page's own name leads
        # to this address (DNS rebinding).
        elif origin and not {origin, "*"} & set(self._settings.origins):
            raise ApiError(403, f"web pages of {origin[:100]} may not ask: start the server with --allow-origin")

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        name = self._settings.model_name
        model = {"id": name, "object": "model", "created": self._started, "owned_by": "vocabtrim"}
        asked = request.path_params.get("name")
        if asked is None:
            return JSONResponse({"object": "list", "data": [model]})
        if asked != name:
            raise ApiError(404, f"there is no model {asked[:100]!r} here: ask for {name!r}", code="model_not_found")
        return JSONResponse(model)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        arrived = asyncio.get_running_loop().time()
        self.workers.enter()
        response: Response | None = None
        try:
            async with asyncio.timeout_at(arrived + self._settings.request_seconds):
                body = await self._body(request)
                job = await asyncio.to_thread(read_job, body, is_chat, self._decoder, self._settings.model_name)
            assert self._decoder.tokenizer is not None
            form = Form(is_chat, self._settings.model_name, self._decoder.tokenizer)
            answer = self._events(job, arrived)
            if not job.is_streamed:
                return await _while_connected(request, _whole(job, form, answer))
            first = await _while_connected(request, anext(answer))  # errors up to here have a status of their own
            seconds = arrived + self._settings.request_seconds - asyncio.get_running_loop().time()
            response = EventStream(job, form, first, answer, self._streamed, seconds + _READING_SECONDS)
            return response
        finally:
            if response is None:  # a stream gives its place back itself
                self.workers.leave()

    def _streamed(self, is_broken: bool) -> None:
        self.workers.leave()
        self.metrics.streamed(is_broken)

    async def _body(self, request: Request) -> bytes:
        if (encoding := request.headers.get("content-encoding", "identity")).lower() not in ("identity", ""):
            why = f"the request's body is encoded as {encoding[:100]}; this server reads no encoding: send it as it is"
            raise ApiError(415, why, code="unsupported_content_encoding", headers={"Accept-Encoding": "identity"})
        most, parts, size = int(self._settings.body_mb * MB), [], 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        most_mb = f"{self._settings.body_mb:g} MiB"
                        raise ApiError(413, f"the request's body is larger than {most_mb}", headers=_CLOSE)
                    parts.append(part)
        except TimeoutError as error:
            seconds = self._settings.body_seconds
            why = f"the request's body did not arrive within {seconds:g} s: send it at once"
            raise ApiError(408, why, headers=_CLOSE) from error
        return b"".join(parts)

    async def _events(self, job: Job, arrived: float) -> AsyncGenerator[Event, None]:
        """Yields the events of an answer, one choice after another."""
        clock = asyncio.get_running_loop().time
        deadline = arrived + self._settings.request_seconds
        is_first = True
        for index, (prompt, sampling) in enumerate(_choices(job)):
            events = self.workers.generate(job, prompt, sampling, self.metrics.generated)
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events, None)
                    if event is None:
                        break
                    if is_first and not isinstance(event, Echo):
                        self.metrics.first_token(clock() - arrived)
                        is_first = False
                    yield index, event
            finally:
                await events.aclose()


async def _whole(job: Job, form: Form, answer: AsyncGenerator[Event, None]) -> Response:
    generations: list[Generation] = []
    echoes: dict[int, Echo] = {}
    try:
        async for index, item in answer:
            if isinstance(item, Generation):
                generations.append(item)
            elif isinstance(item, Echo):
                echoes[index] = item
    finally:
        await answer.aclose()
    return JSONResponse(form.whole(generations, job.prompts, echoes))


def _choices(job: Job) -> list[tuple[list[int], SamplingParams]]:
    """Returns a prompt and a sampling for each choice.

    Seeds differ, otherwise all answers to a prompt would be equal.
    """
    seed = job.sampling.seed
    samplings = [
        job.sampling if seed is None or index == 0 else replace(job.sampling, seed=(seed + index) % (1 << 64))
        for index in range(job.n)
    ]
    return [(prompt, sampling) for prompt in job.prompts for sampling in samplings]


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; cancel it where the client leaves first."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, left):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path, words = request.url.path[:100], "this address takes another method"
    if status != 405:
        words = "there is nothing at this address" + ("" if path.startswith("/v1/") else ": the API is under /v1/")
    why = f"{request.method} {path}: {words}"
    return refusal(ApiError(status, why, headers=getattr(error, "headers", None)))
