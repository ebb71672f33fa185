"""Wrong graphs are caught by the export itself, in every architecture of the tests."""

import itertools
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.bundle.read import DRAFT_MODEL_NAME, FEATURES_NAME, MODEL_NAME
from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from tests.bundles import ALIBI, ARCHITECTURES, MIXTURES
from tests.integration import eagle_heads, test_medusa
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.drafters.eagle_checkpoint import load_head
from vocabtrim_export.drafters.medusa import load_medusa
from vocabtrim_export.proof import proven
from vocabtrim_export.proof.prove import find_difference
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.proof.tokens import calls, window_of
from vocabtrim_export.sources.source import DTYPES, load_source
from vocabtrim_export.trt.settings import TensorRTSettings

NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization")


def swap_inputs(nodes, index):
    """Exchange the constants of the first two nodes that take ones of the same shape."""
    for first in nodes:
        for second in nodes:
            if first[1] == second[1] and first[0].input[index] != second[0].input[index]:
                first[0].input[index], second[0].input[index] = second[0].input[index], first[0].input[index]
                return True
    return False


def attention(graph):
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def edit_attention(graph, name, change):
    found = [a for node in attention(graph)[-1:] for a in node.attribute if a.name == name and (a.f or a.i)]
    for attribute in found:
        change(attribute)
    return bool(found)


def shapes(graph):
    return {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def norms_swapped(graph):
    at = {"SkipSimplifiedLayerNormalization": 2}
    nodes = [node for node in graph.node if node.op_type in NORMS]
    by_op = [[(n, shapes(graph)[n.input[at.get(op, 1)]]) for n in nodes if n.op_type == op] for op in NORMS]
    return any(swap_inputs(group, at.get(group[0][0].op_type, 1)) for group in by_op if group)


def weights_permuted(graph):
    """Swap the weights of one product with those of the same product in another layer."""
    known = shapes(graph)
    return swap_inputs([(n, known[n.input[1]]) for n in graph.node if n.op_type == "MatMul" and n.input[1] in known], 1)


def bias_left_out(graph):
    known = shapes(graph)
    for node in graph.node:
        if node.op_type == "Add" and len(known.get(node.input[1], ())) == 1:
            node.op_type = "Identity"
            del node.input[1]
            return True
    return False


def rotation_swapped(graph):
    nodes = [node for node in attention(graph) if len(node.input) == 9]
    for node in nodes[-1:]:
        node.input[7], node.input[8] = node.input[8], node.input[7]
    return bool(nodes)


def scale_dropped(graph):
    return edit_attention(graph, "scale", lambda a: setattr(a, "f", 2 * a.f))


def softcap_dropped(graph):
    return edit_attention(graph, "softcap", lambda a: setattr(a, "f", 0.0))


def window_dropped(graph):
    windowed = [a for node in attention(graph) for a in node.attribute if a.name == "local_window_size"]
    for attribute in windowed:
        attribute.i = -1
    return bool(windowed)


def wrong_tokens(graph):
    for node in graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ArgMin"
    return True


def experts(graph):
    return [node for node in graph.node if node.op_type in ("MoE", "QMoE")]


def experts_permuted(graph):
    """The second layer of the experts is another's; of quantised ones its values alone."""
    for node in experts(graph)[-1:]:
        down = 4 if node.op_type == "MoE" else 5
        order = np.roll(np.arange(shapes(graph)[node.input[down]][0]), 1)
        graph.initializer.append(onnx.numpy_helper.from_array(order, "order"))
        graph.node.insert(0, onnx.helper.make_node("Gather", [node.input[down], "order"], ["permuted"], axis=0))
        node.input[down] = "permuted"
    return bool(experts(graph))


def routing_weights_equal(graph):
    """Every expert that a router picked counts the same."""
    picked = [node for node in graph.node if node.op_type == "ScatterElements"]
    for node in picked:
        at = next(index for index, each in enumerate(graph.node) if each.output[0] == node.output[0])
        graph.node.insert(at, onnx.helper.make_node("Sub", [node.input[2]] * 2, [f"{node.name}{at}.equal"]))
        node.input[2] = f"{node.name}{at}.equal"
    return bool(picked and experts(graph)[0].op_type == "MoE")


def routing_normalised(graph):
    """The sum of the routing weights is left out behind the experts."""
    outputs = {node.output[0] for node in experts(graph)}
    sums = [node for node in graph.node if node.op_type == "Mul" and node.input[0] in outputs]
    for node in sums:
        node.op_type = "Identity"
        del node.input[1]
    return bool(sums)


def sinks_dropped(graph):
    nodes = [node for node in attention(graph) if len(node.input) > 11]
    for node in nodes:
        node.input[11] = ""
    return bool(nodes)


def key_biases_dropped(graph):
    nodes = [node for node in attention(graph) if len(node.input) > 10 and node.input[10]]
    for node in nodes:
        node.input[10] = ""
    return bool(nodes)


CORRUPTIONS = (
    *(norms_swapped, weights_permuted, bias_left_out, rotation_swapped),
    *(scale_dropped, softcap_dropped, window_dropped, wrong_tokens),
    *(experts_permuted, routing_weights_equal, sinks_dropped, key_biases_dropped),
)


def corrupt(directory, change, name=MODEL_NAME):
    """Apply `change` to the graph on disk; returns whether there was anything to change."""
    graph = onnx.load(directory / name, load_external_data=False)
    changed = change(graph.graph)
    (directory / name).write_bytes(graph.SerializeToString())
    return changed


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES, *ALIBI])
def test_each_wrong_graph_is_noticed(architecture, random_model, export_pair, tmp_path):
    directory = random_model(architecture)
    result = export_pair(directory)
    plan = BundlePlan("target", load_source(str(directory), DTYPES["fp32"]), "fp32", "none", context_length=128)
    missed, changed = [], []
    for change in CORRUPTIONS:
        shutil.copytree(result.target, wrong := tmp_path / change.__name__)
        if corrupt(wrong, change):
            changed.append(change.__name__)
            missed += [change.__name__] if find_difference(wrong, plan) is None else []
    assert not missed
    assert len(changed) >= 3, changed


