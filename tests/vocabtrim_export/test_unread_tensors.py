"""Tensors that no part of the model reads are harmless, noted or refused, never dropped in silence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import VocabtrimError
from vocabtrim_export.sources.source import load_source
from vocabtrim_export.sources.unread_tensors import check_unread


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    """checkpoint(name=tensor, …) → the directory of a model with these tensors added."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def write(file="model.safetensors", **more):
        path = tmp_path / file
        before = load_file(path) if path.exists() else {}
        save_file(before | more, path, {"format": "pt"})
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "biases"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter.*merge"),
        ("model.layers.1.mlp.up_proj.weight_scale", "quantisation"),
        ("model.layers.2.mlp.up_proj.weight", "layers beyond the 2"),
        ("model.layers.0.post_norm.weight", "no place for"),
    ],
)
def test_a_tensor_that_may_be_needed_is_refused_by_name(checkpoint, name, cause):
    path = checkpoint(**{name: torch.zeros(32)})
    with pytest.raises(VocabtrimError, match=cause) as caught:
        load_source(path, torch.float32)
    assert name in str(caught.value)


def test_buffers_and_heads_that_do_not_change_the_output(checkpoint):
    path = checkpoint(
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "score.weight": torch.zeros(2, 32)}
    )
    (note,) = load_source(path, torch.float32).notes
    assert "scores texts" in note


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.2.eh_proj.weight"])
def test_layers_that_predict_several_tokens_are_noted(name):
    beside = ["model.layers.2.mlp.up_proj.weight"] if ".2." in name else []
    (note,) = check_unread("MODEL", [name, *beside], layers=2)
    assert "--drafter mtp" in note


def test_an_adapter_is_not_left_out(checkpoint):
    path = checkpoint("adapter_model.safetensors", **{"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)})
    with pytest.raises(VocabtrimError, match=r"an adapter next to full weights.*merge it"):
        load_source(path, torch.float32)
