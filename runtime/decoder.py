"""`SpeculativeDecoder`: prompts in, text out, with two engines and what was gained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Self

from engines.base import Engine
from engines.bundle.chat_template import ChatOptions
from engines.bundle.tokenizer import Tokenizer
from engines.sampling_params import SamplingParams
from runtime.alarm import AcceptanceAlarm
from runtime.generation_arguments import check_sampling, require_logprobs, require_new_tokens
from runtime.held_text import HeldText
from runtime.json_schema import JsonSchemas
from runtime.loading import forked, opened
from runtime.loop import GREEDY, decode_rounds
from runtime.pair import Auto, check_pair, length_for, make_draft_length
from runtime.prompt_tokens import Prompt, encode_prompt
from runtime.stream import Generation, Stream


class SpeculativeDecoder(HeldText):
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
        super().__init__(target, drafter, tokenizer)
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
        with opened(target, drafter, device, drafter_device) as parts:
            return cls(*parts, draft_length, prompt_lookup)

    def fork(self) -> Self:
        """Returns another decoder over the same loaded weights, with KV caches of its own: use one for each thread.

        Either may be closed first.

        Raises:
            VocabtrimError: The engines cannot be forked; ONNX Runtime's on the CPU can.
        """
        self.target.use.check_open()
        target, drafter = forked(self.target, self.drafter)
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
            sampling: Settings that choose tokens; the rules of the model's generation config apply where it gives none.
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
        check_sampling(sampling, self.target.manifest.vocab_size)
        options = ChatOptions(chat_template, tools, template_args or {}, continue_final_message)
        token_ids = encode_prompt(prompt, self.target, self.tokenizer, chat, options)
        closed = Event()
        rounds = decode_rounds(
            self.target,
            self.drafter,
            token_ids,
            max_new_tokens=require_new_tokens(max_new_tokens),
            draft_length=length_for(self.length, sampling),
            sampling=sampling,
            logprobs=require_logprobs(logprobs),
            keep_prefix=not sampling.must_repeat_itself,
            constraint=None if json_schema is None else self._schemas.constraint(json_schema),
            is_cancelled=closed.is_set,
        )
        return Stream(self._alarm.watch(rounds), self.tokenizer, stop, lambda: self._alarm.collapse, closed)

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
        """Returns the token ids that `generate` feeds for `prompt`. Its arguments are those of `generate`.

        Raises:
            VocabtrimError: The prompt has no token, or leaves no room in the context.
        """
        options = ChatOptions(chat_template, tools, template_args or {}, continue_final_message)
        return encode_prompt(prompt, self.target, self.tokenizer, chat, options)

    def check_json_schema(self, schema: Mapping[str, Any] | bool) -> None:
        """Check that `generate` can apply a schema, before anything is read.

        Args:
            schema: See `generate`.

        Raises:
            VocabtrimError: It cannot.
        """
        self._schemas.constraint(schema)
