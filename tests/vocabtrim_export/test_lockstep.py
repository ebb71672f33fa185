"""A proof's calls in one run: what they compute one after the other, with each weight dequantised once."""

from collections import Counter

import numpy as np
import onnx
import pytest

from engines.bundle.graph_io import LOGITS, PAST
from engines.bundle.read import MODEL_NAME
from engines.ort.session import new_session
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.proof.computed import proof_session, run_graph
from vocabtrim_export.proof.decoding import Decoding
from vocabtrim_export.proof.float_products import float_products
from vocabtrim_export.proof.lockstep import call_name, in_lockstep
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.proof.tokens import Window, calls
from vocabtrim_export.sources.source import DTYPES, load_source


@pytest.mark.parametrize(
    ("architecture", "dtype", "quantization"),
    [("gemma2", "fp32", "int4"), ("gpt2", "fp16", "none"), ("gpt_oss", "fp32", "int8")],
)
def test_calls_in_one_run_compute_what_they_do_one_after_the_other(
    architecture, dtype, quantization, random_model, tmp_path
):
    source = load_source(str(random_model(architecture)), DTYPES[dtype])
    plan = BundlePlan("target", source, dtype, quantization, context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    window = Window(5, 3) if architecture != "gpt2" else None
    fed = calls(source, 128, window)
    assert len(fed.lengths) == 3
    with proof_session(tmp_path / MODEL_NAME, window) as session:
        decoding = Decoding(session)
        rows = [decoding.feed(call.token_ids)[LOGITS] for call in fed]
    computed = run_graph(tmp_path, fed, window)
    spread = np.concatenate(rows).std()
    np.testing.assert_allclose(computed.outputs[LOGITS], np.concatenate(rows), atol=1e-5 * spread)
    assert computed.cache.keys() == decoding.cache.keys()
    for name, value in decoding.cache.items():
        assert name.startswith(PAST)
        np.testing.assert_allclose(computed.cache[name], value[0], atol=1e-4 * value.std())


def test_each_weight_is_dequantised_once_for_all_calls(random_model, tmp_path):
    source = load_source(str(random_model("llama")), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", "int8", context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    written = onnx.load(tmp_path / MODEL_NAME)
    float_products(written)
    before = Counter(node.op_type for node in written.graph.node)
    in_lockstep(written, 3)
    after = Counter(node.op_type for node in written.graph.node)
    assert after["DequantizeLinear"] == before["DequantizeLinear"] > 0
    assert after["FusedMatMul"] == before["FusedMatMul"]
    assert after["GroupQueryAttention"] == 3 * before["GroupQueryAttention"]


def test_a_product_of_activations_is_one_of_each_call():
    """Scores are products too, of which no row of one call belongs to another's."""
    parts = ((("a", "b"), "c"), (("c", "weight"), "d"))
    nodes = [onnx.helper.make_node("MatMul", read, [written]) for read, written in parts]
    shapes = {"a": [1, "S", 3], "b": [1, 3, "S"], "d": [1, "S", 2]}
    a, b, d = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items())
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "weight")
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "products", [a, b], [d], [weight]), ir_version=10)
    in_lockstep(model, 2)
    model.opset_import[0].version = 21
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    inputs = {call_name("a", 0): x, call_name("b", 0): x.swapaxes(1, 2), call_name("a", 1): -x}
    inputs[call_name("b", 1)] = x.swapaxes(1, 2)
    first, second = new_session(model.SerializeToString()).run(None, inputs)
    np.testing.assert_array_equal(first, x @ x.swapaxes(1, 2) @ np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(second, -first)
