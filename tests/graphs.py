"""Open the graphs that an export writes with other tools."""

from pathlib import Path

import onnx
import onnxruntime
from polygraphy.tools import main as polygraphy

# ONNX Runtime's own operator, which it registers in ONNX's domain: ONNX's checker has no schema for it there.
_NOT_ONNX = "SimplifiedLayerNormalization"


def assert_opens(path: Path) -> None:
    """`path` opens with all of its weights in the onnx package, is valid to its checker, and ONNX Runtime loads it.

    `polygraphy inspect model` shows it too. The onnx package refuses weights whose file has a second name as a possible
    attack.
    """
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == _NOT_ONNX:
            node.domain = "com.microsoft"  # the checker passes over domains that it does not know
    onnx.checker.check_model(model)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert polygraphy(["inspect", "model", str(path)]) == 0
