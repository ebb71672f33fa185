"""Every architecture, exported and run for real, against PyTorch's logits: prefill, decode, a block after a past."""

import pytest
import torch
import transformers

from tests.bundles import ALIBI, ARCHITECTURES, MIXTURES

from .conftest import check_logits

STEPS = [(24, 24), (1, 1), (5, 5), (1, 1), (17, 3)]  # tokens fed, positions kept


# keys of 32 numbers, a half of them rotated, and values of 16
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES, *ALIBI, "youtu"])
def test_exported_graph_computes_what_pytorch_does(architecture, random_model, export_pair):
    changes = LATENT | {"num_key_value_heads": 4} if architecture == "youtu" else {}
    directory = random_model(architecture, **changes)
    result = export_pair(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.randint(0, 400, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    for path in (result.target, result.drafter):
        check_logits(path, ids[0].numpy(), wanted, STEPS)


def test_fast_paths_are_taken(pair):
    """A Llama's decode step has no shape arithmetic, one product for q, k and v, and rotates inside attention."""
    import onnx

    graph = onnx.load(pair.drafter / "model.onnx", load_external_data=False).graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("MatMul") == 2 * 5 + 1  # qkv, o, gate, up, down of each layer, and the head
    assert ops.count("SkipSimplifiedLayerNormalization") == 4
    assert not {"Transpose", "Concat", "Cos", "Reshape"} & set(ops)
    assert ops.count("Shape") == 1  # of the input, for the positions that the head reads
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    assert {a.name: a.i for a in attention.attribute}["do_rotary"] == 1


def test_drafter_graph_ends_with_the_baked_table(pair):
    import onnx
    from onnx.numpy_helper import to_array

    model = onnx.load(pair.drafter / "model.onnx")
    head, top, gather = model.graph.node[-3:]
    assert (head.op_type, top.op_type, gather.op_type) == ("MatMul", "ArgMax", "Gather")
    assert (top.input[0], gather.input[1], gather.output[0]) == (head.output[0], top.output[0], "token_ids")
    tensors = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    assert tensors[gather.input[0]].tolist() == pair.selection.vocab_map.kept_token_ids.tolist()
    assert tensors[head.input[1]].shape == (64, 192)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["vocabtrim.vocab_map"] == pair.drafter_manifest.vocab_map
