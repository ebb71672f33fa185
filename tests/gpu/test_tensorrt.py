"""TensorRT plans on a GPU compute what their graphs mean, as CUDA graphs too, and how fast."""

import time

import numpy as np
import pytest

from engines import load_engine, read_bundle
from engines.bundle.read import Bundle
from engines.cuda import runtime as cuda
from engines.trt.executor import TensorRTExecutor
from runtime import SpeculativeDecoder

PROMPT = [5, 17, 200, 33, 91, 4, 250, 12, 77, 140, 3, 9]
TIE = 0.05  # of the logits' standard deviation: what half precision may move them by


def greedy(engine, prompt, count) -> list[int]:
    """`prompt` and what `engine` says after it, `count` tokens."""
    tokens = list(prompt)
    fed = 0
    while len(tokens) < len(prompt) + count:
        output = engine.feed(tokens[fed:])
        fed = len(tokens)
        tokens.append(int(output.token_ids[-1]))
    return tokens


def assert_same_choice(engine, found, wanted, logits, where) -> None:
    """One token each of a plan and of its graph. They may differ only where the graph's logits tie, and it is said.

    logits: float32[head_rows] of the graph.
    """
    if found == wanted:
        return
    kept = np.arange(len(logits)) if engine.vocab_map is None else engine.vocab_map.kept_token_ids
    a, b = (logits[np.searchsorted(kept, token)] for token in (wanted, found))
    print(f"near-tie {where}: {found} for {wanted}, {a - b:.4f} below it")
    assert a - b <= TIE * logits.std(), f"{where}: {found} for {wanted}"


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_plans_choose_and_score_as_their_graphs_do(pair, role):
    """Prompt in chunks, single tokens, blocks, and again after a rewind."""
    path = getattr(pair, role)
    with load_engine(path, device="cpu") as reference, load_engine(path, device="cuda") as engine:
        tokens = np.array(greedy(reference, PROMPT, 100))
        reference.rewind(0)
        for fed, keep in [
            (24, 1),
            (1, 1),
            (1, 1),
            (1, 1),
            (5, 5),
            (5, 5),
            (5, 5),
            (3, 3),
            (30, 4),
            (1, 1),
            (5, 5),
            (5, 5),
        ]:
            start = reference.length
            wanted, found = (x.feed(tokens[start : start + fed], keep=keep) for x in (reference, engine))
            scores = wanted.logits
            np.testing.assert_allclose(found.logits, scores, atol=TIE * scores.std())
            for i in range(keep):
                where = f"after {start + fed - keep + i + 1} tokens"
                assert_same_choice(engine, int(found.token_ids[i]), int(wanted.token_ids[i]), scores[i], where)
        for each in (reference, engine):
            each.rewind(20)
        wanted, found = (each.feed(tokens[40:45], keep=5).logits for each in (reference, engine))
        np.testing.assert_allclose(found, wanted, atol=TIE * wanted.std())


def test_speculation_gives_the_targets_own_greedy_output(pair):
    with load_engine(pair.target, device="cuda") as alone:
        expected = greedy(alone, PROMPT, 80)[len(PROMPT) :]
    with SpeculativeDecoder.load(pair.target, pair.drafter, device="cuda", draft_length=4) as decoder:
        found = decoder.generate(PROMPT, max_new_tokens=80).token_ids
    differing = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None)
    if differing is not None:  # from there on the two texts have nothing to do with each other
        with load_engine(pair.target, device="cpu") as reference:
            logits = reference.feed(PROMPT + expected[:differing]).logits[0]
        assert_same_choice(alone, found[differing], expected[differing], logits, f"after {differing} new tokens")


def test_the_target_as_its_own_drafter_accepts_everything(pair):
    """Whatever positions or rollback lose shows here."""
    target = load_engine(pair.target, device="cuda")
    with SpeculativeDecoder(target, load_engine(pair.target, device="cuda"), draft_length=4) as decoder:
        stats = decoder.generate(PROMPT, max_new_tokens=80).stats
    print(f"{stats.accepted} of {stats.drafted} drafted tokens accepted")
    assert stats.accepted >= 0.9 * stats.drafted > 0  # but for near-ties between its shapes


def test_cuda_graphs_compute_what_the_plain_launch_does(pair):
    bundle = read_bundle(pair.drafter)
    executor = TensorRTExecutor(bundle)
    try:
        for graphs, profile in enumerate(smallest(bundle), 1):
            ids, positions = np.arange(7, 7 + profile.tokens), np.arange(profile.tokens)
            rows = np.arange(profile.tokens - profile.keep, profile.tokens)
            plain, captured, replayed = (run(executor, profile, ids, positions, rows) for _ in range(3))
            assert executor.cuda_graphs == graphs, f"{profile} does not run as a CUDA graph"
            for again in (captured, replayed):
                assert again[0].tolist() == plain[0].tolist()
                np.testing.assert_array_equal(again[1], plain[1])
            other = run(executor, profile, ids + 100, positions, rows)  # a graph reads its inputs anew
            assert not np.array_equal(other[1], plain[1])
        drafts = [
            executor.draft(bundle.manifest.tensorrt.spans[0], np.array([5, 6]), np.array([0, 1])).tolist()
            for _ in range(3)
        ]
        assert drafts[0] == drafts[1] == drafts[2]
        assert executor.cuda_graphs == graphs + 1
    finally:
        executor.close()


