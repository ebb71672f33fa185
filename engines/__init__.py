"""Bundles made runnable: the bundle format, the tokenizer, and the engines that execute what a bundle holds."""

from pathlib import Path

from engines.base import ContextFull, Engine, StepOutput
from engines.bundle import Bundle, Manifest, read_bundle
from engines.errors import VocabtrimError
from engines.vocab_map import VocabMap

__all__ = [
    "Bundle",
    "ContextFull",
    "Engine",
    "Manifest",
    "StepOutput",
    "VocabMap",
    "VocabtrimError",
    "load_engine",
    "read_bundle",
]


def load_engine(path: str | Path, device: str = "cpu") -> Engine:
    """Check the bundle at `path` and load it on `device`, with an empty KV cache of its context length.

    Raises `VocabtrimError` if the bundle is damaged, the device unknown or its runtime not installed.
    """
    if device != "cpu":
        raise VocabtrimError(f"unknown device {device!r}: this version runs bundles on 'cpu'")
    bundle = read_bundle(path)
    if bundle.manifest.dtype == "bf16":
        raise VocabtrimError(
            f"{path} is a bf16 bundle, which ONNX Runtime cannot run on the CPU: export it with --dtype fp32"
        )
    try:
        from engines.onnxruntime_engine import OnnxRuntimeEngine
    except ImportError as error:
        raise VocabtrimError(f"ONNX Runtime is missing ({error}): pip install 'vocabtrim-export[cpu]'") from error
    return OnnxRuntimeEngine(bundle)
