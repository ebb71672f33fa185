"""The main job: a drafter, a target and text in; two bundles out, the drafter's head cut to K rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.bundle.read import Manifest, Role
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.notes import mixture_note, no_gain
from vocabtrim_export.bundles.output import COUNTS_NAME, check_output, existing_parent, placing, reserved
from vocabtrim_export.bundles.size import bundle_bytes
from vocabtrim_export.calibration import Skipped, TokenCounts, skipped_note
from vocabtrim_export.calibration.counter import Listener
from vocabtrim_export.calibration.counting import CalibrationInput, count_tokens, read_calibration
from vocabtrim_export.calibration.domains import domains_note
from vocabtrim_export.drafters.shared_tokens import differing_note, proposable_tokens
from vocabtrim_export.drafters.source import HeadSource, find_head
from vocabtrim_export.formats import write_formats
from vocabtrim_export.formats.exported import Exported
from vocabtrim_export.generation_rules import rule_notes
from vocabtrim_export.head_choice.head import choose_head
from vocabtrim_export.pair_bundles import PairWriter, select
from vocabtrim_export.progress import Progress
from vocabtrim_export.selection import Selection, rows_to_choose
from vocabtrim_export.settings import ExportSettings, check_auto, check_settings
from vocabtrim_export.sources.head_kinds import head_kind
from vocabtrim_export.sources.mapped import check_room
from vocabtrim_export.sources.paths import model_text
from vocabtrim_export.sources.refusals import check_tensorrt
from vocabtrim_export.sources.rotation import context_length, fix_long_tables
from vocabtrim_export.sources.source import DTYPES, Source, load_source
from vocabtrim_export.tracing.layers import decoder_layers


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The bundles and formats that an export wrote.

    Attributes:
        drafter: The drafter's bundle.
        target: The target's bundle; None where no target was named.
        drafter_manifest: The drafter's manifest.
        target_manifest: The target's manifest.
        selection: The kept tokens.
        formats: The directories of the other formats.
        notes: Notes for the user about the models and the pair.
    """

    drafter: Path
    target: Path | None
    drafter_manifest: Manifest
    target_manifest: Manifest | None
    selection: Selection
    formats: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def export(
    drafter: str | Path,
    target: str | Path | None,
    output: str | Path,
    settings: ExportSettings,
    progress: Progress = lambda _task, _done, _total: None,
) -> ExportResult:
    """Calibrate, trim and export a drafter, and its target.

    The token counts stay in `output/token_counts.safetensors`: an interrupted calibration continues from them, and as
    the calibration of another export they serve another K.

    Args:
        drafter: MODEL of the drafter: a hub id, a directory, a `.gguf` file, the directory of an EAGLE head or of
            Medusa heads of `target`, or "mtp" for the target's multi-token-prediction layer.
        target: MODEL of the target; None exports the drafter alone. A head needs its target, whose hidden states it
            reads.
        output: The directory that gets `drafter`, `target` and one directory for each of `settings.formats`.
        settings: The settings of the export.
        progress: Called with (task, done, total).

    Raises:
        VocabtrimError: The models, the settings or the calibration data are not valid; `output` is then as it was, but
            for the token counts.
    """
    drafter, output = model_text("drafter", drafter), Path(output)
    target = None if target is None else model_text("target", target)
    roles: tuple[Role, ...] = ("drafter", "target") if target else ("drafter",)
    names = [*roles, *settings.formats]
    check_output(output, names, settings.force)
    models = _load_checked(drafter, target, output, settings, progress)
    skipped: list[Skipped] = []
    counted: list[str] = []
    with reserved(output):
        check_output(output, names, settings.force)  # again: a killed run's bundles may be whole by now
        counts = count_tokens(
            models.sources,
            models.data,
            settings.calibration,
            output / COUNTS_NAME,
            rows_to_choose(settings.k),
            Listener(progress, skipped.append, counted.append),
        )
        with placing([output / name for name in names]) as directories:
            places = dict(zip(roles, directories, strict=False))
            pair = _write_pair(places, models, counts, settings, progress)
            vocab_map = None if pair.selection.is_noop else pair.selection.vocab_map
            others = dict(zip(settings.formats, directories[len(roles) :], strict=True))
            write_formats(others, Exported(places, pair.manifests, models.sources, vocab_map), progress)
    gain = no_gain(pair.manifests["drafter"], pair.manifests.get("target"))
    gain += mixture_note(pair.manifests["drafter"], pair.manifests.get("target"))
    notes = (*models.notes, *counted, *pair.notes, *gain, *skipped_note(skipped))
    return _result(output, pair, settings.formats, notes)


@dataclass(frozen=True, slots=True)
class _Models:
    """The loaded models of an export that can be made, and what its tokens are counted on.

    Attributes:
        sources: The models by role.
        data: The calibration's data.
        available: int64[n], the ids of the tokens that both models share.
        notes: Notes for the user.
    """

    sources: dict[Role, Source]
    data: CalibrationInput
    available: NDArray[np.int64]
    notes: tuple[str, ...]


