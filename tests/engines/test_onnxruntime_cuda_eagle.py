"""EAGLE heads on ONNX Runtime's CUDA, without a GPU: see `test_onnxruntime_cuda`."""

from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, repeat
from types import SimpleNamespace

import numpy as np
import pytest

from engines import load_engine, read_bundle
from engines.base import Engine
from engines.bundle.read import FEATURES_NAME, MODEL_NAME
from engines.errors import VocabtrimError
from engines.numbers import from_float32, to_float32
from engines.ort import engine as ort_engine
from engines.ort.session import open_session
from engines.ort_cuda import load as cuda_load
from engines.ort_cuda import rows as cuda_rows
from engines.ort_cuda.eagle import CudaEagleEngine, CudaFeatureEngine
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.sampling_params import Sampling
from runtime import SamplingParams, SpeculativeDecoder
from runtime.drafting import Drafting
from runtime.loop import decode_rounds
from tests.engines.test_onnxruntime_cuda import SAMPLINGS, HostGpu, HostStream, host_round
from tests.integration import eagle_heads, layer_heads
from tests.integration.eagle_heads import LAYERS, make_tensors

PROMPT = list(range(40, 62))


@pytest.fixture(scope="module")
def target_dir(random_model):
    return random_model("gpt2", n_layer=6)  # reads position_ids


@pytest.fixture(scope="module")
def head_dir(write_head):
    return write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))


@pytest.fixture(scope="module")
def pair(head_dir, target_dir, export_pair):
    return export_pair(head_dir, target_dir, k=100000)


@pytest.fixture(scope="module")
def first_pair(write_head, random_model, export_pair):
    """An EAGLE-1 head: its hidden states are the target's features."""
    head = write_head(layer_heads.safeailab(layer_heads.make_tensors()), layer_heads.CONFIG)
    return export_pair(head, random_model("llama", num_hidden_layers=3), k=100000)


class Spied(HostStream):
    """from_features: copies out of the target's buffer."""

    def __init__(self):
        super().__init__()
        self.watched, self.from_features = range(0), 0

    def copy(self, target, source, size):
        super().copy(target, source, size)
        self.from_features += source in self.watched


@contextmanager
def on_device(pair):
    """Target and head, as if on CUDA, on one stream."""
    gpu = HostGpu(stream := Spied())
    with ExitStack() as opened:
        path = pair.target
        session = open_session(path / MODEL_NAME)
        target = opened.enter_context(CudaFeatureEngine(read_bundle(path), session, gpu))
        path = pair.drafter
        fuse = open_session(path / FEATURES_NAME) if (path / FEATURES_NAME).exists() else None
        session = open_session(path / MODEL_NAME)
        head = opened.enter_context(CudaEagleEngine(read_bundle(path), session, fuse, gpu))
        memory = target.features.memory
        stream.watched = range(memory.data_ptr(), memory.data_ptr() + memory.tensor_size_in_bytes())
        yield target, head, stream


@contextmanager
def on_host(pair):
    with load_engine(pair.target) as target, load_engine(pair.drafter) as head:
        yield target, head


def moves(target, head, **options):
    return eagle_heads.moves(target, head, PROMPT, **options)


@pytest.mark.parametrize("draft_length", [1, 3])
def test_a_head_of_the_first_kind_drafts_on_the_device_too(draft_length, first_pair, monkeypatch):
    with on_host(first_pair) as host, on_device(first_pair) as (target, head, _):
        for accepted in range(draft_length + 1):
            options = {"draft_length": draft_length, "force_accepted": accepted}
            assert moves(target, head, **options) == moves(*host, **options)
        assert {unread for _, unread, _ in head.rounds.kept} == set(range(1, draft_length + 2))
        monkeypatch.setattr(CudaFeatureEngine, "speculate", Engine.speculate)
        assert moves(target, head, draft_length=draft_length) == moves(*host, draft_length=draft_length)


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.std(), rtol=1e-4)


