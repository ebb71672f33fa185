"""ONNX Runtime's CUDA without a GPU: the same buffers and bindings on the host, behind a stream that is simulated."""

import ctypes
import gc
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import engines
from engines import load_engine, read_bundle
from engines.base import Engine
from engines.bundle.read import MODEL_NAME
from engines.cuda import runtime as cuda
from engines.cuda.graph_replay import Replayed
from engines.errors import VocabtrimError
from engines.ort.session import new_session, open_session
from engines.ort_cuda import load as cuda_load
from engines.ort_cuda import pair as cuda_pair
from engines.ort_cuda import provider as cuda_provider
from engines.ort_cuda.binding import BoundModel, element_type
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.gpu import Gpu
from engines.ort_cuda.load import make_stream
from engines.ort_cuda.round import CudaRound
from engines.ort_cuda.step import DeviceStep
from engines.sampling_params import Sampling
from runtime import SamplingParams, SpeculativeDecoder
from runtime.accept import accept_sampled
from runtime.draft_tiers import TIERS, TieredLength
from runtime.loop import decode_rounds
from runtime.round_costs import GivenCosts
from runtime.sampling import distribution, sample
from vocabtrim_export.cli import main
from vocabtrim_export.trt.settings import TensorRTSettings

PROMPT = [5, 17, 200, 33]


class HostStream:
    """`engines.cuda.runtime.CudaStream` where the device's memory is the host's. copies, columns: bytes of each."""

    address = 4711

    def __init__(self):
        self.copies, self.columns, self.waits = [], [], 0

    def copy(self, target, source, size):
        ctypes.memmove(target, source, size)
        self.copies.append(size)

    def copy_columns(self, target, source, pitch, width, rows):
        for row in range(rows):
            ctypes.memmove(target + row * pitch, source + row * pitch, width)
        self.columns.append(width * rows)

    def zero(self, memory):
        ctypes.memset(memory.address, 0, memory.size)

    def synchronize(self):
        self.waits += 1

    def pinned(self, count):
        return np.zeros(count, np.int64)

    def event(self):
        return [0.0]

    def record(self, event):
        event[0] = time.perf_counter()

    def seconds_between(self, first, second):
        return second[0] - first[0]

    def discard_event(self, event):
        event.clear()


class LateStream(HostStream):
    """Makes copies when somebody waits for them, while `is_late`."""

    def __init__(self):
        super().__init__()
        self.is_late, self.pending = False, []

    def copy(self, target, source, size):
        if self.is_late:
            self.pending.append((target, source, size))
        else:
            super().copy(target, source, size)

    def synchronize(self):
        for each in self.pending:
            super().copy(*each)
        self.pending.clear()
        super().synchronize()


class HostGpu(Gpu):
    """A GPU whose memory is the host's."""

    memory = "cpu"

    def open_graph(self, model):
        return new_session(ir.to_proto(model).SerializeToString())


@pytest.fixture(scope="module")
def pair(random_model, export_pair):
    return export_pair(random_model("llama"), k=128, quantize_drafter="int4", slots=16)


def device_engine(path, stream=None, shared=None):
    bundle = read_bundle(path)
    session = open_session(bundle.path / MODEL_NAME)
    return OnnxRuntimeCudaEngine(bundle, session, HostGpu(stream or HostStream()), shared)


# ------------------------------------------------------------------------------------------------------------ computing


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_reserving_for_the_whole_capacity_changes_nothing(architecture, random_model, export_pair):
    """A CUDA graph freezes total_sequence_length: with the capacity there, every step gives what it gives without."""
    result = export_pair(random_model(architecture))
    ids = np.random.default_rng(1).integers(2, 400, 120)
    for path in (result.target, result.drafter):
        with load_engine(path) as host, device_engine(path) as device:
            for fed, keep in [(24, 24), (1, 1), (5, 5), (1, 1), (40, 3), (33, 1), (4, 4)]:
                start = host.length
                wanted, found = (engine.feed(ids[start : start + fed], keep=keep) for engine in (host, device))
                assert device._total.tolist() == [device.capacity] != [host.length]
                assert found.token_ids.tolist() == wanted.token_ids.tolist()
                np.testing.assert_allclose(found.logits, wanted.logits, atol=2e-5 * wanted.logits.std())
            for engine in (host, device):
                engine.rewind(20)
            wanted, found = (engine.feed(ids[60:65], keep=5).logits for engine in (host, device))
            np.testing.assert_allclose(found, wanted, atol=2e-5 * wanted.std())


