"""Sampling and acceptance within a round on CUDA, as `runtime.sampling` and `runtime.accept` do them on the host."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.graph_io import LOGITS, SLOT_TOKEN_IDS, TOKEN_IDS
from engines.ort_cuda.binding import BoundSession, Place, run_options
from engines.ort_cuda.graphs.acceptance import sampled_acceptance
from engines.ort_cuda.graphs.sampling import draw_graph, warp_graph
from engines.sampling_params import Sampling

if TYPE_CHECKING:
    from engines.ort_cuda.engine import OnnxRuntimeCudaEngine

_TYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
}
_PARAMETERS = 3  # values before the uniforms
_Bound = Mapping[str, Place | ort.OrtValue]


class DeviceSampler:
    """Samples and verifies drafts of one pair of engines.

    It is made for one draft length γ and one top-k; temperature, top-p and min-p may change with every round.

    Attributes:
        chances: The number of values of 8 bytes that a round gets from the host: temperature, top-p, min-p and a
            uniform number for each drafted token, float32 in the low half of each value; then float32[γ + 1], the
            uniform numbers of acceptance.
    """

    def __init__(
        self,
        target: "OnnxRuntimeCudaEngine",
        drafter: "OnnxRuntimeCudaEngine",
        draft_length: int,
        top_k: int,
        has_top_p: bool,
        has_min_p: bool,
    ) -> None:
        vocab, rows = target.manifest.head_rows, drafter.manifest.head_rows
        kept = drafter.vocab_map.kept_token_ids if drafter.vocab_map else None
        kept_columns = np.arange(rows) if kept is None and rows < vocab else kept
        slots = drafter.manifest.slots
        columns = rows + slots
        self._slot_tokens = {name: place for name, place in drafter.slot_places.items() if name == SLOT_TOKEN_IDS}
        self._gpu, self._has_top_p, self._has_min_p = target.gpu, has_top_p, has_min_p
        self._draft_length = draft_length
        self.chances = _PARAMETERS + draft_length + (draft_length + 2) // 2
        self._options = run_options()
        choice = top_k, has_top_p, has_min_p
        self._warp_draft = target.gpu.open_graph(warp_graph(columns, _TYPES[drafter.logits_type], *choice))
        self._draw = target.gpu.open_graph(draw_graph(columns, kept, slots))
        self._warp_verified = target.gpu.open_graph(warp_graph(vocab, _TYPES[target.logits_type], *choice))
        self._accept = target.gpu.open_graph(sampled_acceptance(vocab, kept_columns, slots))
        self._q = target.gpu.allocate((draft_length, columns), np.float32)
        self._p = target.gpu.allocate((draft_length + 1, vocab), np.float32)

    def write_chances(self, values: NDArray[np.int64], sampling: Sampling) -> None:
        """Fill what `propose` and `judge` read on the device.

        Args:
            values: int64[chances], to be written.
            sampling: The parameters, and the generator of the uniform numbers.
        """
        floats, steps, params = values.view(np.float32), self._draft_length, sampling.params
        first, last = 2 * _PARAMETERS, 2 * (_PARAMETERS + steps)
        floats[:first:2] = params.temperature, params.top_p, params.min_p
        uniforms = sampling.rng.random(2 * steps + 1, np.float32)
        floats[first:last:2] = uniforms[:steps]
        floats[last:][: steps + 1] = uniforms[steps:]

    def propose(self, step: int, logits: ort.OrtValue, chances: int, token: int) -> list[BoundSession]:
        """Returns the work that draws drafted token number `step`.

        Args:
            step: The number of the draft step, from 0.
            logits: The drafter's logits.
            chances: Address of what `write_chances` wrote.
            token: Address that the token is written to.
        """
        columns = self._q.shape()[1]
        q = Place(np.float32, (1, columns), self._q.data_ptr() + 4 * columns * step)
        uniform = Place(np.float32, (1,), chances + 8 * (_PARAMETERS + step))
        drawn = Place(np.int64, (1, 1), token)
        return [
            self._warp(self._warp_draft, logits, chances, q),
            self._bind(self._draw, {"probabilities": q, "uniform": uniform, **self._slot_tokens}, {TOKEN_IDS: drawn}),
        ]

    def judge(self, logits: ort.OrtValue, chances: int, drafted: int, verdict: int) -> list[BoundSession]:
        """Returns the work that decides which drafted tokens stay.

        Args:
            logits: The target's logits.
            chances: Address of what `write_chances` wrote.
            drafted: Address of the drafted tokens.
            verdict: Address that the number accepted and the next token are written to.
        """
        steps = self._draft_length
        uniforms = Place(np.float32, (steps + 1,), chances + 8 * (_PARAMETERS + steps))
        tokens = Place(np.int64, (1, steps), drafted)
        inputs: _Bound = {"draft_ids": tokens, "p": self._p, "q": self._q, "uniforms": uniforms, **self._slot_tokens}
        outputs = {"accepted": Place(np.int64, (1,), verdict), "next_token": Place(np.int64, (1,), verdict + 8)}
        p = Place(np.float32, tuple(self._p.shape()), self._p.data_ptr())
        return [self._warp(self._warp_verified, logits, chances, p), self._bind(self._accept, inputs, outputs)]

    def _warp(self, session: ort.InferenceSession, logits: ort.OrtValue, chances: int, written: Place) -> BoundSession:
        inputs: dict[str, Place | ort.OrtValue] = {
            LOGITS: logits,
            "temperature": Place(np.float32, (1,), chances),
        }
        if self._has_top_p:
            inputs["top_p"] = Place(np.float32, (1,), chances + 8)
        if self._has_min_p:
            inputs["min_p"] = Place(np.float32, (1,), chances + 16)
        return self._bind(session, inputs, {"probabilities": written})

    def _bind(self, session: ort.InferenceSession, inputs: _Bound, outputs: Mapping[str, Place]) -> BoundSession:
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, Place):
                self._gpu.bind_input(binding, name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name, place in outputs.items():
            self._gpu.bind_output(binding, name, place)
        return BoundSession(session, binding, self._options)
