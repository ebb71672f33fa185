"""The part of the CUDA runtime that an engine needs, with errors as exceptions. Sizes are bytes, addresses integers."""

import ctypes
import importlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import VocabtrimError

ALIGNMENT = 256  # bytes; TensorRT requires it of every address

_MENDABLE = {
    "cudaErrorInsufficientDriver": "no NVIDIA driver, or one too old for this CUDA: install or update it",
    "cudaErrorNoDevice": "no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it",
    "cudaErrorDevicesUnavailable": "another process has the GPU to itself",
    "cudaErrorSystemDriverMismatch": "the NVIDIA driver was updated while loaded: restart the machine",
}


def runtime() -> Any:
    """Returns the module `cuda.bindings.runtime`.

    Raises:
        VocabtrimError: It is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise VocabtrimError(f"the CUDA bindings are missing ({error}): pip install cuda-bindings") from error


def check(result: tuple[Any, ...], asked: int = 0) -> Any:
    """Returns what a CUDA call returned after its error code: None, the value, or a tuple of values.

    Args:
        result: The error code and the values.
        asked: Bytes that the call was to allocate.

    Raises:
        VocabtrimError: The user can correct it, such as a GPU without enough memory.
        RuntimeError: Anything else.
    """
    error, *values = result
    if error.value == 0:
        return None if not values else values[0] if len(values) == 1 else tuple(values)
    if error.name in _MENDABLE:
        raise VocabtrimError(f"CUDA cannot be used ({error.name}): {_MENDABLE[error.name]}")
    if error.name == "cudaErrorMemoryAllocation":
        raise VocabtrimError(
            f"out of GPU memory ({error.name}) when asking for {asked:,} bytes: "
            "lower --max-length or export with a smaller --dtype or --quantize"
        )
    _, text = runtime().cudaGetErrorString(error)
    raise RuntimeError(f"CUDA failed with {error.name}: {text.decode()}")


def has_device() -> bool:
    """Returns whether there is an NVIDIA GPU that CUDA can use."""
    try:
        return bool(check(runtime().cudaGetDeviceCount()))
    except VocabtrimError:
        return False


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        name: Its product name.
        compute_capability: Such as "8.6".
    """

    name: str
    compute_capability: str


def current_gpu() -> Gpu:
    """Returns the GPU that calls of this thread go to.

    Raises:
        VocabtrimError: There is none.
    """
    cuda = runtime()
    properties = check(cuda.cudaGetDeviceProperties(check(cuda.cudaGetDevice())))
    return Gpu(properties.name.split(b"\0")[0].decode(), f"{properties.major}.{properties.minor}")


