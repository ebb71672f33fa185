"""Weights that an export keeps in mapped files rather than in memory."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from engines import VocabtrimError
from engines.bundle.read import WEIGHTS_NAME
from vocabtrim_export import ExportSettings, export
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.calibration.moments import input_moments
from vocabtrim_export.proof.prove import find_difference
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.sources import mapped
from vocabtrim_export.sources.mapped import holder
from vocabtrim_export.sources.precision import running_in
from vocabtrim_export.sources.source import load_source

PROMPT = torch.arange(5, 15)[None]


@pytest.fixture
def half(random_model, tmp_path):
    """A checkpoint of bfloat16."""
    from transformers import AutoModelForCausalLM

    directory = random_model("qwen3")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def test_a_tensor_in_a_file_has_its_values_and_no_name(tmp_path):
    tensor = torch.randn(600, 1000)
    held = holder(tmp_path)(tensor[:, 1:].t())
    assert torch.equal(held, tensor[:, 1:].t())
    assert f"{tmp_path}/" in Path("/proc/self/maps").read_text("utf-8")
    assert not list(tmp_path.iterdir())


def test_a_model_runs_in_float32_and_keeps_its_own_weights(half):
    model = load_source(str(half), torch.bfloat16).model
    wanted = load_source(str(half), torch.float32).model(PROMPT).logits
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with torch.inference_mode(), running_in(model, torch.float32):
        assert torch.equal(model(PROMPT).logits, wanted)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_experts_run_in_float32_one_at_a_time(architecture, random_model):
    """Bit for bit as transformers runs them; gpt-oss has biases, and its matrices are transposed."""
    model = load_source(str(random_model(architecture)), torch.float32).model.bfloat16().float()
    with torch.inference_mode():
        wanted = model(PROMPT).logits
        with running_in(model.bfloat16(), torch.float32):
            assert torch.equal(model(PROMPT).logits, wanted)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_an_export_holds_no_two_experts_in_float32(random_model, tmp_path, monkeypatch):
    """Written in int4 and proven: no operation in PyTorch makes as many bytes as two experts' matrices have."""
    sizes = {"num_experts": 16, "moe_intermediate_size": 256, "hidden_size": 256}
    source = load_source(str(random_model("qwen3_moe", **sizes)), torch.bfloat16)
    plan = BundlePlan("target", source, "fp32", "int4", context_length=128)
    traced, allocated = trace_source(plan), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                allocated.append(result.untyped_storage().nbytes())
            return result

    with Sizes():
        write_bundle(tmp_path, traced, plan, lambda *_: None)
        assert find_difference(tmp_path, plan) is None
    assert max(allocated) < 2 * (3 * 256 * 256) * 4


def test_a_half_precision_checkpoint_stays_in_its_file_and_gives_the_same_bundle(half, tmp_path):
    """An int4 bundle with moments, and its proof, which sees the weights of the checkpoint."""
    written = []
    for name, scratch in (("mapped", tmp_path), ("loaded", None)):
        source = load_source(str(half), torch.float32, scratch=scratch)
        assert source.model.dtype == (torch.bfloat16 if scratch else torch.float32)
        with running_in(source.model, torch.float32):
            moments = input_moments(source.model, source.tokenizer)
        plan = BundlePlan("target", source, "fp32", "int4", context_length=128, moments=moments)
        (place := tmp_path / name).mkdir()
        write_bundle(place, trace_source(plan), plan, lambda *_: None)
        assert find_difference(place, plan) is None
        written.append((place / WEIGHTS_NAME).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("odd", ["mlp.gate.weight", "experts.1.up_proj.weight"])
def test_a_mixture_in_half_precision_is_mapped_with_what_it_has_in_float32(odd, random_model, tmp_path, monkeypatch):
    """The experts are stacked in files; a float32 tensor stays so, or all are loaded in float32 where it is stacked."""
    monkeypatch.setattr(mapped, "_SMALL", 0)
    directory = random_model("qwen2_moe")
    tensors = load_file(directory / "model.safetensors")
    halves = {name: tensor if odd in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, directory / "model.safetensors", {"format": "pt"})
    parameters = dict(load_source(str(directory), torch.float32, scratch=tmp_path).model.named_parameters())
    for name, wanted in load_source(str(directory), torch.float32).model.named_parameters():
        assert torch.equal(parameters[name].float(), wanted)
        assert parameters[name].dtype == (torch.float32 if odd in name or "expert" in odd else torch.bfloat16)
        assert "experts" not in name or parameters[name].untyped_storage().filename


def test_experts_that_the_disk_has_no_room_for_are_refused(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(VocabtrimError, match=r"its experts stacked, needs 0\.0 GB of disk space in .* and there are 0"):
        load_source(str(random_model("qwen2_moe")), torch.float32, scratch=tmp_path)


def test_a_disk_without_room_is_named_before_the_work(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(VocabtrimError, match=r"needs \d+\.\d GB of disk space in .* and there are 0\.0"):
        export(random_model("llama"), None, tmp_path / "out", ExportSettings(k=192))
    assert not (tmp_path / "out").exists()