def test_steps_give_what_the_cpu_engines_give(pair, monkeypatch):
    """Drafts are equal in several parts, after rewinds, and from the hidden state that the last row left."""
    monkeypatch.setattr(ort_engine, "CHUNK", 8)
    chance = np.random.default_rng(1)
    ids, rows = chance.integers(2, 400, 80), chance.standard_normal((80, 192)).astype(np.float32)
    with on_host(pair) as host, on_device(pair) as (*device, _):
        for back, fed, keep in [(0, 25, 3), (25, 1, 1), (26, 5, 5), (28, 16, 2), (7, 19, 8), (26, 3, 3)]:
            for engine in (host[0], device[0]):
                engine.rewind(back)
            wanted, found = (each.feed(ids[back : back + fed], keep=keep) for each in (host[0], device[0]))
            assert found.features.shape == (fed, 192)
            same(found.features, wanted.features)
            same(found.logits, wanted.logits)
        for back, fed, keep in [(0, 25, 3), (25, 1, 1), (26, 5, 5), (28, 16, 2), (7, 19, 8), (26, 3, 3)]:
            given = []
            for head in (host[1], device[1]):
                head.rewind(back)
                output = head.feed_features(ids[back : back + fed], rows[back : back + fed], keep=keep)
                steps = [output.logits.copy(), *(head.feed([token]).logits.copy() for token in (7, 8, 9))]
                given.append(np.concatenate(steps))
            same(given[1], given[0])
        head = device[1]
        head.rewind(4)
        with pytest.raises(ValueError, match="the row that it computed last"):
            head.feed([42])
        with pytest.raises(ValueError, match=r"2 tokens go with \[tokens, 192\]"):
            head.feed_features([1, 2], np.zeros((1, 192), np.float32))


@pytest.mark.parametrize("draft_length", [1, 2, 4])
def test_a_round_is_the_stepwise_one_after_any_number_of_accepted_tokens(draft_length, pair, monkeypatch):
    with on_host(pair) as host, on_device(pair) as (target, head, stream):
        for accepted in range(draft_length + 1):
            options = {"draft_length": draft_length, "force_accepted": accepted}
            wanted, found = moves(*host, **options), moves(target, head, **options)
            assert found == wanted
        met = {unread for _, unread, steps in head.rounds.kept if steps == draft_length}
        assert met == set(range(1, draft_length + 2))
        costs = []
        for entry in decode_rounds(target, head, PROMPT, max_new_tokens=30, draft_length=draft_length):
            costs.append((entry.drafted, len(stream.copies), stream.waits))
            stream.copies.clear()
            stream.waits = 0
        assert {cost[1:] for cost in costs[2:] if cost[0]} == {(2, 1)}  # the numbers there and back, and one wait
        monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
        assert moves(target, head, draft_length=draft_length) == moves(*host, draft_length=draft_length)


def test_a_round_leaves_the_engines_as_steps_do(pair):
    """The head reads the target's features, and the hidden state of its own last draft step."""
    with on_host(pair) as host, on_device(pair) as (*device, _):
        for target, head in (host, device):
            head.feed_features([*PROMPT[1:], 8], target.feed(PROMPT).features)
            features = target.feed([8, 9, 10]).features[:2].copy()
            target.rewind(len(PROMPT) + 2)  # 10 is not what the target says
        assert device[0].speculate(device[1], [8, 9, 11], 3) is None  # features of three tokens are not there
        made = device[0].speculate(device[1], [9, 11], 3)
        output, drafted = host[1].feed_features([9, 11], features), []
        for _ in range(3):
            drafted.append(int(output.token_ids[0]))
            output = host[1].feed(drafted[-1:])
        assert made.drafted.tolist() == drafted
        verified = host[0].feed([11, *drafted], keep=4)
        same(made.verified.features, verified.features)
        same(made.verified.logits, verified.logits)
        same(device[1].feed(drafted[-1:]).logits, output.logits)
        assert [engine.length for engine in device] == [engine.length for engine in host]


