"""`BoundProfile`: an optimization profile of a plan with every address bound once, and the KV cache that it uses."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import LOGITS, PAST, PRESENT, TOKEN_IDS
from engines.cuda import runtime as cuda
from engines.cuda.graph_replay import Replayed
from engines.errors import VocabtrimError
from engines.numbers import to_float32
from engines.trt.library import Library, Log, create_context
from engines.trt.plan import stored_dtype, tensor_names

Memory = TypeVar("Memory", cuda.DeviceMemory, cuda.PinnedMemory)


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values on the GPU, zero where nothing was written.

    Attributes:
        addresses: The address of each input's [1, heads, slots, head_dim]; both engines of a bundle bind the same ones.
    """

    addresses: Mapping[str, int]
    memory: cuda.DeviceMemory

    @classmethod
    def allocate(cls, library: Library, engine: Any, stream: cuda.CudaStream) -> "KVCache":
        """Allocate the cache of an ICudaEngine.

        Raises:
            VocabtrimError: The GPU has no room.
        """
        offsets, end = {}, 0
        for name in tensor_names(library, engine, inputs=True):
            if name.startswith(PAST):
                offsets[name] = end
                shape = tuple(engine.get_tensor_shape(name))
                end += _aligned(int(np.prod(shape)) * stored_dtype(engine, name).itemsize)
        with ExitStack() as owned:
            memory = _own(owned, cuda.allocate_device(end))
            stream.zero(memory)  # a masked slot weighs 0 in attention, but 0 times a NaN of old memory is NaN
            owned.pop_all()
        return cls({name: memory.address + offset for name, offset in offsets.items()}, memory)


@dataclass(frozen=True, slots=True)
class Shared:
    """The objects that all profiles of an executor share.

    Attributes:
        library: The library that runs the plans.
        log: Its logger.
        stream: The stream that all work is queued on.
        activation: Working memory, enough for the largest profile; one profile uses it at a time.
    """

    library: Library
    log: Log
    stream: cuda.CudaStream
    activation: cuda.DeviceMemory


@dataclass(frozen=True, slots=True)
class _Buffers:
    """The buffers of one profile.

    Attributes:
        inputs_host: All inputs but those that stay on the GPU, in one block, so that one copy moves them.
        inputs_device: The same block on the GPU.
        tokens_host: The token ids, copied from `tokens_device`.
        tokens_device: The token ids that the plan writes.
        logits: The logits that the plan writes; None where it has none.
    """

    inputs_host: cuda.PinnedMemory
    inputs_device: cuda.DeviceMemory
    tokens_host: cuda.PinnedMemory
    tokens_device: cuda.DeviceMemory
    logits: cuda.DeviceMemory | None


