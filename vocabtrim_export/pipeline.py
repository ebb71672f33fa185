"""The main job: a drafter, a target and text in; two bundles out, the drafter's head cut to K rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle.read import Kind, Manifest, Role
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.notes import no_gain, target_notes
from vocabtrim_export.bundles.output import COUNTS_NAME, check_output, placing, reserved
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.calibration import Skipped, TokenCounts, skipped_note
from vocabtrim_export.calibration.counting import CalibrationSettings, count_tokens, read_calibration
from vocabtrim_export.calibration.moments import head_run, input_moments
from vocabtrim_export.drafters.base import FeatureHead
from vocabtrim_export.drafters.kinds import FIND_HEAD
from vocabtrim_export.drafters.medusa import MedusaHeads
from vocabtrim_export.drafters.shared_tokens import differing_note, proposable_tokens
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.formats import FORMATS, check_formats, write_formats
from vocabtrim_export.formats.exported import Exported
from vocabtrim_export.generation_rules import rule_notes
from vocabtrim_export.lowering.graph_files import Progress
from vocabtrim_export.lowering.quantize import Quantization
from vocabtrim_export.proof.proven import trace_source, write_proven
from vocabtrim_export.selection import Coverage, Selection, check_k, select_vocab, structural_token_ids
from vocabtrim_export.sources.head_kind import head_kind
from vocabtrim_export.sources.rotation import context_length, fix_long_tables
from vocabtrim_export.sources.source import DTYPES, Source, calibration_model, load_source
from vocabtrim_export.tracing.trace import Traced, decoder_layers
from vocabtrim_export.trt.bundle import check_buildable
from vocabtrim_export.trt.settings import TensorRTSettings


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How to export; the command line's options by the same names.

    k: rows of the drafter's head: a number, or a `Coverage` of the held-out calibration tokens.
    trt: how to build TensorRT plans; None exports for ONNX Runtime.
    dtype: "fp32", "fp16" or "bf16", of both bundles; None: fp16 for TensorRT, fp32 for ONNX Runtime.
    quantize_drafter: None does as `quantize` says.
    max_length: tokens that the KV caches hold; None: what the models were made for, at most 4,096.
    formats: of `vocabtrim_export.formats`, written beside the bundles.
    slots: in-context slots of the drafter's head: so many tokens that it lacks can be proposed nevertheless, those that
    the text had last. As many as the head loses at most; 0 for none.
    """

    k: int | Coverage
    trt: TensorRTSettings | None = None
    dtype: str | None = None
    quantize: Quantization = "none"
    quantize_drafter: Quantization | None = None
    max_length: int | None = None
    formats: tuple[str, ...] = ()
    slots: int = 0
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    force: bool = False

    @property
    def weights_dtype(self) -> str:
        return self.dtype or ("fp16" if self.trt else "fp32")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        drafter: The drafter's bundle.
        target: The target's bundle; None where none was asked for.
        drafter_manifest: The drafter's manifest.
        target_manifest: The target's manifest.
        selection: The kept tokens.
        formats: The directories of the other formats.
        notes: What the user should know about the models and the pair.
    """

    drafter: Path
    target: Path | None
    drafter_manifest: Manifest
    target_manifest: Manifest | None
    selection: Selection
    formats: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def export(
    drafter: str,
    target: str | None,
    output: str | Path,
    settings: ExportSettings,
    progress: Progress = lambda _task, _done, _total: None,
) -> ExportResult:
    """Calibrate, trim and export a drafter, and its target.

    The token counts stay in `output/token_counts.safetensors`: an interrupted calibration goes on from there, and given
    as the calibration of another export they serve another K.

    Args:
        drafter: MODEL of the drafter: a hub id, a directory, a `.gguf` file, the directory of an EAGLE head or of
            Medusa heads of `target`, or "mtp" for the target's multi-token-prediction layer.
        target: MODEL of the target; None exports the drafter alone. A head needs its target, whose hidden states it
            reads.
        output: The directory that gets `drafter`, `target` and one directory for each of `settings.formats`.
        settings: How to export.
        progress: Called with (task, done, total).

    Raises:
        VocabtrimError: The user can mend it; `output` is then as it was, but for the token counts.
    """
    output = Path(output)
    roles: list[Role] = ["drafter", "target"] if target else ["drafter"]
    names = [*roles, *settings.formats]
    check_output(output, names, settings.force)
    check_k(settings.k)
    kind = head_kind(drafter)
    _check_format(settings, target is not None, kind or "language-model")
    _check_slots(settings, kind or "language-model")
    if kind:
        _check_head(drafter, target, settings)
    given = read_calibration(settings.calibration.calibration)
    sources = _load(drafter, target, settings.weights_dtype, progress)
    shared = proposable_tokens(sources["drafter"], sources.get("target", sources["drafter"]))
    notes = (*_fit(sources, settings), *differing_note(shared))  # refuses before the long work, as the next line does
    notes += tuple(rule_notes(sources["target"].model.generation_config, settings.formats)) if target else ()
    skipped: list[Skipped] = []
    with reserved(output):
        check_output(output, names, settings.force)  # again: a killed run's bundles may be whole by now
        counts = count_tokens(
            sources,
            given,
            settings.calibration,
            output / COUNTS_NAME,
            lambda done, total: progress("calibrate", done, total),
            skipped.append,
        )
        selection = _select(counts, sources, settings.k, shared.token_ids)
        if settings.slots and not selection.lost_token_ids.size:
            raise VocabtrimError(
                f"--slots {settings.slots} is for tokens that the head lost, and this K keeps all of them: give a "
                "smaller K, or leave --slots out"
            )
        with placing([output / name for name in names]) as directories:
            places = dict(zip(roles, directories, strict=False))
            manifests = _write_bundles(places, sources, selection, counts, settings, progress)
            vocab_map = None if selection.is_noop else selection.vocab_map
            others = dict(zip(settings.formats, directories[len(roles) :], strict=True))
            write_formats(others, Exported(places, manifests, sources, vocab_map), progress)
    where = output / "target" if target else None
    written = tuple(output / name for name in settings.formats)
    drafter_manifest, target_manifest = manifests["drafter"], manifests.get("target")
    notes += (*target_notes(target_manifest), *no_gain(drafter_manifest, target_manifest), *skipped_note(skipped))
    return ExportResult(output / "drafter", where, drafter_manifest, target_manifest, selection, written, notes)


def _check_format(settings: ExportSettings, has_target: bool, kind: Kind) -> None:
    """Refuse before the long work what a format cannot hold."""
    check_formats(settings.formats, has_target, settings.trt is not None, kind, settings.weights_dtype)
    if settings.trt is not None:
        drafters = settings.quantize_drafter or settings.quantize
        check_buildable(settings.trt, {settings.weights_dtype, settings.quantize, drafters})
    elif "fp8" in (settings.quantize, settings.quantize_drafter):
        raise VocabtrimError("ONNX Runtime has no fp8 products on the CPU: use int8 or int4, or --format trt")


def _check_slots(settings: ExportSettings, kind: Kind) -> None:
    if settings.slots < 0:
        raise VocabtrimError(f"--slots is {settings.slots}: give the number of slots, or 0 for none")
    if not settings.slots:
        return
    graphs = [name for name in settings.formats if FORMATS[name].needs_graph]
    if settings.trt is not None or graphs:
        name = "trt" if settings.trt is not None else graphs[0]
        raise VocabtrimError(f"--format {name} cannot hold --slots: only bundles of --format onnx can")
    if kind == "medusa":
        raise VocabtrimError("Medusa heads cannot have --slots yet: only language models, EAGLE and layer heads can")
    if settings.weights_dtype == "bf16":
        raise VocabtrimError("--slots is for the CPU so far, which has no bf16 products: give --dtype fp32 or fp16")


def _check_head(drafter: str, target: str | None, settings: ExportSettings) -> None:
    if target is None:
        raise VocabtrimError(f"{drafter} is a head, which reads its target's hidden states: give --target too")
    if settings.trt is not None:
        raise VocabtrimError("heads run on ONNX Runtime only so far: leave --format trt out")
    if settings.calibration.calibration_source == "drafter":
        raise VocabtrimError("a head generates nothing by itself: use --calibration-source target or text")


def _write_bundles(
    places: Mapping[Role, Path],
    sources: Mapping[Role, Source],
    selection: Selection,
    counts: TokenCounts,
    settings: ExportSettings,
    progress: Progress,
) -> dict[Role, Manifest]:
    manifests: dict[Role, Manifest] = {}
    traced: dict[str, Traced | None] = {}
    moments: dict[str, Mapping[str, Tensor]] = {}
    for role, directory in places.items():
        source, plan = sources[role], _plan(role, sources, selection, counts, settings)
        if source.name not in traced:  # a model that drafts for itself is traced and measured once
            progress("trace", 0, 1)
            traced = {source.name: trace_source(plan)}
            progress("trace", 1, 1)
        if plan.quantization == "int4":
            if source.name not in moments:
                progress("measure inputs", 0, 1)
                moments = {source.name: _moments(source, sources)}
                progress("measure inputs", 1, 1)
            plan = replace(plan, moments=moments[source.name])
        manifests[role], traced[source.name] = write_proven(directory, traced[source.name], plan, progress)
    return manifests


def _moments(source: Source, sources: Mapping[Role, Source]) -> dict[str, Tensor]:
    with calibration_model(source.model) as model:
        if not isinstance(source, HeadSource) or not isinstance(model, FeatureHead | MedusaHeads):
            return input_moments(model, source.tokenizer)
        with calibration_model(sources["target"].model) as target:
            return input_moments(model, source.tokenizer, head_run(model, target, source.feature_layers))


def _load(drafter: str, target: str | None, dtype: str, progress: Progress) -> dict[Role, Source]:
    def read(role: Role, spec: str) -> Source:
        return load_source(spec, DTYPES[dtype], lambda done, total: progress(f"load {role}", done >> 20, total >> 20))

    if target and (kind := head_kind(drafter)):
        load_head = FIND_HEAD[kind](drafter, target)
        source = read("target", target)
        decoder_layers(source.model)  # refuses before the long work
        return {"drafter": load_head(source), "target": source}
    sources: dict[Role, Source] = {"drafter": read("drafter", drafter)}
    if target:
        sources["target"] = sources["drafter"] if target == drafter else read("target", target)
    return sources


def _fit(sources: Mapping[Role, Source], settings: ExportSettings) -> tuple[str, ...]:
    """Give every model the rotation of its bundle's length. Returns what the user should know about the models."""
    notes: list[str] = []
    for source in {id(source): source for source in sources.values()}.values():
        context = context_length(source.name, source.model, settings.max_length)
        notes += [*source.notes, *fix_long_tables(source.name, source.model, context)]
    return tuple(notes)


