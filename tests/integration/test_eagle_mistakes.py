"""Heads that cannot be, or do not belong to their target: one line each, before any long work."""

import json
import shutil

import pytest
import torch

from .eagle_heads import CONFIG, INNER, LAYERS, VOCAB, make_tensors, permuted
from .test_mistakes import assert_one_line, attempt  # noqa: F401

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama", num_hidden_layers=8)


def reduced(**changes):
    """A head of 100 rows with these tensors as well."""
    full = make_tensors()
    return {**full, HEAD: full[HEAD][:100], **changes}


def offsets(first=0):
    return permuted(range(first, first + 100))


def without(name):
    return {key: tensor for key, tensor in make_tensors().items() if key != name}


TABLES = {
    "too short": (reduced(d2t=offsets()[:99]), r"d2t is int64\[99\], and the head's 100 rows need as many integers"),
    "no integers": (reduced(d2t=offsets().half()), "d2t is float"),
    "outside": (reduced(d2t=offsets() + 400), "d2t names the token 499, which is outside the vocabulary of 448"),
    "negative": (reduced(d2t=offsets() - 1), "d2t names the token -1"),
    "far outside": (reduced(d2t=offsets() + (1 << 63) - 1), "which is outside the vocabulary"),
    "twice": (reduced(d2t=-torch.arange(100)), "d2t names a token twice"),
    "absolute, and nothing says so": (reduced(d2t=torch.arange(300, 400)), "d2t names the token 498"),
    "missing": (reduced(), "100 rows for a vocabulary of 448 tokens, but no d2t"),
    "t2d of another head": (reduced(t2d=torch.arange(VOCAB) < 99), "t2d names 99 tokens, the head has 100 rows"),
    "t2d of another vocabulary": (reduced(d2t=offsets(), t2d=torch.ones(90).bool()), r"t2d has shape \[90\]"),
    "two tables": (reduced(d2t=offsets(), t2d=torch.arange(VOCAB) >= 348), "d2t and t2d name different tokens"),
}
TENSORS = {
    "no fc": (without("fc.weight"), "lacks tensors of an EAGLE-3 head: fc.weight"),
    "no keys": (without("midlayer.self_attn.k_proj.weight"), "lacks .*: midlayer.self_attn.k_proj.weight"),
    "two layers": (
        {**make_tensors(), "layers.1.mlp.up_proj.weight": torch.ones(2, 2)},
        "cannot be exported yet: layers.1",
    ),
    "another size": (
        {**make_tensors(), "midlayer.mlp.up_proj.weight": torch.ones(INNER, 65)},
        r"midlayer.mlp.up_proj.weight is \[96, 65\], by config.json and the target it must be \[96, 64\]",
    ),
}
CONFIGS = {
    "target's hidden size": ({"target_hidden_size": 128}, "for targets of hidden size 128, .* has 64"),
    "vocabulary": ({"vocab_size": 500}, "for a vocabulary of 500 tokens, .* has 448"),
    "layers": ({"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}, "reads what enters the layers 2, 4, 8 .* has 8"),
    "layers that are none": ({"eagle_aux_hidden_state_layer_ids": [2, -1]}, r"layer_ids\[1\] is -1; expected a whole"),
    "fewer layers": ({"eagle_aux_hidden_state_layer_ids": [2, 4]}, r"fc.weight is \[64, 192\]"),
    "no size": ({"hidden_size": None}, "hidden_size is null; expected a whole number"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "odd heads": ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
    "rope": ({"rope_scaling": {"rope_type": "spiral"}}, "describes no such head"),
    "several layers": ({"num_hidden_layers": 2}, "head of several layers"),
    "a norm": ({"norm_before_fc": True}, "sets norm_before_fc, which cannot be exported yet"),
}


@pytest.mark.parametrize("case", [*TABLES, *TENSORS])
def test_tensors_that_cannot_be(case, attempt, write_head):  # noqa: F811
    tensors, message = (TABLES | TENSORS)[case]
    assert_one_line(attempt(drafter=write_head(tensors)), message)


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_cannot_be(case, attempt, write_head):  # noqa: F811
    changes, message = CONFIGS[case]
    assert_one_line(attempt(drafter=write_head(make_tensors(), CONFIG | changes)), message)


def test_ways_of_asking_that_make_no_sense(attempt, write_head, model, tmp_path):  # noqa: F811
    head = write_head(make_tensors(), eagle_aux_hidden_state_layer_ids=list(LAYERS))
    assert_one_line(attempt(drafter=head, target=None), "reads its target's hidden states: give --target")
    assert_one_line(attempt(drafter=model, target=head), "is a head and no model: give it as --drafter")
    assert_one_line(attempt(drafter=head, format="trt"), "heads run on ONNX Runtime only")
    generating = attempt(drafter=head, calibration=__file__, calibration_source="drafter")
    assert_one_line(generating, "generates nothing by itself")
    pickled = shutil.copytree(head, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert_one_line(attempt(drafter=pickled), "pytorch_model.bin is a pickle checkpoint.*save_file")
    (pickled / "pytorch_model.bin").unlink()
    assert_one_line(attempt(drafter=pickled), "holds an EAGLE head and no .safetensors weights")
    (pickled / "model.safetensors").write_bytes((head / "model.safetensors").read_bytes()[:-8])
    assert_one_line(attempt(drafter=pickled), "fetch it again")
    (pickled / "config.json").write_text(json.dumps(CONFIG)[:-1])
    assert_one_line(attempt(drafter=pickled), "is not valid JSON")
