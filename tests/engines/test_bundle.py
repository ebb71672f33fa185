"""Bundles that were tampered with are refused by name (tests/integration has damaged weights and missing files)."""

import json

import pytest

from engines import VocabMap, VocabtrimError, read_bundle
from engines.bundle import Manifest, file_digest


@pytest.fixture
def bundle(tmp_path):
    vocab_map = VocabMap.from_ids([1, 2], 8)
    (tmp_path / "vocab_map.safetensors").write_bytes(vocab_map.to_bytes())
    names = {"vocab_map.safetensors": file_digest(tmp_path / "vocab_map.safetensors")}
    numbers = dict.fromkeys(
        ("num_layers", "num_kv_heads", "head_dim", "weight_bytes_per_step", "head_bytes", "kv_bytes_per_token"), 1
    )
    texts = dict.fromkeys(("source", "source_digest", "architecture", "tokenizer", "dtype", "quantization"), "x")
    manifest = Manifest(
        role="drafter", vocab_size=8, head_rows=2, eos_token_ids=(1,), context_length=16, inputs=(), outputs=(),
        files=names, tool_versions={}, vocab_map=vocab_map.digest, **numbers, **texts,
    )  # fmt: skip
    (tmp_path / "vocabtrim.json").write_text(manifest.to_json())
    return tmp_path


def edit(bundle, **changes):
    path = bundle / "vocabtrim.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_comes_back_as_it_was_written(bundle):
    found = read_bundle(bundle)
    assert found.vocab_map.kept_token_ids.tolist() == [1, 2]
    assert found.manifest.eos_token_ids == (1,)


def test_another_valid_map_is_refused(bundle):
    other = VocabMap.from_ids([3, 4], 8)
    (bundle / "vocab_map.safetensors").write_bytes(other.to_bytes())
    edit(bundle, files={"vocab_map.safetensors": file_digest(bundle / "vocab_map.safetensors")})
    with pytest.raises(VocabtrimError, match="not the VocabMap"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format 99"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../outside": "0"}}, "not inside the bundle"),
        ({"head_rows": 3}, "not the VocabMap"),
        ({"files": {"gone.bin": "0"}}, "lacks gone.bin"),
    ],
)
def test_an_edited_manifest_is_refused(bundle, changes, message):
    edit(bundle, **changes)
    with pytest.raises(VocabtrimError, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null"])
def test_what_is_no_manifest_is_refused(bundle, text):
    (bundle / "vocabtrim.json").write_text(text)
    with pytest.raises(VocabtrimError, match="not a bundle manifest"):
        read_bundle(bundle)