def _select(
    counts: TokenCounts, sources: Mapping[Role, Source], k: int | Coverage, available: NDArray[np.int64]
) -> Selection:
    always: set[int] = set()
    for source in sources.values():
        always |= structural_token_ids(source.tokenizer, source.model.generation_config)
    return select_vocab(counts, k, always_keep=always, full_vocab=sources["drafter"].vocab_size, available=available)


def _plan(
    role: Role, sources: Mapping[Role, Source], selection: Selection, counts: TokenCounts, settings: ExportSettings
) -> BundlePlan:
    source, drafter = sources[role], sources["drafter"]
    context = context_length(source.name, source.model, settings.max_length)
    if role == "target":
        read = drafter.feature_layers if isinstance(drafter, HeadSource) else ()
        plan = BundlePlan(role, source, settings.weights_dtype, settings.quantize, context, trt=settings.trt)
        return replace(plan, features_given=read)
    quantization = settings.quantize_drafter or settings.quantize
    plan = BundlePlan(role, source, settings.weights_dtype, quantization, context, trt=settings.trt)
    vocab_map = None if selection.is_noop else selection.vocab_map
    lost = selection.lost_token_ids
    plan = replace(plan, slots=min(settings.slots, len(lost)), lost_token_ids=lost)
    return replace(plan, vocab_map=vocab_map, coverage=selection.coverage, calibration=counts.describe())
