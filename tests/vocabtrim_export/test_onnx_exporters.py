"""Graphs of PyTorch's own exporter, KV cache included, can be trimmed as well."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from transformers import AutoModelForCausalLM, DynamicCache

from engines.bundle.vocab_map import VocabMap
from engines.ort.session import open_session
from vocabtrim_export.cli.main import main

CACHE = ["past_key_values.0.key", "past_key_values.0.value"]


class Decoder(torch.nn.Module):
    """A model whose KV cache is tensors, as exporters want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, keys, values):
        cache = DynamicCache()
        cache.update(keys, values, 0)
        out = self.model(input_ids, attention_mask, position_ids, past_key_values=cache, use_cache=True)
        layer = out.past_key_values.layers[0]
        return out.logits, layer.keys, layer.values


@pytest.fixture(scope="module")
def exported(random_model, tmp_path_factory):
    """A directory with the model.onnx that torch.onnx.export writes of a tied Llama of one layer."""
    source, place = random_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("exported")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            Decoder(model).eval(),
            (torch.ones(1, 3).long(), torch.ones(1, 8).long(), torch.arange(5, 8)[None], *torch.randn(2, 1, 2, 5, 16)),
            input_names=["input_ids", "attention_mask", "position_ids", *CACHE],
            output_names=["logits", "present.0.key", "present.0.value"],
            dynamic_shapes=({1: free}, {1: free}, {1: free}, {2: free}, {2: free}),
            dynamo=True,
            verbose=False,
        )
    program.save(place / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, place / name)
    return place


def quantised_logits(place):
    """Its logits quantised, one scale for all of them, as ONNX Runtime's static quantiser does with every product's."""
    model = onnx.load(place / "model.onnx")
    product = next(node for node in model.graph.node if "logits" in node.output)
    product.output[0] = "columns"
    numbers = {"scale": np.array(0.05, np.float32), "zero": np.array(120, np.uint8)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in numbers.items())
    for op, before, after in (("Quantize", "columns", "rounded"), ("Dequantize", "rounded", "logits")):
        model.graph.node.append(helper.make_node(f"{op}Linear", [before, *numbers], [after]))
    onnx.save(model, place / "model.onnx")


def dynamic(place):
    """Quantise by ONNX Runtime's dynamic quantiser, with a head that is not tied to the embedding."""
    model = onnx.load(place / "model.onnx")
    product = next(node for node in model.graph.node if "logits" in node.output)
    transpose = next(node for node in model.graph.node if product.input[1] in node.output)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == transpose.input[0])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(stored).T, "head"))
    product.input[1] = "head"
    onnx.save(model, place / "model.onnx")
    quantize_dynamic(place / "model.onnx", place / "model.onnx", per_channel=True)


def steps(session, names):
    """Feed 24 tokens in three calls that each read the cache of the one before; returns one list of outputs a call."""
    ids, at, found = np.random.default_rng(0).integers(0, 400, (1, 24)), 0, []
    cache = [np.zeros((1, 2, 0, 16), np.float32)] * 2
    for fed in (15, 1, 8):
        feeds = {"input_ids": ids[:, at : at + fed], "attention_mask": np.ones((1, at + fed), np.int64)}
        feeds |= {"position_ids": np.arange(at, at + fed)[None]} | dict(zip(CACHE, cache, strict=True))
        found.append(session.run(names, feeds))
        cache, at = found[-1][1:3], at + fed
    return found


CHANGES = {"as it is": (lambda _: None, 4 * 64), "quantised logits": (quantised_logits, 4 * 64), "int8": (dynamic, 65)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_of_torchs_exporter_is_cut(name, exported, count_file, tmp_path, capsys):
    change, row_bytes = CHANGES[name]
    place = shutil.copytree(exported, tmp_path / "model")
    change(place)
    given = ["--drafter", str(place), "--k", "192", "--calibration", str(count_file(place))]
    assert main(["export", *given, "--output", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["head_bytes"], said["full_head_bytes"]) == (192 * row_bytes, 448 * row_bytes)
    kept = VocabMap.load(tmp_path / "out" / "drafter" / "vocab_map.safetensors").kept_token_ids
    whole, cut = (open_session(path / "model.onnx") for path in (place, tmp_path / "out" / "drafter"))
    assert [(i.name, i.shape) for i in whole.get_inputs()] == [(i.name, i.shape) for i in cut.get_inputs()]
    names = [output.name for output in whole.get_outputs()]
    assert [output.name for output in cut.get_outputs()] == [*names, "token_ids"]
    for wanted, found in zip(steps(whole, names), steps(cut, [*names, "token_ids"]), strict=True):
        columns = wanted[0][..., kept]
        np.testing.assert_array_equal(found[0], columns)
        np.testing.assert_array_equal(found[3], kept[columns.argmax(-1)])
        for mine, theirs in zip(found[1:3], wanted[1:], strict=True):
            np.testing.assert_array_equal(mine, theirs)
