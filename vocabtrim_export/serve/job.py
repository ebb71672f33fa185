"""Requests of OpenAI's two generating interfaces → `Job`: token ids, and how to continue them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.serve.errors import ApiError
from vocabtrim_export.serve.fields import LARGEST, Fields
from vocabtrim_export.serve.response_format import read_response_format

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 64, 16, 20
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_BEGINS = "add_generation_prompt"
# These name the caller or steer what OpenAI's own service does; no token depends on them.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "prediction",
)


@dataclass(frozen=True, slots=True)
class Job:
    """The content of one request.

    Attributes:
        prompts: Token ids; every prompt has `n` answers.
        n: Answers to each prompt.
        max_new_tokens: The most tokens of an answer; None: to the end of the context. 0 goes with `echo` only.
        sampling: Settings that choose tokens; an answer after the first takes another seed where one was given.
        stop: Strings that end an answer.
        logprobs: Alternatives whose log-probabilities are returned with each token's own; None: no log-probabilities.
        is_chat: The request was for /v1/chat/completions.
        echo: The answer begins with the prompt, and has the prompt's log-probabilities if any.
        is_streamed: The answer comes as server-sent events.
        with_usage: A streamed answer ends with the numbers of tokens.
        json_schema: The schema of every answer; None for text.
    """

    prompts: tuple[list[int], ...]
    n: int
    max_new_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    logprobs: int | None
    is_chat: bool
    echo: bool
    is_streamed: bool
    with_usage: bool
    json_schema: Mapping[str, Any] | None


def read_job(body: bytes, is_chat: bool, decoder: SpeculativeDecoder, model_name: str) -> Job:
    """Read a request.

    Args:
        body: The request's body.
        is_chat: The request is for /v1/chat/completions, otherwise for /v1/completions.
        decoder: Encodes the prompt; nothing is generated.
        model_name: The name of the model that is served.

    Raises:
        ApiError: The request is malformed, or asks for what this server lacks.
        VocabtrimError: A value is out of range, or the prompt does not fit.
    """
    fields = Fields(body)
    if (asked := fields.take("model", model_name)) != model_name:
        shown = str(asked)[:100]
        raise ApiError(404, f"there is no model {shown!r} here: ask for {model_name!r}", "model", "model_not_found")
    prompts = (_conversation if is_chat else _texts)(fields, decoder)
    echo = not is_chat and fields.flag("echo")
    most = fields.whole("max_tokens", None if is_chat else _COMPLETION_TOKENS, 0 if echo else 1, LARGEST)
    if is_chat:
        most = fields.whole("max_completion_tokens", most, 1, LARGEST)
    logprobs = _logprobs(fields, is_chat)
    n = fields.whole("n", 1, 1, MOST_CHOICES) or 1
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts times n = {n} are more than {MOST_CHOICES} answers: ask for fewer")
    is_streamed = fields.flag("stream")
    job = Job(
        prompts=tuple(prompts),
        n=n,
        max_new_tokens=most,
        sampling=_sampling(fields),
        stop=_stops(fields),
        logprobs=logprobs,
        is_chat=is_chat,
        echo=echo,
        is_streamed=is_streamed,
        with_usage=_with_usage(fields, is_streamed),
        json_schema=read_response_format(fields, decoder),
    )
    _refuse_unsupported(fields)
    fields.ignore(_IGNORED)
    fields.finish()
    job.sampling.check_token_ids(decoder.target.manifest.vocab_size)
    return job


def _conversation(fields: Fields, decoder: SpeculativeDecoder) -> list[list[int]]:
    messages, tools = fields.take("messages"), fields.take("tools")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty: give a list of messages", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list | None):
            where = f"messages[{index}]"
            raise ApiError(400, f"{where} must be an object whose content is text, a list of parts or null", where)
    choice = fields.take("tool_choice", "auto")
    if choice not in ("auto", "none"):
        why = "a call cannot be forced; give 'auto' or 'none'"
        raise ApiError(400, f"tool_choice is not supported here: {why}", "tool_choice", "unsupported_parameter")
    template_args = dict(fields.mapping("chat_template_kwargs"))
    if (begins := fields.take(_BEGINS)) is not None:  # vLLM's clients send it with continue_final_message
        if not isinstance(begins, bool):
            raise ApiError(400, f"{_BEGINS} must be true or false", _BEGINS, "invalid_value")
        template_args[_BEGINS] = begins
    ids = decoder.encode(
        messages,
        tools=tools if tools and choice == "auto" else None,
        template_args=template_args,
        continue_final_message=fields.flag("continue_final_message"),
    )
    return [ids]


def _texts(fields: Fields, decoder: SpeculativeDecoder) -> list[list[int]]:
    prompt = fields.take("prompt")
    is_ids = isinstance(prompt, list) and all(_is_id(each) for each in prompt)
    prompts = [prompt] if isinstance(prompt, str) or is_ids else prompt
    if not isinstance(prompts, list) or not prompts or not all(_is_text_or_ids(each) for each in prompts):
        raise ApiError(400, "prompt must be text, token ids, or a list of either", "prompt")
    if len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"there are {len(prompts)} prompts: give at most {MOST_CHOICES}", "prompt")
    return [decoder.encode(each, chat=False) for each in prompts]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text_or_ids(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(_is_id(each) for each in value))


def _logprobs(fields: Fields, is_chat: bool) -> int | None:
    if not is_chat:
        return fields.whole("logprobs", None, 0, MOST_LOGPROBS)
    alternatives = fields.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return alternatives or 0
    if alternatives:
        raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
    return None


def _with_usage(fields: Fields, is_streamed: bool) -> bool:
    options = fields.mapping("stream_options")
    if options and not is_streamed:
        raise ApiError(400, "stream_options goes with stream: true", "stream_options")
    for name, value in options.items():  # obfuscation pads OpenAI's events against eavesdroppers; ours have none
        if name not in ("include_usage", "include_obfuscation") or not isinstance(value, bool | None):
            why = f"stream_options has {json.dumps({name: value})[:60]}: give include_usage, true or false"
            raise ApiError(400, why, "stream_options", "invalid_value")
    return options.get("include_usage") is True


def _sampling(fields: Fields) -> SamplingParams:
    """Returns the sampling. Absent fields have OpenAI's defaults, a temperature of 1 among them."""
    seed = fields.whole("seed", None, -LARGEST, LARGEST)
    arguments: dict[str, Any] = {
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "min_p": fields.number("min_p", 0.0),
        "top_k": max(fields.whole("top_k", 0, -1, LARGEST) or 0, 0),  # vLLM's clients say -1 for all tokens
        "seed": None if seed is None else seed % (2 * LARGEST),
        "repetition_penalty": fields.number("repetition_penalty", None),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "logit_bias": fields.mapping("logit_bias"),
    }
    return SamplingParams(**arguments)


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops: Sequence[Any] = [stop] if isinstance(stop, str) else stop
    is_list = isinstance(stops, list) and all(isinstance(each, str) for each in stops)
    if not is_list or len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop must be a string, or a list of at most {MOST_STOPS} strings", "stop")
    if "" in stops:
        raise VocabtrimError("a stop string is empty: give at least one character")
    return tuple(stops)


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse known fields that would require an answer of another form."""
    fields.refuse("echo", [False], "the answer holds new tokens only")
    fields.refuse("best_of", [1], "give n")
    fields.refuse("suffix", [""], "text is continued, not filled in")
    fields.refuse("functions", [[]], "give tools")
    fields.refuse("function_call", ["auto", "none"], "give tools")
    fields.refuse("parallel_tool_calls", [True], "the model's own template decides")
    fields.refuse("modalities", [["text"]], "answers are text")
    fields.refuse("audio", [], "answers are text")
    fields.refuse("reasoning_effort", [], "give what the model's template reads as chat_template_kwargs")
    fields.refuse("verbosity", ["medium"], "ask in the prompt")
    fields.refuse("web_search_options", [], "there is no search")
