"""`calibrate`: count the tokens that a model generates on a corpus, or that its text holds; resumable."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.bundle.messages import plain_data
from engines.bundle.tokenizer import tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import Batches, BatchLimits, count_batch, draws
from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.corpus import Corpus
from vocabtrim_export.calibration.count_settings import NO_EVENTS, CountEvents, CountSettings
from vocabtrim_export.calibration.counts import TokenCounts, is_held_out, read_working
from vocabtrim_export.calibration.document import Skipped, describe_skipped
from vocabtrim_export.calibration.endpoint import BATCH
from vocabtrim_export.calibration.generations import asked_tokens, prompt_tokens, sampled_tokens, text_tokens
from vocabtrim_export.calibration.partial_batch import SECONDS, PartialBatch
from vocabtrim_export.calibration.saving import Saver, resume
from vocabtrim_export.calibration.sufficiency import Evidence, Rows
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Tokens = Sequence[Sequence[int] | NDArray[np.int64]]  # of each document of a batch

# What templates that write the date are told: the result must not depend on the day.
CALIBRATION_DATE = datetime(2024, 7, 26)


def calibrate(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    settings: CountSettings,
    *,
    checkpoint: Path | None = None,
    save_seconds: float = SECONDS,
    events: CountEvents = NO_EVENTS,
) -> TokenCounts:
    """Count the tokens that a model generates on a corpus, or the tokens of the corpus itself.

    Only generated tokens count, the EOS included, never a prompt's. Counting stops at `settings.max_tokens`, within a
    document if need be. Where the documents run out first, the next pass over them draws other random numbers, except
    at temperature 0, where it would only repeat itself. The source "text" makes one pass, and counts fewer tokens where
    the corpus holds fewer.

    Args:
        model: A transformers causal LM in evaluation mode; None where a text is counted or an endpoint generates. On a
            CPU with bfloat16 instructions a model in bfloat16 samples two to three times as fast as one in float32.
        tokenizer: The model's fast tokenizer.
        corpus: The documents to count on.
        settings: What to count.
        checkpoint: A file that is rewritten as tokens come in; beside it, in a directory of its name with ".partial"
            added, is the work on an unfinished batch. A run goes on from an existing one, and ends where it would have
            ended uninterrupted; a larger `max_tokens` continues a finished run.
        save_seconds: The seconds between two savings, which is what a killed run can lose.
        events: Functions to call as tokens come in.

    Returns:
        The counts of the documents that choose the kept tokens, and of those held out.

    Raises:
        VocabtrimError: The model is missing, the checkpoint comes from other settings, or the corpus yields no token.
    """
    if settings.source == "text":
        model = None
    elif model is None and settings.endpoint is None:
        raise VocabtrimError(f"calibrating on the {settings.source}'s generations needs the {settings.source} model")
    settings = replace(settings, chat=replace(settings.chat, now=CALIBRATION_DATE))
    fresh = _fresh_counts(model, tokenizer, corpus, settings)
    skipped: list[Skipped] = []
    counts = fresh if checkpoint is None or not checkpoint.exists() else resume(checkpoint, fresh)
    evidence = None if settings.enough_for is None else _evidence(settings.enough_for, counts, checkpoint)
    saver = Saver(checkpoint, save_seconds, counts, evidence)
    produce = _producer(model, tokenizer, corpus, settings, events, saver, skipped)
    batches = Batches(corpus.documents, fresh.runs[0], settings.max_tokens)
    try:
        while not _is_enough(counts, settings) and (batch := batches.next(counts)):
            tokens, unfinished = produce(counts, *batch)
            held = [is_held_out(index, len(corpus.documents)) for index in batch[1]]
            counts, parts = count_batch(counts, tokens, held, settings.max_tokens)
            if evidence is not None:
                evidence.add([part for part, is_held in zip(parts, held, strict=False) if is_held])
                if verdict := evidence.look(counts.counts, counts.held_out):
                    events.on_verdict(verdict)
                    counts = _stop(counts, settings.enough_for) if verdict.is_enough else counts
            saver.take(counts, unfinished)
            events.progress(counts.total, settings.max_tokens)
        saver.finish(counts)
    finally:  # Ctrl-C too
        saver.save(counts)
    if counts.total == 0:
        why = describe_skipped(skipped) if skipped else "give it text or prompts with content"
        raise VocabtrimError(f"calibration on {corpus.source} counted no token: {why}")
    for each in skipped:
        events.on_skip(each)
    return counts


def _is_enough(counts: TokenCounts, settings: CountSettings) -> bool:
    """Whether `auto` stopped the counting, now or in an earlier run."""
    return counts.runs[0].enough_for == str(settings.enough_for)


def _producer(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    settings: CountSettings,
    events: CountEvents,
    saver: Saver,
    skipped: list[Skipped],
) -> Callable[[TokenCounts, int, list[int]], tuple[Tokens, PartialBatch | None]]:
    """Returns what makes the tokens of a batch, given the counts so far, the pass and the documents' indices.

    It returns them with the place where the work on the batch was kept. It adds to `skipped`.
    """
    runtime, endpoint = runtime_tokenizer(tokenizer), settings.endpoint

    def asked(counts: TokenCounts, pass_number: int, indices: list[int]) -> tuple[Tokens, None]:
        assert endpoint is not None
        documents = [corpus.documents[index] for index in indices]
        on_step = partial(_report, events, counts.total, settings.max_tokens)
        run = counts.runs[0]
        return asked_tokens(endpoint, tokenizer, documents, run, (pass_number, indices), on_step), None

    def read(_counts: TokenCounts, _pass_number: int, indices: list[int]) -> tuple[Tokens, None]:
        return text_tokens(tokenizer, [corpus.documents[index] for index in indices]), None

    def sampled(counts: TokenCounts, pass_number: int, indices: list[int]) -> tuple[Tokens, PartialBatch | None]:
        assert model is not None
        documents, run = [corpus.documents[index] for index in indices], counts.runs[0]
        prompts, left_out = prompt_tokens(runtime, documents, settings.chat, run, counts.full_vocab)
        if pass_number == 0:
            skipped.extend(left_out)
        on_step = partial(_report, events, counts.total, settings.max_tokens)
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


def _report(events: CountEvents, before: int, max_tokens: int, in_batch: int) -> None:
    events.progress(min(before + in_batch, max_tokens), max_tokens)


def _fresh_counts(
    model: "PreTrainedModel | None", tokenizer: "PreTrainedTokenizerFast", corpus: Corpus, settings: CountSettings
) -> TokenCounts:
    """Counts without any token, and with the settings that a checkpoint must have been made with to be continued."""
    run = CalibrationRun(settings.source, corpus.digest, settings.seed, corpus=corpus.source)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    temperature = float(settings.temperature)
    if model is not None:
        vocab_size = model.config.get_text_config().vocab_size  # the head's rows, padding included
        limits = (settings.limits or BatchLimits()).within(model)
        run = replace(
            run,
            model_digest=settings.model_digest,
            dtype=str(model.dtype).removeprefix("torch."),
            temperature=temperature,
            chat=_describe(settings.chat),
            **asdict(limits),
        )
    if settings.endpoint is not None:
        settings.endpoint.check()
        limits = replace(settings.limits or BatchLimits(batch_size=BATCH), max_prompt_tokens=0)  # prompts are not cut
        name = f"endpoint:{settings.endpoint.model}"
        run = replace(run, model_digest=name, temperature=temperature, **asdict(limits))
    empty = np.zeros(vocab_size, np.int64)
    return TokenCounts(empty, empty, tokenizer_digest(tokenizer.backend_tokenizer), (run,))


def _describe(chat: ChatOptions) -> str:
    """The chat template's name and arguments as JSON; "" for the tokenizer's own template without arguments."""
    if chat.template is None and not chat.template_args:
        return ""
    return json.dumps({"template": chat.template, "arguments": plain_data(chat.template_args)}, sort_keys=True)
