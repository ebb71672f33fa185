"""`calibrate` with a user's settings: on one corpus, or on each domain and their mixture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engines.bundle.chat_template import ChatOptions
from vocabtrim_export.calibration import (
    CalibrationSource,
    Corpus,
    CountEvents,
    CountSettings,
    Skipped,
    TokenCounts,
    calibrate,
)
from vocabtrim_export.calibration.domains import Domain, divided_tokens, mix
from vocabtrim_export.calibration.endpoint import Endpoint
from vocabtrim_export.calibration.producers import CountWorkers
from vocabtrim_export.calibration.sufficiency import MOST_GENERATED, MOST_OF_TEXT, HeadSize, Sufficiency
from vocabtrim_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from vocabtrim_export.calibration.counting import CalibrationInput, CalibrationSettings


@dataclass(frozen=True, slots=True)
class Listener:
    """Functions that are called while tokens are counted.

    Attributes:
        progress: Called with (task, done, total): megabytes of a model that is loaded, tokens counted, and percents of
            held-out tokens that `auto` finds covered.
        on_skip: Called for each record of the data that is left out.
        on_note: Called with the reason why `auto` stopped or went on.
    """

    progress: Progress = lambda _task, _done, _total: None
    on_skip: Callable[[Skipped], None] = lambda _skipped: None
    on_note: Callable[[str], None] = lambda _note: None


NOBODY = Listener()
_LIMITED = "drawn from all of the text, and not the rest: --calibration-tokens NUMBER counts as many as you like"


@dataclass(frozen=True, slots=True)
class CountJob:
    """One calibration by a user's settings.

    Attributes:
        source: "drafter" or "target": the model that generates; "text": the text itself is counted.
        settings: The user's settings.
        checkpoint: The file that is rewritten as tokens come in; an interrupted run continues from it.
        rows: The rows of the head that `auto` counts for: a number, or the share of held-out tokens to cover.
        listener: The functions to call meanwhile.
        workers: The processes that make the tokens, if this one does not.
    """

    source: CalibrationSource
    settings: "CalibrationSettings"
    checkpoint: Path
    rows: HeadSize
    listener: Listener = NOBODY
    workers: CountWorkers | None = None


def count_data(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    data: "CalibrationInput",
    job: CountJob,
    model_digest: str = "",
) -> TokenCounts:
    """Run `calibrate` on one corpus, or on each domain, whose counts are then mixed.

    Args:
        model: The model that generates; None where a text is counted or an endpoint generates.
        tokenizer: Its tokenizer.
        data: The text to count on; it holds no earlier counts.
        job: The settings of the counting.
        model_digest: Identifies the model's weights.

    Raises:
        VocabtrimError: See `calibrate`.
    """
    if data.corpus:
        return _count_corpus(model, tokenizer, data.corpus, job, model_digest)
    checkpoint, shares = job.checkpoint, divided_tokens(data.domains, job.settings.calibration_tokens)
    places = {domain.name: checkpoint.with_name(f"{checkpoint.name}.{domain.name}") for domain in data.domains}
    _take_apart(checkpoint, places)
    counts = [
        _count_corpus(model, tokenizer, domain.corpus, _job_of(domain, job, tokens, places), model_digest)
        for domain, tokens in zip(data.domains, shares, strict=True)
    ]
    mixture = mix(data.domains, counts)
    mixture.save(checkpoint)
    for place in places.values():
        place.unlink()
    return mixture


def _job_of(domain: Domain, job: CountJob, tokens: int | Literal["auto"], places: Mapping[str, Path]) -> CountJob:
    """Returns the job that counts `tokens` for one domain."""
    listener = job.listener
    named = replace(
        listener,
        progress=lambda task, done, total: listener.progress(f"{task} {domain.name}", done, total),
        on_note=lambda note: listener.on_note(f"{domain.name}: {note}"),
    )
    settings = replace(job.settings, calibration_tokens=tokens)
    return replace(job, settings=settings, checkpoint=places[domain.name], listener=named)


def _count_corpus(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerFast",
    corpus: Corpus,
    job: CountJob,
    model_digest: str,
) -> TokenCounts:
    listener, settings = job.listener, _count_settings(job, model_digest)
    for skipped in corpus.skipped:
        listener.on_skip(skipped)
    job.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    looks: list[Sufficiency] = []

    def look(sufficiency: Sufficiency) -> None:
        looks.append(sufficiency)
        listener.progress("coverage %", int(100 * sufficiency.coverage), 100)

    events = CountEvents(
        lambda done, total: listener.progress("calibrate", done, total),
        listener.on_skip,
        look,
        lambda done, total: listener.progress("read prompts", done, total),
    )
    counts = calibrate(
        model, tokenizer, corpus, settings, checkpoint=job.checkpoint, workers=job.workers, events=events
    )
    if job.settings.calibration_tokens == "auto":
        listener.progress("calibrate", counts.total, counts.total)
        if job.source == "text" and counts.total == settings.max_tokens:
            listener.on_note(f"{counts.total} tokens were counted, {_LIMITED}")
    for sufficiency in looks[-1:]:
        listener.on_note(str(replace(sufficiency, tokens=counts.total)))
    return counts


def _count_settings(job: CountJob, model_digest: str) -> CountSettings:
    """Returns a user's settings as `calibrate` takes them; `model_digest` identifies the weights of the model."""
    asked = job.settings
    most = MOST_OF_TEXT if job.source == "text" else MOST_GENERATED
    url, name = asked.calibration_endpoint, asked.calibration_model
    return CountSettings(
        job.source,
        asked.calibration_tokens if asked.calibration_tokens != "auto" else most,
        asked.seed,
        asked.temperature,
        chat=ChatOptions(asked.chat_template, template_args=asked.template_args),
        enough_for=job.rows if asked.calibration_tokens == "auto" and job.source != "text" else None,
        endpoint=Endpoint(url, name) if url and name else None,
        model_digest=model_digest,
    )


def _take_apart(checkpoint: Path, places: Mapping[str, Path]) -> None:
    """Write the domains of a finished file to the separate files that their calibrations continue from."""
    if not checkpoint.exists():
        return
    for each in TokenCounts.load(checkpoint).domains:
        place = places.get(each.runs[0].domain)
        if place is not None and not place.exists():
            run = replace(each.runs[0], domain="", weight=0.0)
            replace(each, runs=(run,)).save(place)
