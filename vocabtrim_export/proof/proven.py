"""A bundle that is written and proven: a graph that does not compute what its model does is never placed."""

import shutil
from pathlib import Path

from engines.bundle.manifest import EXPECTED_NAME
from engines.bundle.read import PLAN_NAME, Manifest
from engines.errors import VocabtrimError
from vocabtrim_export.bundles.writer import BundlePlan, add_file, write_bundle
from vocabtrim_export.drafters.base import ParallelHeads
from vocabtrim_export.progress import Progress
from vocabtrim_export.proof.plan_expected import expected_logits
from vocabtrim_export.proof.prove import find_difference
from vocabtrim_export.sources.source import DTYPES
from vocabtrim_export.tracing.trace import Traced, trace


def trace_source(plan: BundlePlan, fuse_rotation: bool = True) -> Traced | None:
    """Trace the model of a plan. Returns None for `ParallelHeads`, which are no decoder."""
    if isinstance(plan.source.model, ParallelHeads):
        return None
    dtype = DTYPES[plan.dtype]
    return trace(plan.source.model, dtype, plan.context_length, plan.features_given, fuse_rotation)


def write_proven(
    directory: Path, traced: Traced | None, plan: BundlePlan, progress: Progress
) -> tuple[Manifest, Traced | None]:
    """Fill the empty `directory` with a bundle, and prove that its graph computes what the model does, to rounding.

    Where it does not, and attention was made to rotate, the rotation is left as the model writes it, and all is written
    and proven again.

    Args:
        directory: An empty directory.
        traced: The trace to start from; None for a model that is lowered without one.
        plan: The parts of the bundle.
        progress: Called with (task, done, total).

    Returns:
        The manifest, and the trace that proved right: a model's next bundle starts from it.

    Raises:
        VocabtrimError: The graph does not compute what the model does; the message names the place.
    """
    manifest = write_bundle(directory, traced, plan, progress)
    difference = _prove(directory, plan, progress)
    if difference and traced is not None and traced.rotates:
        traced = trace_source(plan, fuse_rotation=False)
        shutil.rmtree(directory)
        directory.mkdir()
        manifest = write_bundle(directory, traced, plan, progress)
        difference = _prove(directory, plan, progress)
    if difference:
        architecture = plan.source.model.config.model_type
        raise VocabtrimError(
            f"{plan.source.name} ({architecture}) cannot be exported: run on a few tokens, its graph does not compute "
            f"what the model does: {difference}"
        )
    if PLAN_NAME in manifest.files:
        expected_logits(directory, plan).save(directory / EXPECTED_NAME)
        manifest = add_file(directory, manifest, EXPECTED_NAME)
    return manifest, traced


def _prove(directory: Path, plan: BundlePlan, progress: Progress) -> str | None:
    progress(f"prove {plan.role}", 0, 1)
    difference = find_difference(directory, plan)
    progress(f"prove {plan.role}", 1, 1)
    return difference
