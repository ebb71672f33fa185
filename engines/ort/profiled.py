"""Engines on the CPU that write what each operator took."""

import os
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from engines.bundle.read import FEATURES_NAME, MODEL_NAME, Bundle
from engines.ort.eagle import EagleEngine, FeatureEngine
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.session import open_session


class ProfiledEngine(OnnxRuntimeEngine):
    """An engine that traces its operators, which makes it slower.

    When it is closed, the files of `traces` appear: ONNX Runtime's own traces, in the Trace Event Format.

    Attributes:
        traces: The sessions that are traced, by the files that their traces go to.
    """

    traces: Mapping[Path, ort.InferenceSession] = {}

    def _release(self) -> None:
        for path, session in self.traces.items():
            os.replace(session.end_profiling(), path)
        self.traces = {}
        super()._release()


class _ProfiledTarget(ProfiledEngine, FeatureEngine):
    """A traced target that gives features."""


class _ProfiledHead(ProfiledEngine, EagleEngine):
    """A traced EAGLE head; each of its two graphs has a trace."""


def load_profiled(bundle: Bundle, profile: Path, shared: OnnxRuntimeEngine | None = None) -> ProfiledEngine:
    """Load an engine that traces its operators.

    Args:
        bundle: The bundle.
        profile: The file of the decoder's trace. That of a head's `fc` goes to NAME_features in the same directory.
        shared: See `OnnxRuntimeEngine`.
    """
    engine: ProfiledEngine
    traces = {profile: _open(bundle.path / MODEL_NAME, profile)}
    if bundle.manifest.interface == "feature-head":
        features = profile.with_stem(f"{profile.stem}_features")
        if FEATURES_NAME in bundle.manifest.files:
            traces[features] = _open(bundle.path / FEATURES_NAME, features)
        engine = _ProfiledHead(bundle, traces[profile], traces.get(features))
    else:
        kind = _ProfiledTarget if bundle.manifest.feature_layers else ProfiledEngine
        engine = kind(bundle, traces[profile], shared)
    engine.traces = traces
    return engine


def _open(graph: Path, profile: Path) -> ort.InferenceSession:
    return open_session(graph, profile.with_name(f".{profile.stem}"))  # ONNX Runtime adds a date
