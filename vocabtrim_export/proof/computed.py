"""What a written graph computes, call by call, with ONNX Runtime on the CPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.manifest import HIDDEN_INPUT
from engines.bundle.read import MODEL_NAME
from engines.errors import VocabtrimError
from engines.ort.session import open_session, reason
from vocabtrim_export.proof.float32_view import float32_view
from vocabtrim_export.proof.tokens import Calls, Window

_PROOF_NAME = "proof.onnx"
_PAST = "past_key_values."
_FLOAT32 = 1  # of MatMulNBits: its inputs are not rounded to 8 bits


@dataclass(frozen=True, slots=True)
class Computed:
    """outputs: by name, [S, …] of all tokens fed. cache: past_key_values.N.key|value: [kv_heads, S, head_dim]."""

    outputs: Mapping[str, NDArray[np.generic]]
    cache: Mapping[str, NDArray[np.generic]]


def run_graph(directory: Path, calls: Calls, window: Window | None) -> Computed:
    """Run `model.onnx`, in float32, on the tokens. Raises `VocabtrimError` where ONNX Runtime cannot."""
    with _proof_session(directory / MODEL_NAME, window) as session:
        wanted = {value.name: value for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        cache = {
            name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in wanted.items()
            if name.startswith(_PAST)
        }
        rows: list[dict[str, NDArray[np.generic]]] = []
        at = 0
        for length in calls.lengths:
            end = at + length
            inputs: dict[str, NDArray[np.generic]] = {
                "input_ids": calls.token_ids[None, at:end],
                "position_ids": np.arange(at, end)[None],
                "num_logits_to_keep": np.array([length]),
                "seqlens_k": np.array([end - 1], np.int32),
                "total_sequence_length": np.array([end], np.int32),
            }
            if calls.hidden is not None:
                inputs[HIDDEN_INPUT] = calls.hidden[None, at:end]
            fed = {name: value for name, value in inputs.items() if name in wanted}
            outputs = dict(zip(names, _run(session, fed | cache), strict=True))
            cache = {name: outputs.pop(name.replace("past_key_values", "present")) for name in cache}
            rows.append({name: value[0] for name, value in outputs.items()})
            at = end
    joined = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
    return Computed(joined, {name: value[0] for name, value in cache.items()})


def run_products(graph: Path, name: str, rows: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    """The outputs of a graph without a KV cache, in float32, for `rows`, [1, S, size], as the input `name`."""
    with _proof_session(graph, None) as session:
        return _run(session, {name: rows})


@contextmanager
def _proof_session(graph: Path, window: Window | None) -> Iterator[ort.InferenceSession]:
    """A session on the graph as a proof runs it: the same nodes and weights, in float32, with the proof's window."""
    model = onnx.load(graph, load_external_data=False)
    float32_view(model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if window and attribute.name == "local_window_size" and attribute.i == window.size:
                attribute.i = window.narrowed
            if attribute.name == "accuracy_level":
                attribute.i = _FLOAT32
    path = graph.with_name(_PROOF_NAME)  # beside the weights, which it names
    path.write_bytes(model.SerializeToString())
    try:
        yield open_session(path)
    finally:
        path.unlink()


def _run(session: ort.InferenceSession, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    try:
        outputs: list[NDArray[np.generic]] = session.run(None, dict(inputs))
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise VocabtrimError(f"ONNX Runtime cannot run it: {reason(error)}") from error
    return outputs
