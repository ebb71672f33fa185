"""A model that cannot be exported is refused by its configuration; the error names the kind of architecture."""

import pytest
from transformers import CONFIG_MAPPING

from engines.errors import VocabtrimError
from vocabtrim_export.sources.refusals import check_architecture

FEW = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("architecture", "changes", "cause"),
    [
        ("mamba", {}, "recurrent state"),
        ("qwen3_next", {}, "recurrent state"),
        ("dbrx", {}, "mixture of experts with code of its own"),
        ("mixtral", {**FEW, "hidden_act": "gelu"}, "mixture of experts with a gate of its own"),
        ("deepseek_v32", {}, "sparse or chunked attention"),
        ("falcon", {}, "attention code of its own"),
        ("t5", {}, "encoder-decoder"),
        ("bert", {}, "bidirectional"),
        ("gemma", {"use_bidirectional_attention": True}, "bidirectional"),  # PaliGemma's text model
        ("llama", {"is_causal": False}, "bidirectional"),  # a model of embeddings
        ("gemma3n_text", {}, "KV caches of earlier ones"),
        ("vit", {}, "no language model"),
    ],
)
def test_an_architecture_that_cannot_be_exported(architecture, changes, cause):
    with pytest.raises(VocabtrimError, match=cause) as caught:
        check_architecture("MODEL", CONFIG_MAPPING[architecture](**changes))
    assert str(caught.value).startswith("MODEL")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("bert", {"is_decoder": True}),
        ("phi3", {}),
        ("mixtral", FEW),
        ("gpt_oss", {}),
        ("gpt2", {}),  # its is_decoder is false in every checkpoint
    ],
)
def test_an_architecture_that_can(architecture, changes):
    check_architecture("MODEL", CONFIG_MAPPING[architecture](**changes))
