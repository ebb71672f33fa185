"""LongRoPE: one set of tables for good, chosen by the length of the bundle."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from engines.errors import VocabtrimError
from vocabtrim_export.sources.rotation import context_length, fix_long_tables
from vocabtrim_export.tracing.composites import rotary_modules

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def longrope():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + 0.1 * i for i in range(16)],
        "long_factor": [2 + 0.5 * i for i in range(16)],
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    torch.manual_seed(0)
    config = Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=rope)
    return Phi3ForCausalLM(config).eval()


@torch.inference_mode()
def test_long_tables_for_good():
    """A text fed in parts, the first of them short, gets the logits of the long text in one."""
    ids = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(0))
    wanted = longrope()(ids).logits
    model = longrope()
    assert context_length("MODEL", model, 64) == 64
    assert fix_long_tables("MODEL", model, 64) == ()
    assert context_length("MODEL", model, None) == 64
    assert context_length("MODEL", model, 128) == 128
    (note,) = fix_long_tables("MODEL", model, 128)
    assert "long rotary tables" in note
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in (ids[:, :20], ids[:, 20:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_dynamic_scaling_ends_where_its_tables_begin_to_change():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
    assert context_length("MODEL", model, None) == 256
    (rotary,) = rotary_modules(model)
    tables = [rotary(torch.zeros(1), torch.arange(length)[None])[0] for length in (128, 256, 257)]
    assert torch.equal(tables[0], tables[1][:, :128])
    assert not torch.equal(tables[1], tables[2][:, :256])
    with pytest.raises(VocabtrimError, match=r"beyond 256 tokens.*dynamic rope scaling"):
        context_length("MODEL", model, 257)
