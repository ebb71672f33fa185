"""ONNX Runtime's errors become one line, and nothing is printed beside it."""

import os
import sys

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.errors import VocabtrimError
from engines.ort.session import new_session, open_session


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


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process of Linux")
def test_a_session_has_a_thread_for_each_core_that_its_process_may_use():
    """ONNX Runtime itself takes all cores of the machine, and binds a thread to each."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [x], [y])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        before = set(os.listdir("/proc/self/task"))
        session = new_session(model.SerializeToString())
        assert set(os.listdir("/proc/self/task")) == before  # the thread that calls is the one
        assert session.get_session_options().intra_op_num_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
