"""The graphs that warp and draw on a device, against the runtime's own functions on the host."""

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.ort.session import new_session
from engines.ort_cuda.graphs.builder import GraphBuilder
from engines.ort_cuda.graphs.sampling import draw_graph, warp_graph
from engines.sampling_params import SamplingParams
from runtime.sampling import distribution, sample

SIZES = [1, 2, 7, 64, 1000, 4099]


def session(model: ir.Model) -> ort.InferenceSession:
    stored = ir.to_proto(model).SerializeToString()
    return new_session(stored)


@functools.cache
def warp_session(*arguments) -> ort.InferenceSession:
    return session(warp_graph(*arguments))


def warp(logits, params: SamplingParams, logits_type=ir.DataType.FLOAT):
    graph = warp_session(logits.shape[-1], logits_type, params.top_k, params.top_p < 1, params.min_p > 0)
    chances = {"temperature": params.temperature, "top_p": params.top_p, "min_p": params.min_p}
    wanted = {value.name for value in graph.get_inputs()}
    inputs = {name: np.array([value], np.float32) for name, value in chances.items() if name in wanted}
    (probabilities,) = graph.run(None, {"logits": logits[None], **inputs})
    return probabilities


@pytest.mark.parametrize("top_k", [0, 1, 5, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6, 0.9999])
@pytest.mark.parametrize(("temperature", "min_p"), [(1.0, 0.0), (0.3, 0.0), (2.5, 0.0), (2.5, 0.11)])
def test_warping_keeps_what_the_host_keeps(top_k, top_p, temperature, min_p):
    """Among them many equal logits, as half precision makes them."""
    rng, params = np.random.default_rng(1), SamplingParams(temperature, top_k, top_p, min_p=min_p)
    for size in SIZES:
        for logits in (rng.normal(size=(3, size)) * 4, rng.integers(-3, 4, (3, size)), np.zeros((3, size))):
            wanted = distribution(logits.astype(np.float32), params)
            found = warp(logits.astype(np.float32), params)
            border = (found > 0) != (wanted > 0)  # sums on the border of top-p may round either way:
            mass = np.where(border, found + wanted, 0).sum(axis=1)
            assert ((border.sum(axis=1) <= 1) | (mass < 1e-5)).all()  # one entry, or tiny ones
            for a, b, out in zip(found, wanted, border, strict=True):
                a, b = a[~out], b[~out]
                np.testing.assert_allclose(a / a.sum(), b / b.sum(), rtol=2e-5, atol=1e-9)


def test_half_precision_logits_are_warped_in_float32():
    logits = np.random.default_rng(2).normal(size=(2, 300)).astype(np.float16)
    params = SamplingParams(0.7, top_p=0.95)
    wanted = distribution(logits.astype(np.float32), params)
    np.testing.assert_allclose(warp(logits, params, ir.DataType.FLOAT16), wanted, rtol=1e-5)


def test_of_equal_weights_the_smaller_ids_stay():
    logits = np.array([[0, 1, 0, 1, 0, 1, 1, 0]], np.float32)
    found = warp(logits, SamplingParams(0.05, top_p=0.7))  # three of the four ones hold it
    assert np.flatnonzero(found[0]).tolist() == [1, 3, 5]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(1.0), SamplingParams(1.0, 3, 0.9), SamplingParams(1.0, min_p=0.1)])
def test_logits_that_are_not_finite_draw_no_token(wrong, params):
    logits = np.zeros((1, 50), np.float32)
    logits[0, 7] = wrong
    (token,) = session(draw_graph(50, None)).run(
        None, {"probabilities": warp(logits, params), "uniform": np.array([0.5], np.float32)}
    )
    assert token.tolist() == [[-1]]


def test_a_logit_of_minus_infinity_weighs_nothing():
    logits = np.array([[0, -np.inf, 0]], np.float32)
    np.testing.assert_allclose(warp(logits, SamplingParams(1.0)), [[0.5, 0, 0.5]])


class Fixed:
    def __init__(self, number):
        self.number = float(number)

    def random(self):
        return self.number


@pytest.mark.parametrize("size", SIZES)
def test_drawing_is_the_hosts(size):
    """Weights and uniforms are multiples of powers of two, so that no sum rounds."""
    rng, graph = np.random.default_rng(3), session(draw_graph(size, np.arange(size) * 3 + 1))
    for _ in range(30):
        weights = rng.integers(0, 4, size).astype(np.float32)
        weights[rng.integers(size)] = 1
        for number in (0, 0.5, 255 / 256, rng.integers(256) / 256):
            inputs = {"probabilities": weights[None], "uniform": np.array([number], np.float32)}
            (token,) = graph.run(None, inputs)
            assert token.tolist() == [[3 * sample(weights, Fixed(number)) + 1]]


def test_blocks_hold_the_values_in_order():
    graph = GraphBuilder("blocks")
    value = graph.input("x", ir.DataType.FLOAT, ["rows", 10])
    blocks, count, width = graph.blocks(value, 10)
    assert (count, width) == (3, 4)
    model = graph.finish({"y": (blocks, ir.DataType.FLOAT, ["rows", count, width])})
    (found,) = session(model).run(None, {"x": np.arange(20, dtype=np.float32).reshape(2, 10)})
    assert found.reshape(2, 12).tolist() == [[*range(10), 0, 0], [*range(10, 20), 0, 0]]