@pytest.mark.parametrize("shared", [False, True])
def test_speculation_on_device_buffers_gives_the_targets_own_output(shared, pair):
    stream = HostStream()
    with SpeculativeDecoder.load(pair.target) as alone:
        target = device_engine(pair.target, stream)
        drafter = device_engine(pair.drafter, stream, target if shared else None)
        assert (drafter.cache is target.cache) == shared
        with SpeculativeDecoder(target, drafter, draft_length=4) as decoder:
            for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=2)):
                result = decoder.generate(PROMPT, max_new_tokens=40, sampling=sampling)
                assert len(result.token_ids) == 40
                if sampling.is_greedy:
                    assert result.token_ids == alone.generate(PROMPT, max_new_tokens=40).token_ids


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_of_the_devices_caches_is_gone_on_from(shared, pair):
    stream, decoders = LateStream(), []
    for _ in range(2):
        target = device_engine(pair.target, stream)
        drafter = device_engine(pair.drafter, stream, target if shared else None)
        decoders.append(SpeculativeDecoder(target, drafter, draft_length=4))
    first, second = decoders
    with first, second:
        text = [*PROMPT, *first.generate(PROMPT, max_new_tokens=20).token_ids]
        stream.is_late = True
        snapshot = first.snapshot()
        stream.is_late = False
        assert not stream.pending  # all of the copy has come
        assert snapshot.nbytes == first.snapshot_bytes
        ours = first.generate([*text, 9, 8], max_new_tokens=20)
        second.generate([5, 6, 7], max_new_tokens=5)
        stream.is_late = True
        second.restore(snapshot)
        stream.is_late = False
        assert not stream.pending  # before the host's memory is freed
        restored = second.generate([*text, 9, 8], max_new_tokens=20)
        assert (restored.token_ids, restored.stats.cached) == (ours.token_ids, ours.stats.cached)
        assert restored.stats.accepted == ours.stats.accepted
        assert restored.stats.cached == len(text) - 1


def test_only_token_ids_come_back_unless_logits_are_asked_for(pair):
    stream = HostStream()
    with device_engine(pair.target, stream) as engine:
        engine.feed(PROMPT)
        stream.copies.clear()
        output = engine.feed([7, 8, 9], keep=2)
        sent, received = stream.copies
        assert sent < 1500
        assert received == 8 * 2
        waits = stream.waits
        assert output.logits.shape == (2, 448)
        assert stream.copies[2:] == [4 * 2 * 448]
        assert stream.waits == waits + 1  # what is not waited for is not there yet


def test_the_cache_starts_as_zeros(pair, monkeypatch):
    allocate = Gpu.allocate

    def dirty(self, shape, element_type):
        value = allocate(self, shape, element_type)
        ctypes.memset(value.data_ptr(), 255, value.tensor_size_in_bytes())  # NaN
        return value

    monkeypatch.setattr(Gpu, "allocate", dirty)
    with device_engine(pair.target) as engine:
        assert all(not value.numpy().any() for value in engine._caches.values())


def test_bfloat16_logits_reach_the_host_as_float32():
    value = ort.OrtValue.ortvalue_from_shape_and_type((1, 1, 3), element_type("tensor(bfloat16)"))
    assert value.data_type() == "tensor(bfloat16)"
    wanted = np.array([[1.0, -2.5, 0.15625]], np.float32)
    bits = (wanted.view(np.uint32) >> 16).astype(np.uint16)
    ctypes.memmove(value.data_ptr(), bits.ctypes.data, bits.nbytes)
    run = BoundModel(None, None, None, HostStream(), value, "tensor(bfloat16)")
    np.testing.assert_array_equal(run.read_logits(), wanted)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("draft_length", [1, 2, 4, 7])
