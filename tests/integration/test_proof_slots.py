"""The export's proof fills in-context slots, and reaches past the window of a multi-token-prediction head."""

import shutil

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from engines.bundle.graph_io import SLOT_TOKEN_IDS, TOKEN_IDS
from engines.bundle.manifest import HEAD_ROWS_NAME
from engines.bundle.read import DRAFT_MODEL_NAME
from engines.bundle.vocab_map import VocabMap
from tests.integration import layer_heads
from tests.integration.test_layer_heads import add_tensors
from tests.integration.test_proof import corrupt, window_dropped
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.drafters.mtp import find_mtp, load_mtp
from vocabtrim_export.proof.prove import find_difference
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.sources.source import DTYPES, load_source
from vocabtrim_export.trt.settings import TensorRTSettings

KEPT = VocabMap(np.arange(0, 448, 7), 448)


def ids_shifted(graph):
    """A slot's token is the next one: its column and its row are right, its id is not."""
    tables = [node for node in graph.node if node.op_type == "Concat" and SLOT_TOKEN_IDS in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one"))
    graph.node.insert(0, onnx.helper.make_node("Add", [SLOT_TOKEN_IDS, "one"], ["shifted"]))
    for table in tables:  # one for each step of a graph with several
        table.input[list(table.input).index(SLOT_TOKEN_IDS)] = "shifted"
    return bool(tables)


def empty_slots_can_win(graph):
    (zero,) = (each for each in graph.initializer if each.name == "slot_zero")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(-9, np.int64), "slot_zero"))
    return True


def softcap_of_slots_dropped(graph):
    caps = [node for node in graph.node if node.op_type == "Tanh"]
    for node in caps[1:]:
        node.op_type = "Identity"
    return len(caps) > 1


def rows_shifted(directory):
    """Every stored row is that of the token before."""
    tensors = load_file(directory / HEAD_ROWS_NAME)
    save_file(
        {name: each if name == TOKEN_IDS else np.roll(each, 1, 0) for name, each in tensors.items()},
        directory / HEAD_ROWS_NAME,
    )


def assert_each_is_noticed(right, plan, changes):
    assert find_difference(right, plan) is None
    for number, change in enumerate(changes):
        shutil.copytree(right, wrong := right.with_name(f"{right.name}-{number}"))
        assert corrupt(wrong, change)
        assert find_difference(wrong, plan), change
    rows_shifted(right)
    assert "slots" in find_difference(right, plan)


def write(path, source, **options):
    kept = {"vocab_map": KEPT, "lost_token_ids": np.setdiff1d(np.arange(448), KEPT.kept_token_ids)}
    plan = BundlePlan(
        "drafter", source, context_length=128, **kept | {"dtype": "fp32", "quantization": "none"} | options
    )
    path.mkdir()
    write_bundle(path, trace_source(plan), plan, lambda *_: None)
    return plan


@pytest.mark.parametrize(
    ("architecture", "quantization", "slots"),
    [("llama", "none", 16), ("gemma2", "int4", 16), ("phi", "int8", 1)],  # it ties, caps its logits, has a bias
)
def test_filled_slots_are_proven(architecture, quantization, slots, random_model, tmp_path):
    source = load_source(str(random_model(architecture)), DTYPES["fp32"])
    plan = write(tmp_path / "right", source, quantization=quantization, slots=slots)
    capped = (softcap_of_slots_dropped,) if architecture == "gemma2" else ()
    assert_each_is_noticed(tmp_path / "right", plan, (ids_shifted, empty_slots_can_win, *capped))


def test_filled_slots_of_a_graph_for_tensorrt_are_proven(random_model, tmp_path):
    source = load_source(str(random_model("llama")), DTYPES["fp16"])
    trt = TensorRTSettings(flavor="none", unroll=True, draft_length=3)
    plan = write(tmp_path / "right", source, dtype="fp16", quantization="int4", slots=16, trt=trt)
    shutil.copytree(tmp_path / "right", unrolled := tmp_path / "unrolled")
    assert corrupt(unrolled, ids_shifted, DRAFT_MODEL_NAME)
    assert "draft.onnx" in find_difference(unrolled, plan)
    assert_each_is_noticed(tmp_path / "right", plan, (ids_shifted, empty_slots_can_win))


def test_a_head_with_slots_is_proven_past_its_window(random_model, tmp_path):
    """A window of 100 tokens, which the proof narrows."""
    directory = random_model("mistral", sliding_window=100, **layer_heads.ROTATION)
    tensors = layer_heads.make_tensors((), layer_heads.NORMS)
    add_tensors(directory, layer_heads.beside_the_model(tensors, "model.layers.2.", layer_heads.DEEPSEEK))
    target = load_source(str(directory), DTYPES["fp32"])
    source = load_mtp(find_mtp(str(directory)), target)
    plan = write(tmp_path / "right", source, quantization="int8", slots=16)
    assert_each_is_noticed(tmp_path / "right", plan, (window_dropped, ids_shifted, empty_slots_can_win))
