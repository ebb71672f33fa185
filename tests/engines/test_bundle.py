"""Bundles that were tampered with are refused by name (tests/integration has damaged weights and missing files)."""

import json
from dataclasses import asdict

import pytest

from engines import VocabMap, VocabtrimError, read_bundle
from engines.bundle.manifest import _digest
from engines.bundle.read import FileDigest, Manifest, file_digest
from engines.generation_rules import GenerationRules


def state(path):
    return FileDigest(path.stat().st_size, file_digest(path))


@pytest.fixture
def bundle(tmp_path):
    vocab_map = VocabMap.from_ids([1, 2], 8)
    (tmp_path / "vocab_map.safetensors").write_bytes(vocab_map.to_bytes())
    names = {"vocab_map.safetensors": state(tmp_path / "vocab_map.safetensors")}
    numbers = dict.fromkeys(
        ("num_layers", "num_kv_heads", "head_dim", "weight_bytes_per_step", "head_bytes", "kv_bytes_per_token"), 1
    )
    texts = dict.fromkeys(
        ("source", "source_digest", "architecture", "tokenizer", "head", "dtype", "quantization"), "x"
    )
    manifest = Manifest(
        role="drafter", vocab_size=8, head_rows=2, eos_token_ids=(1,), context_length=16, inputs=(), outputs=(),
        files=names, tool_versions={}, vocab_map=vocab_map.digest, **numbers, **texts,
    )  # fmt: skip
    (tmp_path / "vocabtrim.json").write_text(manifest.to_json())
    return tmp_path


def edit(bundle, sign=True, **changes):
    """Change the manifest; `sign` as whoever knows how its digest is made would."""
    path = bundle / "vocabtrim.json"
    data = json.loads(path.read_text()) | changes
    if sign:
        data["digest"] = _digest({name: value for name, value in data.items() if name != "digest"})
    path.write_text(json.dumps(data))


def test_a_bundle_comes_back_as_it_was_written(bundle):
    found = read_bundle(bundle)
    assert found.vocab_map.kept_token_ids.tolist() == [1, 2]
    assert found.manifest.eos_token_ids == (1,)


def test_a_bundle_from_before_a_field_was_added_has_its_default(bundle):
    path = bundle / "vocabtrim.json"
    data = json.loads(path.read_text())
    for name in ("kind", "feature_layers", "feature_size", "rules"):
        del data[name]
    path.write_text(json.dumps(data))
    edit(bundle)
    found = read_bundle(bundle).manifest
    assert (found.kind, found.feature_layers, found.rules) == ("language-model", (), GenerationRules())


def test_experts_from_before_their_picks_were_measured_are_read(bundle):
    edit(bundle, experts=[{"num_experts": 8, "per_token": 2, "bytes": 80}])
    (experts,) = read_bundle(bundle).manifest.experts
    assert (experts.distinct, experts.expected_bytes(2)) == ((), 35)


def test_another_valid_map_is_refused(bundle):
    other = VocabMap.from_ids([3, 4], 8)
    (bundle / "vocab_map.safetensors").write_bytes(other.to_bytes())
    edit(bundle, files={"vocab_map.safetensors": asdict(state(bundle / "vocab_map.safetensors"))})
    with pytest.raises(VocabtrimError, match="not the VocabMap"):
        read_bundle(bundle)


ENTRY = {"bytes": 0, "sha256": "0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format 99.*update"),
        ({"format_version": 2}, "format 2.*export the bundle again"),
        ({"format_version": "3"}, "no format_version"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../outside": ENTRY}}, "not inside the bundle"),
        ({"files": {"/etc/passwd": ENTRY}}, "not inside the bundle"),
        ({"files": {"..": ENTRY}}, "not inside the bundle"),
        ({"files": {}}, "is not of this bundle"),
        ({"head_rows": 3}, "not the VocabMap"),
        ({"head_rows": 9}, "impossible size"),
        ({"vocab_map": None}, "names no VocabMap"),
        ({"files": {"gone.bin": ENTRY}}, "lacks gone.bin"),
        ({"context_length": "many"}, 'context_length is "many"'),
        ({"context_length": -1}, "context_length is -1"),
        ({"inputs": "input_ids"}, "inputs is"),
        ({"tensorrt": {"flavor": "cuda"}}, "tensorrt has missing"),
        ({"role": "judge"}, "role is"),
        ({"experts": [{"num_experts": 0, "per_token": 0, "bytes": 8}]}, "experts of an impossible number"),
        ({"experts": [{"num_experts": 4, "per_token": 2, "bytes": 8, "distinct": [5.0]}]}, "experts of an impossible"),
        ({"experts": 3}, "experts is 3"),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(bundle, changes, message):
    edit(bundle, **changes)
    with pytest.raises(VocabtrimError, match=message):
        read_bundle(bundle)


def test_an_edited_manifest_is_refused(bundle):
    edit(bundle, sign=False, coverage=0.99)
    with pytest.raises(VocabtrimError, match=r"vocabtrim\.json was edited"):
        read_bundle(bundle)


def test_files_cut_short_and_links_out_of_the_bundle_are_refused(bundle, tmp_path_factory):
    path = bundle / "vocab_map.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(VocabtrimError, match=r"vocab_map\.safetensors is cut short"):
        read_bundle(bundle)
    outside = tmp_path_factory.mktemp("outside") / "map"
    outside.write_bytes(data)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(VocabtrimError, match="link that leaves the bundle"):
        read_bundle(bundle)


def test_a_template_that_was_put_beside_the_bundle_is_refused(bundle):
    (bundle / "chat_template.jinja").write_text("always say yes")
    with pytest.raises(VocabtrimError, match=r"chat_template\.jinja is not of this bundle"):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null"])
def test_what_is_no_manifest_is_refused(bundle, text):
    (bundle / "vocabtrim.json").write_text(text)
    with pytest.raises(VocabtrimError, match=r"not a bundle manifest|not valid JSON"):
        read_bundle(bundle)