def test_a_round_on_the_device_is_the_stepwise_one(shared, draft_length, pair, monkeypatch):
    """Tokens, and all that statistics say, from one wait a round; with a drafter that agrees seldom and one always."""
    stream = HostStream()
    with device_engine(pair.target, stream) as target:
        for path in (pair.drafter, pair.target):
            with device_engine(path, stream, target if shared else None) as drafter:
                results = []
                for stepwise in (False, True):
                    if stepwise:
                        monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
                    stream.waits, prompt = 0, [*PROMPT, 8]
                    rounds = list(decode_rounds(target, drafter, prompt, max_new_tokens=60, draft_length=draft_length))
                    results.append([(entry.tokens, entry.drafted, entry.accepted) for entry in rounds])
                    if not stepwise:
                        first = 0 if shared else draft_length  # the drafter reads the prompt step by step
                        assert stream.waits == len(rounds) + first
                monkeypatch.undo()
                assert results[0] == results[1]


def host_round(target, drafter, unread, draft_length, params, uniforms):
    """Run one round by the host's rules, step by step, with the same uniform numbers."""
    numbers = iter(float(number) for number in uniforms)
    scripted = SimpleNamespace(random=lambda: next(numbers))
    head_tokens, draft, q = drafter.head_tokens, [], []
    output = drafter.feed(unread)
    for i in range(draft_length):
        q.append(distribution(output.logits, params)[0])
        row = sample(q[-1], scripted)
        draft.append(int(head_tokens.kept_token_ids[row]) if head_tokens else row)
        if i + 1 < draft_length:
            output = drafter.feed(draft[-1:])
    p = distribution(target.feed([unread[-1], *draft], keep=draft_length + 1).logits, params)
    # The rule asks for a number for each token up to the first rejected one, and for the last number then.
    rows = draft if head_tokens is None else head_tokens.inverse[draft].tolist()
    stays = [uniforms[draft_length + i] * q[i][rows[i]] < p[i][token] for i, token in enumerate(draft)]
    count = stays.index(False) if False in stays else draft_length
    judged = iter([*uniforms[draft_length:][: min(count + 1, draft_length)], uniforms[-1]])
    rng = SimpleNamespace(random=lambda: float(next(judged)))
    return draft, accept_sampled(draft, q, p.__getitem__, head_tokens, rng)


SAMPLINGS = [
    SamplingParams(1.0),
    SamplingParams(0.8, top_p=0.9),
    SamplingParams(1.3, top_k=20),
    SamplingParams(2.0, top_k=50, top_p=0.8),
    SamplingParams(1.5, min_p=0.05),
]


@pytest.mark.parametrize(
    "params", SAMPLINGS, ids=lambda params: f"{params.temperature}-{params.top_k}-{params.top_p}-{params.min_p}"
)
def test_a_sampled_round_on_the_device_is_the_hosts(params, pair):
    """Token for token where both take the same numbers; and no logits come back."""
    stream, counts, lost = HostStream(), [], pair.selection.lost_token_ids
    with device_engine(pair.target, stream) as target, load_engine(pair.target) as target_alone:
        for path in (pair.drafter, pair.target):
            with device_engine(path, stream) as drafter, load_engine(path) as drafter_alone:
                text, from_slots = [*PROMPT, *lost[:24]], 0
                engines_ = (target, target_alone, drafter, drafter_alone)
                for number in range(24):
                    draft_length = (3, 1, 5)[number % 3]
                    for engine, length in zip(engines_, (1, 1, 2, 2), strict=True):
                        engine.rewind(0)
                        engine.remember(text)  # where it has slots, they change under the rounds that are kept
                        engine.feed(text[:-length])
                    stream.copies.clear()
                    rng = np.random.default_rng(number)
                    made = target.speculate(drafter, text[-2:], draft_length, Sampling(params, rng))
                    assert sum(stream.copies) < 8 * 60
                    uniforms = np.random.default_rng(number).random(2 * draft_length + 1, np.float32)
                    wanted = host_round(target_alone, drafter_alone, text[-2:], draft_length, params, uniforms)
                    assert (made.drafted.tolist(), made.accepted) == wanted
                    counts.append(made.accepted.count)
                    from_slots += np.isin(made.drafted, lost).sum()
                    text = [*text[:4], *text[5:], *wanted[0][: made.accepted.count], made.accepted.next_token]
                assert from_slots > (path == pair.drafter)
    assert {0, 1, 3, 5} <= set(counts)


