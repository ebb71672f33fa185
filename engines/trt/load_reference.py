"""Loads the graphs of bundles of `--format trt` on ONNX Runtime's CPU."""

from pathlib import Path

from engines.base import Engine, Neighbour
from engines.bundle.read import Bundle
from engines.errors import VocabtrimError
from engines.trt.engine import StaticEngine
from engines.trt.reference import ReferenceExecutor


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:  # noqa: ARG001  (it shares nothing)
    """Load a bundle of `--format trt`; see `engines.load.load_engine`."""
    if profile:
        raise VocabtrimError("operators are profiled on the CPU, and in bundles of --format onnx: use those")
    if bundle.manifest.dtype == "bf16":
        raise VocabtrimError(
            f"{bundle.path} is a bf16 bundle, which ONNX Runtime cannot run on the CPU: export it as fp32"
        )
    return StaticEngine(bundle, ReferenceExecutor(bundle))
