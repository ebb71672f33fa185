"""The script of inputs that a bundle carries for Polygraphy."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest

from engines.bundle.read import MANIFEST_NAME, Manifest, Profile, TensorRT
from engines.errors import VocabtrimError
from vocabtrim_export.trt.polygraphy import LOADER_NAME, write_loader

PROMPT = list(range(7, 27))
CACHES = ("past_key_values.0.key", "past_key_values.0.value")


def manifest(**changes):
    small = (Profile("draft", 1, 1, 64), Profile("prefill", 48, 1, 64))
    profiles = (*small, Profile("draft", 1, 1, 128), Profile("prefill", 100, 1, 128))
    fields = {
        "role": "drafter",
        "source": "tiny",
        "source_digest": "",
        "architecture": "llama",
        "vocab_size": 448,
        "head_rows": 96,
        "tokenizer": "",
        "eos_token_ids": (2,),
        "dtype": "fp16",
        "quantization": "none",
        "context_length": 100,
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 16,
        "weight_bytes_per_step": 1,
        "head_bytes": 1,
        "kv_bytes_per_token": 1,
        "inputs": ("input_ids", "position_ids", "logits_positions", "attended_slots", *CACHES),
        "outputs": ("token_ids",),
        "files": {},
        "tool_versions": {},
        "head": "head",
        "tensorrt": TensorRT("none", "", (), profiles, 4, False),
    }
    return Manifest(**(fields | changes))


def load(directory, **changes):
    """The script as a module, in a bundle of that manifest."""
    described = manifest(**changes)
    (directory / MANIFEST_NAME).write_text(described.to_json())
    spec = spec_from_file_location("polygraphy_inputs", write_loader(directory, described, PROMPT))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_feeds_are_the_phases_of_the_shortest_span(tmp_path):
    draft, prefill = load(tmp_path).load_data()
    assert draft["input_ids"].tolist() == [[7]]
    assert prefill["input_ids"].tolist() == [(PROMPT * 3)[:48]]
    assert prefill["position_ids"].tolist() == [list(range(48))]
    assert prefill["logits_positions"].tolist() == [47]
    assert prefill["attended_slots"].tolist() == list(range(64))
    assert {array.dtype for name, array in prefill.items() if name not in CACHES} == {np.dtype(np.int64)}
    for name in CACHES:
        assert (prefill[name].dtype, prefill[name].shape) == (np.float16, (1, 2, 128, 16))
        assert not prefill[name].any()


def test_verification_predicts_every_token(tmp_path):
    profiles = (Profile("verify", 5, 5, 64), Profile("prefill", 48, 1, 64))
    module = load(tmp_path, tensorrt=TensorRT("none", "", (), profiles, 0, False))
    (verify,) = module.load_verify()
    assert verify["logits_positions"].tolist() == [0, 1, 2, 3, 4]
    assert "attended_slots" not in verify
    with pytest.raises(SystemExit, match="no phase unrolled: choose from verify, prefill"):
        list(module.load_unrolled())


def test_unrolled_graph_is_not_asked_which_positions(tmp_path):
    (feed,) = load(tmp_path).load_unrolled()
    assert feed["input_ids"].tolist() == [[7, 8]]
    assert list(feed) == ["input_ids", "position_ids", "attended_slots", *CACHES]


@pytest.mark.parametrize(("dtype", "found"), [("fp32", "float32"), ("bf16", "torch.bfloat16")])
def test_caches_have_the_models_type(tmp_path, dtype, found):
    (feed,) = load(tmp_path, dtype=dtype).load_prefill()
    assert str(feed[CACHES[0]].dtype) == found


def test_shapes_for_the_command_line(tmp_path, capsys):
    load(tmp_path).main(["--shapes", "prefill"])
    shapes = "input_ids:[1,48] position_ids:[1,48] logits_positions:[1] attended_slots:[64] "
    shapes += " ".join(f"{c}:[1,2,128,16]" for c in CACHES)
    options = [f"--trt-{which}-shapes {shapes}" for which in ("min", "opt", "max")]
    assert capsys.readouterr().out == " ".join(options) + "\n"


def test_polygraphy_reads_the_file_of_inputs(tmp_path):
    polygraphy_json = pytest.importorskip("polygraphy.json")
    module = load(tmp_path)
    script, path = tmp_path / LOADER_NAME, tmp_path / "inputs.json"
    subprocess.run([sys.executable, script, path], check=True)
    read = polygraphy_json.load_json(str(path))
    for feed, expected in zip(read, module.load_data(), strict=True):
        assert set(feed) == set(expected)
        assert all(np.array_equal(feed[name], expected[name]) for name in feed)
    subprocess.run([sys.executable, script, path, "unrolled"], check=True)
    assert polygraphy_json.load_json(str(path))[0]["input_ids"].tolist() == [[7, 8]]


def test_wrong_arguments_show_how_it_is_used(tmp_path):
    load(tmp_path)
    ended = subprocess.run([sys.executable, tmp_path / LOADER_NAME, "--help"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "--data-loader-script polygraphy_inputs.py" in ended.stderr


@pytest.mark.parametrize("prompt", [[], [-1], [448]])
def test_impossible_prompts_are_refused(tmp_path, prompt):
    with pytest.raises(VocabtrimError, match="token ids below 448, at least one"):
        write_loader(tmp_path, manifest(), prompt)
    assert list(tmp_path.iterdir()) == []


def test_bundles_without_fixed_shapes_are_refused(tmp_path):
    with pytest.raises(VocabtrimError, match="--format trt"):
        write_loader(tmp_path, manifest(tensorrt=None), PROMPT)


def test_script_reads_its_own_bundles_manifest(tmp_path):
    module = load(tmp_path)
    assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == module.MANIFEST
