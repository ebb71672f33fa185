"""Loads bundles on ONNX Runtime's CPU."""

from pathlib import Path

from engines.base import DeviceName, Engine, Neighbour
from engines.bundle.read import FEATURES_NAME, MODEL_NAME, Bundle
from engines.errors import VocabtrimError
from engines.ort.eagle import EagleEngine, FeatureEngine
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.medusa import MedusaEngine
from engines.ort.profiled import load_profiled
from engines.ort.session import open_session
from engines.refusals import refuse_bf16


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:
    """Load a bundle of `--format onnx`; see `engines.load.load_engine`."""
    manifest = bundle.manifest
    refuse_bf16(bundle)
    if profile and manifest.interface == "parallel-heads":
        raise VocabtrimError("the operators of Medusa heads are not profiled yet: leave --profile out")
    if profile:
        return load_profiled(bundle, profile, cache_owner(bundle, neighbour(), "cpu"))
    session = open_session(bundle.path / MODEL_NAME)
    if manifest.interface == "parallel-heads":
        return MedusaEngine(bundle, session)
    if manifest.interface == "feature-head":
        fuses = FEATURES_NAME in manifest.files
        return EagleEngine(bundle, session, open_session(bundle.path / FEATURES_NAME) if fuses else None)
    engine = FeatureEngine if manifest.feature_layers else OnnxRuntimeEngine
    return engine(bundle, session, cache_owner(bundle, neighbour(), "cpu"))


def cache_owner(bundle: Bundle, neighbour: Engine | None, device: DeviceName) -> OnnxRuntimeEngine | None:
    """Returns `neighbour` if it runs on ONNX Runtime on this device and its KV cache can serve `bundle` too."""
    if not isinstance(neighbour, OnnxRuntimeEngine) or neighbour.device != device:
        return None
    names = ("source_digest", "dtype", "context_length", "num_layers", "num_kv_heads", "head_dim")
    alike = all(getattr(bundle.manifest, name) == getattr(neighbour.manifest, name) for name in names)
    return neighbour if alike else None
