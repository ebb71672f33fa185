"""ONNX Runtime's errors become one line, and nothing is printed beside it."""

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.errors import VocabtrimError
from engines.ort.session import open_session


def test_a_graph_that_cannot_be_opened_prints_nothing(tmp_path, capfd):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4]) for name in "xy")
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [4], [1.0] * 4)
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "x", "scale"], ["y"], epsilon=-1.0, domain="com.microsoft"
    )
    graph = helper.make_graph([node], "graph", [x], [y], [scale])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets), tmp_path / "model.onnx")
    with pytest.raises(VocabtrimError, match=r"cannot open .* on the CPU: .*epsilon"):
        open_session(tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_release_that_computes_otherwise_is_refused(tmp_path, monkeypatch):
    """Releases up to 1.29 compute other logits than the graph asks for."""
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.2")
    with pytest.raises(VocabtrimError, match=r"ONNX Runtime 1\.30\.2 is too old .*: install .*, 1\.31 or newer"):
        open_session(tmp_path / "model.onnx")
    for version in ("1.31.0.dev20261001", "2.0.0"):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        with pytest.raises(VocabtrimError, match="cannot open"):
            open_session(tmp_path / "model.onnx")
