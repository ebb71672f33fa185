"""Mixtures of experts: their quantised kernels, what a step reads of them, and checkpoints that are not whole."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import VocabtrimError, load_engine
from engines.bundle.manifest import Experts
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
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


def test_a_manifest_counts_the_experts_of_a_step(random_model, export_pair):
    manifest = export_pair(random_model("qwen2_moe")).target_manifest
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


@pytest.mark.parametrize(("architecture", "cause"), [("qwen2_moe", "picks a token's experts"), ("granite_swa", "sink")])
def test_tensorrt_refuses_what_its_parser_lacks(architecture, cause, random_model, export_pair):
    with pytest.raises(VocabtrimError, match=cause):
        export_pair(random_model(architecture), trt=TensorRTSettings(flavor="none"))
