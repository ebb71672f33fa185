"""`Acceptance`: the graphs of `engines.ort_cuda.graphs.acceptance` in a session beside the engines."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.errors import VocabtrimError
from engines.ort.session import new_session, reason
from engines.ort_cuda.provider import PROVIDER, require_provider, why_no_provider

_CPU = "CPUExecutionProvider"


class Verdict(NamedTuple):
    """accepted: int64[1], how many drafted tokens stay. next_token: int64[1], the target's own after them.

    On the host: these two numbers are all that crosses from the device.
    """

    accepted: NDArray[np.int64]
    next_token: NDArray[np.int64]


class Acceptance:
    """One acceptance graph on `device`, "cpu" or "cuda": call it with the graph's inputs by name.

    graph: an ONNX file, or its bytes. Raises `VocabtrimError` where it cannot run there. Not for several threads.
    """

    def __init__(self, graph: Path | bytes, device: str = "cpu") -> None:
        self._session = _open(graph, device)

    def __call__(self, **inputs: NDArray[Any] | ort.OrtValue) -> Verdict:
        """Decide. An array is copied to the device; an OrtValue that lies there already is read where it is.

        The session has a stream of its own: whatever writes an OrtValue must have finished.
        """
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, ort.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in Verdict._fields:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return Verdict(*binding.copy_outputs_to_cpu())


def _open(graph: Path | bytes, device: str) -> ort.InferenceSession:
    if device not in ("cpu", "cuda"):
        raise VocabtrimError(f"unknown device {device!r}: acceptance runs on 'cpu' or 'cuda'")
    missing = require_provider() if device == "cuda" else ()
    providers = [PROVIDER, _CPU] if device == "cuda" else [_CPU]
    try:
        session = new_session(graph, providers)
    except Exception as error:  # onnxruntime's exceptions have no common base
        name = graph if isinstance(graph, Path) else "the acceptance graph"
        raise VocabtrimError(f"ONNX Runtime cannot open {name} on {device}: {reason(error)}") from error
    if providers[0] not in session.get_providers():  # it falls back to the CPU in silence
        raise VocabtrimError(why_no_provider(missing))
    return session
