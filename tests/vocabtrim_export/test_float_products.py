"""The proof's view of quantised products: DequantizeLinear and a product are what MatMulNBits computes in float32."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.ort.session import new_session
from vocabtrim_export.proof.float_products import float_products

ROWS = 24


def product(bits, size, block):
    """A MatMulNBits of random blocks; the last one of a row is filled up."""
    random, blocks = np.random.default_rng(0), -(-size // block)
    shapes = {"values": (ROWS, blocks, block * bits // 8), "zeros": (ROWS, -(-blocks * bits // 8))}
    constants = {name: random.integers(0, 256, shape, dtype=np.uint8) for name, shape in shapes.items()}
    constants["scales"] = random.random((ROWS, blocks), dtype=np.float32)
    options = {"K": size, "N": ROWS, "bits": bits, "block_size": block, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", "values", "scales", "zeros"], ["y"], domain="com.microsoft", **options)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, n]) for name, n in (("x", size), ("y", ROWS)))
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "product", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize(("bits", "size", "block"), [(8, 256, 128), (8, 72, 32), (4, 128, 32), (4, 100, 32)])
def test_a_product_on_dequantised_weights_is_that_of_the_blocks(bits, size, block):
    written = product(bits, size, block)
    view = onnx.ModelProto()
    view.CopyFrom(written)
    float_products(view)
    assert "MatMulNBits" not in {node.op_type for node in view.graph.node}
    x = {"x": np.random.default_rng(1).standard_normal((1, 3, size), np.float32)}
    of_blocks, of_weight = (
        new_session(model.SerializeToString(), weights_in_file=True).run(None, x)[0] for model in (written, view)
    )
    np.testing.assert_allclose(of_weight, of_blocks, rtol=1e-4, atol=1e-3)


def test_a_row_with_half_a_byte_of_zero_points_left_over_stays_a_matmulnbits():
    view = product(4, 96, 32)
    float_products(view)
    assert [node.op_type for node in view.graph.node] == ["MatMulNBits"]
