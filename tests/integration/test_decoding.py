"""The oracle tests, on real engines: what the loop gives is what the target alone gives."""

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx.numpy_helper import to_array

from engines import load_engine
from engines.bundle.graph_io import ATTENTION_PADDING
from engines.bundle.read import read_bundle
from engines.ort.engine import OnnxRuntimeEngine
from engines.ort.session import open_session
from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.selection import Coverage

PROMPTS = [[5, 17, 200, 33], list(range(40, 70)), [7]]


@pytest.fixture(scope="module")
def directory(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def pair(directory, export_pair):
    return export_pair(directory, quantize_drafter="int4")


def plain_greedy(directory, prompt, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, min_new_tokens=1)
    return ids[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_generate(directory, pair):
    for draft_length in (1, 4, 7):
        with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=draft_length) as decoder:
            for prompt in PROMPTS:
                result = decoder.generate(prompt, max_new_tokens=40)
                assert list(result.token_ids) == plain_greedy(directory, prompt, 40)


@pytest.mark.parametrize("shared", [False, True])
def test_the_target_as_its_own_drafter_accepts_everything(shared, pair):
    with (
        load_engine(pair.target) as target,
        SpeculativeDecoder(
            target, load_engine(pair.target, share_cache_with=target if shared else None), draft_length=4
        ) as decoder,
    ):
        for prompt in PROMPTS:
            stats = decoder.generate(prompt, max_new_tokens=41).stats
            assert stats.accepted == stats.drafted > 0
        for seed in range(3):
            sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
            stats = decoder.generate(PROMPTS[0], max_new_tokens=41, sampling=sampling).stats
            assert stats.accepted == stats.drafted > 0


def test_long_prompts_run_in_chunks(directory, export_pair):
    prompt = np.random.default_rng(0).integers(2, 400, 240).tolist()
    result = export_pair(directory, max_length=256)
    with load_engine(result.target) as whole, load_engine(result.target) as parts:
        from engines.ort import engine as ort_engine

        expected = whole.feed(prompt, keep=3).logits.copy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ort_engine, "CHUNK", 16)
            found = parts.feed(prompt, keep=3).logits
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_full_context_ends_the_generation(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=4) as decoder:
        prompt = list(range(40, 60))
        result = decoder.generate(prompt, max_new_tokens=10_000)
        assert result.finish_reason == "length"
        assert len(prompt) + len(result.token_ids) == 128 + 1  # the last one need not be cached


def test_a_drafter_of_another_model_still_gives_the_targets_output(directory, random_model, export_pair):
    other = random_model("llama", seed=1, hidden_size=32, num_hidden_layers=1)
    result = export_pair(other, target=directory, k=Coverage(0.5))
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        generated = decoder.generate(PROMPTS[1], max_new_tokens=40)
        assert list(generated.token_ids) == plain_greedy(directory, PROMPTS[1], 40)
        assert generated.stats.accepted < generated.stats.drafted


def head_tensors(bundle):
    model = onnx.load(bundle / "model.onnx")
    head = next(node for node in reversed(model.graph.node) if node.op_type == "MatMulNBits")
    tensors = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    return [tensors[name] for name in head.input[1:]]


def test_rows_may_be_selected_before_or_after_quantisation(pair, directory, export_pair):
    full = export_pair(directory, k=448, quantize_drafter="int4")
    assert full.selection.is_noop
    kept = pair.selection.vocab_map.kept_token_ids
    for trimmed, whole in zip(head_tensors(pair.drafter), head_tensors(full.drafter), strict=True):
        np.testing.assert_array_equal(trimmed, whole[kept])


