"""A server that speaks OpenAI's protocol and serves the model already: vLLM, SGLang, llama.cpp's server."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.document import Document, without_surrogates

KEY_VARIABLE = "OPENAI_API_KEY"
BATCH = 16  # requests whose answers are counted, and saved, together
_ATTEMPTS = 5
# What urllib and the reading of JSON raise where a server is down or slow, or an answer is cut short.
_PASSING = (OSError, http.client.HTTPException, ValueError, RecursionError)
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# The server's count and the tokenizer's differ by special tokens, and where a text ends within a token.
_TOLERANCE, _ENOUGH_TO_TELL, _ENOUGH_ANSWERS = 0.1, 100, 8
# What a server writes where the limit of tokens cuts a character: its bytes so far, or half of a surrogate pair.
_CUT_CHARACTER = re.compile("[\ufffd\ud800-\udfff]+$")
_REASONING = ("reasoning", "reasoning_content")  # two names of one field: some releases of vLLM send both


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's continuation of a prompt.

    Attributes:
        text: The continuation.
        is_ended: Whether the model ended it, and not the limit of tokens.
        tokens: Its length by the server's own count; None where the server does not state it.
    """

    text: str
    is_ended: bool
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server with OpenAI's protocol that serves the model.

    Attributes:
        url: The base of the API, as in "http://localhost:8000/v1".
        model: The model's name there.
        concurrency: Requests at a time.
        timeout: Seconds that one answer may take.
        wait: Seconds before the first repetition of a request that failed; they double with each. Where the server asks
            for more (`Retry-After`), it gets that, up to `timeout`.
        key: The API key; by default the environment variable OPENAI_API_KEY.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 300.0
    wait: float = 1.0
    key: str = field(default_factory=lambda: os.environ.get(KEY_VARIABLE, ""), repr=False)

    def check(self) -> None:
        """Check that the server answers and has the model.

        Raises:
            VocabtrimError: The URL or the key cannot be one, the server does not answer, or it lacks the model.
        """
        if not _is_url(self.url):
            raise VocabtrimError(f"--calibration-endpoint {self.url!r}: give a URL such as http://localhost:8000/v1")
        if not (self.key.isascii() and self.key.isprintable()):
            raise VocabtrimError(
                f"{KEY_VARIABLE} holds a character that no key has, perhaps a line's end: set it again"
            )
        try:
            listed = self._request("models", None)["data"]
            names = [str(each["id"]) for each in listed]
        except _NoSuchPath:
            return  # not every server lists its models
        except (KeyError, TypeError) as error:
            raise VocabtrimError(f"{self.url}/models is not OpenAI's list of models: check the URL") from error
        if self.model not in names:
            raise VocabtrimError(f"{self.url} has no model {self.model!r}, it serves {', '.join(names[:8]) or 'none'}")

    def answer(self, document: Document, max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """Ask for the continuation of a document's prompt.

        Args:
            document: The document; a chat is rendered by the server's own template.
            max_new_tokens: Tokens of the continuation at most.
            temperature: Temperature of sampling; 0 is greedy.
            seed: A seed, which some servers honour.

        Raises:
            VocabtrimError: The server refuses the request, or fails it repeatedly.
        """
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        body: dict[str, Any] = {"model": self.model, "prompt": document.text, **settings}
        path = "completions"
        if document.prompt:
            path = "chat/completions"
            body = {"model": self.model, "messages": [asdict(message) for message in document.prompt], **settings}
        reply = self._request(path, body)
        try:
            return _answer(reply, is_chat=bool(document.prompt))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            begin = json.dumps(reply)[:80]
            raise VocabtrimError(
                f"{self.url}/{path} answers in another form than OpenAI's ({begin}): check the URL"
            ) from error

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        """Returns the server's JSON; a request with a passing failure is repeated."""
        url = f"{self.url.rstrip('/')}/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        why, asked = "", 0.0
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(max(self.wait * 2 ** (attempt - 1), min(asked, self.timeout)))
                asked = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                if error.code in (404, 405) and body is None:
                    raise _NoSuchPath from error
                why, asked = _said(error), _asked_wait(error.headers.get("Retry-After", ""))
                if error.code not in _AGAIN:
                    raise VocabtrimError(f"{url} refuses the request: {why}") from error
            except _PASSING as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
                if isinstance(error, ValueError | RecursionError):
                    why = f"its answer is no whole JSON: {why}"
        raise VocabtrimError(f"{url} failed {_ATTEMPTS} times ({why}): the counts so far are kept, run it again later")


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        is_address = bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:  # no number, or too large a one, is a port
        return False
    return is_address and parts.scheme in ("http", "https") and text.isprintable() and " " not in text


def _answer(reply: Any, is_chat: bool) -> Answer:
    choice = reply["choices"][0]
    text = _message_text(choice["message"]) if is_chat else choice["text"] or ""
    if not isinstance(text, str):
        raise TypeError
    is_ended = choice.get("finish_reason") == "stop"
    if not is_ended:
        text = _CUT_CHARACTER.sub("", text)
    tokens = (reply.get("usage") or {}).get("completion_tokens")
    return Answer(without_surrogates(text), is_ended, None if tokens is None else max(0, int(tokens)))


def _message_text(message: Any) -> str:
    """Returns what the model wrote: servers may put its reasoning into a field of its own."""
    reasoning = next(filter(None, map(message.get, _REASONING)), None)
    return "\n\n".join(part for part in (reasoning, message["content"]) if part)


class _NoSuchPath(Exception):
    """The server lacks an optional path."""


def check_same_tokenizer(endpoint: Endpoint, answers: Sequence[Answer], lengths: Sequence[int]) -> None:
    """Compare the server's own counts of tokens with those of the tokenizer.

    Args:
        endpoint: The server.
        answers: Its answers.
        lengths: The number of tokens of each answer by the model's tokenizer.

    Raises:
        VocabtrimError: The counts differ so much that the server's model must have another tokenizer.
    """
    pairs = [
        (answer.tokens, length) for answer, length in zip(answers, lengths, strict=True) if answer.tokens is not None
    ]
    theirs, ours = (sum(each) for each in zip(*pairs, strict=True)) if pairs else (0, 0)
    if max(theirs, ours) >= _ENOUGH_TO_TELL and abs(theirs - ours) > _TOLERANCE * ours + len(pairs):
        raise VocabtrimError(
            f"{endpoint.url} counts {theirs} tokens in answers that have {ours} by this model's tokenizer: it serves "
            "another model than the one to calibrate for, or keeps a part of the answers back"
        )


def check_not_empty(endpoint: Endpoint, answers: Sequence[Answer]) -> None:
    """Check that some of the answers have a text: their ends alone would be counted.

    Raises:
        VocabtrimError: There are several answers, and none has.
    """
    if len(answers) >= _ENOUGH_ANSWERS and not any(answer.text for answer in answers):
        raise VocabtrimError(
            f"{endpoint.url} answers {len(answers)} prompts with no text; the counts so far are kept: check how the "
            "server renders prompts, or give others"
        )


def _asked_wait(value: str) -> float:
    """Returns the seconds that a `Retry-After` asks for, which may state a time instead; 0 where it states neither."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _said(error: urllib.error.HTTPError) -> str:
    """Returns the status and the first words of the server's answer."""
    try:
        body = error.read(500).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = ""
    return " ".join(f"{error.code} {error.reason} {body}".split())[:200]
