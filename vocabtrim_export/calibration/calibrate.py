"""`calibrate`: count the tokens that a model generates on a corpus, or that its text holds; resumable."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engines.errors import VocabtrimError
from vocabtrim_export.calibration.corpus import Corpus, Document
from vocabtrim_export.calibration.counts import CalibrationRun, TokenCounts, is_held_out
from vocabtrim_export.calibration.prompts import encode, encode_prompts
from vocabtrim_export.sources.end_tokens import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Source = Literal["drafter", "target", "text"]
Progress = Callable[[int, int], None]

# Batches are formed within windows of this many: prompts of like length together, yet no window far from the average.
BATCHES_A_WINDOW = 8
MIN_BATCH = 8
TEXT_BATCH = 64


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Prompts sampled at once, tokens kept of a prompt (its end), tokens generated for each."""

    batch_size: int = 64
    max_prompt_tokens: int = 128
    max_new_tokens: int = 128

    def within(self, model: "PreTrainedModel") -> "BatchLimits":
        """The same, made to fit the model's context."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return self
        new = min(self.max_new_tokens, context // 2)
        return replace(self, max_new_tokens=new, max_prompt_tokens=min(self.max_prompt_tokens, context - new))


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
) -> TokenCounts:
    """Count tokens: about `max_tokens` that `model` samples on the corpus ("drafter", "target"), or its text's.

    model: a transformers causal LM in evaluation mode; ignored, and may be None, for "text". On a CPU with bfloat16
    instructions a model loaded in bfloat16 samples two to three times as fast. tokenizer: its fast tokenizer.
    Only generated tokens count, EOS included, never a prompt's. Sampling stops with the batch that reaches
    `max_tokens`; where documents run out first, the next pass over them draws other random numbers (but not at
    temperature 0, which would only repeat itself). "text" makes one pass.
    checkpoint: file rewritten after every batch. Where it exists the run goes on from there, and ends where it would
    have ended uninterrupted; raising `max_tokens` carries a finished one on.
    progress: called with (tokens so far, max_tokens) as tokens come in.
    model_digest: identifies the weights, so that a checkpoint of other ones is refused.
    Raises `VocabtrimError` for a checkpoint of other settings and for a corpus that yields no token.
    """
    _check(model, source, max_tokens, seed, temperature)
    if source == "text":
        model = None
    fresh = _fresh_counts(model, tokenizer, corpus, source, seed, temperature, model_digest, limits or BatchLimits())
    counts = fresh if checkpoint is None or not checkpoint.exists() else _resume(checkpoint, fresh)
    while batch := _next_batch(corpus.documents, counts, max_tokens):
        pass_number, indices = batch
        documents = [corpus.documents[index] for index in indices]
        tokens: Sequence[Sequence[int] | NDArray[np.int64]]
        if model is None:
            tokens = encode(tokenizer, [document.text for document in documents], add_special_tokens=False)
        else:
            on_step = partial(_report, progress, counts.total, max_tokens)
            draws = _draws(counts.runs[0], pass_number, indices)
            tokens = _sample(model, tokenizer, documents, draws, counts.runs[0], on_step)
        counts = _count(counts, tokens, [is_held_out(index, len(corpus.documents)) for index in indices])
        if checkpoint is not None:
            counts.save(checkpoint)
        progress(counts.total, max_tokens)
    if counts.total == 0:
        raise VocabtrimError(f"calibration on {corpus.source} counted no token: give it text or prompts with content")
    return counts


def _report(progress: Progress, before: int, max_tokens: int, in_batch: int) -> None:
    progress(before + in_batch, max_tokens)


def _check(model: "PreTrainedModel | None", source: str, max_tokens: int, seed: int, temperature: float) -> None:
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
) -> TokenCounts:
    """No tokens yet, of the settings that a checkpoint must have been made with."""
    from engines.bundle.tokenizer import tokenizer_digest

    run = CalibrationRun(source, corpus.digest, seed, corpus=corpus.source)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if model is not None:
        vocab_size = model.config.get_text_config().vocab_size  # the head's rows, padding included
        run = replace(
            run,
            model_digest=model_digest,
            dtype=str(model.dtype).removeprefix("torch."),
            temperature=float(temperature),
            **asdict(limits.within(model)),
        )
    empty = np.zeros(vocab_size, np.int64)
    return TokenCounts(empty, empty, tokenizer_digest(tokenizer.backend_tokenizer), (run,))


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


def _next_batch(documents: Sequence[Document], counts: TokenCounts, max_tokens: int) -> tuple[int, list[int]] | None:
    """The pass over the corpus and the documents (by index) that come next, or None when the counting is done.

    A function of the counts alone, so that it does not matter how often the work was interrupted.
    """
    run = counts.runs[0]
    if not documents or counts.total >= max_tokens:
        return None
    pass_number, start = divmod(run.documents_done, len(documents))
    repeats = run.source != "text" and run.temperature > 0 and counts.total > 0
    if pass_number > 0 and not repeats:
        return None
    size = TEXT_BATCH
    if run.source != "text":  # the last batch is no larger than what is missing needs
        size = min(run.batch_size, max(MIN_BATCH, -(-(max_tokens - counts.total) // run.max_new_tokens)))
    return pass_number, _order(documents, run, pass_number)[start : start + size]


def _order(documents: Sequence[Document], run: CalibrationRun, pass_number: int) -> list[int]:
    """A random order of the documents in which neighbours are of like length, to limit padding.

    Windows of a shuffled corpus are sorted by length and their batches shuffled, so that stopping early still leaves
    short and long prompts.
    """
    random = np.random.default_rng([run.seed, pass_number])
    shuffled = random.permutation(len(documents)).tolist()
    size = run.batch_size or TEXT_BATCH
    order: list[int] = []
    for start in range(0, len(shuffled), BATCHES_A_WINDOW * size):
        window = sorted(
            shuffled[start : start + BATCHES_A_WINDOW * size], key=lambda index: documents[index].prompt_length
        )
        batches = [window[at : at + size] for at in range(0, len(window), size)]
        order += [index for batch in random.permutation(len(batches)) for index in batches[batch]]
    return order


def _draws(run: CalibrationRun, pass_number: int, indices: Sequence[int]) -> NDArray[np.float64]:
    """float64[B, max_new_tokens] in [0, 1): each document has numbers of its own, whatever batch it falls into."""
    seeds = ([run.seed, pass_number, index] for index in indices)
    return np.array([np.random.default_rng(seed).random(run.max_new_tokens) for seed in seeds])


def _sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    draws: NDArray[np.float64],
    run: CalibrationRun,
    on_step: Callable[[int], None],
) -> list[NDArray[np.int64]]:
    """The tokens that `model` continues each document's prompt with; none where the prompt has no token, or one that
    the model has no row for."""
    from vocabtrim_export.calibration.generate import NO_TOKEN, generate_batch

    prompts = [ids[-run.max_prompt_tokens :] for ids in encode_prompts(tokenizer, documents)]
    tokens = [np.empty(0, np.int64)] * len(documents)
    known = model.config.get_text_config().vocab_size  # an added token, as an image's, may have no row in the model
    rows = [row for row, prompt in enumerate(prompts) if prompt and max(prompt) < known]
    if rows:
        generated = generate_batch(
            model,
            [prompts[row] for row in rows],
            draws[rows],
            temperature=run.temperature,
            eos_token_ids=eos_token_ids(tokenizer, model.generation_config),
            on_step=on_step,
        )
        for row, line in zip(rows, generated, strict=True):
            tokens[row] = line[line != NO_TOKEN]
    return tokens


def _count(
    counts: TokenCounts, tokens: Sequence[Sequence[int] | NDArray[np.int64]], held: Sequence[bool]
) -> TokenCounts:
    """`counts` and one more batch: the tokens of each document, and whether it is held out."""
    sums = []
    for part, before in ((False, counts.counts), (True, counts.held_out)):
        mine = [np.empty(0, np.int64), *(ids for ids, is_held in zip(tokens, held, strict=True) if is_held is part)]
        sums.append(before + np.bincount(np.concatenate(mine).astype(np.int64), minlength=counts.full_vocab))
    run = counts.runs[0]
    done = replace(run, documents_done=run.documents_done + len(tokens), tokens=run.tokens + sum(map(len, tokens)))
    return TokenCounts(sums[0], sums[1], counts.tokenizer_digest, (done,))
