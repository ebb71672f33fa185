"""Messages for builds that fail: one line with the place in the model and what to do."""

import re
import signal
from pathlib import Path
from typing import Any, NoReturn

from engines.errors import VocabtrimError
from engines.trt.library import Library, one_line

_LAYER = re.compile(r"(?:^|.*?[./_])layers?\.\d+(?=[./_]|$)")


def parse_error(library: Library, onnx_path: Path, parser: Any, reason: str) -> VocabtrimError:
    """Returns the error of a failed `OnnxParser`: the first node it refuses, its operator and layer, and the reason.

    Args:
        library: The library that parsed.
        onnx_path: The graph.
        parser: The parser.
        reason: The reason in the log, for a parser that lists no errors.
    """
    if not parser.num_errors:
        return VocabtrimError(f"{library.name} cannot read {onnx_path}: {reason}")
    error = parser.get_error(0)
    why = one_line(error.desc())
    if not error.node_operator():
        return VocabtrimError(f"{library.name} cannot read {onnx_path}: {why}")
    layer = model_layer(error.node_name())
    of_layer = f" of layer {layer}" if layer else ""
    return VocabtrimError(
        f"{library.name} cannot take {error.node_operator()}{of_layer} (node {error.node_name() or error.node()} of "
        f"{onnx_path.name}): {why}; --format onnx has no such limit"
    )


def build_error(library: Library, onnx_path: Path, reason: str) -> VocabtrimError:
    """Returns the error of a failed builder.

    Args:
        library: The library that built.
        onnx_path: The graph.
        reason: The reason in the log.
    """
    advice = "it has attention for --dtype fp16 and bf16 only: " if "dedicated kernel" in reason else ""
    return VocabtrimError(f"{library.name} cannot build {onnx_path.name}: {advice}{reason}")


def model_layer(node_name: str) -> str | None:
    """Returns the layer of a node: "model.layers.3" for "model.layers.3.self_attn.o_proj"."""
    match = _LAYER.match(node_name)
    return match[0] if match else None


def raise_ended(library_name: str, onnx_name: str, code: int, stderr: str) -> NoReturn:
    """Raise the error of a builder process that ended without reporting one.

    Args:
        library_name: The library that it built with.
        onnx_name: The graph's file.
        code: The exit status of the process, or the negative number of the signal that ended it.
        stderr: The text that the process wrote.

    Raises:
        VocabtrimError: The process ran out of memory, or the library crashed.
        RuntimeError: The fault is in this project.
    """
    if code > 0:
        raise RuntimeError(f"the builder of {onnx_name} failed:\n{stderr}")
    if -code == signal.SIGKILL:
        raise VocabtrimError(
            f"the builder of {onnx_name} was killed, probably because memory ran out: close other programs, or export "
            "with a smaller --draft-length or --quantize"
        )
    last = one_line((stderr.strip().splitlines() or ["it gave no reason"])[-1])
    raise VocabtrimError(f"{library_name} crashed on {onnx_name} ({signal.Signals(-code).name}): {last}")
