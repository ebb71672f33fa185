"""A trimmed EAGLE-3 checkpoint: which rows and which offsets, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import VocabtrimError
from engines.bundle.vocab_map import VocabMap
from vocabtrim_export.formats.eagle3 import write_eagle3

VOCAB, HIDDEN, INNER, ROWS = 50, 8, 12, 20
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "draft_vocab_size": ROWS,
}


@pytest.fixture
def head(tmp_path):
    """head(**changes) → a checkpoint whose rows are in no order, as ModelOpt writes them: offsets of any sign."""

    def make(**changes):
        random = torch.Generator().manual_seed(0)
        shapes = {
            "fc.weight": (HIDDEN, 3 * HIDDEN),
            "norm.weight": (HIDDEN,),
            "lm_head.weight": (ROWS, HIDDEN),
            **{f"midlayer.self_attn.{x}_proj.weight": (s, 2 * HIDDEN) for x, s in (("q", 8), ("k", 4), ("v", 4))},
            "midlayer.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "midlayer.mlp.gate_proj.weight": (INNER, HIDDEN),
            "midlayer.mlp.up_proj.weight": (INNER, HIDDEN),
            "midlayer.mlp.down_proj.weight": (HIDDEN, INNER),
            **{
                f"midlayer.{x}.weight": (HIDDEN,)
                for x in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
            },
        }
        tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        ids = torch.randperm(VOCAB, generator=random)[:ROWS]
        tensors |= {"d2t": ids - torch.arange(ROWS)} | changes
        path = tmp_path / "head"
        path.mkdir()
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(CONFIG))
        return path, tensors, ids

    return make


def scattered(tensors, hidden):
    """Full-width logits as vLLM makes them: row i goes to column i + d2t[i], −inf elsewhere."""
    logits = hidden @ tensors["lm_head.weight"].T
    full = logits.new_full((VOCAB,), -torch.inf)
    full[torch.arange(len(tensors["d2t"])) + tensors["d2t"]] = logits
    return full


def test_a_kept_token_has_the_logit_that_it_had(head, tmp_path):
    path, before, ids = head()
    wanted = sorted(ids.tolist()[::2])
    absent = sorted(set(range(VOCAB)) - set(ids.tolist()))[:3]
    kept = write_eagle3(path, VocabMap.from_ids([*wanted, *absent], VOCAB), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept.kept_token_ids.tolist() == wanted
    assert config["draft_vocab_size"] == len(wanted) == len(after["lm_head.weight"])
    assert after["d2t"].dtype is torch.int64
    assert torch.nonzero(after["t2d"]).flatten().tolist() == wanted
    hidden = torch.randn(HIDDEN)
    old, new = scattered(before, hidden), scattered(after, hidden)
    assert torch.nonzero(torch.isfinite(new)).flatten().tolist() == wanted
    torch.testing.assert_close(new[wanted], old[wanted])


def test_a_head_without_rows_takes_the_targets(head, tmp_path):
    path, _, _ = head(**{"lm_head.weight": None, "d2t": None})
    target = torch.randn(VOCAB, HIDDEN)
    write_eagle3(path, VocabMap(np.array([3, 40]), VOCAB), tmp_path / "out", target)
    after = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(after["lm_head.weight"], target[[3, 40]])
    assert after["d2t"].tolist() == [3, 39]
    with pytest.raises(VocabtrimError, match="give the target too"):
        write_eagle3(path, VocabMap(np.array([3]), VOCAB), tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d2t": None}, "no d2t that says which"),
        ({"d2t": torch.zeros(ROWS - 1, dtype=torch.int64)}, "rows need as many integers"),
        ({"d2t": torch.full((ROWS,), VOCAB)}, "outside the vocabulary of 50"),
        ({"d2t": -torch.arange(ROWS)}, "names a token twice"),
        ({"layers.0.hidden_norm.weight": torch.zeros(HIDDEN)}, "no loader"),
        ({"norm.weight": None}, "has no norm.weight"),
        ({"midlayer.self_attn.k_proj.weight": torch.zeros(4, HIDDEN)}, r"loaders expect \[4, 16\]"),
    ],
)
def test_what_the_loaders_would_refuse_or_misread_is_refused(changes, message, head, tmp_path):
    path, _, _ = head(**changes)
    with pytest.raises(VocabtrimError, match=message):
        write_eagle3(path, VocabMap(np.arange(VOCAB), VOCAB), tmp_path / "out")
    assert not (tmp_path / "out").exists()
