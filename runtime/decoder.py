"""`SpeculativeDecoder`: prompts in, text out, with two engines and what was gained."""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.bundle.tokenizer import TOKENIZER_NAME, Tokenizer
from engines.errors import VocabtrimError
from engines.sampling_params import SamplingParams
from runtime.alarm import AcceptanceAlarm
from runtime.loop import GREEDY, Round, decode_rounds
from runtime.pair import check_pair, resolve_draft_length
from runtime.stream import Generation, Stream

# Text, the messages of a conversation (`{"role": …, "content": …}`), or token ids.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | NDArray[np.int64]


class SpeculativeDecoder:
    """A target and, if there is one, a drafter. What comes out is the target's own, only sooner.

    Owns its engines: `close`, or leaving its `with` block, closes them. It holds one text at a time: the next
    generation of a thread ends the thread's unfinished stream, and another thread is refused (`VocabtrimError`) until
    the stream is finished, closed or dropped. Each thread or asyncio task gets a decoder of its own by `fork`.
    Where acceptance collapses, a warning is logged once, and `Stats.collapse` says so from then on.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Engine | None = None,
        tokenizer: Tokenizer | None = None,
        draft_length: int | None = None,
    ) -> None:
        """tokenizer: the target's; without it prompts are ids.

        draft_length: γ, tokens drafted per round; None: 4, or fewer where the target verifies no more.
        Raises `VocabtrimError` where the two engines do not belong together, or for more than the target verifies.
        """
        check_pair(target, drafter)
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.draft_length = resolve_draft_length(target, drafter, draft_length)
        self._alarm = AcceptanceAlarm(drafter.manifest if drafter else None)

    @classmethod
    def load(
        cls,
        target: str | Path,
        drafter: str | Path | None = None,
        device: str = "cpu",
        draft_length: int | None = None,
        drafter_device: str | None = None,
    ) -> Self:
        """Load bundles, and the tokenizer from the target's, on `device`; the drafter on `drafter_device` if given.

        A drafter made from the target's own weights shares its KV cache, if both hold as many tokens on one device.
        Raises `VocabtrimError`.
        """
        from engines import load_engine

        with ExitStack() as opened:  # closes the first engine if the second does not load
            target_engine = opened.enter_context(load_engine(target, device))
            drafter_engine = None
            if drafter is not None:
                drafter_engine = opened.enter_context(load_engine(drafter, drafter_device or device, target_engine))
            has_tokenizer = TOKENIZER_NAME in target_engine.manifest.files
            tokenizer = Tokenizer.load(target) if has_tokenizer else None
            decoder = cls(target_engine, drafter_engine, tokenizer, draft_length)
            opened.pop_all()
        return decoder

    def fork(self) -> Self:
        """Another decoder over the same loaded weights, with KV caches of its own: one for each thread.

        Either may be closed first. Raises `VocabtrimError` where the engines cannot: ONNX Runtime's on the CPU can.
        """
        self.target.use.check_open()
        target, drafter = self.target.fork(), None
        if self.drafter:
            drafter = self.drafter.fork(target if self.drafter.cache is self.target.cache else None)
        return type(self)(target, drafter, self.tokenizer, self.draft_length)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams = GREEDY,
        chat: bool = True,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Generate to an EOS, to a string of `stop`, to `max_new_tokens` or to the end of the context.

        prompt: a text becomes a user's message to the chat template if the tokenizer has one and `chat` is true, and
        is taken as it is otherwise; messages always go through the template; token ids are fed as they are.
        Raises `VocabtrimError` for a prompt that is empty or leaves no room in the context, and for
        `max_new_tokens` below 1, and for stop strings that are empty or without a tokenizer.
        """
        return self.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling, chat=chat, stop=stop).finish()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams = GREEDY,
        chat: bool = True,
        stop: Sequence[str] = (),
    ) -> Stream:
        """As `generate`, token by token: iterate over it, by `for` or `async for` (see `Stream`)."""
        self.target.use.check_open()
        if max_new_tokens < 1:
            raise VocabtrimError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
        if stop:
            self._require_tokenizer()
        token_ids = self.encode(prompt, chat=chat)
        rounds = decode_rounds(
            self.target,
            self.drafter,
            token_ids,
            max_new_tokens=max_new_tokens,
            draft_length=self.draft_length,
            sampling=sampling,
        )
        return Stream(self._watched(rounds), self.tokenizer, stop, lambda: self._alarm.collapse)

    def encode(self, prompt: Prompt, *, chat: bool = True) -> list[int]:
        """The token ids that `generate` feeds for `prompt`, checked to fit. Raises `VocabtrimError`."""
        token_ids = self._token_ids(prompt, chat)
        if not token_ids:
            raise VocabtrimError("the prompt is empty: give at least one token")
        if len(token_ids) >= self.target.capacity:
            raise VocabtrimError(
                f"the prompt has {len(token_ids)} tokens and the target's context holds {self.target.capacity}: "
                "shorten it, or export with a longer context"
            )
        vocab_size = self.target.manifest.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise VocabtrimError(f"the prompt has token ids outside the target's vocabulary of {vocab_size}")
        return token_ids

    def close(self) -> None:
        """Close both engines, after the round that runs now. Calling it again does nothing."""
        self.target.close()
        if self.drafter:
            self.drafter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _token_ids(self, prompt: Prompt, chat: bool) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._require_tokenizer()
            if chat and tokenizer.has_chat_template:
                return tokenizer.encode_chat([{"role": "user", "content": prompt}])
            return tokenizer.encode(prompt)
        if len(prompt) and isinstance(prompt[0], Mapping):
            return self._require_tokenizer().encode_chat(cast(Sequence[Mapping[str, Any]], prompt))
        return [int(token) for token in cast(Sequence[int], prompt)]

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise VocabtrimError(
                "the target's bundle has no tokenizer: give the prompt as token ids, without stop strings"
            )
        return self.tokenizer

    def _watched(self, rounds: Generator[Round, None, None]) -> Generator[Round, None, None]:
        """Pass `rounds` on, with a warning once acceptance collapses."""
        with closing(rounds):
            for entry in rounds:
                if collapse := self._alarm.observe(entry):
                    logging.getLogger("runtime").warning("%s", collapse)
                yield entry
