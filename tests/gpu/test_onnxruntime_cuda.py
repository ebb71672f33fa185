"""ONNX Runtime's CUDA on a GPU computes what the CPU does, as CUDA graphs too."""

import numpy as np
import onnx
import pytest

from engines import load_engine, read_bundle
from engines.base import Engine
from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.session import open_session
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.provider import open_cuda_session, require_provider
from engines.sampling_params import Sampling
from runtime import SamplingParams, SpeculativeDecoder
from runtime.loop import decode_rounds
from tests.engines.test_onnxruntime_cuda import SAMPLINGS, host_round

NEEDS = "needs an NVIDIA GPU and onnxruntime-gpu"
# Head sizes and group that attention has kernels for; two layers, so that a cache can be mixed up.
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
PROMPT = [5, 17, 200, 33, 91, 4, 250, 12, 77, 140, 3, 9]
# Small weights, so that rounding does not grow from layer to layer: PyTorch's own half precision moves this model's
# logits by up to 0.007 (fp16) and 0.05 (bf16) of their standard deviation, those of LLAMA by 0.1 and 0.6.
CALM = LLAMA | {"initializer_range": 0.06}
TIE = {"fp16": 0.02, "bf16": 0.15}
# Tokens fed, positions kept: a prompt, single tokens, blocks, one longer than any that is kept bound; graphs are
# captured when a shape first runs and replayed after that.
STEPS = [(24, 1), (1, 1), (1, 1), (1, 1), (5, 5), (5, 5), (5, 5), (3, 3), (40, 4), (1, 1), (5, 5), (5, 5)]


@pytest.fixture(scope="module")
def onnxruntime_cuda():
    """Skips where there is none."""
    try:
        cuda.current_gpu()
        require_provider()
    except VocabtrimError as error:
        pytest.skip(f"{NEEDS}: {error}")


@pytest.fixture(scope="module")
def directory(onnxruntime_cuda, random_model):
    return random_model("llama", **LLAMA)


@pytest.fixture(scope="module")
def pair(directory, export_pair):
    return export_pair(directory, dtype="fp16", quantize_drafter="int4")


@pytest.fixture(scope="module")
def exact(directory, export_pair):
    return export_pair(directory, dtype="fp32", quantize_drafter="int4")


def assert_same_choices(engine, found, wanted, where, tie):
    """Two outputs over the same tokens: scores are near, and choices equal but for near-ties, which are printed."""
    scores = wanted.logits
    spread = scores.std()
    np.testing.assert_allclose(found.logits, scores, atol=tie * spread, err_msg=where)
    kept = np.arange(scores.shape[1]) if engine.vocab_map is None else engine.vocab_map.kept_token_ids
    for row, (a, b) in enumerate(zip(wanted.token_ids, found.token_ids, strict=True)):
        if a != b:
            gap = float(scores[row, kept.searchsorted(a)] - scores[row, kept.searchsorted(b)])
            print(f"near-tie {where}, row {row}: {b} for {a}, {gap:.4f} below it")
            assert gap <= 2 * tie * spread, f"{where}, row {row}: {b} for {a}"


def write_exact(source, path):
    """A graph with its own weights, as they were rounded and quantised, in float32 arithmetic."""
    model = onnx.load(source)
    halves = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    graph = model.graph
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    for tensor in [*graph.initializer, *constants]:
        if tensor.data_type in halves:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":  # else the CPU rounds what it multiplies int4 weights with to int8
                attribute.i = 0
            elif attribute.name == "to" and attribute.i in halves:
                attribute.i = onnx.TensorProto.FLOAT
    onnx.save(model, path)


def exact_engine(path):
    """The bundle on the CPU, computing in float32."""
    write_exact(path / "model.onnx", path / "exact.onnx")
    return OnnxRuntimeEngine(read_bundle(path), open_session(path / "exact.onnx"))


