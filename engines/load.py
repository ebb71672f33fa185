"""`load_engine`: the engine that a bundle and a device ask for."""

import logging
from pathlib import Path

from engines.base import Engine
from engines.bundle.read import FEATURES_NAME, MODEL_NAME, Bundle, Manifest, read_bundle
from engines.errors import VocabtrimError
from engines.generation_rules import UNSUPPORTED_NOTE
from engines.trt.engine import StaticEngine

_LOG = logging.getLogger("engines")


def load_engine(
    path: str | Path, device: str = "cpu", share_cache_with: Engine | None = None, profile: Path | None = None
) -> Engine:
    """Check a bundle and load it, with an empty KV cache of its context length.

    Args:
        path: The bundle.
        device: "cpu" runs any bundle on ONNX Runtime, one of `--format trt` to check it; "cuda" runs TensorRT plans
            where the bundle is of that format, else ONNX Runtime's CUDA.
        share_cache_with: An engine whose KV cache is used where both run on one device, were made from the same weights
            and have caches of one form; else the new engine has its own. A model that drafts for itself then reads the
            target's keys and values. On ONNX Runtime's CUDA the two engines share a stream in any case.
        profile: A file for the time of each operator, written when the engine is closed; only with ONNX Runtime on the
            CPU. The product that reads an EAGLE head's features is in NAME_features, in the same directory.

    Raises:
        VocabtrimError: The bundle is damaged, the device is unknown, or its runtime is not installed.
    """
    if device not in ("cpu", "cuda"):
        raise VocabtrimError(f"unknown device {device!r}: bundles run on 'cpu' or 'cuda'")
    bundle = read_bundle(path)
    if bundle.manifest.dtype == "bf16" and device == "cpu":
        raise VocabtrimError(f"{path} is a bf16 bundle, which ONNX Runtime cannot run on the CPU: export it as fp32")
    if profile and (device != "cpu" or bundle.manifest.tensorrt is not None):
        raise VocabtrimError("operators are profiled on the CPU, and in bundles of --format onnx: use those")
    if bundle.manifest.rules.unsupported:
        _LOG.warning("%s: %s: %s", path, UNSUPPORTED_NOTE, ", ".join(bundle.manifest.rules.unsupported))
    kind = bundle.manifest.kind
    if device == "cuda" and kind == "medusa":
        raise VocabtrimError(f"{path} holds Medusa heads, which run on the CPU only so far: use device 'cpu'")
    if device == "cuda" and bundle.manifest.slots:
        raise VocabtrimError(
            f"{path} has slots, which run with ONNX Runtime on the CPU only so far: load it with device 'cpu' "
            "(--drafter-device cpu), or export it without --slots"
        )
    if profile and kind == "medusa":
        raise VocabtrimError("the operators of Medusa heads are not profiled yet: leave --profile out")
    if device == "cuda" and bundle.manifest.tensorrt is not None:
        return _load_tensorrt(bundle)
    try:
        return _load_onnxruntime(bundle, device, share_cache_with, profile)
    except ImportError as error:
        package = "onnxruntime" if device == "cpu" else "'vocabtrim-export[cuda]'"
        raise VocabtrimError(f"ONNX Runtime cannot be used on {device} ({error}): pip install {package}") from error


def _load_onnxruntime(bundle: Bundle, device: str, neighbour: Engine | None, profile: Path | None) -> Engine:
    from engines.ort.eagle import EagleEngine, FeatureEngine
    from engines.ort.engine import OnnxRuntimeEngine
    from engines.ort.medusa import MedusaEngine
    from engines.ort.session import open_session

    if bundle.manifest.tensorrt is not None:
        from engines.trt.reference import ReferenceExecutor

        return StaticEngine(bundle, ReferenceExecutor(bundle))
    shared = neighbour if isinstance(neighbour, OnnxRuntimeEngine) and neighbour.device == device else None
    if shared and not _one_cache(bundle.manifest, shared.manifest):
        shared = None
    if device == "cuda":
        from engines.ort_cuda.load import load_cuda_engine

        return load_cuda_engine(bundle, neighbour, share_cache=shared is not None)
    if profile:
        from engines.ort.profiled import load_profiled

        return load_profiled(bundle, profile, shared)
    session = open_session(bundle.path / MODEL_NAME)
    if bundle.manifest.kind == "medusa":
        return MedusaEngine(bundle, session)
    if bundle.manifest.kind != "language-model":
        fuses = FEATURES_NAME in bundle.manifest.files
        return EagleEngine(bundle, session, open_session(bundle.path / FEATURES_NAME) if fuses else None)
    kind = FeatureEngine if bundle.manifest.feature_layers else OnnxRuntimeEngine
    return kind(bundle, session, shared)


def _load_tensorrt(bundle: Bundle) -> Engine:
    plans = bundle.manifest.tensorrt
    if plans is None or plans.flavor == "none":
        raise VocabtrimError(f"{bundle.path} holds no TensorRT plan: export it with --format trt, or use device 'cpu'")
    from engines.trt.executor import TensorRTExecutor

    return StaticEngine(bundle, TensorRTExecutor(bundle))


def _one_cache(a: Manifest, b: Manifest) -> bool:
    names = ("source_digest", "dtype", "context_length", "num_layers", "num_kv_heads", "head_dim")
    return all(getattr(a, name) == getattr(b, name) for name in names)
