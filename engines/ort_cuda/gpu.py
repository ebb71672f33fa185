"""`Gpu`: the memory and the stream that the sessions of an engine use."""

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir
import onnxruntime as ort

from engines.cuda import runtime as cuda
from engines.ort_cuda.binding import Place
from engines.ort_cuda.provider import open_cuda_graph


@dataclass(frozen=True, slots=True)
class Gpu:
    """The memory and the stream that an engine runs on.

    Engines that feed each other may share one, and engines that share a cache must.

    Attributes:
        memory: ONNX Runtime's name of the memory.
        stream: The stream of the sessions.
    """

    memory: ClassVar[str] = "cuda"
    stream: cuda.CudaStream

    def allocate(self, shape: tuple[int, ...], element: Any) -> ort.OrtValue:
        """Allocate uninitialised memory.

        Args:
            shape: The shape of the tensor.
            element: A NumPy dtype, or ONNX's number of one that NumPy lacks.
        """
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element, self.memory, 0)

    def bind_input(self, binding: ort.IOBinding, name: str, place: Place) -> None:
        """Let runs with `binding` read the input `name` at `place`."""
        binding.bind_input(name, self.memory, 0, *place)

    def bind_output(self, binding: ort.IOBinding, name: str, place: Place) -> None:
        """Let runs with `binding` write the output `name` at `place`."""
        binding.bind_output(name, self.memory, 0, *place)

    def open_graph(self, model: ir.Model) -> ort.InferenceSession:
        """Open a small model, all of whose nodes can be in a CUDA graph."""
        return open_cuda_graph(ir.to_proto(model).SerializeToString(), self.stream)