def _load_checked(
    drafter: str, target: str | None, output: Path, settings: ExportSettings, progress: Progress
) -> _Models:
    """Read all that an export needs, and refuse what cannot be exported, before the long work.

    Raises:
        VocabtrimError: The models, the settings or the calibration data are not valid, or the disk has no room.
    """
    data = _read_checked(settings, drafter, target)
    sources = _load(drafter, target, settings.weights_dtype, existing_parent(output), progress)
    shared = proposable_tokens(sources["drafter"], sources.get("target", sources["drafter"]))
    _check_disk(output, sources, settings)
    notes = (*_fit(sources, settings), *differing_note(shared))
    if target:
        notes += tuple(rule_notes(sources["target"].model.generation_config, settings.formats))
    return _Models(sources, data, shared.token_ids, notes)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The bundles of a pair, as they were written."""

    selection: Selection
    manifests: dict[Role, Manifest]
    notes: tuple[str, ...]


def _result(output: Path, pair: _Pair, formats: Sequence[str], notes: tuple[str, ...]) -> ExportResult:
    target = pair.manifests.get("target")
    return ExportResult(
        drafter=output / "drafter",
        target=None if target is None else output / "target",
        drafter_manifest=pair.manifests["drafter"],
        target_manifest=target,
        selection=pair.selection,
        formats=tuple(output / name for name in formats),
        notes=notes,
    )


def _write_pair(
    places: Mapping[Role, Path], models: _Models, counts: TokenCounts, settings: ExportSettings, progress: Progress
) -> _Pair:
    """Choose the kept tokens and fill the directories of the pair."""
    sources, available = models.sources, models.available
    manifests: dict[Role, Manifest] = {}
    notes: tuple[str, ...] = ()
    writer = PairWriter(sources, counts, settings, progress)
    k, slots = settings.k, settings.slots or 0
    if k == "auto":
        choice, manifests = choose_head(places, writer, sources, models.data, counts, available, settings, progress)
        k, slots = choice.best.k, choice.best.slots
        notes += choice.reasons()
    selection = select(counts, sources, k, available)
    notes += domains_note(counts, selection.vocab_map.kept_token_ids)
    if slots and not selection.lost_token_ids.size:
        raise VocabtrimError(
            f"--slots {slots} is for tokens that the head lost, and this K keeps all of them: give a smaller K, or "
            "leave --slots out"
        )
    missing = {role: place for role, place in places.items() if role not in manifests}
    manifests |= writer.write(missing, selection, slots)
    return _Pair(selection, manifests, notes)


def _read_checked(settings: ExportSettings, drafter: str, target: str | None) -> CalibrationInput:
    """Returns the calibration's data, once the settings are known to fit it and the models."""
    kind = head_kind(drafter)
    check_settings(settings, drafter, target, kind)
    data = read_calibration(settings.calibration.calibration)
    if settings.k == "auto":
        check_auto(settings, kind, target, data)
    return data


def _load(drafter: str, target: str | None, dtype: str, scratch: Path, progress: Progress) -> dict[Role, Source]:
    def read(role: Role, spec: str, scratch: Path | None = scratch) -> Source:
        def report(done: int, total: int) -> None:
            progress(f"load {role}", done >> 20, total >> 20)

        return load_source(spec, DTYPES[dtype], report, scratch)

    if target and (kind := head_kind(drafter)):
        load_head = find_head(kind, drafter, target)
        source = read("target", target, None)  # a head gets its target's dtype
        decoder_layers(source.model)  # refuses before the long work
        return {"drafter": load_head(source), "target": source}
    sources: dict[Role, Source] = {"drafter": read("drafter", drafter)}
    if target:
        sources["target"] = sources["drafter"] if target == drafter else read("target", target)
    return sources


def _check_disk(output: Path, sources: Mapping[Role, Source], settings: ExportSettings) -> None:
    """Refuse, before the long work, bundles that the disk has no room for; a head's are small and not counted."""
    needed = 0.0
    for role, source in sources.items():
        quantization = settings.quantize if role == "target" else settings.quantize_drafter or settings.quantize
        rows = None
        if role == "drafter":
            rows = min(settings.k, source.vocab_size) if isinstance(settings.k, int) else 0
        if not isinstance(source, HeadSource):
            needed += bundle_bytes(source.model, settings.weights_dtype, quantization, rows)
    check_room(existing_parent(output), needed, "the export")


def _fit(sources: Mapping[Role, Source], settings: ExportSettings) -> tuple[str, ...]:
    """Give every model the rotation for its bundle's length. Returns notes for the user about the models."""
    notes: list[str] = []
    for source in {id(source): source for source in sources.values()}.values():
        if settings.trt is not None:
            check_tensorrt(source.name, source.model.config.get_text_config())
        context = context_length(source.name, source.model, settings.max_length)
        notes += [*source.notes, *fix_long_tables(source.name, source.model, context)]
    return tuple(notes)
