"""EAGLE heads on ONNX Runtime's CUDA, on a GPU."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from engines import load_engine, read_bundle
from engines.base import Engine
from engines.bundle.read import FEATURES_NAME
from engines.ort.eagle import EagleEngine
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.session import open_session
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.rows import DeviceRows
from runtime import SamplingParams, SpeculativeDecoder
from runtime.loop import decode_rounds
from tests.engines.test_onnxruntime_cuda import SAMPLINGS
from tests.engines.test_onnxruntime_cuda_eagle import sampled_rounds
from tests.gpu import test_onnxruntime_cuda as plain
from tests.gpu.test_onnxruntime_cuda import CALM, LLAMA, PROMPT, TIE, assert_same_choices, check_greedy, write_exact
from tests.integration.eagle_heads import CONFIG, LAYERS, make_tensors, moves

onnxruntime_cuda = plain.onnxruntime_cuda

FEATURES = len(LAYERS) * LLAMA["hidden_size"]
# Cut back to, fed to the head, positions kept: more than fit into one call, and what rounds feed.
STEPS = [(0, 298, 4), (298, 1, 1), (299, 5, 1), (299, 3, 1), (302, 40, 7), (20, 5, 5)]


@pytest.fixture(scope="module")
def export_head(onnxruntime_cuda, random_model, write_head, export_pair):
    """export_head(dtype, quantisation of the head) → ExportResult."""
    sizes = {"hidden": LLAMA["hidden_size"], "size": LLAMA["head_dim"], "inner": LLAMA["intermediate_size"]}
    tensors = make_tensors(**sizes, scale=CALM["initializer_range"])
    head = write_head(tensors, CONFIG | LLAMA, eagle_aux_hidden_state_layer_ids=list(LAYERS))
    wanted = CALM | {"num_hidden_layers": 6, "max_position_embeddings": 1024}

    target = random_model("llama", **wanted)

    def export(dtype="fp16", quantize="none"):
        return export_pair(head, target, dtype=dtype, quantize_drafter=quantize, max_length=512)

    return export


@pytest.fixture(scope="module", params=["none", "int4"])
def pair(export_head, request):
    return export_head(quantize=request.param)


@contextmanager
def on_cuda(pair):
    with load_engine(pair.target, "cuda") as target, load_engine(pair.drafter, "cuda", target) as head:
        yield target, head


@contextmanager
def exact_pair(pair, directory):
    """The same weights in float32 arithmetic on the CPU."""
    with ExitStack() as opened:
        for path, names in [(pair.target, ["model.onnx"]), (pair.drafter, ["model.onnx", "features.onnx"])]:
            (directory / path.name).mkdir()
            for name in names:
                write_exact(path / name, directory / path.name / name)
        sessions = [open_session(directory / path.name / "model.onnx") for path in (pair.target, pair.drafter)]
        target = opened.enter_context(OnnxRuntimeEngine(read_bundle(pair.target), sessions[0]))
        fuse = open_session(directory / pair.drafter.name / FEATURES_NAME)
        yield target, opened.enter_context(EagleEngine(read_bundle(pair.drafter), sessions[1], fuse))


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("fp16", "none"), ("fp16", "int4"), ("bf16", "none"), ("bf16", "int4")]
)
def test_steps_compute_what_float32_does(dtype, quantize, export_head, tmp_path):
    """Features, fused rows and the hidden state that a draft step goes on from, launched and as graphs."""
    pair = export_head(dtype, quantize)
    ids, chance, tie = np.random.default_rng(0).integers(2, 400, 400), np.random.default_rng(1), TIE[dtype]
    with exact_pair(pair, tmp_path) as (exact_target, exact_head), on_cuda(pair) as (target, head):
        for again in range(3):
            for engine in (exact_target, target):
                engine.rewind(0)
            for fed, keep in [(300, 4), (1, 1), (5, 5)]:
                start = target.length
                wanted, found = (engine.feed(ids[start : start + fed], keep=keep) for engine in (exact_target, target))
                assert_same_choices(target, found, wanted, f"target, run {again}, at {start}", tie)
                off = np.abs(found.features - wanted.features).max() / wanted.features.std()
                print(f"{dtype}: features of {fed} tokens are off by {off:.4f} of their spread at most")
                assert off < 2 * tie
            for back, fed, keep in STEPS:
                rows = chance.standard_normal((fed, FEATURES)).astype(np.float16).astype(np.float32)
                for engine in (exact_head, head):
                    engine.rewind(back)
                tokens, where = ids[back : back + fed], f"head, run {again}, at {back}"
                wanted, found = (engine.feed_features(tokens, rows, keep=keep) for engine in (exact_head, head))
                assert_same_choices(head, found, wanted, where, tie)
                for token in (7, 8, 9):
                    wanted, found = (engine.feed([token]) for engine in (exact_head, head))
                    assert_same_choices(head, found, wanted, f"{where}, drafting", 2 * tie)
        for engine in (target, head):
            assert engine.is_capturable, "some node has no CUDA kernel, or is fed from the host"
            assert engine.cuda_graphs, "no step is a CUDA graph"


@pytest.mark.parametrize("draft_length", [1, 4])
def test_a_round_in_one_graph_is_the_stepwise_one(draft_length, pair, monkeypatch):
    with on_cuda(pair) as (target, head):
        made = []
        for stepwise in (False, True):
            if stepwise:
                monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
            for accepted in range(draft_length + 1):
                options = {"force_accepted": accepted, "draft_length": draft_length, "max_new_tokens": 60}
                made.append(moves(target, head, PROMPT, **options))
        assert made[: draft_length + 1] == made[draft_length + 1 :]
        full = {
            unread: each.has_graph for (_, unread, steps), each in head.rounds.kept.items() if steps == draft_length
        }
        assert full == dict.fromkeys(range(1, draft_length + 2), True), "some round is no CUDA graph"


def test_features_stay_on_the_gpu(pair, monkeypatch):
    read, rows_read = DeviceRows.read, []
    monkeypatch.setattr(DeviceRows, "read", lambda rows, count: rows_read.append(count) or read(rows, count))
    with on_cuda(pair) as (target, head):
        rounds = list(decode_rounds(target, head, PROMPT, max_new_tokens=80, draft_length=4))
        assert rows_read[0] == len(PROMPT)
        assert len(rows_read) <= 2  # a last round may draft nothing
        found = [f"{1e6 * (r.seconds - r.draft_seconds - r.verify_seconds):.0f} µs" for r in rounds[-6:-1]]
        print("host:", found, f"4 draft steps: {1e6 * rounds[-3].draft_seconds:.0f} µs")


@pytest.mark.parametrize(
    "params", SAMPLINGS, ids=lambda params: f"{params.temperature}-{params.top_k}-{params.top_p}-{params.min_p}"
)
def test_a_sampled_round_in_one_graph_is_the_hosts(params, pair):
    """Token for token, but for a sum that rounds to the other side of a border."""
    with on_cuda(pair) as engines:
        made = list(sampled_rounds(engines, engines, params, 40))
        assert all(each.has_graph for each in engines[1].rounds.kept.values()), "no round became a CUDA graph"
    differing = [pair for pair in made if pair[0] != pair[1]]
    print(differing, [found[1].count for found, _ in made])
    assert len(differing) <= 1


def test_speculation_gives_the_targets_own_greedy_output(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter, device="cuda", draft_length=4) as decoder:
        assert decoder.drafter.gpu is decoder.target.gpu
        check_greedy(pair, decoder)
        sampled = decoder.generate(PROMPT, max_new_tokens=60, sampling=SamplingParams(temperature=1.0, seed=1))
        assert sampled.stats.drafted


@pytest.mark.parametrize(("device", "drafter_device"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_head_on_another_device(device, drafter_device, pair):
    with SpeculativeDecoder.load(
        pair.target, pair.drafter, device, drafter_device=drafter_device, draft_length=4
    ) as decoder:
        check_greedy(pair, decoder)
