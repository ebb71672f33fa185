"""Settings of a config.json that are read as they are meant, or refused in a line that names what is wrong."""

import json

import pytest
import torch
from transformers import AutoConfig

from engines.errors import VocabtrimError
from vocabtrim_export.sources.config import read_config
from vocabtrim_export.sources.source import load_source

LONGROPE = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}


def described(directory, **changes):
    """Changes settings of a config.json; those that are None are left out of it."""
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return str(directory)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_first_name_of_longrope_is_read(key, random_model):
    """ "su", as Phi-3's first releases have it, which transformers 5 refuses."""
    place = random_model("phi3", head_dim=16, hidden_size=64)
    old = {"rope_parameters": None, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    today = described(place, **old, rope_scaling=LONGROPE | {"type": "longrope"})
    wanted = AutoConfig.from_pretrained(today).rope_parameters
    assert (wanted["rope_type"], wanted["original_max_position_embeddings"]) == ("longrope", 64)
    config = read_config("MODEL", described(place, rope_scaling=LONGROPE | {key: "su"}))
    assert {**config.rope_parameters, "type": "longrope"} == wanted


@pytest.mark.parametrize(
    ("architecture", "changes", "cause"),
    [
        ("llama", {"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}}, "'banana'"),
        ("llama", {"hidden_act": "banana"}, "'banana'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "'str'"),
        ("llama", {"num_hidden_layers": "2"}, "'num_hidden_layers' expected int"),
        ("qwen3", {"layer_types": ["full_attention"]}, r"`layer_types` \(1\)"),
    ],
)
def test_settings_that_transformers_cannot_read_are_named(architecture, changes, cause, random_model):
    place = described(random_model(architecture), **changes)
    begin = rf"transformers cannot make a model \({architecture}\) of the config.json of .*"
    with pytest.raises(VocabtrimError, match=f"{begin}({cause}).*; compare its settings"):
        load_source(place, torch.float32)


def test_a_stated_attention_that_this_machine_lacks_does_not_matter(random_model):
    source = load_source(described(random_model("llama"), attn_implementation="flash_attention_2"), torch.float32)
    assert source.model.config._attn_implementation != "flash_attention_2"
