"""`--format openvino`: its graphs compute what the bundles do, and OpenVINO GenAI drafts with them."""

import numpy as np
import pytest

from engines import load_engine
from engines.errors import VocabtrimError
from runtime import SpeculativeDecoder

openvino = pytest.importorskip("openvino")
pytest.importorskip("openvino_tokenizers")

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
PROMPT = [5, 17, 260, 33, 120, 7]


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "qwen3", "phi3", "phi", "granite", "cohere", "gpt2", "gpt_neox"]
)  # what turns, and where
def test_its_graph_computes_what_the_bundle_does(architecture, random_model, export_pair):
    """A batch of two, one padded on its left, then with its rows exchanged."""
    result = export_pair(random_model(architecture), formats=("openvino",))
    kept = result.selection.vocab_map.kept_token_ids
    graph = result.drafter.parent / "openvino" / "drafter" / "openvino_model.xml"
    request = openvino.Core().compile_model(graph, "CPU", EXACT).create_infer_request()
    feed = {
        "input_ids": np.array([[0, 0, *PROMPT[:4]], PROMPT]),
        "attention_mask": np.array([[0, 0, 1, 1, 1, 1], [1] * 6]),
        "position_ids": np.array([[0, 0, 0, 1, 2, 3], range(6)]),
        "beam_idx": np.arange(2, dtype=np.int32),
    }
    first = request.infer(feed)["logits"].copy()
    feed = {
        "input_ids": np.array([[9, 11], [9, 11]]),
        "attention_mask": np.array([[1] * 8, [0, 0, *[1] * 6]]),
        "position_ids": np.array([[6, 7], [4, 5]]),
        "beam_idx": np.array([1, 0], np.int32),
    }
    then = request.infer(feed)["logits"]
    for ids, before, after in ((PROMPT, first[1], then[0]), (PROMPT[:4], first[0, 2:], then[1])):
        with load_engine(result.drafter) as engine:
            for tokens, found in ((ids, before), ([9, 11], after)):
                wanted = engine.feed(tokens, keep=len(tokens)).logits
                np.testing.assert_allclose(found[:, kept], wanted, atol=2e-4 * wanted.std(), rtol=1e-4)
                assert np.isneginf(np.delete(found, kept, axis=1)).all()


@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", "none"), ("fp16", "none"), ("fp32", "int4")])
def test_genai_drafts_with_it_and_writes_what_we_write(dtype, quantize, random_model, export_pair):
    genai = pytest.importorskip("openvino_genai")
    model = random_model("llama")
    result = export_pair(model, dtype=dtype, quantize_drafter=quantize, formats=("openvino",))
    place = result.drafter.parent / "openvino"
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        ours = list(decoder.generate(PROMPT, max_new_tokens=24).token_ids)

    def generate(drafted, **options):
        config = genai.GenerationConfig(max_new_tokens=24, do_sample=False, num_assistant_tokens=drafted)
        pipeline = genai.LLMPipeline(place / "target", "CPU", **EXACT, **options)
        return pipeline.generate(openvino.Tensor(np.array([PROMPT])), config)

    plain = generate(0)
    drafted = generate(3, draft_model=genai.draft_model(place / "drafter", "CPU", **EXACT))
    for tokens in (list(plain.tokens[0]), list(drafted.tokens[0])):
        assert len(tokens) > 4
        assert tokens == ours[: len(tokens)]
    assert drafted.extended_perf_metrics.get_num_accepted_tokens() > 0


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("mistral", {}, "window of 5 tokens, .* give --max-length 5"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "caps its attention scores"),
        ("mpt", {}, "ALiBi positions or attention sinks"),
    ],
)
def test_attention_that_would_be_lost_is_refused(architecture, changes, message, random_model, export_pair):
    with pytest.raises(VocabtrimError, match=message):
        export_pair(random_model(architecture, **changes), formats=("openvino",))
