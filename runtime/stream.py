"""What a generation gives: `Stream`, token by token, and `Generation`, all of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from runtime.alarm import Collapse
from runtime.logprobs import TokenLogprob
from runtime.loop import FinishReason, Round
from runtime.stats import Stats, summarize
from runtime.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token and the text that it completes.

    "" for a special one, within an unfinished character, and while a stop string may have begun.
    logprob: None where none were asked for.
    """

    id: int
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated, the prompt not included.

    text: without special tokens, and without the stop string; "" where the decoder has no tokenizer.
    token_ids: with the EOS, or up to the token that completes a stop string, if there is one.
    finish_reason: "stop" at an EOS or a stop string, "length" at `max_new_tokens` or at the end of the context.
    logprobs: of `token_ids`, one each; None where none were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return asdict(self) | {"stats": self.stats.to_dict()}


class Stream(Iterator[Token]):
    """The tokens of one generation as they come. Their texts, joined, are the text of `finish()`.

    A decoder has one KV cache per engine, so that its next `generate` or `stream` ends this one. To cancel it, stop
    iterating: nothing runs in between.
    """

    def __init__(
        self,
        rounds: Iterator[Round],
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        collapse: Callable[[], Collapse | None] = lambda: None,
    ) -> None:
        """rounds: see `decode_rounds`. collapse: what the decoder's alarm has found by now."""
        self._past: list[Round] = []
        self._collapse = collapse
        self._decoded = tokenizer.stream() if tokenizer else None
        self._stop = StopStrings(stop)
        self._text = ""  # given out so far
        self._tokens = self._run(rounds)

    def __next__(self) -> Token:
        return next(self._tokens)

    @property
    def stats(self) -> Stats:
        """Of the rounds so far."""
        return summarize(self._past, self._collapse())

    def finish(self) -> Generation:
        """Generate what is left, and return all of it."""
        for _ in self:
            pass
        last = self._past[-1] if self._past else None
        if last is None or last.finish_reason is None:
            raise VocabtrimError("this generation broke off with an error: start another")
        token_ids = tuple(token for entry in self._past for token in entry.tokens)
        logprobs = tuple(each for entry in self._past for each in entry.logprobs) or None
        return Generation(self._text, token_ids, last.finish_reason, self.stats, logprobs)

    def _run(self, rounds: Iterator[Round]) -> Iterator[Token]:
        for entry in rounds:
            self._past.append(entry)
            for count, token_id in enumerate(entry.tokens, 1):
                is_last = entry.finish_reason is not None and count == len(entry.tokens)
                piece, stopped = self._stop.push(self._decode(token_id, is_last), is_last)
                self._text += piece
                if stopped:  # what the round gave beyond it never was
                    self._past[-1] = replace(
                        entry,
                        tokens=entry.tokens[:count],
                        accepted=min(entry.accepted, count),
                        finish_reason="stop",
                        logprobs=entry.logprobs[:count],
                    )
                yield Token(token_id, piece, entry.logprobs[count - 1] if entry.logprobs else None)
                if stopped:
                    return

    def _decode(self, token_id: int, is_last: bool) -> str:
        if self._decoded is None:
            return ""
        piece = self._decoded.push(token_id)
        return piece + self._decoded.finish() if is_last else piece
