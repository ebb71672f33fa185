"""`calibrate`: count the tokens that a model generates on a corpus, or that its text holds; resumable."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engines.bundle.chat_template import ChatOptions
from engines.bundle.messages import plain_data
from engines.bundle.tokenizer import Tokenizer, tokenizer_digest
from engines.errors import VocabtrimError
from vocabtrim_export.calibration.batches import BatchLimits, draws, next_batch
from vocabtrim_export.calibration.corpus import Corpus
from vocabtrim_export.calibration.counts import CalibrationRun, TokenCounts, is_held_out, read_working
from vocabtrim_export.calibration.document import Document, Skipped, describe_skipped
from vocabtrim_export.calibration.endpoint import BATCH, Endpoint, check_same_tokenizer
from vocabtrim_export.calibration.partial_batch import SECONDS, PartialBatch
from vocabtrim_export.calibration.prompts import encode, encode_document
from vocabtrim_export.calibration.sufficiency import Evidence, Rows, Verdict
from vocabtrim_export.sources.end_tokens import eos_token_ids
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Source = Literal["drafter", "target", "text"]
Progress = Callable[[int, int], None]

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
    runtime = runtime_tokenizer(tokenizer)
    skipped: list[Skipped] = []
    counts = fresh if checkpoint is None or not checkpoint.exists() else _resume(checkpoint, fresh)
    evidence = None if enough_for is None else _evidence(enough_for, counts, checkpoint)
    saver = _Saver(checkpoint, save_seconds, counts, evidence)
    try:
        while counts.runs[0].enough_for != str(enough_for) and (
            batch := next_batch(corpus.documents, counts, max_tokens)
        ):
            pass_number, indices = batch
            documents = [corpus.documents[index] for index in indices]
            tokens: Sequence[Sequence[int] | NDArray[np.int64]]
            unfinished = None
            if endpoint is not None:
                on_step = partial(_report, progress, counts.total, max_tokens)
                tokens = _asked(endpoint, tokenizer, documents, counts.runs[0], (pass_number, indices), on_step)
            elif model is None:
                tokens = _text_tokens(tokenizer, documents)
            else:
                prompts, left_out = _prompts(runtime, documents, chat, counts.runs[0], counts.full_vocab)
                skipped += left_out if pass_number == 0 else []
                on_step = partial(_report, progress, counts.total, max_tokens)
                numbers = draws(counts.runs[0], pass_number, indices)
                eos = eos_token_ids(tokenizer, model.generation_config)
                unfinished = saver.unfinished(counts, batch)
                tokens = _sample(model, prompts, numbers, counts.runs[0], eos, on_step, unfinished)
            held = [is_held_out(index, len(corpus.documents)) for index in indices]
            counts, parts = _count(counts, tokens, held, max_tokens)
            if evidence is not None:
                evidence.add([part for part, is_held in zip(parts, held, strict=False) if is_held])
                if verdict := evidence.look(counts.counts, counts.held_out):
                    on_verdict(verdict)
                    counts = _stop(counts, enough_for) if verdict.is_enough else counts
            saver.take(counts, unfinished)
            progress(counts.total, max_tokens)
        saver.evidence = None  # the file of a finished run holds the counts alone
        if evidence is not None and checkpoint is not None and checkpoint.exists():
            counts.save(checkpoint)
    finally:  # Ctrl-C too
        saver.save(counts)
    if counts.total == 0:
        why = describe_skipped(skipped) if skipped else "give it text or prompts with content"
        raise VocabtrimError(f"calibration on {corpus.source} counted no token: {why}")
    for each in skipped:
        on_skip(each)
    return counts


def _evidence(rows: Rows, counts: TokenCounts, checkpoint: Path | None) -> Evidence:
    saved = read_working(checkpoint) if checkpoint is not None and checkpoint.exists() else {}
    return Evidence(rows, counts.full_vocab, saved)


def _stop(counts: TokenCounts, rows: Rows | None) -> TokenCounts:
    """The same counts, which are enough for these rows."""
    return replace(counts, runs=(replace(counts.runs[0], enough_for=str(rows)),))


class _Saver:
    """Writes the counts and the work on an unfinished batch, now and then."""

    def __init__(self, checkpoint: Path | None, seconds: float, saved: TokenCounts, evidence: Evidence | None) -> None:
        self.checkpoint, self.seconds, self.saved, self.last = checkpoint, seconds, saved, monotonic()
        self.evidence = evidence

    def unfinished(self, counts: TokenCounts, batch: tuple[int, list[int]]) -> PartialBatch | None:
        """Where the work on this batch is kept."""
        if self.checkpoint is None:
            return None
        run = counts.runs[0]
        settings = {each.name: getattr(run, each.name) for each in fields(run) if each.compare}
        key = json.dumps([settings, counts.tokenizer_digest, batch], sort_keys=True)
        directory = self.checkpoint.with_name(f"{self.checkpoint.name}.partial")
        return PartialBatch(directory, hashlib.sha256(key.encode()).hexdigest(), self.seconds)

    def take(self, counts: TokenCounts, unfinished: PartialBatch | None) -> None:
        """Save the counts that a batch ended with where it is time, or where the batch's own files go."""
        if monotonic() - self.last >= self.seconds or (unfinished is not None and unfinished.count):
            self.save(counts)
        if unfinished is not None:
            unfinished.clear()

    def save(self, counts: TokenCounts) -> None:
        """Save the counts, once."""
        if self.checkpoint is not None and counts is not self.saved:
            counts.save(self.checkpoint, self.evidence.tensors() if self.evidence else None)
            self.saved, self.last = counts, monotonic()


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


