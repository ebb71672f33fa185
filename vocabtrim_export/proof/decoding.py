"""A written graph fed call by call, with ONNX Runtime on the CPU."""

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.graph_io import (
    ATTENDED_SLOTS,
    HIDDEN_INPUT,
    INPUT_IDS,
    KEEP,
    LOGITS_POSITIONS,
    PAST,
    POSITION_IDS,
    SEQLENS_K,
    SLOT_BIAS,
    SLOT_TOKEN_IDS,
    SLOT_WEIGHT,
    TOTAL_LENGTH,
    present_name,
)
from engines.bundle.vocab_map import NOT_KEPT
from engines.errors import VocabtrimError
from engines.ort.session import numpy_dtype, reason
from vocabtrim_export.proof.tokens import Call

Array = NDArray[np.generic]


class Decoding:
    """A graph with a KV cache, in ONNX Runtime's form (which grows) or TensorRT's (of a fixed size), fed call by call.

    Attributes:
        cache: past_key_values.N.key|value, [1, kv_heads, slots, head_dim] each, in the graph's dtype.
        length: Tokens in the cache.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._wanted = {value.name: value for value in session.get_inputs()}
        self.cache: Mapping[str, Array] = empty_cache(self._wanted)
        self.length = 0

    def feed(
        self,
        token_ids: NDArray[np.int64],
        hidden: NDArray[np.float32] | None = None,
        slots: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run the graph on more tokens.

        Args:
            token_ids: int64[S].
            hidden: [S, hidden], the hidden states of a head.
            slots: The inputs of its in-context slots; None for empty ones.

        Returns:
            The outputs without their batch dimension, [S, …] those for each token.
        """
        call = Call(self.length, token_ids, hidden)
        fed = call_inputs(self._wanted, self.cache, call, slots)
        outputs = run_session(self._session, fed | dict(self.cache))
        self.length = call.end
        self.cache = {name: outputs.pop(present_name(name)) for name in self.cache}
        return {name: value[0] for name, value in outputs.items()}


def call_inputs(
    wanted: Mapping[str, ort.NodeArg],
    cache: Mapping[str, Array],
    call: Call,
    slots: Mapping[str, Array] | None,
) -> dict[str, Array]:
    """Returns what a call reads but for the KV cache.

    Args:
        wanted: The inputs of the graph.
        cache: The KV cache, [1, kv_heads, slots, head_dim] each, before any call.
        call: The tokens.
        slots: The inputs of its in-context slots; None for empty ones.
    """
    count, capacity = len(call.token_ids), max((each.shape[2] for each in cache.values()), default=0)
    inputs: dict[str, Array] = {
        INPUT_IDS: call.token_ids[None],
        POSITION_IDS: np.arange(call.begin, call.end)[None],
        KEEP: np.array([count]),
        SEQLENS_K: np.array([call.end - 1], np.int32),
        TOTAL_LENGTH: np.array([call.end], np.int32),
        LOGITS_POSITIONS: np.arange(count),
        ATTENDED_SLOTS: np.arange(capacity),
    }
    if call.hidden is not None:
        inputs[HIDDEN_INPUT] = call.hidden[None]
    inputs |= _empty_slots(wanted) if slots is None else slots
    return {
        name: value.astype(numpy_dtype(wanted[name].type), copy=False)
        for name, value in inputs.items()
        if name in wanted
    }


def empty_cache(wanted: Mapping[str, ort.NodeArg]) -> dict[str, Array]:
    """Returns the KV cache before any call, [1, kv_heads, slots, head_dim] each: no slots where it grows.

    Args:
        wanted: The inputs of the graph.
    """
    shapes = {name: value.shape for name, value in wanted.items() if name.startswith(PAST)}
    return {
        name: np.zeros(
            [each if isinstance(each, int) else 0 for each in (1, *shape[1:])], numpy_dtype(wanted[name].type)
        )
        for name, shape in shapes.items()
    }


def run_session(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the outputs of a session by name.

    Raises:
        VocabtrimError: ONNX Runtime cannot run the graph.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4  # what it would print is raised
    try:
        outputs: list[Array] = session.run(None, dict(inputs), options)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VocabtrimError(f"ONNX Runtime cannot run it: {reason(error)}") from error
    return dict(zip([value.name for value in session.get_outputs()], outputs, strict=True))


def _empty_slots(wanted: Mapping[str, ort.NodeArg]) -> dict[str, Array]:
    """Returns the inputs of empty in-context slots; none for a graph without slots."""
    inputs: dict[str, Array] = {
        name: np.zeros(wanted[name].shape, np.float32) for name in (SLOT_WEIGHT, SLOT_BIAS) if name in wanted
    }
    if SLOT_TOKEN_IDS in wanted:
        inputs[SLOT_TOKEN_IDS] = np.full(wanted[SLOT_TOKEN_IDS].shape, NOT_KEPT, np.int64)
    return inputs
