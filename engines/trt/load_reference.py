"""Loads the graphs of bundles of `--format trt` on ONNX Runtime's CPU."""

from pathlib import Path

from engines.base import Engine, Neighbour
from engines.bundle.read import Bundle
from engines.refusals import refuse_bf16, refuse_profile
from engines.trt.engine import StaticEngine
from engines.trt.reference import ReferenceExecutor


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:  # noqa: ARG001  (it shares nothing)
    """Load a bundle of `--format trt`; see `engines.load.load_engine`."""
    refuse_profile(profile)
    refuse_bf16(bundle)
    return StaticEngine(bundle, ReferenceExecutor(bundle))