def _asked(
    endpoint: Endpoint,
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    run: CalibrationRun,
    batch: tuple[int, list[int]],
    on_step: Callable[[int], None],
) -> list[list[int]]:
    """The tokens of what the server continues each document with, an EOS where the model ended it."""
    pass_number, indices = batch
    seeds = [int(np.random.default_rng([run.seed, pass_number, index]).integers(1 << 31)) for index in indices]
    answers = endpoint.answers(documents, run.max_new_tokens, run.temperature, seeds, on_step)
    tokens = encode(tokenizer, [answer.text for answer in answers], add_special_tokens=False)
    check_same_tokenizer(endpoint, answers, [len(ids) for ids in tokens])
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [ids + end * answer.is_ended for ids, answer in zip(tokens, answers, strict=True)]


def _describe(chat: ChatOptions) -> str:
    """The chat template's name and arguments as JSON; "" for the tokenizer's own template without arguments."""
    if chat.template is None and not chat.template_args:
        return ""
    return json.dumps({"template": chat.template, "arguments": plain_data(chat.template_args)}, sort_keys=True)


def _resume(checkpoint: Path, fresh: TokenCounts) -> TokenCounts:
    """The counts in the file, once they prove to come from the same settings as `fresh`."""
    found, wanted = TokenCounts.load(checkpoint), fresh.runs[0]
    if len(found.runs) != 1:
        raise VocabtrimError(f"{checkpoint} is a sum of calibrations, which cannot be continued: name another file")
    differ = [f.name for f in fields(wanted) if f.compare and getattr(found.runs[0], f.name) != getattr(wanted, f.name)]
    if (found.tokenizer_digest, found.full_vocab) != (fresh.tokenizer_digest, fresh.full_vocab):
        differ.append("tokenizer")
    if differ:
        raise VocabtrimError(
            f"{checkpoint} was calibrated with another {', '.join(differ)}: "
            "remove it to start anew, or name another file"
        )
    return found


def _text_tokens(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]) -> list[list[int]]:
    """The tokens of each document's texts, each text encoded by itself."""
    texts = [text for document in documents for text in document.counted_texts]
    encoded = iter(encode(tokenizer, texts, add_special_tokens=False))
    return [[token for _ in document.counted_texts for token in next(encoded)] for document in documents]


def _prompts(
    tokenizer: Tokenizer, documents: Sequence[Document], chat: ChatOptions, run: CalibrationRun, rows: int
) -> tuple[list[list[int]], list[Skipped]]:
    """The end of each document's prompt, empty where it cannot be one, and those that cannot.

    rows: of the model's embedding; an added token, as an image's, may have an id beyond them.
    """
    prompts: list[list[int]] = []
    skipped: list[Skipped] = []
    for document in documents:
        try:
            prompt = encode_document(tokenizer, document, chat)[-run.max_prompt_tokens :]
            if max(prompt, default=0) >= rows:
                raise VocabtrimError(f"the model has no row for token {max(prompt)} of the prompt")
        except VocabtrimError as error:
            prompt = []
            skipped.append(Skipped(document.where, str(error)))
        prompts.append(prompt)
    return prompts, skipped


def _sample(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    numbers: NDArray[np.float64],
    run: CalibrationRun,
    eos: frozenset[int],
    on_step: Callable[[int], None],
    unfinished: PartialBatch | None,
) -> list[NDArray[np.int64]]:
    """The tokens that `model` continues each prompt with; none where the prompt has no token."""
    from vocabtrim_export.calibration.generate import NO_TOKEN, generate_batch

    tokens = [np.empty(0, np.int64)] * len(prompts)
    rows = [row for row, prompt in enumerate(prompts) if prompt]
    if rows:
        generated = generate_batch(
            model,
            [prompts[row] for row in rows],
            numbers[rows],
            temperature=run.temperature,
            eos_token_ids=eos,
            on_step=on_step,
            partial_batch=unfinished,
        )
        for row, line in zip(rows, generated, strict=True):
            tokens[row] = line[line != NO_TOKEN]
    return tokens


def _count(
    counts: TokenCounts,
    tokens: Sequence[Sequence[int] | NDArray[np.int64]],
    held: Sequence[bool],
    max_tokens: int,
) -> tuple[TokenCounts, list[NDArray[np.int64]]]:
    """Add one more batch to `counts`, up to `max_tokens`.

    Args:
        counts: The counts so far.
        tokens: The tokens of each document.
        held: Whether each is held out.
        max_tokens: The number of tokens to count.

    Returns:
        The counts, and what was counted of each document, up to the one that the limit cut.
    """
    run, left = counts.runs[0], max_tokens - counts.total
    begun, done, parts = run.next_done, 0, []
    for ids in tokens:
        if len(ids) - begun > left:
            parts.append(ids[begun : begun + left])
            begun += left
            break
        parts.append(ids[begun:])
        left -= len(parts[-1])
        begun, done = 0, done + 1
    sums = []
    for part, before in ((False, counts.counts), (True, counts.held_out)):
        mine = [np.empty(0, np.int64), *(ids for ids, is_held in zip(parts, held, strict=False) if is_held is part)]
        sums.append(before + np.bincount(np.concatenate(mine).astype(np.int64), minlength=counts.full_vocab))
    total = run.tokens + sum(map(len, parts))
    run = replace(run, documents_done=run.documents_done + done, next_done=begun, tokens=total)
    return TokenCounts(sums[0], sums[1], counts.tokenizer_digest, (run,)), [np.asarray(ids, np.int64) for ids in parts]