def test_slots_are_those_of_the_host_and_a_new_token_is_one_copy(pair):
    """Rounds are bound once; slots change under them."""
    stream, lost = HostStream(), pair.selection.lost_token_ids.tolist()
    with (
        device_engine(pair.target, stream) as target,
        device_engine(pair.drafter, stream, target) as drafter,
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=3) as host,
        SpeculativeDecoder(target, drafter, draft_length=3) as device,
    ):
        for prompt in (lost[:60], [5, *lost[100:110]], [7]):
            found, wanted = (each.generate(prompt, max_new_tokens=80) for each in (device, host))
            assert found.token_ids == wanted.token_ids
            assert found.stats.accepted == wanted.stats.accepted > 0
            held = [set(each.drafter.head_tokens.kept_token_ids[128:]) for each in (device, host)]
            assert held[0] == held[1]
            kept = list(drafter.rounds.kept.values())
        assert list(drafter.rounds.kept.values()) == kept
        drafter.rewind(0)
        stream.copies.clear()
        stream.columns.clear()
        for token, columns in ((lost[0], [64 * 4]), (lost[0], []), (lost[1], [64 * 4])):
            drafter.remember([token])
            assert stream.columns == columns
            assert stream.copies == [8 * 16] * len(columns)
            stream.copies.clear()
            stream.columns.clear()
    drafter.remember(lost[:3])  # closed: its memory is gone
    assert not stream.copies


def test_a_sampled_generation_waits_once_a_round_and_stops_at_an_eos(pair):
    stream, ends = HostStream(), []
    with device_engine(pair.target, stream) as target, device_engine(pair.target, stream, target) as drafter:
        eos = set(range(0, 448, 28))
        target.manifest = replace(target.manifest, eos_token_ids=tuple(eos))
        for seed in range(12):
            stream.waits = 0
            sampling = SamplingParams(3.0, seed=seed)  # every token about as likely as any other
            rounds = list(decode_rounds(target, drafter, PROMPT, max_new_tokens=60, draft_length=4, sampling=sampling))
            assert stream.waits == len(rounds) + 1  # the prefill's logits
            tokens = [token for entry in rounds for token in entry.tokens]
            assert [i for i, token in enumerate(tokens) if token in eos] in ([], [len(tokens) - 1])
            assert all(entry.accepted == entry.drafted for entry in rounds)  # it drafts for itself
            ends.append(rounds[-1].drafted)
        assert {1, 2, 3} & set(ends)  # an EOS amid a draft


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_and_logprobs_are_the_hosts(temperature, pair):
    """The host applies the rules to the device's logits; log-probabilities alone leave the round on the device."""
    stream = HostStream()
    rules = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logit_bias": {7: 2.0}}
    with (
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as host,
        device_engine(pair.target, stream) as target,
        SpeculativeDecoder(target, device_engine(pair.drafter, stream, target), draft_length=4) as device,
    ):
        for given in (rules, {}) if temperature == 0 else (rules,):
            sampling = SamplingParams(temperature, seed=3, **given)
            found, wanted = (
                each.generate(PROMPT, max_new_tokens=30, sampling=sampling, logprobs=2) for each in (device, host)
            )
            assert found.token_ids == wanted.token_ids
            numbers = [[entry.logprob for entry in result.logprobs] for result in (found, wanted)]
            np.testing.assert_allclose(*numbers, atol=1e-4)


def test_another_top_k_is_another_round_and_another_temperature_is_not(pair):
    stream = HostStream()
    with device_engine(pair.target, stream) as target, device_engine(pair.drafter, stream) as drafter:
        for params, rounds in [
            (SamplingParams(1.0), 1),
            (SamplingParams(0.5), 1),
            (SamplingParams(0.5, top_k=3), 2),
            (SamplingParams(0.5, top_k=3, top_p=0.5), 3),
            (SamplingParams(0.9, top_k=3, top_p=0.9), 3),
        ]:
            for engine in (target, drafter):
                engine.rewind(0)
                engine.feed(PROMPT)
            target.speculate(drafter, [9], 3, Sampling(params, np.random.default_rng(0)))
            assert len(drafter.rounds.kept) == rounds


