"""What went wrong while a model was traced, in one line without the compiler's own words."""

import traceback
from pathlib import Path

from transformers import PreTrainedModel

from engines.errors import VocabtrimError


def untraceable(model: PreTrainedModel, error: Exception) -> VocabtrimError:
    """The refusal of a model that `torch.export` or its ONNX exporter could not take.

    Args:
        model: what was traced.
        error: whatever the model's own code or torch raised.

    Returns:
        An error that names the architecture and the line of its code where tracing stopped, if there is one.
    """
    where = _model_frame(error)
    at = f" ({where})" if where else ""
    return VocabtrimError(
        f"a {model.config.model_type} model cannot be exported: its code{at} does something that a graph of fixed "
        "operators cannot hold, such as a branch on the tokens; give another architecture"
    )


def _model_frame(error: BaseException | None) -> str | None:
    """The innermost line in transformers' models on the way to `error` or to what caused it."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if path.name.startswith("modeling_") and "models" in path.parts:
                return f"{path.name}, line {frame.lineno}"
        error = error.__cause__ or error.__context__
    return None