def environment() -> dict[str, str]:
    """Returns the name and versions that a report lists of the GPU that calls of this thread go to."""
    gpu = current_gpu()
    versions = {"cuda_driver": runtime().cudaDriverGetVersion(), "cuda_runtime": runtime().cudaRuntimeGetVersion()}
    named = {name: check(version) for name, version in versions.items()}
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        **{name: f"{version // 1000}.{version % 1000 // 10}" for name, version in named.items()},
    }


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the GPU, which its owner frees once. `allocate_device` makes it."""

    address: int
    size: int

    def free(self) -> None:
        # The result is not checked: freeing fails only after another call has failed, and that one has raised.
        runtime().cudaFree(self.address)


def allocate_device(size: int) -> DeviceMemory:
    """Allocate at least `size` bytes, aligned to ALIGNMENT and uninitialised."""
    size = max(size, ALIGNMENT)
    return DeviceMemory(int(check(runtime().cudaMalloc(size), asked=size)), size)


@dataclass(frozen=True, slots=True)
class PinnedMemory:
    """Page-locked memory of the host, which its owner frees once. `allocate_pinned` makes it.

    A copy in a CUDA graph runs without waiting for the host only with page-locked memory.
    """

    address: int
    size: int

    def view(self, offset: int, count: int) -> NDArray[np.int64]:
        """Returns int64[count] over the bytes from `offset` on. It must not be used after `free`."""
        raw = (ctypes.c_byte * (8 * count)).from_address(self.address + offset)
        return np.frombuffer(memoryview(raw), np.int64)

    def free(self) -> None:
        runtime().cudaFreeHost(self.address)


def allocate_pinned(size: int) -> PinnedMemory:
    """Allocate `size` bytes of page-locked memory."""
    return PinnedMemory(int(check(runtime().cudaMallocHost(size), asked=size)), size)


class CudaStream:
    """A queue of work for the GPU, run in order. It and the default stream do not wait for each other."""

    def __init__(self) -> None:
        cuda = runtime()
        self._handle = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.address = int(self._handle)
        self._is_capturing = False

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from address `source` to address `target`, on the host or the device."""
        cuda = runtime()
        check(cuda.cudaMemcpyAsync(target, source, size, cuda.cudaMemcpyKind.cudaMemcpyDefault, self._handle))

    def copy_columns(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Queue a copy of the first bytes of each row of a matrix.

        Args:
            target: The address of the first row's copy.
            source: The address of the first row.
            pitch: The bytes from one row to the next, on both sides.
            width: The bytes of each row to copy.
            rows: The number of rows.
        """
        cuda = runtime()
        kind = cuda.cudaMemcpyKind.cudaMemcpyDefault
        check(cuda.cudaMemcpy2DAsync(target, pitch, source, pitch, width, rows, kind, self._handle))

    def pinned(self, count: int) -> NDArray[np.int64]:
        """Returns int64[count], zeros, in page-locked memory that is freed with the last view of it."""
        memory = allocate_pinned(8 * count)
        array = memory.view(0, count)
        # Not at exit: the driver may be gone by then, and its memory with it.
        weakref.finalize(array, memory.free).atexit = False
        array[:] = 0
        return array

    def zero(self, memory: DeviceMemory) -> None:
        """Queue filling all of `memory` with zeros."""
        check(runtime().cudaMemsetAsync(memory.address, 0, memory.size, self._handle))

    def synchronize(self) -> None:
        """Wait until everything queued is done. Raises RuntimeError for what failed since the last time."""
        check(runtime().cudaStreamSynchronize(self._handle))

    def event(self) -> Any:
        """Returns a new event for `record`. The caller passes it to `discard_event` once."""
        return check(runtime().cudaEventCreate())

    def record(self, event: Any) -> None:
        """Queue recording the time at which all earlier work is done. In a CUDA graph every launch records it."""
        cuda = runtime()
        flags = cuda.cudaEventRecordExternal if self._is_capturing else cuda.cudaEventRecordDefault
        check(cuda.cudaEventRecordWithFlags(event, self._handle, flags))

    def seconds_between(self, first: Any, second: Any) -> float:
        """Returns the time between two events by the GPU's clock. Both must have happened: call `synchronize` first."""
        return float(check(runtime().cudaEventElapsedTime(first, second))) / 1e3

    def discard_event(self, event: Any) -> None:
        """Free an event."""
        runtime().cudaEventDestroy(event)

    def capture(self, enqueue: Callable[[], bool]) -> Any | None:
        """Capture what `enqueue` queues as a graph for `launch`; nothing runs yet.

        Returns:
            The graph; None if `enqueue` returns False or does what a graph cannot hold. The stream can be used in
            either case.
        """
        cuda = runtime()
        # Thread-local: another thread's engine may allocate meanwhile.
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cuda.cudaStreamBeginCapture(self._handle, mode))
        self._is_capturing = True
        try:
            complete = enqueue()
        except Exception:  # the libraries that queue have exceptions of their own
            complete = False
        self._is_capturing = False
        error, graph = cuda.cudaStreamEndCapture(self._handle)
        if error.value or not complete:
            cuda.cudaGetLastError()  # clears the error: the next call that asks for the last one would report it
            if not error.value:
                check(cuda.cudaGraphDestroy(graph))
            return None
        try:
            return check(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            check(cuda.cudaGraphDestroy(graph))

    def launch(self, graph: Any) -> None:
        """Queue all of a captured graph."""
        check(runtime().cudaGraphLaunch(graph, self._handle))

    def discard(self, graph: Any) -> None:
        """Free a captured graph."""
        runtime().cudaGraphExecDestroy(graph)

    def destroy(self) -> None:
        """Release the stream, once."""
        runtime().cudaStreamDestroy(self._handle)