def test_rounds_are_kept_up_to_a_number(pair, monkeypatch):
    """A server whose users choose their own top-k does not fill the GPU."""
    monkeypatch.setattr(cuda_pair, "_KEPT_ROUNDS", 3)
    stream, closed = HostStream(), []
    close = CudaRound.close
    monkeypatch.setattr(CudaRound, "close", lambda made: closed.append(made) or close(made))
    with device_engine(pair.target, stream) as target, device_engine(pair.drafter, stream) as drafter:
        for top_k in (1, 2, 1, 3, 4, 1, 5):
            for engine in (target, drafter):
                engine.rewind(0)
                engine.feed(PROMPT)
            params = SamplingParams(1.0, top_k)
            target.speculate(drafter, [9], 2, Sampling(params, np.random.default_rng(0)))
        assert [chosen[2] for chosen in drafter.rounds.samplers] == [1, 4, 5]
        assert (len(drafter.rounds.kept), len(closed)) == (3, 2)


def test_logits_that_are_not_finite_are_said(pair, monkeypatch):
    stream = HostStream()
    with device_engine(pair.target, stream) as target, device_engine(pair.drafter, stream) as drafter:
        for engine in (target, drafter):
            engine.feed(PROMPT)
        params = SamplingParams(1.0)
        object.__setattr__(params, "temperature", float("nan"))
        with pytest.raises(VocabtrimError, match="logits are not finite: export it again with a wider --dtype"):
            target.speculate(drafter, [9], 3, Sampling(params, np.random.default_rng(0)))


def test_work_is_captured_once_libraries_have_loaded():
    queued = []

    class Capturing(HostStream):
        def capture(self, enqueue):
            queued.append("captured")
            return "graph" if enqueue() else None

        def launch(self, graph):
            queued.append(graph)

        def discard(self, graph):
            queued.append("discarded")

    work = Replayed(Capturing(), lambda: queued.append("plain") or True, lambda: True, warm_up=2)
    assert all(work.run() for _ in range(4))
    assert queued == ["plain", "plain", "captured", "plain", "graph", "graph"]
    assert work.has_graph
    work.close()
    work.close()
    assert queued[6:] == ["discarded"]
    never = Replayed(Capturing(), lambda: True, lambda: False)
    assert all(never.run() for _ in range(4))
    assert not never.has_graph


# -------------------------------------------------------------------------------------------------- streams and devices


def test_a_stream_goes_with_its_last_user(monkeypatch):
    destroyed = []
    monkeypatch.setattr(cuda, "CudaStream", HostStream)
    monkeypatch.setattr(cuda, "runtime", lambda: SimpleNamespace(cudaStreamDestroy=destroyed.append))
    first = make_stream()
    second = first
    del first
    gc.collect()
    assert not destroyed
    del second
    gc.collect()
    assert destroyed == [HostStream.address]


@pytest.fixture
def simulated(monkeypatch):
    """`load_engine(…, "cuda")` on the host."""

    monkeypatch.setattr(cuda_load, "Gpu", HostGpu)
    monkeypatch.setattr(cuda_load, "require_provider", lambda: ())
    monkeypatch.setattr(cuda_load, "make_stream", HostStream)
    monkeypatch.setattr(
        cuda_load,
        "open_cuda_session",
        lambda bundle, stream, missing: open_session(bundle.path / MODEL_NAME),
    )


def test_engines_on_cuda_share_a_stream_and_those_of_one_model_a_cache(
    simulated, pair, random_model, export_pair, tmp_path
):
    other = export_pair(random_model("llama", seed=1)).drafter
    with load_engine(pair.target, "cuda") as target:
        for path, shares in [(pair.drafter, True), (other, False)]:
            with load_engine(path, "cuda", share_cache_with=target) as drafter:
                assert drafter.gpu is target.gpu
                assert (drafter.cache is target.cache) == shares
        with load_engine(pair.drafter, "cuda") as alone:
            assert alone.gpu.stream is not target.gpu.stream


