"""`calibrate` by a user's settings: of one corpus, or of each domain and their mixture."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle.chat_template import ChatOptions
from engines.errors import VocabtrimError
from vocabtrim_export.calibration import Corpus, Skipped, TokenCounts, calibrate
from vocabtrim_export.calibration import Source as CalibrationSource
from vocabtrim_export.calibration.domains import Domain, mix
from vocabtrim_export.calibration.endpoint import Endpoint
from vocabtrim_export.calibration.sufficiency import MOST_TOKENS, Rows, Verdict
from vocabtrim_export.lowering.graph_files import Progress

if TYPE_CHECKING:
    from vocabtrim_export.calibration.counting import CalibrationInput, CalibrationSettings


def counter(
    data: "CalibrationInput",
    how: CalibrationSource,
    settings: "CalibrationSettings",
    checkpoint: Path,
    progress: Progress,
    on_skip: Callable[[Skipped], None],
    on_note: Callable[[str], None],
    rows: Rows,
) -> Callable[..., TokenCounts]:
    """`calibrate` on this data; the model and its tokenizer are left to be given."""
    assert data.corpus is not None
    if not data.domains:
        return _calibrator(data.corpus, how, settings, checkpoint, progress, on_skip, on_note, rows)
    places = [checkpoint.with_name(f"{checkpoint.name}.{domain.name}") for domain in data.domains]
    weights = sum(domain.weight for domain in data.domains)

    def calibrator(domain: Domain, place: Path) -> Callable[..., TokenCounts]:
        tokens = settings.calibration_tokens
        if tokens != "auto":
            tokens = max(1, round(tokens * domain.weight / weights))
        return _calibrator(
            domain.corpus,
            how,
            replace(settings, calibration_tokens=tokens),
            place,
            lambda task, done, total: progress(f"{task} {domain.name}", done, total),
            on_skip,
            lambda note: on_note(f"{domain.name}: {note}"),
            rows,
        )

    def count(*model: Any, **digest: Any) -> TokenCounts:
        _take_apart(checkpoint, dict(zip([domain.name for domain in data.domains], places, strict=True)))
        pairs = zip(data.domains, places, strict=True)
        counts = mix(data.domains, [calibrator(domain, place)(*model, **digest) for domain, place in pairs])
        counts.save(checkpoint)
        for place in places:
            place.unlink()
        return counts

    return count


def _endpoint(settings: "CalibrationSettings", how: CalibrationSource) -> Endpoint | None:
    url, model = settings.calibration_endpoint, settings.calibration_model
    if url is None and model is None:
        return None
    if not url or not model:
        raise VocabtrimError("--calibration-endpoint URL and --calibration-model NAME belong together: give both")
    if how == "text":
        raise VocabtrimError("--calibration-source text counts a text, which no endpoint generates: leave one out")
    return Endpoint(url, model)


def _take_apart(checkpoint: Path, places: Mapping[str, Path]) -> None:
    """Write the domains of a finished file to the files that their calibrations go on from."""
    if not checkpoint.exists():
        return
    for each in TokenCounts.load(checkpoint).domains:
        place = places.get(each.runs[0].domain)
        if place is not None and not place.exists():
            run = replace(each.runs[0], domain="", weight=0.0)
            replace(each, runs=(run,)).save(place)


def _calibrator(
    corpus: Corpus,
    how: CalibrationSource,
    settings: "CalibrationSettings",
    checkpoint: Path,
    progress: Progress,
    on_skip: Callable[[Skipped], None],
    on_note: Callable[[str], None],
    rows: Rows,
) -> Callable[..., TokenCounts]:
    """`calibrate` on this corpus by these settings; the model and its tokenizer are left to be given."""
    for skipped in corpus.skipped:
        on_skip(skipped)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run = partial(
        calibrate,
        corpus=corpus,
        source=how,
        seed=settings.seed,
        temperature=settings.temperature,
        checkpoint=checkpoint,
        progress=lambda done, total: progress("calibrate", done, total),
        chat=ChatOptions(settings.chat_template, template_args=settings.template_args),
        on_skip=on_skip,
        endpoint=_endpoint(settings, how),
    )
    if settings.calibration_tokens != "auto":
        return partial(run, max_tokens=settings.calibration_tokens)

    def count(*model: Any, **how: Any) -> TokenCounts:
        verdicts: list[Verdict] = []

        def look(verdict: Verdict) -> None:
            verdicts.append(verdict)
            progress("coverage %", int(100 * verdict.coverage), 100)

        counts = run(*model, max_tokens=MOST_TOKENS, enough_for=rows, on_verdict=look, **how)
        progress("calibrate", counts.total, counts.total)
        for verdict in verdicts[-1:]:
            on_note(str(replace(verdict, tokens=counts.total)))
        return counts

    return count