def test_bytes_per_step_are_what_the_files_hold(pair):
    """Everything but tables is read whole: the embedding, the rotary tables and the remap table give a row each."""
    manifest, model = pair.drafter_manifest, onnx.load(pair.drafter / "model.onnx")
    sizes = {tensor.name: (to_array(tensor).nbytes, len(to_array(tensor))) for tensor in model.graph.initializer}
    tables = [
        name
        for name, (_, rows) in sizes.items()
        if name.startswith("model.lm_head.weight.rows") or "rope" in name or "kept_token" in name
    ]
    assert len(tables) == 6
    expected = sum(size // rows if name in tables else size for name, (size, rows) in sizes.items())
    assert manifest.weight_bytes_per_step == expected
    blocks = 64 // 32
    assert manifest.head_bytes == 192 * (blocks * 16 + blocks * 4 + 1)  # nibbles, scales, zero points
    assert manifest.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_bundles(dtype, directory, export_pair):
    from engines import VocabtrimError

    result = export_pair(directory, dtype=dtype)
    if dtype == "bf16":
        with pytest.raises(VocabtrimError, match="bf16"):
            load_engine(result.target)
        return
    with load_engine(result.target) as engine:
        logits = engine.feed(PROMPTS[1], keep=8).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[1]])).logits[0, -8:].numpy()
    np.testing.assert_allclose(logits, wanted, atol=0.1 * wanted.std())


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request, directory, export_pair):
    return export_pair(directory, quantize=request.param)


def test_quantised_targets_are_near_the_model_and_still_lossless(quantised, directory):
    tolerance = {"int8": 0.15, "int4": 0.5}[quantised.target_manifest.quantization]  # the inputs are int8, too
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[1]])).logits[0, -8:].numpy()
    with (
        SpeculativeDecoder.load(quantised.target) as alone,
        SpeculativeDecoder.load(quantised.target, quantised.drafter, draft_length=4) as pair,
    ):
        found = alone.target.feed(PROMPTS[1], keep=8).logits
        assert np.abs(found - wanted).mean() < tolerance * wanted.std()
        for prompt in PROMPTS:  # to the end of the context
            expected, found = (each.generate(prompt, max_new_tokens=10_000) for each in (alone, pair))
            assert found.token_ids == expected.token_ids
            assert found.finish_reason == expected.finish_reason == "length"


def check_one_model(path, lengths):
    with load_engine(path) as engine:
        check_one_engine(engine, lengths)