def test_features_stay_on_the_device_and_the_output_is_the_targets(pair):
    with SpeculativeDecoder.load(pair.target) as alone, on_device(pair) as (target, head, stream):
        decoder, drafted = SpeculativeDecoder(target, head, draft_length=4), 0
        for prompt in (PROMPT, [7], [5, 17, 200]):
            stream.from_features = 0
            wanted = alone.generate(prompt, max_new_tokens=200)
            found = decoder.generate(prompt, max_new_tokens=200)  # to the end of the context
            assert found.token_ids == wanted.token_ids
            drafted += found.stats.drafted
            assert stream.from_features <= 2  # those of the prompt, and of a last round without a draft
        assert drafted > 200


def test_past_the_end_of_its_context_a_head_is_silent(pair):
    with on_host(pair) as host, on_device(pair) as (target, head, stream):
        made = []
        for engines in (host, (target, head)):
            engines[1].capacity = 64
            made.append(moves(*engines, max_new_tokens=100))
        assert made[0] == made[1]
        assert [len(draft) for draft, _ in made[0]][-20:] == [0] * 20
        assert stream.from_features == 1  # nobody will read what the target gives from there on


def test_a_head_that_was_silent_reads_what_it_missed(pair, monkeypatch):
    room, asked = Drafting.room, []

    def sometimes(*args):
        asked.append(args)
        return room(*args) if len(asked) % 5 > 2 else 0

    monkeypatch.setattr(Drafting, "room", sometimes)
    with on_host(pair) as host, on_device(pair) as (target, head, _):
        for accepted in (1, 4):
            made = []
            for engines in (host, (target, head)):
                asked.clear()
                made.append(moves(*engines, force_accepted=accepted))
            assert made[0] == made[1]
            assert [len(draft) for draft, _ in made[0]][:7] == [0, 0, 4, 4, 0, 0, 0]


