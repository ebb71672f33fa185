"""The outputs of a written graph, call by call, with ONNX Runtime on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
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
from engines.bundle.read import MODEL_NAME
from engines.bundle.vocab_map import NOT_KEPT
from engines.errors import VocabtrimError
from engines.ort.session import numpy_dtype, open_session, reason
from vocabtrim_export.proof.float32_view import float32_view
from vocabtrim_export.proof.float_experts import float_experts
from vocabtrim_export.proof.float_products import float_products
from vocabtrim_export.proof.tokens import Calls, Window

_FLOAT32 = 1  # accuracy_level of MatMulNBits: its inputs are not rounded to 8 bits


Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Computed:
    """The outputs and the KV cache of a run.

    Attributes:
        outputs: By name, [S, …] of all tokens fed.
        cache: By name, past_key_values.N.key|value: [kv_heads, S, head_dim].
    """

    outputs: Mapping[str, Array]
    cache: Mapping[str, Array]


class Decoding:
    """A graph with a KV cache, in ONNX Runtime's form (which grows) or TensorRT's (of a fixed size), fed call by call.

    Attributes:
        cache: past_key_values.N.key|value, [1, kv_heads, slots, head_dim] each, in the graph's dtype.
        length: Tokens in the cache.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith(PAST)}
        self._dtypes = {value.name: numpy_dtype(value.type) for value in session.get_inputs()}
        self.capacity = next((shape[2] for shape in shapes.values() if isinstance(shape[2], int)), None)
        self.cache: Mapping[str, Array] = {
            name: np.zeros((1, shape[1], self.capacity or 0, shape[3]), self._dtypes[name])
            for name, shape in shapes.items()
        }
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
        begin, self.length = self.length, self.length + len(token_ids)
        inputs: dict[str, Array] = {
            INPUT_IDS: token_ids[None],
            POSITION_IDS: np.arange(begin, self.length)[None],
            KEEP: np.array([len(token_ids)]),
            SEQLENS_K: np.array([self.length - 1], np.int32),
            TOTAL_LENGTH: np.array([self.length], np.int32),
            LOGITS_POSITIONS: np.arange(len(token_ids)),
            ATTENDED_SLOTS: np.arange(self.capacity or 0),
        }
        if hidden is not None:
            inputs[HIDDEN_INPUT] = hidden[None]
        wanted = {value.name: value.shape for value in self._session.get_inputs()}
        inputs |= _empty_slots(wanted) if slots is None else slots
        fed = {name: value.astype(self._dtypes[name], copy=False) for name, value in inputs.items() if name in wanted}
        fed |= dict(self.cache)
        names = [value.name for value in self._session.get_outputs()]
        outputs = dict(zip(names, _run(self._session, fed), strict=True))
        self.cache = {name: outputs.pop(present_name(name)) for name in self.cache}
        return {name: value[0] for name, value in outputs.items()}


def run_graph(
    directory: Path,
    calls: Calls,
    window: Window | None,
    as_written: bool = False,
    slots: Sequence[Mapping[str, Array]] | None = None,
) -> Computed:
    """Run `model.onnx` on the tokens.

    Args:
        directory: The directory of the graph.
        calls: The tokens.
        window: The proof's sliding window.
        as_written: Run in the graph's own dtypes; otherwise in float32.
        slots: The inputs of its in-context slots in each call; None for empty ones.

    Raises:
        VocabtrimError: ONNX Runtime cannot run the graph.
    """
    path = directory / MODEL_NAME
    with nullcontext(open_session(path)) if as_written else proof_session(path, window) as session:
        decoding = Decoding(session)
        rows: list[dict[str, Array]] = []
        for call, length in enumerate(calls.lengths):
            begin, end = decoding.length, decoding.length + length
            hidden = None if calls.hidden is None else calls.hidden[begin:end]
            rows.append(decoding.feed(calls.token_ids[begin:end], hidden, slots[call] if slots else None))
    joined = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    # Copies: an array of a session keeps all of the session's memory.
    cache = {name: value[0, :, : len(calls)].copy() for name, value in decoding.cache.items()}
    return Computed(joined, cache)


def _empty_slots(shapes: Mapping[str, list[int]]) -> dict[str, Array]:
    """Returns the inputs of empty in-context slots; none for a graph without slots.

    Args:
        shapes: The shapes of all inputs of the graph.
    """
    inputs: dict[str, Array] = {
        name: np.zeros(shapes[name], np.float32) for name in (SLOT_WEIGHT, SLOT_BIAS) if name in shapes
    }
    if SLOT_TOKEN_IDS in shapes:
        inputs[SLOT_TOKEN_IDS] = np.full(shapes[SLOT_TOKEN_IDS], NOT_KEPT, np.int64)
    return inputs


def run_products(graph: Path, name: str, rows: NDArray[np.float32]) -> list[Array]:
    """Returns the outputs of a graph without a KV cache, in float32, for `rows`, [1, S, size], as the input `name`."""
    with proof_session(graph, None) as session:
        return _run(session, {name: rows})


@contextmanager
def proof_session(graph: Path, window: Window | None) -> Iterator[ort.InferenceSession]:
    """Yields a session on the graph in the form that a proof runs: in float32, with the proof's window.

    Its nodes and weights are otherwise the graph's own.
    """
    model = onnx.load(graph, load_external_data=False)
    float32_view(model)
    float_experts(model)
    float_products(model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if window and attribute.name == "local_window_size" and attribute.i == window.size:
                attribute.i = window.narrowed
            if attribute.name == "accuracy_level":
                attribute.i = _FLOAT32
    path = graph.with_name(f"{graph.stem}.proof.onnx")  # beside the weights, which it names
    path.write_bytes(model.SerializeToString())
    try:
        yield open_session(path, weights_in_file=True)
    finally:
        path.unlink()


def _run(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> list[Array]:
    options = ort.RunOptions()
    options.log_severity_level = 4  # what it would print is raised
    try:
        outputs: list[Array] = session.run(None, dict(inputs), options)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VocabtrimError(f"ONNX Runtime cannot run it: {reason(error)}") from error
    return outputs
