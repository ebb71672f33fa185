"""The graphs that TensorRT plans are built from, on ONNX Runtime's CPU against PyTorch: this is what the plans mean."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from engines import VocabtrimError, load_engine
from engines.trt import reference
from runtime import SamplingParams, SpeculativeDecoder
from tests.bundles import ARCHITECTURES
from vocabtrim_export.trt.settings import TensorRTSettings

from .conftest import check_logits

GRAPHS = TensorRTSettings(flavor="none", draft_length=3, prefill_chunk=16, spans=(40,), unroll=True)
STEPS = [(24, 24), (1, 1), (5, 5), (1, 1), (17, 3), (20, 1), (4, 4)]  # tokens fed, positions kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_standard_graph_computes_what_pytorch_does(architecture, random_model, export_pair):
    directory = random_model(architecture)
    result = export_pair(directory, trt=GRAPHS, dtype="fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(0, 400, (1, 72), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    for path in (result.target, result.drafter):
        check_logits(path, ids[0].numpy(), wanted, STEPS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unrolled_draft_is_the_stepwise_one(architecture, random_model, export_pair):
    result = export_pair(random_model(architecture), trt=GRAPHS, dtype="fp32")
    ids = np.random.default_rng(2).integers(2, 400, 60)
    with load_engine(result.drafter) as unrolled, load_engine(result.drafter) as stepwise:
        for length, lacking in ((1, 1), (20, 1), (20, 2), (37, 2), (58, 2)):
            for engine in (unrolled, stepwise):
                engine.rewind(0)
                engine.feed(ids[:length])
            drafted = unrolled.draft(ids[length : length + lacking])
            expected = [int(stepwise.feed(ids[length : length + lacking]).token_ids[-1])]
            for _ in range(2):
                expected.append(int(stepwise.feed(expected[-1:]).token_ids[-1]))
            assert drafted.tolist() == expected
            assert unrolled.length == stepwise.length
            after = [engine.feed([5, 6], keep=2).logits for engine in (unrolled, stepwise)]
            np.testing.assert_allclose(*after, atol=2e-4 * after[0].std())  # so is what it left in the cache


def test_padding_sees_a_slot_whatever_the_window(random_model, export_pair):
    """A token that sees none leaves NaN in the cache, where a runtime has it so; masked or not, NaN spreads."""
    settings = replace(GRAPHS, prefill_chunk=64, unroll=False)
    result = export_pair(random_model("mistral"), trt=settings, dtype="fp32")
    calls = []
    with load_engine(result.target) as engine:
        step = engine._executor.step
        engine._executor.step = lambda profile, ids, at, rows: (
            calls.append((profile, at)),
            step(profile, ids, at, rows),
        )[1]
        for fed in (20, 20, 4, 60, 20):
            engine.feed(range(2, 2 + fed))
    assert {profile.span for profile, _ in calls} == {64, 192}
    assert all(at.max() < min(profile.span, engine.capacity) for profile, at in calls)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_quantised_weights_stay_near_the_models(quantize, random_model, export_pair):
    """Their own error is the quantiser's tests' business; a mistake in axis, block or layout would give noise."""
    directory = random_model("llama")
    exact, rounded = (
        export_pair(directory, trt=GRAPHS, dtype="fp32", quantize=name).drafter for name in ("none", quantize)
    )
    ids = np.random.default_rng(3).integers(2, 400, 40)
    with load_engine(exact) as a, load_engine(rounded) as b:
        found, wanted = b.feed(ids, keep=40).logits, a.feed(ids, keep=40).logits
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > {"int8": 0.99, "int4": 0.8, "fp8": 0.98}[quantize]


def test_half_precision_graph_runs_as_well(random_model, export_pair):
    directory = random_model("qwen3")
    result = export_pair(directory, trt=GRAPHS, dtype="fp16")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(0, 400, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), load_engine(result.target) as engine:
        wanted = model(ids).logits[0].numpy()
        np.testing.assert_allclose(engine.feed(ids[0].numpy(), keep=40).logits, wanted, atol=0.05 * wanted.std())


@pytest.fixture(scope="module")
def pair(random_model, export_pair):
    directory = random_model("llama")
    plain = export_pair(directory)
    return plain, export_pair(directory, trt=GRAPHS, dtype="fp32")


@pytest.mark.parametrize("draft_length", [1, 2, 3])  # 3 is what the engines were built for
def test_greedy_output_is_the_plain_targets(pair, draft_length):
    plain, standard = pair
    with (
        SpeculativeDecoder.load(plain.target) as alone,
        SpeculativeDecoder.load(standard.target, standard.drafter, draft_length=draft_length) as decoder,
    ):
        for prompt in ([5, 17, 200, 33], list(range(40, 100)), [7]):
            expected = alone.generate(prompt, max_new_tokens=200)
            result = decoder.generate(prompt, max_new_tokens=200)
            assert result.token_ids == expected.token_ids
            assert result.finish_reason == expected.finish_reason == "length"
        rules = {"max_new_tokens": 40, "sampling": SamplingParams(repetition_penalty=1.3, no_repeat_ngram_size=2)}
        assert decoder.generate([7], **rules).token_ids == alone.generate([7], **rules).token_ids


def test_drafts_longer_than_the_target_verifies_are_refused(pair):
    _, standard = pair
    with load_engine(standard.target) as target, load_engine(standard.drafter) as drafter:
        assert SpeculativeDecoder(target, drafter).draft_length == 3
        with pytest.raises(VocabtrimError, match="draft_length is 5: give a number from 1 to 3, or export the target"):
            SpeculativeDecoder(target, drafter, draft_length=5)
        with pytest.raises(VocabtrimError, match=r"draft_length is 0: give a number from 1 to 3$"):
            SpeculativeDecoder(target, drafter, draft_length=0)
        assert SpeculativeDecoder(target).generate([5, 6], max_new_tokens=3).stats.tokens == 3


def test_the_target_as_its_own_drafter_accepts_everything(pair):
    _, standard = pair
    target = load_engine(standard.target)
    with SpeculativeDecoder(target, load_engine(standard.target), draft_length=3) as decoder:
        for sampling in (SamplingParams(), SamplingParams(temperature=1.0, seed=1)):
            stats = decoder.generate([5, 6, 7], max_new_tokens=60, sampling=sampling).stats
            assert stats.accepted == stats.drafted > 0


def test_drafts_in_one_call_are_counted_as_steps(pair):
    from runtime.measure.timing import timed_run

    _, standard = pair
    with load_engine(standard.target) as target, load_engine(standard.drafter) as drafter:
        run = timed_run(target, drafter, [5, 6, 7], 40, 3)
    later = run.drafter[1:]
    assert {feed.tokens for feed in later} == {1}
    assert any(a.seconds == b.seconds == c.seconds for a, b, c in zip(later, later[1:], later[2:], strict=False))


def test_int4_that_does_not_divide_is_refused_and_names_the_layer(random_model, export_pair):
    directory = random_model("llama", intermediate_size=88)
    with pytest.raises(VocabtrimError, match=r"layers\.0\.mlp\.down_proj\.weight has 88 inputs"):
        export_pair(directory, trt=GRAPHS, dtype="fp32", quantize="int4")


def test_a_text_takes_the_shortest_span(pair):
    _, standard = pair
    spans = []
    with load_engine(standard.target) as engine:
        step = engine._executor.step
        engine._executor.step = lambda profile, *inputs: (spans.append(profile.span), step(profile, *inputs))[1]
        engine.feed(range(2, 52))
        engine.feed(range(52, 62))
        assert set(spans) == {64}
        engine.feed(range(62, 66))
        assert spans[-1] == 192
        engine.rewind(40)
        engine.feed([5])
        assert spans[-1] == 64


def filled(bundle, tokens):
    """An engine of a bundle with these tokens in its slots, and the column of each in its logits."""
    engine = load_engine(bundle)
    engine.remember(tokens.tolist())
    return engine, engine.head_tokens.inverse[tokens]


@pytest.mark.parametrize("quantize", ["none", "int8", "int4", "fp8"])
def test_with_every_token_in_slots_the_trimmed_head_is_the_full_one(quantize, random_model, export_pair, monkeypatch):
    """Its rows are those that the full head multiplies with, in every quantisation; activations are not rounded."""
    monkeypatch.setattr(reference, "open_session", partial(reference.open_session, weights_in_file=True))
    directory = random_model("llama")
    options = {"trt": GRAPHS, "dtype": "fp32", "quantize": quantize}
    slotted, full = (export_pair(directory, k=k, slots=slots, **options) for k, slots in ((64, 10_000), (448, 0)))
    lost = slotted.selection.lost_token_ids
    assert slotted.drafter_manifest.slots == len(lost)
    ids = np.random.default_rng(3).integers(2, 400, 40)
    engine, columns = filled(slotted.drafter, lost)
    with engine, load_engine(full.drafter) as whole:
        wanted = whole.feed(ids, keep=8)
        found = engine.feed(ids, keep=8)
        proposable = np.sort(engine.head_tokens.kept_token_ids)
        logits = wanted.logits[:, proposable]
        off = np.abs(found.logits[:, columns] - wanted.logits[:, lost]).max()
        assert off < 1e-5 * logits.std()
        assert found.token_ids.tolist() == proposable[logits.argmax(-1)].tolist()


def test_slots_draft_what_they_draft_on_onnx_runtime(random_model, export_pair):
    """Token for token, drafted in steps and in one call, with tokens leaving the sixteen slots."""
    directory = random_model("llama")
    options = {"k": 64, "slots": 16, "dtype": "fp32"}
    plain, standard = export_pair(directory, **options), export_pair(directory, trt=GRAPHS, **options)
    lost = plain.selection.lost_token_ids.tolist()
    accepted = 0
    for draft_length in (2, 3):  # 3 in one call
        with (
            SpeculativeDecoder.load(plain.target, plain.drafter, draft_length=draft_length) as host,
            SpeculativeDecoder.load(standard.target, standard.drafter, draft_length=draft_length) as decoder,
        ):
            for prompt in ([5, 17, 200, 33], lost[:60], [7]):
                found, wanted = (each.generate(prompt, max_new_tokens=60) for each in (decoder, host))
                assert found.token_ids == wanted.token_ids
                assert (found.stats.drafted, found.stats.accepted) == (wanted.stats.drafted, wanted.stats.accepted)
                accepted += found.stats.accepted
            sampling = SamplingParams(temperature=1.0, seed=4)
            found, wanted = (each.generate([7], max_new_tokens=40, sampling=sampling) for each in (decoder, host))
            assert found.token_ids == wanted.token_ids
            decoder.drafter.rewind(0)
            assert (decoder.drafter.head_tokens.kept_token_ids[64:] == -1).all()
    assert accepted > 40


def test_slots_of_half_precision(random_model, export_pair):
    result = export_pair(random_model("phi"), k=64, slots=10_000, trt=GRAPHS)  # fp16, and a head with a bias
    full = export_pair(random_model("phi"), k=448, trt=GRAPHS)
    lost = result.selection.lost_token_ids
    engine, columns = filled(result.drafter, lost)
    with engine, load_engine(full.drafter) as whole:
        wanted, found = whole.feed([5, 6, 7]).logits[:, lost], engine.feed([5, 6, 7]).logits[:, columns]
        np.testing.assert_allclose(found, wanted, atol=2e-3 * wanted.std(), rtol=2e-3)
