"""`OnnxRuntimeCudaEngine`: a bundle on ONNX Runtime's CUDA, on one stream, with only token ids crossing to the host."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import MAX_KEEP, Engine, StepOutput
from engines.bundle import Bundle
from engines.cuda_provider import PROVIDER, explain_out_of_memory, open_cuda_session, require_provider
from engines.onnxruntime_engine import (
    CACHED_LENGTHS,
    Device,
    OnnxRuntimeEngine,
    Step,
    numpy_dtype,
)
from engines.trt import cuda
from engines.trt.bound import to_float32

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: NumPy has no such dtype
_ALIGNED = cuda.ALIGNMENT // 8  # int64 values from one input of a step to the next


@dataclass(frozen=True, slots=True)
class DeviceStep(Step):
    """A step whose arrays are copied to the device and back; of the outputs only `token_ids` is.

    inputs: input_ids, position_ids and seqlens_k in one block, so that one copy moves them.
    upload, download: target, source and bytes of the copies before and after the session runs.
    """

    stream: cuda.Stream
    options: ort.RunOptions
    inputs: ort.OrtValue
    upload: tuple[int, int, int]
    download: tuple[int, int, int]
    logits: ort.OrtValue
    logits_dtype: np.dtype[np.generic]

    def run(self, end: int) -> None:  # noqa: ARG002
        # `end` is of no use: a CUDA graph would freeze it, see `OnnxRuntimeCudaEngine`
        self.stream.copy(*self.upload)
        self.session.run_with_iobinding(self.binding, self.options)
        self.stream.copy(*self.download)
        self.stream.synchronize()

    def read_logits(self) -> NDArray[np.float32]:
        stored = np.empty(self.logits.shape()[1:], self.logits_dtype)
        self.stream.copy(stored.ctypes.data, self.logits.data_ptr(), stored.nbytes)
        self.stream.synchronize()
        return to_float32(stored)


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """Runs on CUDA: cache, inputs and outputs live on the device, at addresses that never change.

    A CUDA graph is captured for every shape whose binding is kept. It freezes `total_sequence_length`, which kernels
    read on the host: it is always the capacity. They take the true length from seqlens_k, on the device.
    stream: of `session`. Engines that feed each other may share one; `shared` must be on it.
    device: "cpu" only to test all this without a GPU.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: ort.InferenceSession,
        stream: cuda.Stream,
        shared: "OnnxRuntimeCudaEngine | None" = None,
        device: Device = "cuda",
    ) -> None:
        self.device, self.stream, self._bundle = device, stream, bundle
        try:
            super().__init__(bundle, session, shared)
        except Exception as error:
            explain_out_of_memory(error, bundle)
            raise

    def __del__(self) -> None:
        if hasattr(self, "_steps"):
            self.close()  # a session must not outlive its stream

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps run as CUDA graphs; not where a node of the model has no CUDA kernel."""
        options: dict[str, str] = self._session.get_provider_options().get(PROVIDER, {})
        return options.get("enable_cuda_graph") == "1"

    def feed(self, token_ids: Sequence[int] | NDArray[np.int64], keep: int = 1) -> StepOutput:
        try:
            return super().feed(token_ids, keep)
        except Exception as error:
            explain_out_of_memory(error, self._bundle)
            raise

    def _bind(self, length: int, keep: int) -> Step:
        binding = self._bind_common(keep)
        section = -(-length // _ALIGNED) * _ALIGNED
        host = np.zeros(2 * section + 1, np.int64)
        inputs = self._allocate((len(host),), np.int64)
        places = {
            "input_ids": (np.int64, (1, length), 0),
            "position_ids": (np.int64, (1, length), section),
            "seqlens_k": (np.int32, (1,), 2 * section),
        }
        for name in self._token_inputs:
            dtype, shape, start = places[name]
            binding.bind_input(name, self.device, 0, dtype, shape, inputs.data_ptr() + 8 * start)
        token_ids, tokens = np.zeros((1, keep), np.int64), self._allocate((1, keep), np.int64)
        logits = self._allocate((1, keep, self._head_rows), _element_type(self._logits_type))
        binding.bind_ortvalue_output("token_ids", tokens)
        binding.bind_ortvalue_output("logits", logits)
        return DeviceStep(
            self._session,
            binding,
            host[None, :length],
            host[None, section : section + length],
            host[2 * section :].view(np.int32)[:1],
            token_ids,
            self.stream,
            run_options(length, keep),
            inputs,
            (inputs.data_ptr(), host.ctypes.data, host.nbytes),
            (token_ids.ctypes.data, tokens.data_ptr(), token_ids.nbytes),
            logits,
            numpy_dtype(self._logits_type),
        )

    def _allocate_cache(self, shape: tuple[int, ...], onnx_type: str) -> ort.OrtValue:
        value = self._allocate(shape, _element_type(onnx_type))
        size = int(np.prod(shape)) * numpy_dtype(onnx_type).itemsize
        self.stream.zero(cuda.DeviceMemory(value.data_ptr(), size))
        return value

    def _allocate(self, shape: tuple[int, ...], element_type: Any) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, self.device, 0)


def load_cuda_engine(bundle: Bundle, neighbour: Engine | None, share_cache: bool) -> OnnxRuntimeCudaEngine:
    """The bundle on CUDA, on the stream of `neighbour` if that has one, and with its cache if `share_cache`.

    Raises `VocabtrimError` if ONNX Runtime has no CUDA, a library of it is missing, or the GPU is too small.
    """
    missing = require_provider()
    beside = neighbour if isinstance(neighbour, OnnxRuntimeCudaEngine) else None
    stream = beside.stream if beside else make_stream()
    session = open_cuda_session(bundle, stream, missing)
    return OnnxRuntimeCudaEngine(bundle, session, stream, beside if share_cache else None)


def make_stream() -> cuda.Stream:
    """A stream that goes with its last user: engines share it and close in any order."""
    stream = cuda.Stream()
    # Not at exit: sessions that nobody closed are still there then.
    weakref.finalize(stream, cuda.runtime().cudaStreamDestroy, stream.address).atexit = False
    return stream


def run_options(length: int, keep: int) -> ort.RunOptions:
    """Of a step: the CUDA graph of its shape, -1 for none, as for bindings that are not kept. The step waits itself."""
    graph = length * (MAX_KEEP + 1) + keep if length <= CACHED_LENGTHS else -1
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _element_type(onnx_type: str) -> Any:
    return _BFLOAT16 if onnx_type == "tensor(bfloat16)" else numpy_dtype(onnx_type)
