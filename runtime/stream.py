"""`Stream`, a generation token by token, and `Generation`, all of it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any
from weakref import ref

from engines.bundle.tokenizer import TextStream, Tokenizer
from engines.closing import Closing
from engines.errors import VocabtrimError
from runtime.alarm import Collapse
from runtime.logprobs import TokenLogprob
from runtime.prompt_tokens import require_tokenizer
from runtime.round import FinishReason, Round
from runtime.stats import Stats, summarize
from runtime.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token and the text that it completes.

    Attributes:
        id: The token's id.
        text: "" for a special token, within an unfinished character, and while a stop string may have begun.
        logprob: None where none were asked for.
    """

    id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text, without its prompt.

    Attributes:
        text: The text without special tokens and without the stop string; "" where the decoder has no tokenizer.
        token_ids: The new tokens, including an EOS; they end with the token that completes a stop string, if there is
            one.
        finish_reason: "stop" at an EOS or a stop string, "length" at `max_new_tokens` or at the end of the context.
        stats: Sums over the rounds.
        logprobs: One entry for each of `token_ids`; None where none were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain data for `json.dumps`."""
        return asdict(self) | {"stats": self.stats.to_dict()}


class Stream(Iterator[Token], AsyncIterator[Token], Closing):
    """The tokens of one generation as they come. Their texts, joined, are the text of `finish()`.

    `for token in stream` runs the rounds in the caller's thread, `async for token in stream` in a thread of the
    stream's own, so that the event loop goes on meanwhile. The decoder is free for other threads once the stream is
    finished, closed, or no longer referenced. A cancelled `async for` closes the stream, after the round that runs.
    """

    def __init__(
        self,
        rounds: Generator[Round, None, None],
        tokenizer: Tokenizer | None,
        stop: str | Sequence[str] | None = None,
        collapse: Callable[[], Collapse | None] = lambda: None,
        closed: Event | None = None,
    ) -> None:
        """Give out the tokens of a generation.

        Args:
            rounds: See `decode_rounds`.
            tokenizer: The target's tokenizer; None gives token ids without text.
            stop: The strings that end the text.
            collapse: Returns what the decoder's alarm has found by now.
            closed: Set by `close`, so that the rounds can tell.
        """
        self._rounds = rounds
        self._past: list[Round] = []
        self._collapse = collapse
        self._decoded = tokenizer.stream() if tokenizer else None
        self._decoded_whole = require_tokenizer(tokenizer).stream(skip_special_tokens=False) if stop else None
        self._stop = StopStrings(stop)
        self._ready: deque[Token] = deque()  # tokens of the last round that were not given out yet
        self._text = ""  # of all rounds so far
        self._closed = closed or Event()
        self._worker: ThreadPoolExecutor | None = None  # one thread, for `async for`

    def __next__(self) -> Token:
        if not self._ready and not self._closed.is_set():
            self._read_round()
        if not self._ready or self._closed.is_set():
            raise StopIteration
        return self._ready.popleft()

    async def __anext__(self) -> Token:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "vocabtrim-stream")
        step = asyncio.wrap_future(self._worker.submit(_next_token, ref(self)))
        try:
            token = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.close()
            await asyncio.wait([step])  # the engines cannot be interrupted within a run
            raise
        if token is None:
            self.close()
            raise StopAsyncIteration
        return token

    def close(self) -> None:
        """Cancel what is left and free the decoder; from any thread.

        A round that runs in another thread ends first, or the part of the prompt that it reads.
        """
        self._closed.set()
        with suppress(ValueError):  # raised where it runs in another thread, which closes it after the round
            self._rounds.close()
        if self._worker:
            self._worker.shutdown(wait=False)

    @property
    def stats(self) -> Stats:
        """Sums over the rounds so far."""
        return summarize(self._past, self._collapse())

    def finish(self) -> Generation:
        """Generate the rest.

        Returns:
            All of the generation, the tokens that were read before included.

        Raises:
            VocabtrimError: The stream was closed before its end, or broke off with an error.
        """
        for _ in self:
            pass
        last = self._past[-1] if self._past else None
        if last is None or last.finish_reason is None:
            raise VocabtrimError("this generation was closed or broke off with an error: start another")
        token_ids = tuple(token for entry in self._past for token in entry.tokens)
        logprobs = tuple(each for entry in self._past for each in entry.logprobs) or None
        return Generation(self._text, token_ids, last.finish_reason, self.stats, logprobs)

    def _read_round(self) -> None:
        """Run the next round, if there is one, and make its tokens ready."""
        try:
            entry = next(self._rounds, None)
        except VocabtrimError:
            if not self._closed.is_set():
                raise
            return  # closed while the prompt was read
        if entry is None:
            return
        for count, token_id in enumerate(entry.tokens, 1):
            is_last = entry.finish_reason is not None and count == len(entry.tokens)
            shown = _decode(self._decoded, token_id, is_last)
            whole = _decode(self._decoded_whole, token_id, is_last) if self._decoded_whole else shown
            piece, stopped = self._stop.push(whole, shown, is_last)
            self._text += piece
            self._ready.append(Token(token_id, piece, entry.logprobs[count - 1] if entry.logprobs else None))
            if stopped:  # what the round gave beyond it never was
                entry = replace(
                    entry,
                    tokens=entry.tokens[:count],
                    accepted=min(entry.accepted, count),
                    finish_reason="stop",
                    logprobs=entry.logprobs[:count],
                )
                break
        self._past.append(entry)
        if entry.finish_reason is not None or self._closed.is_set():
            self._rounds.close()


def _decode(stream: TextStream | None, token_id: int, is_last: bool) -> str:
    if stream is None:
        return ""
    piece = stream.push(token_id)
    return piece + stream.finish() if is_last else piece


def _next_token(stream: "ref[Stream]") -> Token | None:
    """Returns the next token; None at the end.

    Args:
        stream: A weak reference, because the worker keeps its arguments for a moment after it returns, and a stream
            that is dropped then must free its decoder at once.
    """
    held = stream()
    return None if held is None else next(held, None)
