"""MODEL in the user's words, as text and as a path."""

import os
from pathlib import Path
from typing import Any

from engines.errors import VocabtrimError


def model_text(what: str, spec: Any) -> str:
    """Returns MODEL as text.

    Args:
        what: The model's role, for the message.
        spec: A text or a path.

    Raises:
        VocabtrimError: It is neither.
    """
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise VocabtrimError(f"the {what} is {spec!r}: give a hub id, a model directory or a .gguf file")
    return str(spec)


def local_path(spec: str) -> Path:
    """Returns the path that MODEL would be; `~` is a home directory where there is one."""
    return Path(os.path.expanduser(spec))
