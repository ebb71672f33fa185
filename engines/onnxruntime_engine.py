"""`OnnxRuntimeEngine`: a bundle on ONNX Runtime, with everything it touches bound once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from engines.base import MAX_KEEP, ContextFull, Engine, StepOutput
from engines.bundle import MODEL_NAME, Bundle
from engines.errors import VocabtrimError

CHUNK = MAX_KEEP
_CACHED_LENGTHS = 32  # step lengths (drafts, catch-ups, verifications) whose bindings are kept


@dataclass(frozen=True, slots=True)
class _Step:
    """One input length with its buffers: written by `feed`, read by the session, never allocated again."""

    binding: ort.IOBinding
    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    logits: NDArray[Any]
    token_ids: NDArray[np.int64]


class OnnxRuntimeEngine(Engine):
    """Runs on the CPU. Each layer's keys and values live in one buffer, bound as past and as present.

    shared: an engine whose buffers to use instead of own ones; the two caches must be of one form.
    """

    def __init__(self, bundle: Bundle, shared: "OnnxRuntimeEngine | None" = None) -> None:
        super().__init__(bundle.manifest, bundle.vocab_map)
        self._session = open_session(bundle.path / MODEL_NAME)
        self._caches: dict[str, ort.OrtValue] = dict(shared._caches) if shared else self._allocate_caches()
        self.cache = shared.cache if shared else self.cache
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros(1, np.int32)
        self._steps: dict[tuple[int, int], _Step] = {}
        (logits,) = (output for output in self._session.get_outputs() if output.name == "logits")
        self._head_rows = int(logits.shape[-1])
        self._dtype = numpy_dtype(logits.type)

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        ids = np.asarray(token_ids, np.int64)
        if not 1 <= keep <= min(len(ids), CHUNK):
            raise ValueError(f"cannot keep {keep} of {len(ids)} positions (at most {CHUNK})")
        if self.length + len(ids) > self.capacity:
            raise ContextFull(f"{self.length} + {len(ids)} tokens, the cache holds {self.capacity}")
        while len(ids) > CHUNK:
            # what follows the chunk must hold all the kept positions
            cut = min(CHUNK, len(ids) - keep)
            self._run(ids[:cut], 1)
            ids = ids[cut:]
        return self._run(ids, keep)

    def close(self) -> None:
        self._steps.clear()
        self._caches.clear()
        if hasattr(self, "_session"):
            del self._session

    def _run(self, ids: NDArray[np.int64], keep: int) -> StepOutput:
        step = self._step(len(ids), keep)
        end = self.length + len(ids)
        step.input_ids[0] = ids
        step.position_ids[0] = np.arange(self.length, end)
        self._seqlens[0], self._total[0] = end - 1, end
        self._session.run_with_iobinding(step.binding)
        self.length = end
        return StepOutput(step.token_ids[0], lambda: step.logits[0].astype(np.float32, copy=False))

    def _step(self, length: int, keep: int) -> _Step:
        step = self._steps.get((length, keep))
        if step is None:
            step = self._bind(length, keep)
            if length <= _CACHED_LENGTHS or length == CHUNK:
                self._steps[length, keep] = step
        return step

    def _bind(self, length: int, keep: int) -> _Step:
        binding = self._session.io_binding()
        step = _Step(
            binding,
            np.zeros((1, length), np.int64),
            np.zeros((1, length), np.int64),
            np.zeros((1, keep, self._head_rows), self._dtype),
            np.zeros((1, keep), np.int64),
        )
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": step.input_ids,
            "position_ids": step.position_ids,
            "num_logits_to_keep": np.array([keep], np.int64),
            "seqlens_k": self._seqlens,
            "total_sequence_length": self._total,
        }
        for value in self._session.get_inputs():
            cache = self._caches.get(value.name)
            binding.bind_ortvalue_input(value.name, cache or share(inputs[value.name]))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_ortvalue_output("logits", share(step.logits))
        binding.bind_ortvalue_output("token_ids", share(step.token_ids))
        return step

    def _allocate_caches(self) -> dict[str, ort.OrtValue]:
        caches = {}
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, _, size = value.shape
                shape = 1, heads, self.capacity, size
                caches[value.name] = share(np.zeros(shape, numpy_dtype(value.type)))
        return caches


def share(array: NDArray[Any]) -> ort.OrtValue:
    """An OrtValue on the memory of `array`, which it keeps alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def numpy_dtype(onnx_type: str) -> np.dtype[np.generic]:
    """The dtype of, for one, "tensor(float16)"."""
    name = re.fullmatch(r"tensor\((\w+)\)", onnx_type)
    dtypes = {"float": np.float32, "float16": np.float16}
    return np.dtype(dtypes[name[1] if name else onnx_type])


def open_session(path: Path) -> ort.InferenceSession:
    """A session on the CPU, in the thread pool that all share. Raises `VocabtrimError`."""
    _share_thread_pool()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        reason = " ".join(str(error).split())[:300]
        raise VocabtrimError(f"ONNX Runtime cannot open {path} on the CPU: {reason}") from error


def _share_thread_pool() -> None:
    """One pool for all sessions: a pool each, and an idle engine's spinning threads take the cores from the other.

    Measured on a pair of engines: 0.55 times the speed of target-only decoding with two pools, 1.11 with one.
    """
    try:
        ort.set_global_thread_pool_sizes(0, 1)  # 0: ONNX Runtime's own choice, a thread a physical core
    except Fail:  # the pool was made before: by an earlier engine, or by the program that uses us
        return
