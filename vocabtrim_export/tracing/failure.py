"""A failed tracing in one line, without the compiler's own words."""

import traceback
from pathlib import Path

from transformers import PreTrainedModel

from engines.errors import VocabtrimError


def untraceable(model: PreTrainedModel, error: Exception) -> VocabtrimError:
    """Returns the error for a model that `torch.export` or its ONNX exporter refuses.

    Args:
        model: The model.
        error: The exception of the model's own code or of torch.

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
    """Returns the innermost line of transformers' models in the traceback of `error` or of its cause."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if path.name.startswith("modeling_") and "models" in path.parts:
                return f"{path.name}, line {frame.lineno}"
        error = error.__cause__ or error.__context__
    return None
