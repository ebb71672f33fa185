"""EAGLE-1 heads and multi-token-prediction layers that cannot be, or do not belong to their target: one line each."""

import pytest
import torch
from safetensors.torch import save_file

from .layer_heads import CONFIG, DEEPSEEK, HIDDEN, INNER, MIMO, NORMS, beside_the_model, make_tensors, safeailab
from .test_mistakes import assert_one_line, attempt, model  # noqa: F401

HEADS = {
    "hidden size": ({}, {"hidden_size": 128}, "for targets of hidden size 128, .* has 64"),
    "vocabulary": ({}, {"vocab_size": 500}, "for a vocabulary of 500 tokens, .* has 448"),
    "several layers": ({}, {"num_hidden_layers": 2}, "head of several layers"),
    "speculators' norms": ({}, {"layernorms": True}, "sets layernorms, which cannot be exported yet"),
    "HASS's norms": (
        {"embed_layernorm.weight": torch.ones(HIDDEN)},
        {},
        "has tensors that cannot be exported yet: embed_layernorm.weight",
    ),
    "another size": (
        {"layers.0.mlp.up_proj.weight": torch.ones(INNER, 65)},
        {},
        r"layer.mlp.up_proj.weight is \[96, 65\], by config.json and the target it must be \[96, 64\]",
    ),
    "no norm": ({"layers.0.post_attention_layernorm.weight": None}, {}, "lacks tensors of an EAGLE head: layer.post"),
}


@pytest.mark.parametrize("case", HEADS)
def test_eagle_1_heads_that_cannot_be(case, attempt, write_head):  # noqa: F811
    changed, changes, message = HEADS[case]
    tensors = safeailab(make_tensors()) | changed
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert_one_line(attempt(drafter=write_head(held, CONFIG | changes)), message)


def mimo(changed=None):
    tensors = make_tensors(("q_proj", "k_proj", "v_proj", "o_proj"), NORMS) | (changed or {})
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return beside_the_model(held, "model.mtp_layers.0.", MIMO)


def appended(name):
    return beside_the_model(make_tensors((), NORMS), "model.layers.2.", DEEPSEEK) | {
        f"model.layers.2.{name}.weight": torch.ones(2, 2)
    }


LAYERS = {
    "none": ({}, "has no multi-token-prediction layer in its files"),
    "experts": (appended("mlp.experts.0.up_proj"), "layer of .* is a mixture of experts, which cannot be exported yet"),
    "latent attention": (appended("self_attn.kv_b_proj"), "is latent attention, which cannot be exported yet"),
    "no norm": (mimo({"norm.weight": None}), "lacks tensors of a multi-token-prediction layer: norm.weight"),
    "more tensors": (
        mimo({"layer.self_attn.q_norm.weight": torch.ones(16)}),
        "cannot be exported yet: layer.self_attn.q",
    ),
    "hidden size": (mimo({"fc.weight": torch.ones(64, 96)}), r"fc.weight is \[64, 96\], .* must be \[64, 128\]"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_cannot_be(case, attempt, random_model):  # noqa: F811
    tensors, message = LAYERS[case]
    target = random_model("llama")
    if tensors:
        save_file(tensors, target / "mtp.safetensors")
    assert_one_line(attempt(drafter="mtp", target=target), message)


def test_ways_of_asking_that_make_no_sense(attempt, write_head, random_model):  # noqa: F811
    assert_one_line(attempt(drafter="mtp", target=None), "reads its target's hidden states: give --target")
    assert_one_line(attempt(drafter="mtp", target="someone/model"), "someone/model is no local directory")
    head = write_head(safeailab(make_tensors()), CONFIG)
    assert_one_line(attempt(drafter=random_model("llama"), target=head), "is a head and no model: give it as --drafter")
    assert_one_line(attempt(drafter=head, format="eagle3"), "kind eagle3, and this one is of eagle")