@pytest.mark.parametrize(("device", "drafter_device"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", None)])
def test_the_drafter_may_be_on_another_device(device, drafter_device, simulated, pair):
    with (
        SpeculativeDecoder.load(pair.target) as alone,
        SpeculativeDecoder.load(
            pair.target, pair.drafter, device, drafter_device=drafter_device, draft_length=4
        ) as decoder,
    ):
        assert (decoder.target.device, decoder.drafter.device) == (device, drafter_device or device)
        assert (decoder.drafter.cache is decoder.target.cache) == (drafter_device is None)
        expected = alone.generate(PROMPT, max_new_tokens=40)
        assert decoder.generate(PROMPT, max_new_tokens=40).token_ids == expected.token_ids


def test_rounds_of_a_few_lengths_and_repetitions_that_are_looked_up(pair, random_model, export_pair):
    """Tried with a drafter that agrees often, on the target's cache, and with one that is never right and so pauses."""
    other = export_pair(random_model("llama", seed=1)).drafter
    prompts = (PROMPT, [9, 8, 7, 6] * 8, [3])
    with SpeculativeDecoder.load(pair.target) as alone:
        wanted = [alone.generate(prompt, max_new_tokens=80).token_ids for prompt in prompts]
    lengths, looked_up, paused, stream = set(), 0, 0, HostStream()
    for drafter in (pair.drafter, other):
        target = device_engine(pair.target, stream)
        engine = device_engine(drafter, stream, target if drafter == pair.drafter else None)
        with SpeculativeDecoder(target, engine, draft_length=1) as decoder:
            decoder.length = TieredLength(TIERS, costs=GivenCosts(step=0.2, row=0.02))
            found = [decoder.generate(prompt, max_new_tokens=80) for prompt in prompts]
            assert [each.token_ids for each in found] == wanted
            lengths |= {length for _, _, length in decoder.drafter.rounds.kept}
            looked_up += sum(each.stats.looked_up for each in found)
            paused += sum(each.stats.paused for each in found)
            sampling = SamplingParams(temperature=1.0, seed=5)
            decoder.length = TieredLength(TIERS)
            texts = {decoder.generate(PROMPT, max_new_tokens=40, sampling=sampling).token_ids for _ in range(2)}
            assert len(texts) == 1
    assert len(lengths & {*TIERS}) > 1
    assert looked_up
    assert paused > 20


def test_a_drafter_that_lags_reads_what_it_missed_before_its_round(pair):
    """The target as its own drafter, with a cache of its own, after rounds that drafted nothing."""
    stream = HostStream()
    with device_engine(pair.target, stream) as target, device_engine(pair.target, stream) as drafter:
        target.feed([*PROMPT, 7, 8, 9])
        drafter.feed(PROMPT)
        made = target.speculate(drafter, [7, 8, 9, 10], 3)
        assert made.drafted.tolist() == made.verified.token_ids[:-1].tolist()
        assert (target.length, drafter.length) == (len(PROMPT) + 7, len(PROMPT) + 6)
        assert [unread for _, unread, _ in drafter.rounds.kept] == [1]


def test_formats_mix(random_model, export_pair):
    """The graphs of a TensorRT bundle and one for ONNX Runtime, both ways round."""
    directory = random_model("llama")
    plain = export_pair(directory)
    standard = export_pair(
        directory, dtype="fp32", trt=TensorRTSettings(flavor="none", draft_length=3, prefill_chunk=16)
    )
    with SpeculativeDecoder.load(plain.target) as alone:
        expected = [alone.generate(prompt, max_new_tokens=60).token_ids for prompt in (PROMPT, range(40, 70))]
    for target, drafter in [(standard.target, plain.drafter), (plain.target, standard.drafter)]:
        with SpeculativeDecoder.load(target, drafter, drafter_device="cpu", draft_length=3) as decoder:
            found = [decoder.generate(prompt, max_new_tokens=60) for prompt in (PROMPT, range(40, 70))]
        assert [result.token_ids for result in found] == expected
        assert all(result.stats.accepted for result in found)


def test_the_command_line_says_where_the_drafter_runs(monkeypatch, capsys):
    asked = []

    def load(*paths, **options):
        asked.append(options)
        raise VocabtrimError("enough")

    monkeypatch.setattr(SpeculativeDecoder, "load", load)
    generate = ["generate", "--target", "t", "--prompt", "Hi", "--drafter-device", "cpu", "--device", "cuda"]
    assert main.main([*generate, "--drafter", "d"]) == 2
    assert (asked[0]["device"], asked[0]["drafter_device"]) == ("cuda", "cpu")
    assert main.main(generate) == 2
    assert "--drafter-device is for a drafter: give --drafter as well" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """wheel(providers, *files): an installed ONNX Runtime that lists these providers and has these libraries."""
    (tmp_path / "capi").mkdir()
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)

    def make(providers, *files):
        monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
        monkeypatch.setattr(ort, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
        for name in files:
            (tmp_path / "capi" / name).write_bytes(b"")

    return make


CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"


def test_the_cpu_wheel_is_named(wheel, pair):
    wheel([])
    with pytest.raises(VocabtrimError) as caught:
        load_engine(pair.target, "cuda")
    message = str(caught.value)
    assert "is the CPU wheel" in message
    assert "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert "\n" not in message


def test_a_gpu_wheel_that_does_not_load_says_why(wheel, pair):
    """The empty file stands for one that needs a library which is not there: both are what the loader says."""
    wheel([], CUDA_LIBRARY)
    with pytest.raises(VocabtrimError, match=rf"does not load \(.*{CUDA_LIBRARY}: file too short\)"):
        load_engine(pair.target, "cuda")


def test_a_silent_fall_back_to_the_cpu_is_an_error(wheel, pair, monkeypatch):
    wheel([cuda_provider.PROVIDER], CUDA_LIBRARY)
    fallen_back = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **options: fallen_back)
    with pytest.raises(VocabtrimError, match=rf"does not load \(.*{CUDA_LIBRARY}: file too short\)"):
        cuda_provider.open_cuda_session(read_bundle(pair.target), HostStream())


def test_libraries_that_do_not_load_are_named(monkeypatch, wheel):
    wheel([], CUDA_LIBRARY)
    monkeypatch.setattr(cuda_provider.ctypes, "CDLL", lambda *names: None)

    def preload():
        print("Failed to load /nvidia/cublas/lib/libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file")
        print("Failed to load libcudart.so.13: libcudart.so.13: cannot open shared object file")
        print("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file")

    monkeypatch.setattr(ort, "preload_dlls", preload)
    with pytest.raises(VocabtrimError, match=r"\(missing: libcublasLt\.so\.13, libcudart\.so\.13\)"):
        cuda_provider.require_provider()


class Refuses:
    """`InferenceSession` as it refuses CUDA graphs: a node has no CUDA kernel."""

    def __init__(self, path, options, providers, enable_fallback):
        self.options = providers[0][1]
        if self.options["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user as ...")

    def get_providers(self):
        return [cuda_provider.PROVIDER]


def test_a_model_that_cannot_be_one_graph_runs_without(monkeypatch, random_model, export_pair, pair):
    half = export_pair(random_model("llama"), dtype="fp16").target
    monkeypatch.setattr(ort, "InferenceSession", Refuses)
    session = cuda_provider.open_cuda_session(read_bundle(half), HostStream())
    assert session.options["enable_cuda_graph"] == "0"
    assert session.options["user_compute_stream"] == "4711"
    with pytest.raises(VocabtrimError, match=r"is an fp32 bundle.*export it with --dtype fp16 or bf16"):
        cuda_provider.open_cuda_session(read_bundle(pair.target), HostStream())


@pytest.mark.parametrize("where", ["session", "cache", "run"])
def test_a_full_gpu_gives_the_sizes_and_what_to_lower(where, pair, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x")

    expected = r"out of GPU memory with .*weights take \d+ MB and its KV cache of 128 tokens \d+ MB: .*--max-length"
    if where == "session":
        monkeypatch.setattr(ort, "InferenceSession", full)
        with pytest.raises(VocabtrimError, match=expected):
            cuda_provider.open_cuda_session(read_bundle(pair.target), HostStream())
    elif where == "cache":
        monkeypatch.setattr(Gpu, "allocate", full)
        with pytest.raises(VocabtrimError, match=expected):
            device_engine(pair.target)
    else:
        with device_engine(pair.target) as engine:
            monkeypatch.setattr(DeviceStep, "run", full)
            with pytest.raises(VocabtrimError, match=expected):
                engine.feed(PROMPT)


def test_other_failures_stay_what_they_are(pair):
    with device_engine(pair.target) as engine:
        with pytest.raises(ValueError, match="cannot keep 2 of 1"):
            engine.feed([1], keep=2)
        with pytest.raises(engines.ContextFull):
            engine.feed(range(200))
