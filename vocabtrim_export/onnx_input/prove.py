"""The proof of a cut head: the trimmed model gives the kept columns of what the whole model gives."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle.graph_io import INPUT_IDS, LOGITS, POSITION_IDS, SEQLENS_K, TOKEN_IDS, TOTAL_LENGTH
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from engines.ort.session import open_session, reason

_TOKENS = 6
_TOLERANCE = 1e-3  # as a share of the logits' standard deviation; a product of fewer columns may sum in another order
_DTYPES = {"float16": np.float16, "float": np.float32, "double": np.float64, "int32": np.int32, "int64": np.int64}


def prove_cut(whole: Path, trimmed: Path, vocab_map: VocabMap) -> str | None:
    """Run both models on the same few tokens and compare them.

    Args:
        whole: The ONNX file before the cut.
        trimmed: The file after the cut, with the output token_ids.
        vocab_map: The columns that were kept.

    Returns:
        Why the whole model could not be run on this machine's CPU, so that nothing was proven; None where it was.

    Raises:
        VocabtrimError: The trimmed model does not run or computes other logits or tokens.
    """
    try:
        inputs, (wanted,) = _run(whole, {}, vocab_map.full_vocab, [LOGITS])
    except Exception as error:  # onnxruntime's exceptions have no common base
        return reason(error)
    try:
        _, (logits, token_ids) = _run(trimmed, inputs, vocab_map.full_vocab, [LOGITS, TOKEN_IDS])
    except Exception as error:
        raise VocabtrimError(f"{whole}: with its head cut, ONNX Runtime cannot run it: {reason(error)}") from error
    kept = wanted[..., vocab_map.kept_token_ids].astype(np.float32)
    off = np.abs(logits.astype(np.float32) - kept).max(initial=0.0) if logits.shape == kept.shape else np.inf
    if not off <= _TOLERANCE * float(kept.std()):
        raise VocabtrimError(f"{whole}: with its head cut, its logits are not those of the kept tokens: it is refused")
    if not np.array_equal(token_ids, vocab_map.kept_token_ids[logits.argmax(-1)]):
        raise VocabtrimError(f"{whole}: with its head cut, its token_ids are not those of its largest logits")
    return None


def _run(
    model: Path, inputs: dict[str, NDArray[Any]], vocab: int, outputs: list[str]
) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
    """Returns the inputs, made up where `inputs` is empty, and the outputs of `model` for them."""
    session = open_session(model)
    fed = inputs or {value.name: _made_up(value, vocab) for value in session.get_inputs()}
    return fed, session.run(outputs, fed)


def _made_up(value: ort.NodeArg, vocab: int) -> NDArray[Any]:
    """Returns a prompt of a few tokens, the first call of a decoder: nothing is cached yet."""
    dtype = _DTYPES.get(value.type.removeprefix("tensor(").removesuffix(")"), np.float32)
    rank = len(value.shape)
    if value.name in (INPUT_IDS, POSITION_IDS):
        ids = np.random.default_rng(0).integers(0, vocab, _TOKENS) if value.name == INPUT_IDS else np.arange(_TOKENS)
        return ids.astype(dtype).reshape(*[1] * (rank - 1), -1)
    if value.name in (SEQLENS_K, TOTAL_LENGTH):
        return np.full([1] * rank, _TOKENS - (value.name == SEQLENS_K), dtype)
    is_cache = rank >= 3
    sizes = [size if isinstance(size, int) else 0 if is_cache else _TOKENS for size in value.shape]
    if rank and not isinstance(value.shape[0], int):
        sizes[0] = 1  # the batch
    return (np.zeros if is_cache else np.ones)(sizes, dtype)
