"""The TensorRT part of a bundle: its graphs, the plans that are built from them, and the builder's log."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engines.bundle.read import DRAFT_MODEL_NAME, DRAFT_PLAN_NAME, MODEL_NAME, PLAN_NAME, Role, TensorRT
from engines.errors import VocabtrimError
from engines.trt.library import Library, load_library
from vocabtrim_export.lowering.graph_files import save_graph, save_sharing_weights
from vocabtrim_export.lowering.lowered import Lowered
from vocabtrim_export.lowering.pipeline import Weights, lower_standard, lower_unrolled
from vocabtrim_export.lowering.standard_operators import CacheForm
from vocabtrim_export.progress import Progress
from vocabtrim_export.tracing.trace import Traced
from vocabtrim_export.trt.build import BuildOptions, build_plan, target_capabilities
from vocabtrim_export.trt.network import DRAFT_NETWORK_NAME, NETWORK_NAME
from vocabtrim_export.trt.settings import TensorRTSettings, dimensions, profiles

# The first compute capability with each type. TensorRT refuses older GPUs too, but only when it builds.
_SINCE = {"bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}
_LOG = logging.getLogger("vocabtrim_export.trt")


def check_buildable(settings: TensorRTSettings, dtypes: Collection[str]) -> None:
    """Refuse plans that cannot be built, before the long work.

    Args:
        settings: The settings of the build.
        dtypes: The dtypes of the weights and of their quantised forms, such as {"fp16", "int4"}.

    Raises:
        VocabtrimError: The library is missing, does not build for a GPU, or cannot run one of the types there.
    """
    settings.check()
    if settings.flavor == "none":
        return
    if "fp32" in dtypes:
        raise VocabtrimError(
            "TensorRT has no fused attention in fp32: give --dtype fp16 or bf16 (--trt-flavor none writes the graph)"
        )
    capabilities = target_capabilities(load_library(settings.flavor), _options(settings))
    for dtype in sorted(set(dtypes) & set(_SINCE)):
        least = _SINCE[dtype]
        if older := [name for name in capabilities if tuple(map(int, name.split("."))) < least]:
            raise VocabtrimError(
                f"{dtype} needs GPUs of compute capability {least[0]}.{least[1]} or newer, which {', '.join(older)} is "
                "not: give --compute-capability, or another type"
            )


def write_tensorrt(
    directory: Path,
    traced: Traced,
    weights: Weights,
    role: Role,
    context_length: int,
    settings: TensorRTSettings,
    progress: Progress,
) -> tuple[Lowered, TensorRT]:
    """Write `model.onnx` and its plan, and, for a drafter with `settings.unroll`, `draft.onnx` and its plan.

    With the flavor "none" only the graphs are written.

    Args:
        directory: The bundle.
        traced: The traced model.
        weights: Its weights.
        role: "drafter" or "target".
        context_length: The tokens that the KV cache holds.
        settings: The settings of the build.
        progress: Called with (task, done, total).

    Returns:
        The lowered graph, and the manifest's description of the plans.

    Raises:
        VocabtrimError: A plan cannot be built.
    """
    shapes = profiles(role, settings, context_length)
    plans = TensorRT("none", "", (), shapes, 0, False)
    cache = CacheForm(plans.spans[-1], plans.spans)
    lowered = lower_standard(traced, weights, cache)
    save_graph(lowered.model, directory, f"write {role}", progress)
    steps = settings.draft_length if role == "drafter" and settings.unroll else 0
    if steps:
        save_sharing_weights(lower_unrolled(traced, weights, cache, steps).model, directory, DRAFT_MODEL_NAME)
    plans = replace(plans, draft_length=steps)
    if settings.flavor == "none":
        return lowered, plans
    builder = _Builder(load_library(settings.flavor), directory, _options(settings), progress)
    return lowered, _build_plans(builder, role, plans, settings.strip_weights)


def _build_plans(builder: "_Builder", role: Role, plans: TensorRT, strip_weights: bool) -> TensorRT:
    """Build a plan of each graph. Returns `plans` with the library and the GPUs that they are for."""
    sizes = [dimensions(profile) for profile in plans.profiles]
    capabilities = builder.build(MODEL_NAME, PLAN_NAME, NETWORK_NAME, sizes, f"build {role}")
    if plans.draft_length:
        spans = [{"span": span} for span in plans.spans]
        builder.build(DRAFT_MODEL_NAME, DRAFT_PLAN_NAME, DRAFT_NETWORK_NAME, spans, "build draft engine")
    return replace(
        plans,
        flavor=builder.library.flavor,
        version=builder.library.version,
        compute_capabilities=capabilities,
        weights_stripped=strip_weights,
    )


class _Builder:
    def __init__(self, library: Library, directory: Path, options: BuildOptions, progress: Progress) -> None:
        self.library, self.directory, self.options, self.progress = library, directory, options, progress

    def build(
        self, model: str, plan: str, network: str, shapes: Sequence[Mapping[str, int]], task: str
    ) -> tuple[str, ...]:
        """Build one plan, and write it with its description. Returns the compute capabilities that it is for."""
        built = build_plan(
            self.library,
            self.directory / model,
            self.directory / plan,
            shapes,
            self.options,
            _LOG.debug if _LOG.isEnabledFor(logging.DEBUG) else None,
            lambda done, total: self.progress(task, done, total),
        )
        (self.directory / network).write_text(built.network.to_json(), "utf-8")
        return built.compute_capabilities


def _options(settings: TensorRTSettings) -> BuildOptions:
    return BuildOptions(
        settings.compute_capabilities, settings.strip_weights, settings.timing_cache, settings.version_compatible
    )