def run(executor, profile, ids, positions, rows):
    output = executor.step(profile, ids, positions, rows)
    return output.token_ids, output.logits


def smallest(bundle: Bundle):
    """The profiles of the shortest span."""
    plans = bundle.manifest.tensorrt
    return [profile for profile in plans.profiles if profile.span == plans.spans[0]]


def test_an_unrolled_draft_is_the_stepwise_one(pair):
    text = np.array(PROMPT * 10)
    with (
        load_engine(pair.drafter, device="cpu") as reference,
        load_engine(pair.drafter, device="cuda") as unrolled,
        load_engine(pair.drafter, device="cuda") as stepwise,
    ):
        for length, lacking in [(1, 1), (20, 1), (20, 2), (21, 2), (57, 2), (90, 1), (90, 2)]:
            for engine in (reference, unrolled, stepwise):
                engine.rewind(0)
                engine.feed(text[:length])
            lacked = text[length : length + lacking]
            drafted = unrolled.draft(lacked)
            assert len(drafted) == 4
            expected = [int(stepwise.feed(lacked).token_ids[-1])]
            logits = reference.feed(lacked).logits[0]
            for i, token in enumerate(drafted.tolist()):
                assert_same_choice(unrolled, token, expected[i], logits, f"step {i} after {length} tokens")
                if token != expected[i]:
                    break
                if i < 3:
                    expected.append(int(stepwise.feed([token]).token_ids[-1]))
                    logits = reference.feed([token]).logits[0]
            else:
                assert unrolled.length == stepwise.length
                after = [engine.feed([5], keep=1).logits for engine in (unrolled, stepwise)]
                np.testing.assert_allclose(*after, atol=TIE * after[1].std())  # what it left in the cache


def test_spans_read_one_cache(build, pair):
    """A longer span reads what a short one wrote, and the other way round."""
    result = build(spans=(60,))
    text = np.array(PROMPT * 10)
    with load_engine(result.target, device="cuda") as engine, load_engine(pair.target, device="cuda") as whole:
        for begin, end in [(0, 20), (20, 50), (50, 75), (75, 90)]:
            found, wanted = (each.feed(text[begin:end], keep=5).logits for each in (engine, whole))
            np.testing.assert_allclose(found, wanted, atol=TIE * wanted.std())
        for each in (engine, whole):
            each.rewind(30)
        found, wanted = (each.feed(text[30:35], keep=5).logits for each in (engine, whole))
        np.testing.assert_allclose(found, wanted, atol=TIE * wanted.std())


def test_bfloat16_logits_are_read_right(build):
    """ONNX Runtime's CPU cannot run the graph, and the float32 of the same weights is near."""
    result = build(dtype="bf16")
    half = build(dtype="fp16")
    with load_engine(result.target, device="cuda") as engine, load_engine(half.target, device="cpu") as reference:
        found, wanted = (each.feed(PROMPT).logits for each in (engine, reference))
    np.testing.assert_allclose(found, wanted, atol=0.3 * wanted.std())


def test_a_plan_without_weights_is_refitted_at_load(build, pair):
    stripped = build(strip_weights=True)
    assert (stripped.target / "model.engine").stat().st_size < (pair.target / "model.engine").stat().st_size
    with load_engine(stripped.target, device="cuda") as engine, load_engine(stripped.target, device="cpu") as reference:
        found, wanted = (each.feed(PROMPT, keep=4).logits for each in (engine, reference))
    np.testing.assert_allclose(found, wanted, atol=TIE * wanted.std())


def test_a_draft_step_takes_what_the_memory_bandwidth_allows(build):
    """Prints both. The bound is loose: what is to be seen here is a step that launches kernels one by one, or worse."""
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    bundle = read_bundle(build(**wide, num_hidden_layers=4).drafter)
    profile = smallest(bundle)[0]
    executor = TensorRTExecutor(bundle)
    try:
        inputs = np.array([7]), np.array([0]), np.array([0])
        for _ in range(10):
            executor.step(profile, *inputs)
        start = time.perf_counter()
        for _ in range(100):
            executor.step(profile, *inputs)
        step = (time.perf_counter() - start) / 100
    finally:
        executor.close()
    limit = bundle.manifest.weight_bytes_per_step / bandwidth()
    print(f"a draft step takes {step * 1e6:.0f} µs, reading its weights from memory {limit * 1e6:.0f} µs")
    assert step < 5 * limit + 500e-6


def bandwidth(size: int = 1 << 28, repeats: int = 20) -> float:
    """Bytes a second that the GPU reads and writes while it copies its own memory."""
    stream = cuda.CudaStream()
    memory = [cuda.allocate_device(size) for _ in range(2)]
    try:
        for count in (2, repeats):
            start = time.perf_counter()
            for _ in range(count):
                stream.copy(memory[0].address, memory[1].address, size)
            stream.synchronize()
            seconds = time.perf_counter() - start
    finally:
        for each in memory:
            each.free()
        stream.destroy()
    return 2 * size * repeats / seconds
