"""Bundles made runnable: the bundle format, the tokenizer, and the engines that execute what a bundle holds."""

from pathlib import Path

from engines.base import ContextFull, Engine, StepOutput
from engines.bundle import Bundle, Manifest, read_bundle
from engines.errors import VocabtrimError
from engines.static import StaticEngine
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


def load_engine(path: str | Path, device: str = "cpu", share_cache_with: Engine | None = None) -> Engine:
    """Check the bundle at `path` and load it on `device`, with an empty KV cache of its context length.

    device: "cpu" runs any bundle on ONNX Runtime, one of `--format trt` to check it; "cuda" runs TensorRT plans.
    share_cache_with: an engine whose KV cache to use where both were made from the same weights and their caches are
    of one form; else it changes nothing. A model that drafts for itself then reads the target's keys and values.
    Raises `VocabtrimError` if the bundle is damaged, the device unknown or its runtime not installed.
    """
    if device not in ("cpu", "cuda"):
        raise VocabtrimError(f"unknown device {device!r}: bundles run on 'cpu' or 'cuda'")
    bundle = read_bundle(path)
    if device == "cuda":
        return _load_tensorrt(bundle)
    if bundle.manifest.dtype == "bf16":
        raise VocabtrimError(f"{path} is a bf16 bundle, which ONNX Runtime cannot run on the CPU: export it as fp32")
    try:
        from engines.onnxruntime_engine import OnnxRuntimeEngine
        from engines.reference_executor import ReferenceExecutor
    except ImportError as error:
        raise VocabtrimError(f"ONNX Runtime is missing ({error}): pip install 'vocabtrim-export[cpu]'") from error
    if bundle.manifest.tensorrt is not None:
        return StaticEngine(bundle, ReferenceExecutor(bundle))
    if isinstance(share_cache_with, OnnxRuntimeEngine) and _one_cache(bundle.manifest, share_cache_with.manifest):
        return OnnxRuntimeEngine(bundle, share_cache_with)
    return OnnxRuntimeEngine(bundle)


def _load_tensorrt(bundle: Bundle) -> Engine:
    plans = bundle.manifest.tensorrt
    if plans is None or plans.flavor == "none":
        raise VocabtrimError(f"{bundle.path} holds no TensorRT plan: export it with --format trt, or use device 'cpu'")
    from engines.trt.executor import TensorRTExecutor

    return StaticEngine(bundle, TensorRTExecutor(bundle))


def _one_cache(a: Manifest, b: Manifest) -> bool:
    names = ("source_digest", "dtype", "context_length", "num_layers", "num_kv_heads", "head_dim")
    return all(getattr(a, name) == getattr(b, name) for name in names)
