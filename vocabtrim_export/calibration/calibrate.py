"""`calibrate`: count the tokens that a model generates on a corpus, or that its text holds; resumable."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.bundle.messages import plain_data
from engines.bundle.tokenizer import tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import BatchLimits, count_batch, draws, next_batch
from vocabtrim_export.calibration.corpus import Corpus
from vocabtrim_export.calibration.counts import CalibrationRun, TokenCounts, is_held_out, read_working
from vocabtrim_export.calibration.document import Skipped, describe_skipped
from vocabtrim_export.calibration.endpoint import BATCH, Endpoint
from vocabtrim_export.calibration.generations import asked_tokens, prompt_tokens, sampled_tokens, text_tokens
from vocabtrim_export.calibration.partial_batch import SECONDS, PartialBatch
from vocabtrim_export.calibration.saving import Saver, resume
from vocabtrim_export.calibration.sufficiency import Evidence, Rows, Verdict
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Source = Literal["drafter", "target", "text"]
Progress = Callable[[int, int], None]
Tokens = Sequence[Sequence[int] | NDArray[np.int64]]  # of each document of a batch

# What templates that write the date are told: the result must not depend on the day.
CALIBRATION_DATE = datetime(2024, 7, 26)


def calibrate(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    *,
    source: Source,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    checkpoint: Path | None = None,
    progress: Progress = lambda _done, _total: None,
    model_digest: str = "",
    limits: BatchLimits | None = None,
    chat: ChatOptions | None = None,
    on_skip: Callable[[Skipped], None] = lambda _skipped: None,
    save_seconds: float = SECONDS,
    enough_for: Rows | None = None,
    on_verdict: Callable[[Verdict], None] = lambda _verdict: None,
    endpoint: Endpoint | None = None,
) -> TokenCounts:
    """Count the tokens that a model generates on a corpus, or the tokens of the corpus itself.

    Only generated tokens count, the EOS included, never a prompt's. Counting stops at `max_tokens`, within a document
    if need be. Where the documents run out first, the next pass over them draws other random numbers, except at
    temperature 0, where it would only repeat itself. The source "text" makes one pass, and counts fewer tokens where
    the corpus holds fewer.

    Args:
        model: A transformers causal LM in evaluation mode; ignored for "text", where it may be None. On a CPU with
            bfloat16 instructions a model in bfloat16 samples two to three times as fast as one in float32.
        tokenizer: The model's fast tokenizer.
        corpus: The documents to count on.
        source: "drafter" or "target": the role of `model`, which generates; "text": count the corpus.
        max_tokens: The number of tokens to count.
        seed: Seed of the random numbers that tokens are drawn with.
        temperature: Temperature of sampling; 0 is greedy.
        checkpoint: A file that is rewritten as tokens come in; beside it, in a directory of its name with ".partial"
            added, is the work on an unfinished batch. A run goes on from an existing one, and ends where it would have
            ended uninterrupted; a larger `max_tokens` continues a finished run.
        progress: Called with (tokens so far, max_tokens) as tokens come in.
        model_digest: Identifies the weights, so that a checkpoint of other weights is refused.
        limits: The size of batches, prompts and continuations.
        chat: Which chat template renders prompts, and its arguments.
        on_skip: Called at the end for each document that cannot be a prompt of this model.
        save_seconds: The time between two savings, which is what a killed run can lose.
        enough_for: The rows of a trimmed head, a number or the share of held-out tokens that they are to cover:
            counting stops before `max_tokens` where more tokens would change little for such a head.
        endpoint: A server that generates instead of `model`, with its own chat template.
        on_verdict: Called with each look at whether the tokens are enough; the last one is the one that stopped.

    Returns:
        The counts of the documents that choose the kept tokens, and of those held out.

    Raises:
        VocabtrimError: An argument is out of range, the checkpoint comes from other settings, or the corpus yields no
            token.
    """
    _check(model or endpoint, source, max_tokens, seed, temperature)
    if source == "text":
        model = None
    chat = replace(chat or ChatOptions(), now=CALIBRATION_DATE)
    fresh = _fresh_counts(
        model, tokenizer, corpus, source, seed, temperature, model_digest, limits or BatchLimits(), chat
    )
    if endpoint is not None:
        endpoint.check()
        fresh = _of_endpoint(fresh, endpoint, temperature, limits or BatchLimits(batch_size=BATCH))
    skipped: list[Skipped] = []
    counts = fresh if checkpoint is None or not checkpoint.exists() else resume(checkpoint, fresh)
    evidence = None if enough_for is None else _evidence(enough_for, counts, checkpoint)
    saver = Saver(checkpoint, save_seconds, counts, evidence)
    produce = _producer(model, endpoint, tokenizer, corpus, chat, progress, max_tokens, saver, skipped)
    try:
        while counts.runs[0].enough_for != str(enough_for) and (
            batch := next_batch(corpus.documents, counts, max_tokens)
        ):
            tokens, unfinished = produce(counts, *batch)
            held = [is_held_out(index, len(corpus.documents)) for index in batch[1]]
            counts, parts = count_batch(counts, tokens, held, max_tokens)
            if evidence is not None:
                evidence.add([part for part, is_held in zip(parts, held, strict=False) if is_held])
                if verdict := evidence.look(counts.counts, counts.held_out):
                    on_verdict(verdict)
                    counts = _stop(counts, enough_for) if verdict.is_enough else counts
            saver.take(counts, unfinished)
            progress(counts.total, max_tokens)
        saver.finish(counts)
    finally:  # Ctrl-C too
        saver.save(counts)
    if counts.total == 0:
        why = describe_skipped(skipped) if skipped else "give it text or prompts with content"
        raise VocabtrimError(f"calibration on {corpus.source} counted no token: {why}")
    for each in skipped:
        on_skip(each)
    return counts


def _producer(
    model: "PreTrainedModel | None",
    endpoint: Endpoint | None,
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    chat: ChatOptions,
    progress: Progress,
    max_tokens: int,
    saver: Saver,
    skipped: list[Skipped],
) -> Callable[[TokenCounts, int, list[int]], tuple[Tokens, PartialBatch | None]]:
    """What makes the tokens of a batch, given the counts so far, the pass and the documents' indices.

    It returns them with where the work on the batch was kept. It adds to `skipped`.
    """
    runtime = runtime_tokenizer(tokenizer)

    def asked(counts: TokenCounts, pass_number: int, indices: list[int]) -> tuple[Tokens, None]:
        assert endpoint is not None
        documents = [corpus.documents[index] for index in indices]
        on_step = partial(_report, progress, counts.total, max_tokens)
        run = counts.runs[0]
        return asked_tokens(endpoint, tokenizer, documents, run, (pass_number, indices), on_step), None

    def read(_counts: TokenCounts, _pass_number: int, indices: list[int]) -> tuple[Tokens, None]:
        return text_tokens(tokenizer, [corpus.documents[index] for index in indices]), None

    def sampled(counts: TokenCounts, pass_number: int, indices: list[int]) -> tuple[Tokens, PartialBatch | None]:
        assert model is not None
        documents, run = [corpus.documents[index] for index in indices], counts.runs[0]
        prompts, left_out = prompt_tokens(runtime, documents, chat, run, counts.full_vocab)
        if pass_number == 0:
            skipped.extend(left_out)
        on_step = partial(_report, progress, counts.total, max_tokens)
        eos = eos_token_ids(tokenizer, model.generation_config)
        unfinished = saver.unfinished(counts, (pass_number, indices))
        numbers = draws(run, pass_number, indices)
        return sampled_tokens(model, prompts, numbers, run, eos, on_step, unfinished), unfinished

    return asked if endpoint is not None else read if model is None else sampled


def _evidence(rows: Rows, counts: TokenCounts, checkpoint: Path | None) -> Evidence:
    saved = read_working(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    return Evidence(rows, counts.full_vocab, saved)


def _stop(counts: TokenCounts, rows: Rows | None) -> TokenCounts:
    """The same counts, which are enough for these rows."""
    return replace(counts, runs=(replace(counts.runs[0], enough_for=str(rows)),))


def _report(progress: Progress, before: int, max_tokens: int, in_batch: int) -> None:
    progress(min(before + in_batch, max_tokens), max_tokens)


def _check(
    model: "PreTrainedModel | Endpoint | None", source: str, max_tokens: int, seed: int, temperature: float
) -> None:
    if source not in get_args(Source):
        raise VocabtrimError(f"unknown calibration source {source!r}: choose from {', '.join(get_args(Source))}")
    if source != "text" and model is None:
        raise VocabtrimError(f"calibrating on the {source}'s generations needs the {source} model")
    if max_tokens < 1:
        raise VocabtrimError(f"the number of calibration tokens must be positive, not {max_tokens}")
    if seed < 0:
        raise VocabtrimError(f"the calibration seed must be 0 or more, not {seed}")
    if not 0 <= temperature < float("inf"):
        raise VocabtrimError(f"the calibration temperature must be 0 or more, not {temperature}")


def _fresh_counts(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    source: Source,
    seed: int,
    temperature: float,
    model_digest: str,
    limits: BatchLimits,
    chat: ChatOptions,
) -> TokenCounts:
    """Counts without any token, and with the settings that a checkpoint must have been made with to be continued."""
    run = CalibrationRun(source, corpus.digest, seed, corpus=corpus.source)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if model is not None:
        vocab_size = model.config.get_text_config().vocab_size  # the head's rows, padding included
        run = replace(
            run,
            model_digest=model_digest,
            dtype=str(model.dtype).removeprefix("torch."),
            temperature=float(temperature),
            chat=_describe(chat),
            **asdict(limits.within(model)),
        )
    empty = np.zeros(vocab_size, np.int64)
    return TokenCounts(empty, empty, tokenizer_digest(tokenizer.backend_tokenizer), (run,))


def _of_endpoint(fresh: TokenCounts, endpoint: Endpoint, temperature: float, limits: BatchLimits) -> TokenCounts:
    """The same counts without any token, with the settings of an endpoint."""
    sizes = replace(limits, max_prompt_tokens=0)  # prompts are not cut
    served = {"model_digest": f"endpoint:{endpoint.model}", "temperature": float(temperature), **asdict(sizes)}
    return replace(fresh, runs=(replace(fresh.runs[0], **served),))


def _describe(chat: ChatOptions) -> str:
    """The chat template's name and arguments as JSON; "" for the tokenizer's own template without arguments."""
    if chat.template is None and not chat.template_args:
        return ""
    return json.dumps({"template": chat.template, "arguments": plain_data(chat.template_args)}, sort_keys=True)
