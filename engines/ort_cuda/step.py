"""`DeviceStep`: one step of a model on CUDA, with pinned inputs and outputs, and its binding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.bundle.graph_io import INPUT_IDS, POSITION_IDS, SEQLENS_K
from engines.cuda import runtime as cuda
from engines.cuda.graph_replay import Replayed
from engines.ort.step import Step
from engines.ort_cuda.binding import BoundModel
from engines.ort_cuda.mirrored import allocate_mirrored

if TYPE_CHECKING:
    from engines.ort_cuda.engine import OnnxRuntimeCudaEngine

_ALIGNED = cuda.ALIGNMENT // 8  # int64 values from one input of a step to the next


@dataclass(frozen=True, slots=True)
class DeviceStep(Step):
    """A step whose inputs are copied to the device. Only `token_ids` is copied back.

    Attributes:
        stream: The stream of the session.
        bound_model: The session, bound to the device's memory.
        work: The copy of the inputs, the run, and the copy of the tokens.
    """

    stream: cuda.CudaStream
    bound_model: BoundModel
    work: Replayed

    def run(self, end: int) -> None:  # noqa: ARG002
        # `end` is not used: a CUDA graph would freeze it, see `OnnxRuntimeCudaEngine`
        self.work.run()
        self.stream.synchronize()

    def read_logits(self) -> NDArray[np.float32]:
        return self.bound_model.read_logits()


def bind_step(engine: "OnnxRuntimeCudaEngine", length: int, keep: int) -> DeviceStep:
    """Bind a step of `engine` to memory of its own, on the host and on the device.

    Args:
        engine: The engine, whose model, stream and cache the step uses.
        length: Tokens that the step reads.
        keep: Positions that it predicts after, the last ones.

    Returns:
        The step. Its inputs are written and its tokens read on the host.
    """
    # input_ids | position_ids | seqlens_k | token_ids, each aligned, on the host as on the device
    section = -(-length // _ALIGNED) * _ALIGNED
    seqlens, tokens = 2 * section, 2 * section + _ALIGNED
    block = allocate_mirrored(engine.gpu, tokens + keep)
    places = {
        INPUT_IDS: block.place(0, np.int64, (1, length)),
        POSITION_IDS: block.place(section, np.int64, (1, length)),
        SEQLENS_K: block.place(seqlens, np.int32, (1,)),
    }
    run = engine.bind_model(places, block.place(tokens, np.int64, (1, keep)))

    def enqueue() -> None:
        block.send(seqlens + 1)
        run.enqueue()
        block.receive(tokens)

    return DeviceStep(
        run.session,
        run.binding,
        block.host[None, :length],
        block.host[None, section : section + length],
        block.host[seqlens:].view(np.int32)[:1],
        block.host[None, tokens:],
        block.stream,
        run,
        engine.replayed(enqueue),
    )
