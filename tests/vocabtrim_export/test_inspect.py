"""`vocabtrim inspect` on bundles written by hand."""

import argparse
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.bundle.read import MANIFEST_NAME, VOCAB_MAP_NAME, FileDigest, Manifest, Profile, TensorRT, file_digest
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from vocabtrim_export.cli import inspect_command
from vocabtrim_export.lowering.graph_files import stamp_graph
from vocabtrim_export.trt.network import DRAFT_NETWORK_NAME, NETWORK_NAME, Kernel, Layer, Network, NetworkTensor

MAP = VocabMap(np.arange(0, 192, 2), 448)
HEAD = "969a9fcd7ca5bb306a63a3cf39248d54576c82884e20e616f8ce6a89b82dc80f"  # of the table, which stands for a head here
PLANS = TensorRT(
    flavor="rtx",
    version="1.7.1",
    compute_capabilities=("8.6", "12.0"),
    profiles=(Profile("draft", 1, 1, 128), Profile("prefill", 77, 1, 128)),
    draft_length=4,
    weights_stripped=False,
)


def write_graph(path):
    value, cache = helper.make_tensor_value_info, [1, 2, 128, 16]
    caches = {side: [f"{side}.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")] for side in SIDES}
    inputs = [value("input_ids", TensorProto.INT64, [1, "sequence_length"])]
    outputs = [value("token_ids", TensorProto.INT64, [1, "sequence_length"])]
    nodes = [helper.make_node("Identity", ["input_ids"], ["token_ids"], name="same_tokens")]
    for past, present in zip(*caches.values(), strict=True):
        inputs.append(value(past, TensorProto.FLOAT16, cache))
        outputs.append(value(present, TensorProto.FLOAT16, cache))
        nodes.append(helper.make_node("Identity", [past], [present], name=f"keep_{past}"))
    table = numpy_helper.from_array(MAP.kept_token_ids, "kept_token_ids")
    graph = helper.make_graph(nodes, "step", inputs, outputs, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    digests = {
        "vocab_map": MAP.digest,
        "tokenizer": "cd" * 32,
        "model": "ab" * 32,
        "head_tensors": '["kept_token_ids"]',
    }
    onnx.save(model, path)
    stamp_graph(path, {f"vocabtrim.{name}": value for name, value in (digests | {"head": HEAD}).items()})


SIDES = ("past_key_values", "present")


def network(name):
    ids = NetworkTensor("ids", "INT64", (1, -1))
    kept = NetworkTensor("kept", "INT64", (96,))
    layers = (Layer("table [bold]", "CONSTANT", (), (kept,)), Layer(name, "GATHER", (kept, ids), (ids,)))
    return Network(layers, (Kernel("gather_0", "kgen", (name,)),))


def write_bundle(directory, tensorrt=None):
    directory.mkdir()
    write_graph(directory / "model.onnx")
    (directory / VOCAB_MAP_NAME).write_bytes(MAP.to_bytes())
    if tensorrt is not None:
        write_graph(directory / "draft.onnx")
        (directory / "model.engine").write_bytes(bytes(5000))
        (directory / "draft.engine").write_bytes(bytes(7000))
        (directory / NETWORK_NAME).write_text(network("lookup").to_json())
        (directory / DRAFT_NETWORK_NAME).write_text(network("unrolled_lookup").to_json())
    manifest = Manifest(
        role="drafter",
        source="tiny-model",
        source_digest="ab" * 32,
        architecture="llama",
        vocab_size=448,
        head_rows=96,
        tokenizer="cd" * 32,
        head=HEAD,
        eos_token_ids=(2,),
        dtype="fp16",
        quantization="int4",
        context_length=100,
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        weight_bytes_per_step=123456,
        head_bytes=6543,
        kv_bytes_per_token=256,
        inputs=("input_ids",),
        outputs=("token_ids",),
        files={path.name: FileDigest(path.stat().st_size, file_digest(path)) for path in directory.iterdir()},
        tool_versions={},
        vocab_map=MAP.digest,
        coverage=0.875,
        tensorrt=tensorrt,
    )
    (directory / MANIFEST_NAME).write_text(manifest.to_json())
    return directory


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("onnx") / "drafter")


@pytest.fixture(scope="module")
def trt_bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("trt") / "drafter", PLANS)


@pytest.fixture
def inspect(capsys):
    def run(*arguments):
        parser = argparse.ArgumentParser()
        inspect_command.add_arguments(parser)
        inspect_command.run(parser.parse_args([str(argument) for argument in arguments]))
        return capsys.readouterr().out

    return run


