import pytest

from engines.bundle.graph_file import GraphFile
from tests.graphs import assert_opens
from vocabtrim_export.lowering import ort_products
from vocabtrim_export.random_weights.bundles import RandomSettings, random_bundles


def weights(path):
    graph = GraphFile.read(path)
    return {name: graph.digest([name]) for name in graph.tensors}


@pytest.mark.parametrize("drafter", ["tiny", "eagle3-tiny"])
def test_drafters_share_all_but_their_heads_and_are_what_they_would_be_alone(tmp_path, monkeypatch, drafter):
    calls, real = [], ort_products.quantize_blocks
    monkeypatch.setattr(ort_products, "quantize_blocks", lambda *given: calls.append(1) or real(*given))

    def make(*rows):
        calls.clear()
        settings = RandomSettings("tiny", drafter, rows, quantize_drafter="int4", max_length=64)
        return list(random_bundles(settings, tmp_path / str(rows), lambda *_: None).drafters.values()), len(calls)

    (first, second), quantised = make(64, None)
    (alone,), products = make(None)
    assert quantised == products + 1  # the other head
    for graph in alone.glob("*.onnx"):
        assert weights(second / graph.name) == weights(graph)
        assert b".py" not in graph.read_bytes()  # no line of code, in no directory of this machine
    for graph in [*first.glob("*.onnx"), *second.glob("*.onnx")]:
        assert_opens(graph)