@pytest.mark.parametrize("role", ["target", "drafter"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_steps_compute_what_float32_does(role, dtype, onnxruntime_cuda, random_model, export_pair):
    path = getattr(export_pair(random_model("llama", **CALM), dtype=dtype, quantize_drafter="int4"), role)
    ids = np.random.default_rng(0).integers(2, 400, 120)
    with exact_engine(path) as reference, load_engine(path, "cuda") as engine:
        for again in range(3):  # launched, captured, replayed
            for fed, keep in STEPS:
                start = reference.length
                wanted, found = (x.feed(ids[start : start + fed], keep=keep) for x in (reference, engine))
                assert_same_choices(engine, found, wanted, f"run {again}, after {start + fed} tokens", TIE[dtype])
            for each in (reference, engine):
                each.rewind(20)
            wanted, found = (each.feed(ids[60:65], keep=5) for each in (reference, engine))
            assert_same_choices(engine, found, wanted, f"run {again}, after a rewind", TIE[dtype])
            for each in (reference, engine):
                each.rewind(0)
        assert engine.is_capturable, "some node of the model has no CUDA kernel, or is fed from the host"
        assert engine.cuda_graphs == len({step for step in STEPS if step[0] <= 32}), "a step is no CUDA graph"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_a_round_in_one_graph_is_the_stepwise_one(shared, draft_length, pair, monkeypatch):
    with load_engine(pair.target, "cuda") as target:
        for path in (pair.drafter, pair.target):
            drafter = load_engine(path, "cuda", share_cache_with=target if shared else None)
            if not shared:
                drafter.close()
                session = open_cuda_session(read_bundle(path), target.gpu.stream)
                drafter = OnnxRuntimeCudaEngine(read_bundle(path), session, target.gpu)
            with drafter:
                made = []
                for stepwise in (False, True):
                    if stepwise:
                        monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
                    rounds = list(decode_rounds(target, drafter, PROMPT, max_new_tokens=80, draft_length=draft_length))
                    made.append([(entry.tokens, entry.drafted, entry.accepted) for entry in rounds])
                    if not stepwise:
                        graphs = [each.has_graph for each in drafter.rounds.kept.values()]
                        assert any(graphs), "no round became a CUDA graph"
                        rounds = [entry for entry in rounds if entry.drafted == draft_length][-5:]
                        print([f"{1e6 * (r.seconds - r.draft_seconds - r.verify_seconds):.0f} µs" for r in rounds])
                monkeypatch.undo()
                assert made[0] == made[1]


@pytest.mark.parametrize(
    "params", SAMPLINGS, ids=lambda params: f"{params.temperature}-{params.top_k}-{params.top_p}-{params.min_p}"
)
def test_a_sampled_round_in_one_graph_is_the_hosts(params, pair):
    """Token for token where both take the same numbers, but for a sum that rounds to the other side of a border."""
    differing, counts, text = [], [], [*PROMPT]
    with (
        load_engine(pair.target, "cuda") as target,
        load_engine(pair.drafter, "cuda", share_cache_with=target) as drafter,
    ):
        for number in range(60):
            for engine in (target, drafter):
                engine.rewind(0)
                engine.feed(text[:-1])
            rng = np.random.default_rng(number)
            made = target.speculate(drafter, text[-1:], 4, Sampling(params, rng))
            for engine in (target, drafter):
                engine.rewind(len(text) - 1)
            uniforms = np.random.default_rng(number).random(9, np.float32)
            wanted = host_round(target, drafter, text[-1:], 4, params, uniforms)
            if (made.drafted.tolist(), made.accepted) != wanted:
                differing.append((number, made.drafted.tolist(), made.accepted, wanted))
            counts.append(made.accepted.count)
            text = [*text[:40], made.accepted.next_token]
        assert all(each.has_graph for each in drafter.rounds.kept.values()), "no round became a CUDA graph"
    print(differing, counts)
    assert len(differing) <= 1
    assert len(set(counts)) > 1


def test_replays_read_their_inputs_anew_and_repeat_themselves(pair):
    with load_engine(pair.target, "cuda") as engine:
        outputs = []
        for first in (7, 7, 7, 107):  # plain and captured, then replayed
            engine.rewind(0)
            output = engine.feed(np.arange(first, first + 5), keep=5)
            outputs.append((output.token_ids.tolist(), output.logits.copy()))
        for tokens, logits in outputs[1:3]:
            assert tokens == outputs[0][0]
            np.testing.assert_array_equal(logits, outputs[0][1])
        assert not np.array_equal(outputs[3][1], outputs[0][1])


def check_greedy(pair, decoder):
    """`decoder` says what its target says alone, on the device that it is on, up to the first near-tie."""
    found = decoder.generate(PROMPT, max_new_tokens=80).token_ids
    decoder.target.rewind(0)
    output, expected = decoder.target.feed(PROMPT), []
    while True:
        expected.append(int(output.token_ids[-1]))
        if len(expected) == 80:
            break
        output = decoder.target.feed(expected[-1:])
    differing = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if differing is not None:  # from there on the two texts have nothing to do with each other
        with load_engine(pair.target) as reference:
            logits = reference.feed(PROMPT + expected[:differing]).logits[0]
        gap = float(logits[expected[differing]] - logits[found[differing]])
        print(f"near-tie after {differing} new tokens: {found[differing]}, {gap:.4f} below {expected[differing]}")
        assert abs(gap) <= 0.05 * logits.std()


def test_speculation_gives_the_targets_own_greedy_output(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter, device="cuda", draft_length=4) as decoder:
        assert decoder.drafter.cache is decoder.target.cache
        assert decoder.drafter.gpu is decoder.target.gpu
        check_greedy(pair, decoder)


def test_a_drafter_with_its_own_cache(pair):
    target = load_engine(pair.target, "cuda")
    with SpeculativeDecoder(target, load_engine(pair.drafter, "cuda"), draft_length=4) as decoder:
        check_greedy(pair, decoder)


@pytest.mark.parametrize(("device", "drafter_device"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_drafter_on_another_device(device, drafter_device, pair):
    with SpeculativeDecoder.load(
        pair.target, pair.drafter, device, drafter_device=drafter_device, draft_length=4
    ) as decoder:
        check_greedy(pair, decoder)


@pytest.mark.parametrize("shared", [False, True])
def test_the_target_as_its_own_drafter_accepts_nearly_everything(shared, pair):
    """Whatever positions or rollback lose shows here."""
    target = load_engine(pair.target, "cuda")
    drafter = load_engine(pair.target, "cuda", share_cache_with=target if shared else None)
    with SpeculativeDecoder(target, drafter, draft_length=4) as decoder:
        for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=1)):
            stats = decoder.generate(PROMPT, max_new_tokens=80, sampling=sampling).stats
            print(f"{stats.accepted} of {stats.drafted} drafted tokens accepted")
            assert stats.accepted >= 0.9 * stats.drafted > 0  # but for near-ties between shapes


def test_fp32_is_refused_or_runs(exact):
    """Refused while ONNX Runtime has no fp32 attention on CUDA, with what to do; never slow in silence."""
    refusal = ""
    try:
        with load_engine(exact.target, "cuda") as engine:
            assert engine.is_capturable
    except VocabtrimError as error:
        refusal = str(error)
    assert not refusal or "--dtype fp16 or bf16" in refusal


def test_a_cache_larger_than_the_gpu_says_what_to_lower(onnxruntime_cuda, pair, monkeypatch):
    allocate = OnnxRuntimeEngine._allocate_caches

    def huge(self):
        self.capacity = 1 << 31
        return allocate(self)

    monkeypatch.setattr(OnnxRuntimeEngine, "_allocate_caches", huge)
    with pytest.raises(VocabtrimError, match=r"out of GPU memory.*--max-length"):
        load_engine(pair.target, "cuda")
