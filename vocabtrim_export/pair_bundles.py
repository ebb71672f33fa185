"""The bundles of a pair: which tokens the drafter keeps, and both written and proven."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle.read import Manifest, Role
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.moments import head_run, input_moments
from vocabtrim_export.drafters.base import FeatureHead, ParallelHeads
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.lowering.graph_files import Progress
from vocabtrim_export.proof.proven import trace_source, write_proven
from vocabtrim_export.selection import Coverage, Selection, select_vocab, structural_token_ids
from vocabtrim_export.settings import ExportSettings
from vocabtrim_export.sources.precision import calibration_model
from vocabtrim_export.sources.rotation import context_length
from vocabtrim_export.sources.source import Source
from vocabtrim_export.tracing.trace import Traced


def write_bundles(
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
        if not isinstance(source, HeadSource) or not isinstance(model, FeatureHead | ParallelHeads):
            return input_moments(model, source.tokenizer)
        with calibration_model(sources["target"].model) as target:
            return input_moments(model, source.tokenizer, head_run(model, target, source.feature_layers))


def select(
    counts: TokenCounts,
    sources: Mapping[Role, Source],
    k: int | Coverage,
    available: NDArray[np.int64],
) -> Selection:
    always, rows = always_kept(sources), sources["drafter"].vocab_size
    return select_vocab(counts, k, always_keep=always, full_vocab=rows, available=available)


def always_kept(sources: Mapping[Role, Source]) -> set[int]:
    always: set[int] = set()
    for source in sources.values():
        always |= structural_token_ids(source.tokenizer, source.model.generation_config)
    return always


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
    plan = replace(plan, slots=min(settings.slots or 0, len(lost)), lost_token_ids=lost)
    return replace(plan, vocab_map=vocab_map, coverage=selection.coverage, calibration=counts.describe())
