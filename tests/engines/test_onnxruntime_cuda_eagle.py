"""EAGLE heads on ONNX Runtime's CUDA, without a GPU: see `test_onnxruntime_cuda`."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from engines import load_engine, onnxruntime_cuda, onnxruntime_cuda_eagle, onnxruntime_engine, read_bundle
from engines.base import Engine
from engines.bundle import FEATURES_NAME, MODEL_NAME
from engines.cuda_provider import open_cuda_session
from engines.errors import VocabtrimError
from engines.numbers import from_float32, to_float32
from engines.onnxruntime_cuda import OnnxRuntimeCudaEngine
from engines.onnxruntime_cuda_eagle import CudaEagleEngine, CudaFeatureEngine
from engines.onnxruntime_engine import open_session
from runtime import SamplingParams, SpeculativeDecoder
from runtime.loop import _Loop, decode_rounds
from tests.engines.test_onnxruntime_cuda import HostStream
from tests.integration import conftest as bundles
from tests.integration.eagle_heads import LAYERS, make_tensors

random_model, count_file, export_pair = bundles.random_model, bundles.count_file, bundles.export_pair
write_head = bundles.write_head

PROMPT = list(range(40, 62))


@pytest.fixture(scope="module")
def target_dir(random_model):
    return random_model("llama", num_hidden_layers=8)


@pytest.fixture(scope="module")
def head_dir(write_head):
    return write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))


@pytest.fixture(scope="module")
def pair(head_dir, target_dir, export_pair):
    return export_pair(head_dir, target_dir, k="100000")


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
    stream = Spied()
    with ExitStack() as opened:
        path = pair.target
        session = open_session(path / MODEL_NAME)
        target = opened.enter_context(CudaFeatureEngine(read_bundle(path), session, stream, device="cpu"))
        path = pair.drafter
        sessions = (open_session(path / name) for name in (MODEL_NAME, FEATURES_NAME))
        head = opened.enter_context(CudaEagleEngine(read_bundle(path), *sessions, stream, device="cpu"))
        memory = target.features.memory
        stream.watched = range(memory.data_ptr(), memory.data_ptr() + memory.tensor_size_in_bytes())
        yield target, head, stream


@contextmanager
def on_host(pair):
    with load_engine(pair.target) as target, load_engine(pair.drafter) as head:
        yield target, head


def moves(target, head, prompt=PROMPT, **options):
    """What each round drafted, and its new tokens."""
    drafts, move = [], _Loop.move
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Loop, "move", lambda loop: drafts.append(move(loop)) or drafts[-1])
        rounds = list(decode_rounds(target, head, prompt, **{"max_new_tokens": 40, "draft_length": 4} | options))
    return [(entry.draft, made.tokens) for entry, made in zip(drafts, rounds[1:], strict=True)]


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.std(), rtol=1e-4)


def test_steps_give_what_the_cpu_engines_give(pair, monkeypatch):
    """In several parts, after rewinds, and from the hidden state that the last row left."""
    monkeypatch.setattr(onnxruntime_engine, "CHUNK", 8)
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
        met = {unread for _, unread, steps in head._rounds if steps == draft_length}
        assert met == set(range(1, draft_length + 2))
        costs = []
        for entry in decode_rounds(target, head, PROMPT, max_new_tokens=30, draft_length=draft_length):
            costs.append((entry.drafted, len(stream.copies), stream.waits))
            stream.copies.clear()
            stream.waits = 0
        assert {cost[1:] for cost in costs[2:] if cost[0]} == {(2, 1)}  # the numbers there and back, and one wait
        monkeypatch.setattr(OnnxRuntimeCudaEngine, "speculate", Engine.speculate)
        assert moves(target, head, draft_length=draft_length) == moves(*host, draft_length=draft_length)


def test_features_stay_on_the_device_and_the_output_is_the_targets(pair):
    with SpeculativeDecoder.load(pair.target) as alone, on_device(pair) as (target, head, stream):
        decoder = SpeculativeDecoder(target, head)
        for prompt in (PROMPT, [7], [5, 17, 200]):
            stream.from_features = 0
            wanted = alone.generate(prompt, max_new_tokens=200)
            found = decoder.generate(prompt, max_new_tokens=200)  # to the end of the context
            assert found.token_ids == wanted.token_ids
            assert found.stats.drafted > 100
            assert stream.from_features <= 2  # those of the prompt, and of a last round without a draft


def test_a_head_with_a_shorter_context_falls_silent(pair, head_dir, target_dir, export_pair):
    short = export_pair(head_dir, target_dir, k="100000", max_length=64)
    with load_engine(pair.target) as target, load_engine(short.drafter) as head:
        wanted = moves(target, head, max_new_tokens=100)
    with on_device(replace(pair, drafter=short.drafter)) as (target, head, stream):
        assert moves(target, head, max_new_tokens=100) == wanted
        assert [len(draft) for draft, _ in wanted][-1] == 0
        assert stream.from_features == 1


def test_a_head_that_was_silent_reads_what_it_missed(pair, monkeypatch):
    room, asked = _Loop.room, []
    monkeypatch.setattr(
        _Loop, "room", lambda loop, drafter: asked.append(0) or room(loop, drafter) * (len(asked) % 5 > 2)
    )
    with on_host(pair) as host, on_device(pair) as (target, head, stream):
        for accepted in (1, 4):
            made = []
            for engines in (host, (target, head)):
                asked.clear()
                made.append(moves(*engines, force_accepted=accepted))
            assert made[0] == made[1]
            lengths = [len(draft) for draft, _ in made[0]]
            assert 0 in lengths[3:] and 4 in lengths[4:]
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "room", room)
            always = moves(*host, force_accepted=0)
        assert [tokens for _, tokens in always] == [tokens for _, tokens in moves(*host, force_accepted=0)]


def test_sampling_reads_features_and_logits_step_by_step(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as host, on_device(pair) as (target, head, _):
        device = SpeculativeDecoder(target, head)
        for seed in range(3):
            sampling = SamplingParams(temperature=1.5, seed=seed)
            wanted, found = (each.generate(PROMPT, max_new_tokens=60, sampling=sampling) for each in (host, device))
            assert found.token_ids == wanted.token_ids
            assert (found.stats.drafted, found.stats.accepted) == (wanted.stats.drafted, wanted.stats.accepted)
        assert not head._rounds
