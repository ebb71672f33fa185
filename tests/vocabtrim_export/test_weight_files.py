"""Models that are not what they say: refused by their headers, before anything is allocated or run."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from engines.errors import VocabtrimError
from vocabtrim_export.drafters.mtp import find_mtp
from vocabtrim_export.drafters.source import weight_files
from vocabtrim_export.formats.eagle3 import read_head
from vocabtrim_export.sources import checkpoint
from vocabtrim_export.sources import source as sources
from vocabtrim_export.sources.head_kinds import head_kind
from vocabtrim_export.sources.weight_files import checkpoint_files, count_weights

GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<IQ", 1, 8) + struct.pack("<IQ", 0, 0)


def gguf(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_headers_that_hold_are_counted(tmp_path):
    assert count_weights(gguf(tmp_path, (GGUF + TENSOR).ljust(64, b"\0") + bytes(32))) == 8
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": np.zeros((2, 3)), "b": np.zeros(5)}))
    assert count_weights(path) == 11


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + GGUF[4:], "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (GGUF + struct.pack("<Q", 1 << 60) + b"t", "a name of 1152921504606846976 bytes"),
        (GGUF + TENSOR[:13] + struct.pack("<Q", 1 << 60) + TENSOR[21:], "end beyond the file"),
        (GGUF + TENSOR[:-12] + struct.pack("<IQ", 999, 0), "unknown type 999"),
        (GGUF, "ends in the middle"),
    ],
)
def test_a_gguf_that_claims_what_cannot_be(tmp_path, data, message):
    with pytest.raises(VocabtrimError, match=message):
        count_weights(gguf(tmp_path, data))


def test_the_files_of_a_model_are_those_that_transformers_takes(tmp_path):
    for name in ("a", "b", "consolidated", "adapter_model"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [file.stem for file in checkpoint_files(tmp_path)] == ["a", "b", "consolidated"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert [file.stem for file in checkpoint_files(tmp_path)] == ["a", "b"]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(VocabtrimError, match=r"is not whole: b\.safetensors, which model\.safetensors\.index\.json"):
        checkpoint_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(VocabtrimError, match=r"names '\.\./a\.safetensors', which is no file of that directory"):
        checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert [file.stem for file in checkpoint_files(tmp_path)] == ["model"]


def test_a_backup_beside_a_head_is_no_part_of_it(tmp_path):
    """A model with a head's file beside it is a model, and its own layer goes before one in a file beside it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 2}))
    (tmp_path / "model.safetensors").write_bytes(save({"model.norm.weight": np.ones(2)}))
    (tmp_path / "old.safetensors").write_bytes(save({"fc.weight": np.zeros(2), "mtp.fc.weight": np.zeros(2)}))
    assert head_kind(str(tmp_path)) is None
    assert [file.stem for file in find_mtp(str(tmp_path)).files] == ["old"]
    (tmp_path / "model.safetensors").write_bytes(save({"fc.weight": np.ones(2), "mtp.fc.weight": np.ones(2)}))
    assert head_kind(str(tmp_path)) == "eagle"
    assert [file.stem for file in find_mtp(str(tmp_path)).files] == ["model"]
    assert [file.stem for file in weight_files(tmp_path, "a head")] == ["model"]
    assert read_head(tmp_path).tensors["fc.weight"].all()


def test_a_safetensors_file_cut_short(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"a": np.zeros(8)})[:-1])
    with pytest.raises(VocabtrimError, match="its header says"):
        count_weights(path)


def test_a_config_that_asks_for_more_than_there_is(model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1_000_000}))
    loader = checkpoint.AutoModelForCausalLM
    monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("it was allocated"))
    with pytest.raises(VocabtrimError, match="do not fit its config"):
        sources.load_source(str(tmp_path), torch.float32)


@pytest.mark.parametrize("kind", ["own", "llama"])  # refused at once; read as transformers' own
def test_a_models_own_code_does_not_run(kind, tmp_path, monkeypatch):
    """Nor is anybody asked on the terminal whether it may."""
    mark = tmp_path / "it-ran"
    config = {"model_type": kind, "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w').close()")
    (tmp_path / "model.safetensors").write_bytes(save({"a": np.zeros(8)}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with pytest.raises(VocabtrimError):
        sources.load_source(str(tmp_path), torch.float32)
    assert not mark.exists()


def test_a_known_architecture_with_code_of_its_own_says_so(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(config | own))
    (note,) = sources.load_source(str(tmp_path), torch.float32).notes
    assert "auto_map" in note


@pytest.mark.parametrize(
    ("changes", "is_noted"),
    [
        ({"sliding_window": 5}, True),
        ({"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"sliding_window": 5, "layer_types": ["full_attention"] * 2}, False),
        ({"sliding_window": None}, False),
    ],
)
def test_a_window_that_the_architecture_does_not_have_is_noted(changes, is_noted, random_model):
    notes = sources.load_source(str(random_model("llama", **changes)), torch.float32).notes
    assert [note for note in notes if "states a sliding window of 5" in note] == list(notes)
    assert bool(notes) == is_noted


def test_a_window_that_the_architecture_has_is_not_noted(random_model):
    assert sources.load_source(str(random_model("mistral", sliding_window=5)), torch.float32).notes == ()


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model."])
def test_names_that_a_wrapper_put_before_the_models_are_said(wrapper, random_model):
    from safetensors.torch import load_file, save_file

    place = random_model("qwen2")
    stored = load_file(place / "model.safetensors")
    save_file({wrapper + name: tensor for name, tensor in stored.items()}, place / "model.safetensors")
    with pytest.raises(VocabtrimError, match=f"every name begins with '{wrapper}'.*; save the model inside"):
        sources.load_source(str(place), torch.float32)