def rows(text):
    """Cells of every table's rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]


def test_facts_of_an_onnx_bundle(inspect, onnx_bundle):
    found = {row[0]: row[1] for row in rows(inspect(onnx_bundle))}
    assert found["role"] == "drafter"
    assert found["source"] == "tiny-model (llama), abababababab"
    assert (found["dtype"], found["quantization"]) == ("fp16", "int4")
    assert found["head rows"] == "96 of 448 (21.4%)"
    assert found["kept tokens"] == f"map {MAP.digest[:12]}"
    assert found["coverage"] == "87.50% of held-out tokens"
    assert found["context length"] == "100 tokens"
    assert found["weights per step"] == "123,456 bytes, of the head 6,543"
    assert "plans" not in found


def test_graph_is_shown_with_its_caches_as_one(inspect, onnx_bundle):
    table = rows(inspect(onnx_bundle))
    assert ["input_ids", "input", "int64", "1×sequence_length"] in table
    assert ["past_key_values.0.key and 3 more", "input", "float16", "1×2×128×16"] in table
    assert ["present.0.key and 3 more", "output", "float16", "1×2×128×16"] in table
    assert not any(row[0].startswith("past_key_values.1") for row in table)


def test_files_have_their_sizes(inspect, trt_bundle):
    table = rows(inspect(trt_bundle))
    assert ["model.engine", "5,000"] in table
    assert ["draft.engine", "7,000"] in table


def test_plans_profiles_and_layer_types(inspect, trt_bundle):
    text = inspect(trt_bundle)
    found = {row[0]: row[1] for row in rows(text)}
    assert found["plans"] == "TensorRT-RTX 1.7.1"
    assert found["compute capabilities"] == "8.6, 12.0"
    assert found["drafted in one call"] == "4 tokens"
    assert ["prefill", "77", "1", "128"] in rows(text)
    assert ["GATHER", "1"] in rows(text)
    assert ["kernels built from them", "1"] in rows(text)
    assert "draft_network.json" in text
    assert "unrolled_lookup" not in text


def test_layers_of_the_parsed_networks(inspect, trt_bundle):
    table = rows(inspect(trt_bundle, "--layers"))
    assert ["lookup", "GATHER", "96, 1×-1", "1×-1"] in table
    assert ["unrolled_lookup", "GATHER", "96, 1×-1", "1×-1"] in table
    assert ["table [bold]", "CONSTANT", "", "96"] in table  # and not taken for markup


def test_layers_of_an_onnx_bundle_are_its_nodes(inspect, onnx_bundle):
    assert ["same_tokens", "Identity", "input_ids", "token_ids"] in rows(inspect(onnx_bundle, "--layers"))


def test_json_has_it_all(inspect, trt_bundle):
    found = json.loads(inspect(trt_bundle, "--json"))
    assert found["format"] == "trt"
    assert found["manifest"]["tensorrt"]["version"] == PLANS.version
    assert found["file_bytes"]["draft.engine"] == 7000
    assert found["networks"][NETWORK_NAME] == {"layers": {"CONSTANT": 1, "GATHER": 1}, "kernels": {"kgen": 1}}
    assert [value["name"] for value in found["graphs"]["model.onnx"]["inputs"]][:2] == [
        "input_ids",
        "past_key_values.0.key",
    ]
    assert "layers" not in found


def test_json_lists_layers_when_asked(inspect, trt_bundle, onnx_bundle):
    layers = json.loads(inspect(trt_bundle, "--json", "--layers"))["layers"]
    assert layers[NETWORK_NAME][1]["name"] == "lookup"
    assert layers[NETWORK_NAME][1]["inputs"][0] == {"name": "kept", "dtype": "INT64", "shape": [96]}
    found = json.loads(inspect(onnx_bundle, "--json", "--layers"))
    assert found["format"] == "onnx"
    assert found["layers"]["model.onnx"][0]["type"] == "Identity"


def test_plans_without_weights_and_graphs_without_plans(inspect, tmp_path):
    stripped = write_bundle(tmp_path / "stripped", replace(PLANS, weights_stripped=True, draft_length=0))
    found = {row[0]: row[1] for row in rows(inspect(stripped))}
    assert found["weights"] == "stripped, taken from the graphs at load"
    assert found["drafted in one call"] == "one token"
    graphs = write_bundle(tmp_path / "graphs", replace(PLANS, flavor="none", version="", compute_capabilities=()))
    assert {row[0]: row[1] for row in rows(inspect(graphs))}["plans"] == "none, only graphs"


def test_damaged_bundle_is_refused(inspect, tmp_path):
    bundle = write_bundle(tmp_path / "drafter", PLANS)
    (bundle / "model.engine").write_bytes(b"x" + bytes(4999))
    with pytest.raises(VocabtrimError, match=r"model\.engine does not match its digest"):
        inspect(bundle)


def test_check_says_all_of_it(inspect, onnx_bundle, tmp_path):
    found = rows(inspect("--check", onnx_bundle))
    assert ["head rows", "ok"] in found
    assert {row[1] for row in found[1:]} == {"ok"}
    bundle = write_bundle(tmp_path / "drafter")
    (bundle / "model.onnx").write_bytes(b"x")
    with pytest.raises(VocabtrimError, match=r"4 of 8 checks failed, first: .*model\.onnx is cut short"):
        inspect("--check", bundle)


def test_checks_for_machines(inspect, tmp_path, capsys):
    bundle = write_bundle(tmp_path / "drafter")
    (bundle / "vocab_map.safetensors").unlink()
    with pytest.raises(VocabtrimError):
        inspect("--check", "--json", bundle)
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    wrong = {check["name"]: check["wrong"] for check in found["checks"]}
    assert "lacks vocab_map.safetensors" in wrong["vocab_map.safetensors"]
    assert wrong["manifest"] is wrong["head rows"] is None
