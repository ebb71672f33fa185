"""`OnnxRuntimeCudaEngine`: a bundle on ONNX Runtime's CUDA, on one stream, with only token ids crossing to the host."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import MOST_UNREAD, Engine
from engines.bundle.graph_io import LOGITS, SLOT_TOKEN_IDS, TOKEN_IDS
from engines.bundle.head_rows import HeadRows
from engines.bundle.read import Bundle
from engines.bundle.vocab_map import VocabMap
from engines.cuda import runtime as cuda
from engines.cuda.graph_replay import Replayed
from engines.cuda.slots import DeviceSlots
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.session import numpy_dtype
from engines.ort.step import Step
from engines.ort_cuda.binding import BoundModel, Place, Work, element_type, run_options
from engines.ort_cuda.gpu import Gpu
from engines.ort_cuda.pair import PairRounds
from engines.ort_cuda.provider import can_be_captured, explain_out_of_memory
from engines.ort_cuda.step import DeviceStep, bind_step
from engines.outputs import Speculation, StepOutput
from engines.sampling_params import Sampling

# The first run loads kernels and fills the arena; by the second it has planned its memory and allocated that.
_WARM_UP = 2


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """Runs on CUDA: the KV cache, inputs and outputs are on the device, at addresses that never change.

    Every step length whose binding is kept becomes a CUDA graph, and so does a whole round of two engines. A CUDA graph
    freezes `total_sequence_length`, which kernels read on the host, so it is always the capacity; kernels take the true
    length from seqlens_k, on the device.

    Attributes:
        gpu: The memory and the stream of the session.
        lag: Positions by which a drafter's cache is shorter than the text that it has read.
        rounds: The rounds that this engine drafts in.
        slot_places: The inputs of in-context slots by name; none where there are no slots.
    """

    device = "cuda"
    lag = 0

    def __init__(
        self,
        bundle: Bundle,
        session: ort.InferenceSession,
        gpu: Gpu,
        shared: "OnnxRuntimeCudaEngine | None" = None,
    ) -> None:
        self.gpu, self._bundle = gpu, bundle
        self.rounds = PairRounds(self)  # that this engine drafts in
        self.slot_places: dict[str, Place] = {}
        self._slot_memory: list[ort.OrtValue] = []
        try:
            super().__init__(bundle, session, shared)
        except Exception as error:
            explain_out_of_memory(error, bundle)
            raise

    def __del__(self) -> None:
        if hasattr(self, "_steps"):
            self.close()  # a session must not outlive its stream

    @property
    def is_capturable(self) -> bool:
        """Whether steps can be CUDA graphs: every node of the model needs a CUDA kernel."""
        return can_be_captured(self._session)

    @property
    def cuda_graphs(self) -> int:
        """The number of kept steps, and of rounds that this engine drafts in, that run as a CUDA graph."""
        steps = [step.work for step in self._steps.values() if isinstance(step, DeviceStep)]
        return sum(work.has_graph for work in steps) + self.rounds.cuda_graphs

    def _feed(
        self, token_ids: Sequence[int] | NDArray[np.int64], keep: int, features: NDArray[np.float32] | None = None
    ) -> StepOutput:
        try:
            return super()._feed(token_ids, keep, features)
        except Exception as error:
            explain_out_of_memory(error, self._bundle)
            raise

    def speculate(
        self,
        drafter: Engine,
        token_ids: Sequence[int] | NDArray[np.int64],
        draft_length: int,
        sampling: Sampling | None = None,
    ) -> Speculation | None:
        if not isinstance(drafter, OnnxRuntimeCudaEngine):
            return None
        try:
            return drafter.rounds.speculate(self, token_ids, draft_length, sampling)
        except Exception as error:
            explain_out_of_memory(error, self._bundle)
            raise

    def knows(self, target: "OnnxRuntimeCudaEngine", unread: int) -> bool:  # noqa: ARG002
        """Returns whether all that this drafter needs to draft after `unread` tokens of `target` is on the device."""
        return True

    def catch_up(self, token_ids: Sequence[int] | NDArray[np.int64]) -> Sequence[int] | NDArray[np.int64]:
        """Feed all but the last of these tokens if they are more than a round can take.

        There may be many of them after rounds in which this drafter drafted nothing.

        Returns:
            The tokens that are left to feed.
        """
        if len(token_ids) <= MOST_UNREAD:
            return token_ids
        self.feed(token_ids[:-1])
        return token_ids[-1:]

    def prepare(self, target: "OnnxRuntimeCudaEngine", unread: int) -> list[Work]:  # noqa: ARG002
        """Returns the work of a round that precedes this drafter's first step."""
        return []

    def beside_tokens(self, step: int, unread: int) -> dict[str, Place]:  # noqa: ARG002
        """Returns what step `step` of a round reads and writes besides tokens, by the names of inputs and outputs."""
        return {}

    def environment(self) -> dict[str, str]:
        return super().environment() | cuda.environment()

    def _release(self) -> None:
        self.rounds.close()
        for step in self._steps.values():
            if isinstance(step, DeviceStep):
                step.work.close()
        super()._release()
        self.slot_places.clear()
        self._slot_memory.clear()

    def bind_model(self, places: Mapping[str, Place], token_ids: Place) -> BoundModel:
        """Bind a run of the session that reads `places`, by input name, and writes `token_ids`, int64[1, keep]."""
        keep = token_ids.shape[-1]
        binding = self._bind_common(keep)
        for name in self._token_inputs:
            self.gpu.bind_input(binding, name, places[name])
        logits = self.gpu.allocate((1, keep, self._head_rows), element_type(self.logits_type))
        self.gpu.bind_output(binding, TOKEN_IDS, token_ids)
        binding.bind_ortvalue_output(LOGITS, logits)
        return BoundModel(self._session, binding, run_options(), self.gpu.stream, logits, self.logits_type)

    def replayed(self, enqueue: Callable[[], None], others: Sequence["OnnxRuntimeCudaEngine"] = ()) -> Replayed:
        """Make `enqueue` a CUDA graph, if the models of this engine and of `others` can be part of one."""

        def whole() -> bool:
            enqueue()
            return True

        is_capturable = all(engine.is_capturable for engine in (self, *others))
        return Replayed(self.gpu.stream, whole, lambda: is_capturable, _WARM_UP)

    def _bind(self, length: int, keep: int) -> Step:
        return bind_step(self, length, keep)

    def _make_slots(self, vocab_map: VocabMap, rows: HeadRows, shape: tuple[int, int], onnx_type: str) -> DeviceSlots:
        def allocate(size: int) -> int:
            self._slot_memory.append(self.gpu.allocate((size,), np.uint8))
            return int(self._slot_memory[-1].data_ptr())

        slots = DeviceSlots(vocab_map, rows, shape, numpy_dtype(onnx_type), self.gpu.stream, allocate)
        for name, array in slots.inputs.items():
            element = np.int64 if name == SLOT_TOKEN_IDS else element_type(onnx_type)
            self.slot_places[name] = Place(element, array.shape, slots.addresses[name])
        return slots

    def _bind_slots(self, binding: ort.IOBinding) -> None:
        for name, place in self.slot_places.items():
            self.gpu.bind_input(binding, name, place)

    def _allocate_cache(self, shape: tuple[int, ...], onnx_type: str) -> ort.OrtValue:
        value = self.gpu.allocate(shape, element_type(onnx_type))
        size = int(np.prod(shape)) * numpy_dtype(onnx_type).itemsize
        self.gpu.stream.zero(cuda.DeviceMemory(value.data_ptr(), size))
        return value

    def _read_cache(self, cache: ort.OrtValue, length: int) -> NDArray[np.generic]:
        _, heads, capacity, size = cache.shape()
        rows = np.empty((1, heads, length, size), numpy_dtype(cache.data_type()))
        row, address = size * rows.itemsize, int(cache.data_ptr())
        for head in range(heads):
            self.gpu.stream.copy(rows[0, head].ctypes.data, address + head * capacity * row, length * row)
        self.gpu.stream.synchronize()
        return rows

    def _write_cache(self, cache: ort.OrtValue, rows: NDArray[np.generic]) -> None:
        _, heads, capacity, size = cache.shape()
        row, address, whole = size * rows.itemsize, int(cache.data_ptr()), np.ascontiguousarray(rows)
        for head in range(heads):
            self.gpu.stream.copy(address + head * capacity * row, whole[0, head].ctypes.data, rows.shape[2] * row)
        self.gpu.stream.synchronize()  # before `whole` is freed
