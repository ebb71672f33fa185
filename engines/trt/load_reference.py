"""Loads the graphs of bundles of `--format trt` on ONNX Runtime's CPU."""

from pathlib import Path

from engines.base import Engine, Neighbour
from engines.bundle.read import Bundle
from engines.refusals import refuse_bf16, refuse_profile
from engines.trt.engine import StaticEngine
from engines.trt.reference import ReferenceExecutor


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:  # noqa: ARG001  (it shares nothing)
    """Load a bundle of `--format trt` to check it on the CPU; see `engines.load.load_engine`.

    Args:
        bundle: The bundle.
        neighbour: Not used: the engine shares nothing.
        profile: Must be None.

    Raises:
        VocabtrimError: A profile is asked for, or the bundle holds bf16, which ONNX Runtime cannot compute on the CPU.
    """
    refuse_profile(profile)
    refuse_bf16(bundle)
    return StaticEngine(bundle, ReferenceExecutor(bundle))
