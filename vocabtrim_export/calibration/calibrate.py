"""`calibrate`: count the tokens that a model generates on a corpus, or that its text holds; resumable."""

import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.bundle.chat_template import ChatOptions
from engines.bundle.messages import plain_data
from engines.bundle.tokenizer import tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import Batches, BatchLimits, count_batch
from vocabtrim_export.calibration.calibration_run import CalibrationRun
from vocabtrim_export.calibration.corpus import Corpus
from vocabtrim_export.calibration.count_settings import NO_EVENTS, CountEvents, CountSettings
from vocabtrim_export.calibration.counts import TokenCounts, is_held_out, read_working
from vocabtrim_export.calibration.document import Skipped, describe_skipped
from vocabtrim_export.calibration.endpoint import BATCH
from vocabtrim_export.calibration.model_facts import ModelFacts
from vocabtrim_export.calibration.partial_batch import SECONDS
from vocabtrim_export.calibration.producers import CountTask, CountWorkers, producer
from vocabtrim_export.calibration.saving import Saver, resume
from vocabtrim_export.calibration.sufficiency import Evidence, HeadSize
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The date for templates that write one: the result must not depend on the day.
CALIBRATION_DATE = datetime(2024, 7, 26)


def calibrate(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    settings: CountSettings,
    *,
    checkpoint: Path | None = None,
    save_seconds: float = SECONDS,
    workers: CountWorkers | None = None,
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
        settings: The settings of the counting.
        checkpoint: A file that is rewritten as tokens come in; next to it, in a directory of its name with ".partial"
            added, is the work on an unfinished batch. A run goes on from an existing one, and ends where it would have
            ended uninterrupted; a larger `max_tokens` continues a finished run.
        save_seconds: The seconds between two savings, which is what a killed run can lose.
        workers: Processes that count or generate instead of this one.
        events: Functions to call as tokens come in.

    Returns:
        The counts of the documents that choose the kept tokens, and of those held out.

    Raises:
        VocabtrimError: The model is missing, there is no chat template of the name in the settings, the checkpoint
            comes from other settings, or the corpus yields no token.
    """
    model = None if settings.source == "text" else model
    facts = None if settings.source == "text" else _model_facts(model, workers, settings)
    settings = replace(settings, chat=replace(settings.chat, now=CALIBRATION_DATE))
    if facts is not None:
        runtime_tokenizer(tokenizer).chat.check(settings.chat)
    fresh = _fresh_counts(facts, tokenizer, corpus, settings)
    skipped: list[Skipped] = []
    counts = fresh if checkpoint is None or not checkpoint.exists() else resume(checkpoint, fresh)
    evidence = None if settings.enough_for is None else _evidence(settings.enough_for, counts, checkpoint)
    saver = Saver(checkpoint, save_seconds, counts, evidence)
    batches = Batches(corpus.documents, fresh.runs[0], settings.max_tokens)
    task = CountTask(model, tokenizer, workers, corpus, settings, batches, saver, events)
    counts = _count(task, counts, evidence, skipped)
    if counts.total == 0:
        why = describe_skipped(skipped) if skipped else "give it text or prompts with content"
        raise VocabtrimError(f"calibration on {corpus.source} counted no token: {why}")
    for each in skipped:
        events.on_skip(each)
    return counts


def _model_facts(
    model: "PreTrainedModel | None", workers: CountWorkers | None, settings: CountSettings
) -> ModelFacts | None:
    """Returns the facts of the model that generates, here or in `workers`; None where an endpoint does.

    Raises:
        VocabtrimError: Nothing generates.
    """
    facts = ModelFacts.of(model) if model is not None else workers.facts if workers is not None else None
    if facts is None and settings.endpoint is None:
        raise VocabtrimError(f"calibrating on the {settings.source}'s generations needs the {settings.source} model")
    return facts


def _count(task: CountTask, counts: TokenCounts, evidence: Evidence | None, skipped: list[Skipped]) -> TokenCounts:
    """Count batch after batch until there are enough tokens, and save the counts whatever ends the loop.

    The documents that cannot be prompts are added to `skipped`.
    """
    settings, events, documents = task.settings, task.events, len(task.corpus.documents)
    before = -1  # tokens at the beginning of the pass
    with producer(task) as produce:
        try:
            while not _is_enough(counts, settings) and (batch := task.batches.next(*_done(counts))):
                if _done(counts)[0] % documents == 0:
                    _check_grown(before, counts, task)
                    before = counts.total
                produced = produce(counts, batch)
                skipped += produced.skipped if batch.pass_number == 0 else ()
                held = [is_held_out(index, documents) for index in batch.indices]
                counts, parts = count_batch(counts, produced.tokens, held, settings.max_tokens)
                if evidence is not None:
                    evidence.add([part for part, is_held in zip(parts, held, strict=False) if is_held])
                    if sufficiency := evidence.look(counts.counts, counts.held_out):
                        events.on_look(sufficiency)
                        counts = _stop(counts, settings.enough_for) if sufficiency.is_enough else counts
                task.saver.take(counts, batch)
                events.progress(counts.total, _expected(counts, settings, documents))
            task.saver.finish(counts)
        finally:  # after Ctrl-C too
            task.saver.save(counts)
    return counts


def _expected(counts: TokenCounts, settings: CountSettings, documents: int) -> int:
    """Returns the tokens at which the counting ends; of a text an estimate by the documents counted so far."""
    done, tokens = _done(counts)
    of_all = tokens * documents // max(1, done) if settings.source == "text" else settings.max_tokens
    return min(of_all, settings.max_tokens)


def _check_grown(before: int, counts: TokenCounts, task: CountTask) -> None:
    """Refuse another pass after one that counted nothing: it would go on for ever."""
    if counts.total == before:
        raise VocabtrimError(
            f"a whole pass over {task.corpus.source} counted no token, as the {task.settings.source} generates "
            f"nothing; the {before} tokens counted so far are kept: give other prompts"
        )


def _done(counts: TokenCounts) -> tuple[int, int]:
    """Returns the documents and the tokens counted so far."""
    return counts.runs[0].documents_done, counts.runs[0].tokens


def _is_enough(counts: TokenCounts, settings: CountSettings) -> bool:
    """Returns whether `auto` stopped the counting, now or in an earlier run."""
    return counts.runs[0].enough_for == str(settings.enough_for)


def _evidence(rows: HeadSize, counts: TokenCounts, checkpoint: Path | None) -> Evidence:
    saved = read_working(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    return Evidence(rows, counts.full_vocab, saved)


def _stop(counts: TokenCounts, rows: HeadSize | None) -> TokenCounts:
    """Returns the same counts, marked as enough for these rows."""
    return replace(counts, runs=(replace(counts.runs[0], enough_for=str(rows)),))


def _fresh_counts(
    facts: ModelFacts | None, tokenizer: "PreTrainedTokenizerFast", corpus: Corpus, settings: CountSettings
) -> TokenCounts:
    """Returns counts without any token. Their settings are those that a checkpoint must have to be continued."""
    run = CalibrationRun(settings.source, corpus.digest, settings.seed, corpus=corpus.source)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    temperature = float(settings.temperature)
    if facts is not None:
        vocab_size = facts.rows
        limits = (settings.limits or BatchLimits()).within(facts.context)
        run = replace(
            run,
            model_digest=settings.model_digest,
            dtype=facts.dtype,
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
    """Returns the chat template's name and arguments as JSON; "" for the tokenizer's own template without arguments."""
    if chat.template is None and not chat.template_args:
        return ""
    return json.dumps({"template": chat.template, "arguments": plain_data(chat.template_args)}, sort_keys=True)