class BoundProfile:
    """An execution context on one optimization profile.

    The first `run` launches kernel by kernel, as libraries load them when first used; the second captures the copy of
    the inputs, the kernels and the copy of the tokens into a CUDA graph, which later runs launch.

    Attributes:
        inputs: Flat int64 arrays of page-locked memory by the names of inputs. The caller writes them before `run`.

    Args:
        shared: The objects that all profiles share.
        engine: The ICudaEngine.
        index: The number of the optimization profile.
        addresses: The addresses of the inputs that stay on the GPU, the KV cache and in-context slots, by name.
    """

    def __init__(self, shared: Shared, engine: Any, index: int, addresses: Mapping[str, int]) -> None:
        self.inputs: dict[str, NDArray[np.int64]] = {}
        self._shared, self._engine = shared, engine
        self._context = self._make_context(index)
        self._work = Replayed(shared.stream, self._enqueue, self._is_capturable)
        with ExitStack() as owned:
            self._buffers = self._bind(owned, addresses)
            # Its size depends on the profile and the shapes, so it is set after them.
            self._context.set_device_memory(shared.activation.address, shared.activation.size)
            self._owned = owned.pop_all()

    @property
    def has_graph(self) -> bool:
        """Whether `run` launches a CUDA graph."""
        return self._work.has_graph

    def run(self) -> NDArray[np.int64]:
        """Compute with what `inputs` hold and wait for it. Returns token_ids, flat: int64[n]."""
        stream, log = self._shared.stream, self._shared.log
        log.clear()  # drops the errors of a failed attempt to capture a graph
        if not self._work.run():
            raise RuntimeError(f"{self._shared.library.name} failed to run a plan: {log.reason()}")
        stream.synchronize()
        tokens = self._buffers.tokens_host
        return tokens.view(0, tokens.size // 8).copy()

    def read_logits(self) -> NDArray[np.float32]:
        """Returns the logits of the last `run`, float32[keep, head_rows]."""
        if self._context is None or self._buffers.logits is None:
            raise RuntimeError("no logits: they are valid until the next feed, and no draft has any")
        _, *shape = self._context.get_tensor_shape(LOGITS)
        stored = np.empty(shape, stored_dtype(self._engine, LOGITS))
        self._shared.stream.copy(stored.ctypes.data, self._buffers.logits.address, stored.nbytes)
        self._shared.stream.synchronize()
        return to_float32(stored)

    def close(self) -> None:
        """Release the graph, the context and the buffers, once."""
        self._work.close()
        self._context = self._engine = None
        self.inputs.clear()
        self._owned.close()

    def _make_context(self, index: int) -> Any:
        """Returns an execution context whose profile and input shapes are set."""
        shared, engine = self._shared, self._engine
        shared.log.clear()
        context = create_context(shared.library, engine)
        if context is None:
            raise VocabtrimError(f"{shared.library.name} cannot make an execution context: {shared.log.reason()}")
        self._require(context.set_optimization_profile_async(index, shared.stream.address), f"profile {index}")
        for name in tensor_names(shared.library, engine, inputs=True):
            shape = tuple(engine.get_tensor_shape(name))
            if -1 in shape:
                shape = tuple(engine.get_tensor_profile_shape(name, index)[-1])  # its least, usual and largest are one
            self._require(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
        self._require(not context.infer_shapes(), "the input shapes")
        return context

    def _bind(self, owned: ExitStack, addresses: Mapping[str, int]) -> _Buffers:
        library = self._shared.library
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name in tensor_names(library, self._engine, inputs=True):
            if name in addresses:
                self._set_address(name, addresses[name])
            else:
                offsets[name] = end, int(np.prod(self._shape(name)))
                end += _aligned(8 * offsets[name][1])
        host, device = _own(owned, cuda.allocate_pinned(end)), _own(owned, cuda.allocate_device(end))
        for name, (offset, count) in offsets.items():
            self.inputs[name] = host.view(offset, count)
            self._set_address(name, device.address + offset)
        outputs: dict[str, cuda.DeviceMemory] = {}
        for name in tensor_names(library, self._engine, inputs=False):
            if name.startswith(PRESENT):
                past = self._engine.get_aliased_input_tensor(name)
                self._require(past in addresses, f"one address for the KV cache and {name}")
                self._set_address(name, addresses[past])
            else:
                outputs[name] = _own(owned, cuda.allocate_device(self._size(name)))
                self._set_address(name, outputs[name].address)
        tokens = _own(owned, cuda.allocate_pinned(self._size(TOKEN_IDS)))
        return _Buffers(host, device, tokens, outputs[TOKEN_IDS], outputs.get(LOGITS))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def _size(self, name: str) -> int:
        return int(np.prod(self._shape(name))) * stored_dtype(self._engine, name).itemsize

    def _set_address(self, name: str, address: int) -> None:
        self._require(self._context.set_tensor_address(name, address), f"the address of {name}")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise RuntimeError(f"{self._shared.library.name} does not take {what}: {self._shared.log.reason()}")

    def _is_capturable(self) -> bool:
        """Returns False where TensorRT-RTX says that the profile cannot be a CUDA graph; TensorRT cannot say it."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._shared.stream.address))

    def _enqueue(self) -> bool:
        stream, buffers = self._shared.stream, self._buffers
        stream.copy(buffers.inputs_device.address, buffers.inputs_host.address, buffers.inputs_host.size)
        done = bool(self._context.execute_async_v3(stream.address))
        stream.copy(buffers.tokens_host.address, buffers.tokens_device.address, buffers.tokens_host.size)
        return done


def _own(owned: ExitStack, memory: Memory) -> Memory:
    owned.callback(memory.free)
    return memory


def _aligned(size: int) -> int:
    return -(-size // cuda.ALIGNMENT) * cuda.ALIGNMENT
