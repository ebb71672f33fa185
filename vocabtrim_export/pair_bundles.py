"""The bundles of a pair: the choice of the drafter's tokens, and both bundles written and proven."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle.experts import Picks
from engines.bundle.read import Manifest, Role
from vocabtrim_export.bundles.writer import BundlePlan
from vocabtrim_export.calibration import TokenCounts
from vocabtrim_export.calibration.expert_picks import distinct_experts
from vocabtrim_export.calibration.moments import head_run, input_moments
from vocabtrim_export.drafters.base import FeatureHead, ParallelHeads
from vocabtrim_export.drafters.source import HeadSource
from vocabtrim_export.progress import Progress
from vocabtrim_export.proof.proven import trace_source, write_proven
from vocabtrim_export.selection import Coverage, Selection, select_vocab, structural_token_ids
from vocabtrim_export.settings import ExportSettings
from vocabtrim_export.sources.precision import calibration_dtype, running_in
from vocabtrim_export.sources.rotation import context_length
from vocabtrim_export.sources.source import Source
from vocabtrim_export.tracing.experts import expert_modules
from vocabtrim_export.tracing.trace import Traced


class PairWriter:
    """Writes and proves the bundles of a pair. What does not depend on a head's rows is computed once and used again.

    Args:
        sources: The loaded models by role.
        counts: The token counts.
        settings: The settings of the export.
        progress: Called with (task, done, total).
    """

    def __init__(
        self, sources: Mapping[Role, Source], counts: TokenCounts, settings: ExportSettings, progress: Progress
    ) -> None:
        self._sources, self._counts = sources, counts
        self._settings, self._progress = settings, progress
        self._traced: dict[str, Traced | None] = {}  # of the last model alone: a trace holds its whole graph
        self._moments: dict[str, Mapping[str, Tensor]] = {}
        self._picks: Picks | None = None

    def write(self, places: Mapping[Role, Path], selection: Selection, slots: int) -> dict[Role, Manifest]:
        """Fill empty directories.

        Args:
            places: The directories by role.
            selection: The tokens that the drafter's head keeps.
            slots: In-context slots of the drafter; at most as many as its head loses tokens are made.

        Returns:
            The manifests by role.

        Raises:
            VocabtrimError: A graph does not compute what its model does.
        """
        manifests: dict[Role, Manifest] = {}
        for role, directory in places.items():
            plan = self._measured(_plan(role, self._sources, selection, self._counts, self._settings, slots))
            name = plan.source.name
            if name not in self._traced:  # a model that drafts for itself is traced once
                self._progress(f"trace {role}", 0, 1)
                self._traced = {name: trace_source(plan)}
                self._progress(f"trace {role}", 1, 1)
            manifests[role], self._traced[name] = write_proven(directory, self._traced[name], plan, self._progress)
        return manifests

    def _measured(self, plan: BundlePlan) -> BundlePlan:
        """Returns the plan with what has to be measured of its model along text.

        These are the second moments of the layers' inputs, where int4 needs them, and how many experts of a target's
        layers consecutive tokens pick.
        """
        source = plan.source
        if plan.quantization == "int4":
            if source.name not in self._moments:
                self._progress(f"measure {plan.role} inputs", 0, 1)
                self._moments[source.name] = _moments(source, self._sources)
                self._progress(f"measure {plan.role} inputs", 1, 1)
            plan = replace(plan, moments=self._moments[source.name])
        if plan.role == "target" and self._picks is None:
            self._picks = self._picks_of(source)
        return replace(plan, picks=self._picks or {}) if plan.role == "target" else plan

    def _picks_of(self, target: Source) -> Picks:
        """Returns how many experts of the target's layers consecutive tokens pick; nothing for a dense model."""
        if not any(expert_modules(target.model)):
            return {}
        self._progress("measure target experts", 0, 1)
        with running_in(target.model, calibration_dtype()):
            picks = distinct_experts(target.model, target.tokenizer)
        self._progress("measure target experts", 1, 1)
        return picks


def _moments(source: Source, sources: Mapping[Role, Source]) -> dict[str, Tensor]:
    model, dtype = source.model, calibration_dtype()
    with running_in(model, dtype):
        if not isinstance(source, HeadSource) or not isinstance(model, FeatureHead | ParallelHeads):
            return input_moments(model, source.tokenizer)
        target = sources["target"].model
        with running_in(target, dtype):
            return input_moments(model, source.tokenizer, head_run(model, target, source.feature_layers))


def select(
    counts: TokenCounts,
    sources: Mapping[Role, Source],
    k: int | Coverage,
    available: NDArray[np.int64],
) -> Selection:
    """Choose the tokens that the drafter's head keeps.

    Args:
        counts: The counts of each token.
        sources: The loaded models by role.
        k: The number of rows, or the share of held-out tokens to cover.
        available: int64[n], the ids that both models give the same meaning.
    """
    always, rows = always_kept(sources), sources["drafter"].vocab_size
    return select_vocab(counts, k, always_keep=always, full_vocab=rows, available=available)


def always_kept(sources: Mapping[Role, Source]) -> set[int]:
    """Returns the ids that every head keeps: the tokens that begin, end or structure a text in one of the models."""
    always: set[int] = set()
    for source in sources.values():
        always |= structural_token_ids(source.tokenizer, source.model.generation_config)
    return always


def _plan(
    role: Role,
    sources: Mapping[Role, Source],
    selection: Selection,
    counts: TokenCounts,
    settings: ExportSettings,
    slots: int,
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
    plan = replace(plan, slots=min(slots, len(lost)), lost_token_ids=lost)
    return replace(plan, vocab_map=vocab_map, coverage=selection.coverage, calibration=counts.describe())