def test_sampling_step_by_step_is_the_cpus(pair, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
    with (
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as host,
        on_device(pair) as (target, head, _),
    ):
        device = SpeculativeDecoder(target, head, draft_length=4)
        for seed in range(3):
            sampling = SamplingParams(temperature=1.5, seed=seed)
            wanted, found = (each.generate(PROMPT, max_new_tokens=60, sampling=sampling) for each in (host, device))
            assert found.token_ids == wanted.token_ids
            assert (found.stats.drafted, found.stats.accepted) == (wanted.stats.drafted, wanted.stats.accepted)


def call_next(functions, argument):
    return next(functions)(argument)


def sampled_rounds(device, host, params, count):
    """Decode some texts in rounds on the device and by the host's rules, with the same uniform numbers."""
    text = [*PROMPT]
    for number in range(count):
        for target, head in (device, host):
            for engine in (target, head):
                engine.rewind(0)
            head.remember(text)
            head.feed_features(text[1:-1], target.feed(text[:-2]).features)
            rows = target.feed(text[-2:-1]).features.copy()
        made = device[0].speculate(device[1], text[-1:], 4, Sampling(params, np.random.default_rng(number)))
        for engine, length in zip(host, (len(text) - 1, len(text) - 2), strict=True):
            engine.rewind(length)
        feeds = chain([partial(host[1].feed_features, features=rows)], repeat(host[1].feed))
        drafter = SimpleNamespace(head_tokens=host[1].head_tokens, feed=partial(call_next, feeds))
        uniforms = np.random.default_rng(number).random(9, np.float32)
        yield (made.drafted.tolist(), made.accepted), host_round(host[0], drafter, text[-1:], 4, params, uniforms)
        text = [*text[:40], made.accepted.next_token]


@pytest.mark.parametrize(
    "params", SAMPLINGS, ids=lambda params: f"{params.temperature}-{params.top_k}-{params.top_p}-{params.min_p}"
)
def test_a_sampled_round_on_the_device_is_the_hosts(params, half):
    with on_host(half) as host, on_device(half) as (*device, _):
        made = list(sampled_rounds(device, host, params, 20))
        assert [found for found, _ in made] == [wanted for _, wanted in made]


def test_a_sampled_generation_moves_no_features(pair):
    rounds = []
    with on_device(pair) as (target, head, stream):
        for seed in range(8):
            stream.from_features, sampling = 0, SamplingParams(3.0, seed=seed)
            rounds += decode_rounds(target, head, PROMPT, max_new_tokens=60, draft_length=4, sampling=sampling)
            assert stream.from_features <= 2
    assert sum(entry.drafted for entry in rounds) > 200
    assert sum(entry.accepted for entry in rounds) > 5


# -------------------------------------------------------------------------------------------------- dtypes, and loading


@pytest.fixture(scope="module")
def half(head_dir, target_dir, export_pair):
    return export_pair(head_dir, target_dir, k=128, dtype="fp16", quantize_drafter="int4", slots=16)


def test_fp16_with_a_trimmed_int4_head(half):
    with on_host(half) as host, on_device(half) as (target, head, _):
        assert target.features.onnx_type == "tensor(float16)"
        for accepted in (0, 2, 4):
            assert moves(target, head, force_accepted=accepted) == moves(*host, force_accepted=accepted)
        assert len(head.rounds.kept) > 3


def test_a_head_on_another_device_reads_features_from_the_host(pair):
    with on_host(pair) as host, on_device(pair) as device:
        expected = moves(*host)
        assert moves(host[0], device[1]) == expected
        assert moves(device[0], host[1]) == expected


def test_bfloat16_rounds_to_the_nearest():
    values = np.array([1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.3e38, -0.0, np.inf], np.float32)
    stored = from_float32(values, np.dtype(np.uint16))
    assert stored.dtype == np.uint16
    wanted = np.array([1.0, -2.5, 1.0, 1 + 2**-6, 1 + 2**-7, 3.3e38, -0.0, np.inf], np.float32)
    np.testing.assert_allclose(to_float32(stored), wanted, rtol=2**-9)
    assert to_float32(stored)[:5].tolist() == wanted[:5].tolist()
    np.testing.assert_array_equal(from_float32(to_float32(stored), np.dtype(np.uint16)), stored)


@pytest.fixture
def simulated(monkeypatch):
    """`load_engine(…, "cuda")` on the host."""
    monkeypatch.setattr(cuda_load, "Gpu", HostGpu)
    monkeypatch.setattr(cuda_load, "require_provider", lambda: ())
    monkeypatch.setattr(cuda_load, "make_stream", HostStream)
    monkeypatch.setattr(
        cuda_load,
        "open_cuda_session",
        lambda bundle, stream, missing, name=MODEL_NAME: open_session(bundle.path / name),
    )


def test_pairs_load_onto_one_stream_and_dtypes_do_not_mix(simulated, pair, half):
    with SpeculativeDecoder.load(pair.target, pair.drafter, "cuda", draft_length=4) as decoder:
        assert decoder.generate(PROMPT, max_new_tokens=30).stats.drafted
        assert decoder.drafter.rounds.kept
    with load_engine(pair.target, "cuda") as target, load_engine(half.drafter, "cuda", target) as head:
        head.feed_features([*PROMPT[1:], 8], target.feed(PROMPT).features)
        target.feed([8])
        assert target.speculate(head, [9], 4) is None
        with pytest.raises(VocabtrimError, match="the target is fp32, the head fp16; export both together"):
            SpeculativeDecoder(target, head, draft_length=4)


def test_a_full_gpu_is_explained(pair, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")

    expected = r"out of GPU memory with .*--max-length"
    with on_device(pair) as (_, head, _):
        monkeypatch.setattr(head, "_bind_fuse", full)
        with pytest.raises(VocabtrimError, match=expected):
            head.feed_features([5], np.zeros((1, 192), np.float32))
    monkeypatch.setattr(cuda_rows, "element_type", full)
    with pytest.raises(VocabtrimError, match=expected), on_device(pair):
        pass