def test_routing_weights_that_do_not_add_up_to_one_are_not_normalised(random_model, export_pair):
    directory = random_model("qwen2_moe")
    result = export_pair(directory)
    plan = BundlePlan("target", load_source(str(directory), DTYPES["fp32"]), "fp32", "none", context_length=128)
    assert corrupt(result.target, routing_normalised)
    assert find_difference(result.target, plan)


def quantized_swapped(parts):
    def change(graph):
        """Exchange these inputs of two quantised products of one shape."""
        known = shapes(graph)
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        for a, b in itertools.combinations(nodes, 2):
            if a.input[1] != b.input[1] and known[a.input[1]] == known[b.input[1]]:
                for part in parts:
                    a.input[part], b.input[part] = b.input[part], a.input[part]
                return True
        return False

    return change


def quantized_data_swapped(graph, op="MatMulNBits", parts=(1, 2, 3)):
    """Exchange what is stored of two quantised products: the graph is right, the writer took another layer's weight."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == op]
    for a, b in itertools.combinations(nodes, 2):
        first, second = ([known[node.input[part]] for part in parts] for node in (a, b))
        if first[0] is not second[0] and first[0].dims == second[0].dims:
            for x, y in zip(first, second, strict=True):
                kept = list(x.external_data)
                for tensor, entries in ((x, list(y.external_data)), (y, kept)):
                    copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
                    del tensor.external_data[:]
                    tensor.external_data.extend(copies)
            return True
    return False


def experts_data_swapped(graph):
    return quantized_data_swapped(graph, "QMoE", (2, 3, 11))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3", "cohere", "gpt2", "gpt_oss"])
def test_each_wrong_quantized_graph_is_noticed(architecture, quantization, random_model, tmp_path):
    source = load_source(str(random_model(architecture)), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", quantization, context_length=128)
    (right := tmp_path / "right").mkdir()
    write_bundle(right, trace_source(plan), plan, lambda *_: None)
    assert find_difference(right, plan) is None
    swaps = (quantized_swapped((1, 2, 3)), quantized_swapped((2,)), quantized_data_swapped)
    if architecture in MIXTURES:
        swaps += (experts_data_swapped, experts_permuted)
    missed, changed = [], []
    for number, change in enumerate(dict.fromkeys((*CORRUPTIONS, *swaps))):
        shutil.copytree(right, wrong := tmp_path / str(number))
        if corrupt(wrong, change):
            changed.append(change)
            missed += [change] if find_difference(wrong, plan) is None else []
    assert not missed
    assert set(swaps) < set(changed)


def transposed_swapped(graph):
    """Exchange the weights of two products of a graph for TensorRT."""
    known = shapes(graph)
    return swap_inputs(
        [(n, known[n.input[0]]) for n in graph.node if n.op_type == "Transpose" and n.input[0] in known], 0
    )


def standard_scale_doubled(graph):
    scales = [a for node in graph.node if node.op_type == "Attention" for a in node.attribute if a.name == "scale"]
    for attribute in scales:
        attribute.f *= 2
    return bool(scales)


def standard_softcap_dropped(graph):
    caps = [node for node in graph.node if node.op_type == "Tanh"]
    for node in caps:
        node.op_type = "Identity"
    return bool(caps)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_each_wrong_graph_for_tensorrt_is_noticed(architecture, random_model, tmp_path):
    source = load_source(str(random_model(architecture)), DTYPES["fp16"])
    trt = TensorRTSettings(flavor="none", unroll=True, draft_length=3)
    plan = BundlePlan("drafter", source, "fp16", "none", context_length=128, trt=trt)
    (right := tmp_path / "right").mkdir()
    write_bundle(right, trace_source(plan), plan, lambda *_: None)
    assert find_difference(right, plan) is None
    changes = (transposed_swapped, norms_swapped, bias_left_out, standard_scale_doubled, standard_softcap_dropped)
    missed, changed = [], []
    for number, change in enumerate((*changes, wrong_tokens)):
        shutil.copytree(right, wrong := tmp_path / str(number))
        if corrupt(wrong, change):
            changed.append(change)
            missed += [change] if find_difference(wrong, plan) is None else []
    assert not missed
    assert len(changed) >= 4, changed
    assert corrupt(right, wrong_tokens, DRAFT_MODEL_NAME)
    assert "draft.onnx does not draft" in find_difference(right, plan)


@pytest.mark.parametrize("quantization", ["none", "int4"])
@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
def test_each_wrong_graph_of_a_head_is_noticed(kind, quantization, random_model, write_head, tmp_path):
    target = load_source(str(random_model("llama", num_hidden_layers=6)), DTYPES["fp32"])
    if kind == "eagle3":
        head = write_head(eagle_heads.make_tensors(bias=True), eagle_aux_hidden_state_layer_ids=[2, 4, 5])
        source = load_head(str(head), target)
    else:
        source = load_medusa(str(write_head(test_medusa.make_tensors(), test_medusa.CONFIG)), target)
    kept = VocabMap(np.arange(0, 448, 7), 448)
    plan = BundlePlan("drafter", source, "fp32", quantization, context_length=128, vocab_map=kept)
    (right := tmp_path / "right").mkdir()
    write_bundle(right, trace_source(plan), plan, lambda *_: None)
    assert find_difference(right, plan) is None
    missed, changed = [], []
    for number, change in enumerate((*CORRUPTIONS, quantized_swapped((1, 2, 3)))):
        shutil.copytree(right, wrong := tmp_path / str(number))
        if corrupt(wrong, change):
            changed.append(change)
            missed += [change] if find_difference(wrong, plan) is None else []
    assert not missed
    assert len(changed) >= 2
    if kind == "eagle3":
        data = right / f"{FEATURES_NAME}.data"
        data.write_bytes(data.read_bytes()[::-1])
        assert find_difference(right, plan).startswith(f"in {FEATURES_NAME}, ")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_long_window_is_proven_on_few_tokens(dtype, random_model, tmp_path):
    """A window of 100 tokens, which the proof's tokens do not reach past unless it is narrowed."""
    source = load_source(str(random_model("mistral", sliding_window=100)), DTYPES[dtype])
    plan = BundlePlan("target", source, dtype, "none", context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    assert len(calls(source, plan.context_length, window_of(source.model, plan.context_length, narrow=True))) < 40
    assert find_difference(tmp_path, plan) is None
    assert corrupt(tmp_path, window_dropped)
    assert find_difference(tmp_path, plan)


def test_export_refuses_a_wrong_graph_and_places_nothing(random_model, export_pair, monkeypatch):
    def write_wrong(directory, *arguments):
        manifest = write_bundle(directory, *arguments)
        corrupt(directory, norms_swapped)
        return manifest

    placed = []
    monkeypatch.setattr(
        proven, "write_bundle", lambda directory, *rest: placed.append(directory) or write_wrong(directory, *rest)
    )
    with pytest.raises(VocabtrimError, match=r"does not compute what the model does: the .* of layer 0 are the first"):
        export_pair(random_model("qwen3", seed=1))  # which no other test has had exported
    assert len(placed) == 2  # with the rotation in attention, and without
    assert not any(path.exists() for path in placed)


def test_a_norm_behind_the_rotation_leaves_the_rotation_to_the_model(random_model, export_pair):
    result = export_pair(random_model("hunyuan_v1_dense", head_dim=32))
    for bundle in (result.target, result.drafter):
        graph = onnx.load(bundle / MODEL_NAME, load_external_data=False).graph
        assert {a.name: a.i for node in attention(graph) for a in node.attribute}["do_rotary"] == 0


def test_a_stored_head_beside_a_tied_flag_is_the_head(random_model, tmp_path):
    """transformers keeps both matrices, whatever config.json says."""
    directory = random_model("llama", tie_word_embeddings=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(directory / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    source = load_source(str(directory), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", "none", context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    assert find_difference(tmp_path, plan) is None


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers_are_named_whatever_the_quantisation(name, random_model, export_pair):
    directory = random_model("llama", tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    weights[name][3, 3] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(VocabtrimError, match=rf"its weights of {name.removesuffix('.weight')} hold NaN"):
        export_pair(directory, quantize="int4")
