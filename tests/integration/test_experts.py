"""Mixtures of experts: their quantised kernels, what a step reads of them, and checkpoints that are not whole."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import VocabtrimError, load_engine
from engines.bundle.experts import Experts
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.calibration import expert_picks
from vocabtrim_export.calibration.expert_picks import distinct_experts, mean_distinct
from vocabtrim_export.proof.dequantized import dequantized
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.sources.source import DTYPES, load_source
from vocabtrim_export.trt.settings import TensorRTSettings

IDS = np.random.default_rng(3).integers(3, 400, 40)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_experts_compute_what_their_blocks_stand_for(quantization, random_model, tmp_path):
    """Inputs are rounded to 8 bits, and the result is the same bit for bit however many tokens a call reads."""
    source = load_source(str(random_model("qwen2_moe")), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", quantization, context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    graph, head = tmp_path / "model.onnx", source.model.get_output_embeddings()
    with dequantized(source.model, graph, quantization, {head: None}) as unlike, torch.inference_mode():
        wanted = source.model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert not unlike
    with load_engine(tmp_path) as engine:
        whole = engine.feed(IDS, keep=len(IDS)).logits.copy()
        engine.rewind(0)
        parts = [engine.feed(IDS[at : at + size], keep=size).logits.copy() for at, size in ((0, 1), (1, 30), (31, 9))]
    off = np.sqrt(np.square(whole - wanted).mean(-1)) / wanted.std()
    assert np.median(off) < 0.1  # of the tokens; a few change experts, whose weights were as good as equal
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_step_reads_the_experts_that_its_tokens_pick():
    experts = Experts(num_experts=128, per_token=8, bytes=128_000)
    assert experts.expected_bytes(1) == pytest.approx(8_000)
    assert experts.expected_bytes(2) == pytest.approx(8_000 + 8_000 * 120 / 128)  # the second token picks some again
    assert 99_000 < experts.expected_bytes(24) < experts.expected_bytes(10_000) == pytest.approx(128_000)


def test_what_was_measured_along_text_takes_the_place_of_independent_picks():
    experts = Experts(num_experts=8, per_token=2, bytes=800, distinct=(2.0, 2.5, 4.0))
    assert [experts.expected_distinct(tokens) for tokens in (1, 1.5, 2, 2.5, 3)] == [2, 2.25, 2.5, 3.25, 4]
    assert experts.expected_distinct(4) == pytest.approx(5)  # of the other four, a quarter
    assert experts.expected_bytes(2) == 250


def test_distinct_experts_of_consecutive_tokens():
    first = [[0, 1], [2, 3], [0, 1], [0, 4]]
    second = [[5, 1], [1, 5], [5, 1], [5, 1]]
    means = mean_distinct(torch.tensor([first, second]), num_experts=6)
    assert means == pytest.approx((2, (4 + 4 + 3 + 2 + 2 + 2) / 6, (4 + 5 + 2 + 2) / 4, (5 + 2) / 2))


def test_an_export_counts_what_the_routers_pick_along_text(random_model):
    source = load_source(str(random_model("qwen2_moe")), DTYPES["fp32"])
    measured = distinct_experts(source.model, source.tokenizer)
    texts = expert_picks._texts(source.model, source.tokenizer)
    assert texts.shape == (8, 64)
    for tokens in (1, 2, 5, 17):
        counts = []
        for text in texts:
            routers = source.model(input_ids=text[None], output_router_logits=True).router_logits
            for logits in routers:
                picks = logits.topk(2).indices.tolist()
                windows = (picks[begin : begin + tokens] for begin in range(64 - tokens + 1))
                counts += [len({expert for pick in window for expert in pick}) for window in windows]
        assert measured[4, 2][tokens - 1] == pytest.approx(np.mean(counts))
    assert len(measured[4, 2]) == 17


def test_a_manifest_counts_the_experts_of_a_step(random_model, export_pair):
    """The routers' biases make every token pick the same two of four."""
    directory = random_model("gpt_oss")
    tensors = load_file(directory / "model.safetensors")
    for name in (each for each in tensors if each.endswith("router.bias")):
        tensors[name] = torch.tensor([300.0, -300.0, 200.0, -200.0])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    result = export_pair(directory)
    manifest = result.target_manifest
    (experts,) = manifest.experts
    assert experts.distinct == (2.0,) * 17
    assert manifest.weight_bytes(1) == manifest.weight_bytes(5) == manifest.weight_bytes_per_step
    assert "5 tokens read 2.0 experts of a layer where one token reads 2, and 1.00 times" in result.notes[-1]
    (unmeasured,) = result.drafter_manifest.experts
    assert unmeasured.distinct == ()


def test_without_measured_experts_a_manifest_takes_independent_picks(random_model, export_pair):
    manifest = export_pair(random_model("qwen2_moe")).drafter_manifest
    (experts,) = manifest.experts
    weights = 2 * 4 * 3 * 32 * 64 * 4  # layers, experts, matrices, their size, bytes of a number
    assert (experts.num_experts, experts.per_token, experts.bytes) == (4, 2, weights)
    assert manifest.weight_bytes(1) == manifest.weight_bytes_per_step
    assert manifest.weight_bytes(2) == manifest.weight_bytes_per_step + weights / 4
    dense = manifest.weight_bytes_per_step - weights / 2
    assert manifest.weight_bytes(1000) == pytest.approx(dense + weights)


@pytest.mark.parametrize(("damage", "cause"), [("missing", "missing"), ("unequal", r"the shape \[64, 16\]")])
def test_experts_that_are_not_whole_are_refused(damage, cause, random_model):
    directory = random_model("qwen2_moe")
    tensors = load_file(directory / "model.safetensors")
    name = next(each for each in tensors if "experts.3.down_proj" in each)
    tensors[name] = tensors[name][:, :16].contiguous()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=rf"experts\.3\.down_proj\.weight .*{cause}") as caught:
        load_source(str(directory), DTYPES["fp32"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "cause"),
    [("qwen2_moe", "picks a token's experts"), ("granite_swa", "sink"), ("bloom", "ALiBi")],
)
def test_tensorrt_refuses_what_its_parser_lacks(architecture, cause, random_model, export_pair):
    with pytest.raises(VocabtrimError, match=cause):
        export_pair(random_model(architecture), trt=TensorRTSettings(flavor="none"))
