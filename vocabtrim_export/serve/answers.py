"""Answers in the form of OpenAI's objects."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from engines.bundle.tokenizer import Tokenizer
from runtime import Generation
from runtime.logprobs import TokenLogprob
from runtime.stream import Token
from vocabtrim_export.serve.echo import Echo


@dataclass(frozen=True, slots=True)
class Form:
    """The objects of one request's answer.

    Attributes:
        is_chat: Objects of /v1/chat/completions, otherwise of /v1/completions.
        model_name: The name of the model.
        tokenizer: The target's; it names the tokens of log-probabilities.
        id: The answer's identifier.
        created: When it began, in seconds since 1970.
    """

    is_chat: bool
    model_name: str
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, generations: Sequence[Generation], prompts: Sequence[list[int]], echoes: Mapping[int, Echo]
    ) -> dict[str, Any]:
        """Returns the answer that is not streamed.

        Args:
            generations: One for each choice.
            prompts: Token ids of the request's prompts.
            echoes: The prompts that choices begin with, by the choice.
        """
        choices = [self._choice(index, generation, echoes.get(index)) for index, generation in enumerate(generations)]
        body = self._object("chat.completion" if self.is_chat else "text_completion")
        return body | {"choices": choices, "usage": usage(generations, prompts)}

    def role(self, index: int) -> dict[str, Any]:
        """Returns the first event of a choice of a streamed conversation."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, index: int, item: Token | Echo, offset: int) -> tuple[dict[str, Any], int]:
        """Returns an event with a token of a choice, or with its prompt, and where the next one begins.

        Args:
            index: The choice.
            item: The token or the prompt.
            offset: The characters of the choice before it, of those whose log-probabilities are given.
        """
        if isinstance(item, Echo):
            text, logprobs = self.tokenizer.decode(item.prompt), self._logprobs(item.logprobs, item.prompt[:1])
        else:
            text, logprobs = item.text, self._logprobs([item.logprob] if item.logprob else None, offset=offset)
        content: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
        offset += sum(map(len, logprobs["tokens"])) if logprobs and not self.is_chat else 0
        return self._chunk(index, content | {"logprobs": logprobs, "finish_reason": None}), offset

    def end(self, index: int, generation: Generation) -> dict[str, Any]:
        """Returns the last event of a choice."""
        content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        return self._chunk(index, content | {"finish_reason": generation.finish_reason})

    def numbers(self, generations: Sequence[Generation], prompts: Sequence[list[int]]) -> dict[str, Any]:
        """Returns the event with the numbers of tokens, which ends a stream that asked for it."""
        return self._object(self._chunk_kind) | {"choices": [], "usage": usage(generations, prompts)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _object(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model_name}

    def _chunk(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return self._object(self._chunk_kind) | {"choices": [{"index": index, "logprobs": None} | content]}

    def _choice(self, index: int, generation: Generation, echo: Echo | None) -> dict[str, Any]:
        text, entries, first = generation.text, generation.logprobs, list[int]()
        if echo:
            text = self.tokenizer.decode(echo.prompt) + text
            if echo.logprobs is not None:
                entries, first = (*echo.logprobs, *(entries or ())), echo.prompt[:1]
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        )
        logprobs = self._logprobs(entries, first)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": generation.finish_reason}

    def _logprobs(
        self, entries: Sequence[TokenLogprob] | None, first: Sequence[int] = (), offset: int = 0
    ) -> dict[str, Any] | None:
        """Returns log-probabilities; None where none were asked for.

        Args:
            entries: The tokens'.
            first: The token before them, if any, which nothing predicts.
            offset: The characters before.
        """
        if entries is None:
            return None
        if self.is_chat:
            return {"content": [self._entry(entry) for entry in entries], "refusal": None}
        names = [self._name(token) for token in (*first, *(entry.token_id for entry in entries))]
        nothing = [None] * len(first)
        return {
            "tokens": names,
            "token_logprobs": [*nothing, *(entry.logprob for entry in entries)],
            "top_logprobs": [*nothing, *(self._top(entry) for entry in entries)],
            "text_offset": list(accumulate(map(len, names[:-1]), initial=offset)),
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Returns log-probabilities by the tokens' texts, the chosen token's among them as OpenAI has it.

        Tokens that share a text, as the bytes of one character do, are named by their ids after the first, as in vLLM.
        """
        named = {self._name(entry.token_id): (entry.token_id, entry.logprob)}
        for token, value in entry.top:
            name = self._name(token)
            is_other = name in named and named[name][0] != token
            named[f"token_id:{token}" if is_other else name] = token, value
        return {name: value for name, (_, value) in named.items()}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        pairs = [(entry.token_id, entry.logprob), *entry.top]
        own, *top = [
            {"token": self._name(token), "logprob": value, "bytes": list(self.tokenizer.token_bytes(token))}
            for token, value in pairs
        ]
        return own | {"top_logprobs": top}

    def _name(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id)


def usage(generations: Sequence[Generation], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Returns OpenAI's `usage`; its details state how many drafted tokens were accepted and rejected.

    Args:
        generations: One for each choice.
        prompts: Token ids of the request's prompts, each of which counts once.
    """
    read, written = sum(map(len, prompts)), sum(len(generation.token_ids) for generation in generations)
    drafted = sum(generation.stats.drafted for generation in generations)
    accepted = sum(generation.stats.accepted for generation in generations)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(generation.stats.cached for generation in generations)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
