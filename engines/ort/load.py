"""Loads bundles on ONNX Runtime's CPU."""

from pathlib import Path

import onnxruntime as ort

from engines.base import DeviceName, Engine, Neighbour
from engines.bundle.graph_io import ATTENTION_PADDING
from engines.bundle.read import FEATURES_NAME, MODEL_NAME, Bundle
from engines.errors import VocabtrimError
from engines.ort.eagle import EagleEngine
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.medusa import MedusaEngine
from engines.ort.padding import NO_PADDING, Padding, is_row_exact
from engines.ort.session import open_session
from engines.refusals import refuse_bf16


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> Engine:
    """Load a bundle of `--format onnx`; see `engines.load.load_engine`.

    Raises:
        VocabtrimError: The bundle is bfloat16, its graph cannot be opened, or its operators cannot be profiled.
    """
    manifest = bundle.manifest
    refuse_bf16(bundle)
    if manifest.interface == "parallel-heads":
        if profile:
            raise VocabtrimError("the operators of Medusa heads are not profiled yet: leave --profile out")
        return MedusaEngine(bundle, open_session(bundle.path / MODEL_NAME))
    traces = _trace_files(profile)
    sessions = {
        name: open_session(bundle.path / name, _trace_prefix(traces.get(name)))
        for name in (MODEL_NAME, FEATURES_NAME)
        if name in manifest.files
    }
    if manifest.interface == "feature-head":
        engine: OnnxRuntimeEngine = EagleEngine(bundle, sessions[MODEL_NAME], sessions.get(FEATURES_NAME))
    else:
        session, shared = sessions[MODEL_NAME], cache_owner(bundle, neighbour(), "cpu")
        engine = OnnxRuntimeEngine(bundle, session, shared, _least_padding(bundle, session))
    engine.traces = {traces[name]: session for name, session in sessions.items() if name in traces}
    return engine


def _least_padding(bundle: Bundle, session: ort.InferenceSession) -> Padding:
    """Returns the least padding that makes a bundle one model in steps of every length on this machine."""
    steps, attention = Padding.of_steps(bundle.manifest), Padding("attention")
    can_pad_attention = any(value.name == ATTENTION_PADDING for value in session.get_overridable_initializers())
    if steps == NO_PADDING or not can_pad_attention:
        return steps
    with OnnxRuntimeEngine(bundle, session, padding=attention) as engine:  # a cache of its own: a shared one holds text
        return attention if is_row_exact(engine) else steps


def _trace_files(profile: Path | None) -> dict[str, Path]:
    """Returns the files of the operators' traces by the graphs' names."""
    if profile is None:
        return {}
    return {MODEL_NAME: profile, FEATURES_NAME: profile.with_stem(f"{profile.stem}_features")}


def _trace_prefix(file: Path | None) -> Path | None:
    """Returns what ONNX Runtime, which adds a date, is to call the trace until the engine is closed."""
    return file and file.with_name(f".{file.stem}")


def cache_owner(bundle: Bundle, neighbour: Engine | None, device: DeviceName) -> OnnxRuntimeEngine | None:
    """Returns `neighbour` if it runs on ONNX Runtime on this device and its KV cache can serve `bundle` too."""
    if not isinstance(neighbour, OnnxRuntimeEngine) or neighbour.device != device:
        return None
    names = ("source_digest", "dtype", "context_length", "num_layers", "num_kv_heads", "head_dim")
    alike = all(getattr(bundle.manifest, name) == getattr(neighbour.manifest, name) for name in names)
    return neighbour if alike else None