def check_one_engine(engine, lengths):
    ids = np.random.default_rng(0).integers(2, 400, 120)
    wanted = engine.feed(ids, keep=120).logits.copy()
    for length in lengths:
        engine.rewind(0)
        for start in range(0, 120, length):
            part = ids[start : start + length]
            for keep in sorted({1, len(part) // 2 or 1, len(part)}):
                engine.rewind(start)
                output, rows = engine.feed(part, keep), wanted[start : start + length][-keep:]
                np.testing.assert_array_equal(output.logits, rows)
                np.testing.assert_array_equal(output.token_ids, rows.argmax(axis=1))


@pytest.fixture
def is_exact(request, monkeypatch):
    """Whether products in 8 bits are taken to be exact in any number of rows; None looks at this machine's."""
    if request.param is not None:
        monkeypatch.setattr("engines.ort.load.is_row_exact", lambda _engine: request.param)
    return request.param


@pytest.mark.parametrize(
    ("quantization", "is_exact", "wanted"),
    [
        ("int8", True, {1: 1, 2: 2, 3: 3, 17: 17}),
        ("int8", False, {1: 2, 2: 2, 3: 4, 17: 18}),
        ("int4", True, {1: 2, 2: 2, 3: 3, 17: 18}),
    ],
    indirect=["is_exact"],
)
def test_a_quantised_target_tells_the_rows_that_it_computes(random_model, export_pair, quantization, is_exact, wanted):
    """They decide how long drafts are."""
    result = export_pair(random_model("llama", num_hidden_layers=1), quantize=quantization)
    with SpeculativeDecoder.load(result.target, result.drafter) as decoder:
        assert {rows: decoder.target.rows_computed(rows) for rows in wanted} == wanted
        assert decoder.drafter.rows_computed(1) == 1
        decoder.generate(PROMPTS[0], max_new_tokens=2)


@pytest.mark.parametrize("is_exact", [None, False], indirect=True)
def test_a_quantised_target_is_one_model_in_steps_of_every_length(quantised, is_exact):
    """Bit for bit: its products round their inputs to 8 bits, which turns any difference into a large one."""
    check_one_model(quantised.target, (1, 2, 3, 5, 17, 33))


def test_without_padding_a_quantised_target_is_not_one_model(quantised):
    bundle = read_bundle(quantised.target)
    with (
        OnnxRuntimeEngine(bundle, open_session(bundle.path / "model.onnx")) as engine,
        pytest.raises(AssertionError),
    ):
        check_one_engine(engine, (1,))


def test_attention_alone_is_padded_where_that_can_be_enough(quantised, random_model, export_pair):
    """Products in 4 bits and experts have a kernel for a lone row. Other programs feed no padding."""
    mixture = export_pair(random_model("mixtral"), quantize="int8")
    for path, pads in [
        (quantised.target, quantised.target_manifest.quantization == "int8"),
        (quantised.drafter, False),
        (mixture.target, False),
    ]:
        session = open_session(path / "model.onnx")
        assert ATTENTION_PADDING not in {value.name for value in session.get_inputs()}
        assert (ATTENTION_PADDING in {value.name for value in session.get_overridable_initializers()}) == pads


def test_an_int8_target_of_wide_blocks_is_one_model_in_steps_of_every_length(random_model, export_pair):
    """Its products take two rows at a time; a third would be computed by another kernel."""
    model = random_model("llama", hidden_size=128, intermediate_size=256)
    check_one_model(export_pair(model, quantize="int8").target, (1, 2, 3, 5, 17, 33))


def test_a_target_of_wide_attention_heads_is_one_model_in_steps_of_every_length(random_model, export_pair):
    """Tiles of keys are wide enough to split the products of a head on this machine, or this head splits none."""
    model = random_model("llama", head_dim=192)
    check_one_model(export_pair(model, quantize="int8").target, (1, 2, 5, 17, 33))


def test_only_a_drafter_of_the_targets_weights_shares_its_cache(pair, directory, random_model, export_pair):
    other = export_pair(random_model("llama", seed=2), target=directory)
    shorter = export_pair(directory, max_length=64)
    with load_engine(pair.target) as target:
        for result, shares in [(pair, True), (other, False), (shorter, False)]:
            with load_engine(result.drafter, share_cache_with=target) as drafter:
                assert (drafter.cache is target.cache) == shares


def test_loading_an_engine_that_shares_a_cache_leaves_the_text_in_it(quantised):
    """A load looks at the logits of a few tokens, in a cache of its own."""
    with load_engine(quantised.target) as target:
        target.feed(PROMPTS[1])
        wanted = target.feed([7]).logits.copy()
        target.rewind(len(PROMPTS[1]))
        with load_engine(quantised.target, share_cache_with=target) as other:
            assert other.cache is target.cache
        np.testing.assert_array_equal(target.feed([7]).logits, wanted)


def test_sharing_the_cache_changes_the_drafts_and_not_the_output(directory, pair):
    prompt = PROMPTS[1]
    with (
        load_engine(pair.target) as target,
        load_engine(pair.drafter) as own,
        load_engine(pair.drafter, share_cache_with=target) as shared,
    ):
        for drafter in (own, shared, own):  # turns on one target, as bench takes them
            result = SpeculativeDecoder(target, drafter, draft_length=4).generate(prompt, max_new_tokens=60)
            assert list(result.token_ids) == plain_greedy(directory, prompt, 60)
        # what the drafter wrote ahead has left no trace in the target's cache
        sampling = SamplingParams(temperature=1.0, seed=3)
        first = SpeculativeDecoder(target, shared, draft_length=4).generate(
            prompt, max_new_tokens=60, sampling=sampling
        )
        again = SpeculativeDecoder(target, shared, draft_length=4).generate(
            prompt, max_new_tokens=60, sampling=sampling
        )
        assert first.token_ids == again.token_ids
