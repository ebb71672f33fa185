"""`ProfiledEngine`: an engine on the CPU that writes what each operator took."""

import os
from pathlib import Path

from engines.bundle import MODEL_NAME, Bundle
from engines.onnxruntime_engine import OnnxRuntimeEngine, open_session


class ProfiledEngine(OnnxRuntimeEngine):
    """Slower than it would be. When it is closed, `profile` appears: ONNX Runtime's own, in the Trace Event Format."""

    def __init__(self, bundle: Bundle, profile: Path, shared: OnnxRuntimeEngine | None = None) -> None:
        self._profile = profile
        aside = profile.with_name(f".{profile.stem}")  # ONNX Runtime adds a date
        super().__init__(bundle, open_session(bundle.path / MODEL_NAME, aside), shared)

    def close(self) -> None:
        if hasattr(self, "_session"):
            os.replace(self._session.end_profiling(), self._profile)
        super().close()
