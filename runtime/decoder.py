"""`SpeculativeDecoder`: prompts in, text out, with two engines and what was gained."""

import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engines.base import Engine
from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import TOKENIZER_NAME, Tokenizer
from engines.sampling_params import SamplingParams
from runtime.alarm import AcceptanceAlarm
from runtime.draft_length import DraftLength
from runtime.generation_arguments import check_sampling, require_logprobs, require_new_tokens
from runtime.json_schema import JsonSchemas
from runtime.kept_prefix import kept_prefix
from runtime.loop import GREEDY, decode_rounds
from runtime.pair import Auto, check_pair, make_draft_length
from runtime.prompt_tokens import Prompt, check_prompt, prompt_token_ids, require_tokenizer
from runtime.round import Round
from runtime.round_costs import GivenCosts
from runtime.stream import Generation, Stream

SEEDED_COSTS = GivenCosts(step=0.15, row=0.04)  # typical of a trimmed int4 drafter and a target in fp32


class SpeculativeDecoder:
    """Generates text with a target and, if there is one, a drafter. The output is that of the target alone.

    It owns its engines: `close`, or leaving its `with` block, closes them. It holds one text at a time: the next
    generation of a thread ends the thread's unfinished stream, and another thread is refused (`VocabtrimError`) until
    the stream is finished, closed or dropped. Each thread or asyncio task gets a decoder of its own by `fork`.
    What the next prompt has in common with the text before, as the turns of a conversation have, stays in the KV caches
    and is not read again; only sampling with a seed, which must repeat itself to the last bit, starts over.
    Where acceptance collapses, a warning is logged once, and `Stats.collapse` says so from then on.
    """

    def __init__(
        self,
        target: Engine,
        drafter: Engine | None = None,
        tokenizer: Tokenizer | None = None,
        draft_length: int | Auto | None = None,
        prompt_lookup: bool = True,
    ) -> None:
        """Make a decoder of two loaded engines.

        Args:
            target: The engine whose output is generated.
            drafter: The engine that drafts; None: the target decodes alone.
            tokenizer: The target's tokenizer; without it prompts are token ids.
            draft_length: γ, the tokens drafted per round. "auto" and None: as many as are worth their time on this text
                and machine, or none: 16 at most where both engines are on the CPU; on a GPU, where a round is one
                piece of work, 1, 3 or 7. Measured times are not the same twice, so sampling with a seed, which must
                repeat itself, decides by fixed costs. Without a drafter, "auto" drafts by prompt lookup alone, and None
                drafts nothing.
            prompt_lookup: Whether "auto" also drafts what followed the last tokens where they stood in the text before,
                as far as that gains more than the drafter does.

        Raises:
            VocabtrimError: The two engines do not belong together, or the target cannot verify so many tokens.
        """
        check_pair(target, drafter)
        self.target = target
        self.drafter = drafter
        self.tokenizer = tokenizer
        self.length = make_draft_length(target, drafter, draft_length, prompt_lookup)
        self._schemas = JsonSchemas(tokenizer, target.manifest)
        self._alarm = AcceptanceAlarm(drafter.manifest if drafter else None)

    @classmethod
    def load(
        cls,
        target: str | Path,
        drafter: str | Path | None = None,
        device: str = "cpu",
        draft_length: int | Auto | None = None,
        drafter_device: str | None = None,
        prompt_lookup: bool = True,
    ) -> Self:
        """Load bundles, and the tokenizer of the target's.

        A drafter made from the target's own weights shares its KV cache, if both hold as many tokens on one device.

        Args:
            target: The target's bundle.
            drafter: The drafter's bundle; None: the target decodes alone.
            device: "cpu" or "cuda".
            draft_length: γ, None or "auto", see the constructor.
            drafter_device: The drafter's device; None: `device`.
            prompt_lookup: See the constructor.

        Raises:
            VocabtrimError: A bundle is damaged or cannot run on its device, or the two do not belong together.
        """
        from engines import load_engine
        from engines.load import load_pair

        with (
            ExitStack() as opened,
            ThreadPoolExecutor(max_workers=1) as thread,
        ):  # closes what is open if the rest fails
            reading = thread.submit(Tokenizer.load, target)
            drafter_engine = None
            if drafter is None:
                target_engine = opened.enter_context(load_engine(target, device))
            else:
                target_engine, drafter_engine = map(
                    opened.enter_context, load_pair(target, drafter, device, drafter_device)
                )
            tokenizer = reading.result() if TOKENIZER_NAME in target_engine.manifest.files else None
            decoder = cls(target_engine, drafter_engine, tokenizer, draft_length, prompt_lookup)
            opened.pop_all()
        return decoder

    def fork(self) -> Self:
        """Returns another decoder over the same loaded weights, with KV caches of its own: use one for each thread.

        Either may be closed first.

        Raises:
            VocabtrimError: The engines cannot be forked; ONNX Runtime's on the CPU can.
        """
        self.target.use.check_open()
        target, drafter = self.target.fork(), None
        if self.drafter:
            drafter = self.drafter.fork(target if self.drafter.cache is self.target.cache else None)
        length: int | Auto = "auto" if self.length.adapts else self.draft_length
        fork = type(self)(target, drafter, self.tokenizer, length, self.length.lookups is not None)
        fork._schemas = self._schemas
        return fork

    @property
    def draft_length(self) -> int:
        """γ, the drafted tokens of a round; for an adaptive length the longest draft."""
        return self.length.longest

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams = GREEDY,
        chat: bool = True,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        logprobs: int | bool | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
    ) -> Generation:
        """Generate to an EOS, to a stop string, to `max_new_tokens` or to the end of the context.

        Args:
            prompt: A text becomes a user's message to the chat template if the tokenizer has one and `chat` is true,
                and is taken as it is otherwise; messages always go through the template; token ids are fed as they are.
            max_new_tokens: The most tokens to generate, at least 1.
            sampling: How tokens are chosen; the rules of the model's generation config apply where it gives none.
            chat: Render a text by the chat template.
            stop: One string or several, which are looked for in the text with its special tokens.
            tools: See `ChatOptions`.
            template_args: See `ChatOptions`.
            chat_template: See `ChatOptions`.
            continue_final_message: See `ChatOptions`.
            logprobs: Return each token's log-probability under the model (see `TokenLogprob`), and those of this many
                alternatives; True asks for no alternatives.
            json_schema: Let the text be JSON of this schema, unless it ends at `max_new_tokens` or at a stop string: at
                each position target and drafter choose among the tokens that can go on to such JSON. True allows any
                JSON. It needs the extra `json`; which schemas work: docs/json.md.

        Raises:
            VocabtrimError: The prompt is empty or leaves no room in the context, an argument is out of range, stop
                strings are empty or given without a tokenizer, or the schema cannot be applied.
        """
        return self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            chat=chat,
            stop=stop,
            tools=tools,
            template_args=template_args,
            chat_template=chat_template,
            continue_final_message=continue_final_message,
            logprobs=logprobs,
            json_schema=json_schema,
        ).finish()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingParams = GREEDY,
        chat: bool = True,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        logprobs: int | bool | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
    ) -> Stream:
        """Generate token by token: iterate over the result with `for` or `async for` (see `Stream`).

        The arguments and errors are those of `generate`.
        """
        self.target.use.check_open()
        max_new_tokens, logprobs = require_new_tokens(max_new_tokens), require_logprobs(logprobs)
        check_sampling(sampling, self.target.manifest.vocab_size)
        if stop:
            require_tokenizer(self.tokenizer)
        token_ids = self.encode(
            prompt,
            chat=chat,
            tools=tools,
            template_args=template_args,
            chat_template=chat_template,
            continue_final_message=continue_final_message,
        )
        rounds = decode_rounds(
            self.target,
            self.drafter,
            token_ids,
            max_new_tokens=max_new_tokens,
            draft_length=self._length_for(sampling),
            sampling=sampling,
            logprobs=logprobs,
            keep_prefix=not _must_repeat_itself(sampling),
            constraint=None if json_schema is None else self._schemas.constraint(json_schema),
        )
        return Stream(self._watched(rounds), self.tokenizer, stop, lambda: self._alarm.collapse)

    def encode(
        self,
        prompt: Prompt,
        *,
        chat: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the token ids that `generate` feeds for `prompt`.

        Raises:
            VocabtrimError: They are none, or leave no room in the context.
        """
        options = ChatOptions(chat_template, tools, template_args or {}, continue_final_message)
        token_ids = prompt_token_ids(prompt, self.tokenizer, chat, options)
        check_prompt(token_ids, self.target, self.tokenizer)
        return token_ids

    def check_json_schema(self, schema: Mapping[str, Any] | bool) -> None:
        """Check that `generate` can apply a schema, before anything is read.

        Args:
            schema: See `generate`.

        Raises:
            VocabtrimError: It cannot.
        """
        self._schemas.constraint(schema)

    def kept_prefix(self, token_ids: Sequence[int]) -> int:
        """Returns how many of the first tokens of a prompt this decoder would not read again.

        Args:
            token_ids: The prompt as `encode` returns it.
        """
        return kept_prefix(self.target, token_ids)

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

    def _length_for(self, sampling: SamplingParams) -> DraftLength:
        """Returns the draft length for `sampling`.

        Where a seed promises the same text, neither measured times nor what was learnt from earlier texts may count.
        """
        if not self.length.adapts or not _must_repeat_itself(sampling):
            return self.length
        return self.length.afresh(SEEDED_COSTS)

    def _watched(self, rounds: Generator[Round, None, None]) -> Generator[Round, None, None]:
        """Pass `rounds` on, with a warning once acceptance collapses."""
        with closing(rounds):
            for entry in rounds:
                if collapse := self._alarm.observe(entry):
                    logging.getLogger("runtime").warning("%s", collapse)
                yield entry


def _must_repeat_itself(sampling: SamplingParams) -> bool:
    """Whether a seed promises the same text each time: then nothing of earlier texts may change how logits round."""
    return not sampling.is_greedy and sampling.seed is not None
