"""The outputs of a written graph in all calls of a proof, with ONNX Runtime on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.graph_io import LOGITS, present_name
from engines.bundle.read import MODEL_NAME
from engines.ort.session import open_session
from vocabtrim_export.proof.decoding import Array, Decoding, call_inputs, empty_cache, run_session
from vocabtrim_export.proof.float32_view import float32_view
from vocabtrim_export.proof.float_products import float_products
from vocabtrim_export.proof.lockstep import by_call, call_name, in_lockstep
from vocabtrim_export.proof.tokens import Calls, Window

_FLOAT32 = 1  # accuracy_level of MatMulNBits: its inputs are not rounded to 8 bits


@dataclass(frozen=True, slots=True)
class Computed:
    """The outputs and the KV cache of a run.

    Attributes:
        outputs: By name, [S, …] of all tokens fed.
        cache: By name, past_key_values.N.key|value: [kv_heads, S, head_dim].
    """

    outputs: Mapping[str, Array]
    cache: Mapping[str, Array]


def run_graph(
    directory: Path, calls: Calls, window: Window | None, slots: Sequence[Mapping[str, Array]] | None = None
) -> Computed:
    """Run `model.onnx` on the tokens in float32, with all calls in one run.

    Args:
        directory: The directory of the graph.
        calls: The tokens.
        window: The proof's sliding window.
        slots: The inputs of its in-context slots in each call; None for empty ones.

    Raises:
        VocabtrimError: ONNX Runtime cannot run the graph.
    """
    count = len(calls.lengths)
    inputs: dict[str, Array] = {}
    with proof_session(directory / MODEL_NAME, window, count) as session:
        reads = by_call({value.name: value for value in session.get_inputs()}, count)
        cache = empty_cache(reads[0])
        for number, call in enumerate(calls):
            own = call_inputs(reads[number], cache, call, slots[number] if slots else None)
            inputs |= {call_name(name, number): value for name, value in own.items()}
        inputs |= {call_name(name, 0): value for name, value in cache.items()}
        outputs = by_call(run_session(session, inputs), count)
    caches = {name: outputs[-1].pop(present_name(name)) for name in cache}
    # Copies: an array of a session keeps all of the session's memory.
    return Computed(
        {name: np.concatenate([each[name][0] for each in outputs]) for name in outputs[-1]},
        {name: value[0, :, : len(calls)].copy() for name, value in caches.items()},
    )


def written_logits(directory: Path, calls: Calls) -> NDArray[np.float32]:
    """Run `model.onnx` on the tokens in its own dtypes, call by call.

    Args:
        directory: The bundle's directory.
        calls: The tokens of the proof.

    Returns:
        float32[S, vocab].

    Raises:
        VocabtrimError: ONNX Runtime cannot run the graph.
    """
    decoding = Decoding(open_session(directory / MODEL_NAME))
    rows = [decoding.feed(call.token_ids, call.hidden)[LOGITS] for call in calls]
    return np.concatenate(rows).astype(np.float32)


def run_products(graph: Path, name: str, rows: NDArray[np.float32]) -> list[Array]:
    """Returns the outputs of a graph without a KV cache, in float32, for `rows`, [1, S, size], as the input `name`."""
    with proof_session(graph, None) as session:
        return list(run_session(session, {name: rows}).values())


@contextmanager
def proof_session(graph: Path, window: Window | None, calls: int | None = None) -> Iterator[ort.InferenceSession]:
    """Yields a session on the graph in the form that a proof runs: in float32, with the proof's window.

    Its nodes and weights are otherwise the graph's own.

    Args:
        graph: The ONNX file.
        window: The proof's sliding window.
        calls: How many calls one run is, see `in_lockstep`; None leaves inputs and outputs as they are.
    """
    model = onnx.load(graph, load_external_data=False)
    float32_view(model)
    float_products(model)
    if calls is not None:
        in_lockstep(model, calls)
    for node in model.graph.node:
        for attribute in node.attribute:
            if window and attribute.name == "local_window_size" and attribute.i == window.size:
                attribute.i = window.narrowed
            if attribute.name == "accuracy_level":
                attribute.i = _FLOAT32
    path = graph.with_name(f"{graph.stem}.proof.onnx")  # next to the weights, which it names
    path.write_bytes(model.SerializeToString())
    try:
        yield open_session(path, weights_in_file=True)
    finally:
        path.unlink()
