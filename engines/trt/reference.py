"""`ReferenceExecutor`: the graphs of a TensorRT bundle on ONNX Runtime's CPU, to check them without a GPU."""

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.base import DeviceName
from engines.bundle.graph_io import (
    ATTENDED_SLOTS,
    INPUT_IDS,
    LOGITS,
    LOGITS_POSITIONS,
    PAST,
    POSITION_IDS,
    SLOT_WEIGHT,
    TOKEN_IDS,
    present_name,
)
from engines.bundle.read import DRAFT_MODEL_NAME, MODEL_NAME, Bundle, Profile
from engines.ort.session import numpy_dtype, open_session, share
from engines.outputs import StepOutput
from engines.slots import Slots, open_head_rows


class ReferenceExecutor:
    """An `Executor` for the graphs that plans are built from, in the same fixed shapes.

    Raises:
        VocabtrimError: ONNX Runtime has no CPU kernel for a graph (bf16).
    """

    device: DeviceName = "cpu"

    def __init__(self, bundle: Bundle) -> None:
        plans = bundle.manifest.tensorrt
        assert plans is not None
        self._model = open_session(bundle.path / MODEL_NAME)
        self._draft = open_session(bundle.path / DRAFT_MODEL_NAME) if plans.draft_length else None
        self._caches: dict[str, ort.OrtValue] = {}
        for value in self._model.get_inputs():
            if value.name.startswith(PAST):
                self._caches[value.name] = share(np.zeros(value.shape, numpy_dtype(value.type)))
        self._has_spans = len(plans.spans) > 1
        self.slots = _open_slots(bundle, self._model)
        self._slot_inputs = {name: share(array) for name, array in (self.slots.inputs if self.slots else {}).items()}

    def environment(self) -> dict[str, str]:
        return {"onnxruntime": ort.__version__}

    def step(
        self,
        profile: Profile,
        input_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        logits_positions: NDArray[np.int64],
    ) -> StepOutput:
        inputs = {INPUT_IDS: input_ids[None], POSITION_IDS: position_ids[None]}
        inputs[LOGITS_POSITIONS] = logits_positions
        token_ids, logits = self._run(self._model, inputs, profile.span, [TOKEN_IDS, LOGITS])
        return StepOutput(token_ids[0], lambda: logits[0].astype(np.float32, copy=False))

    def draft(self, span: int, input_ids: NDArray[np.int64], position_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._draft is not None
        inputs = {INPUT_IDS: input_ids[None], POSITION_IDS: position_ids[None]}
        (token_ids,) = self._run(self._draft, inputs, span, [TOKEN_IDS])
        drafted: NDArray[np.int64] = token_ids[0]
        return drafted

    def close(self) -> None:
        self._caches.clear()
        self._model = self._draft = None

    def _run(
        self, session: ort.InferenceSession, inputs: dict[str, NDArray[np.int64]], span: int, outputs: list[str]
    ) -> list[NDArray[Any]]:
        binding = session.io_binding()
        if self._has_spans:
            inputs[ATTENDED_SLOTS] = np.arange(span)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._slot_inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(present_name(name), cache)
        for name in outputs:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[len(self._caches) :]]


def _open_slots(bundle: Bundle, session: ort.InferenceSession) -> Slots | None:
    inputs = {value.name: value for value in session.get_inputs()}
    (logits,) = (value for value in session.get_outputs() if value.name == LOGITS)
    shapes = {name: value.shape for name, value in inputs.items()}
    rows = open_head_rows(bundle, shapes, int(logits.shape[-1]))
    if rows is None or bundle.vocab_map is None:
        return None
    return Slots(bundle.vocab_map, rows, shapes[SLOT_WEIGHT], numpy_dtype(inputs[SLOT_WEIGHT].type))
