"""Plans built for real by TensorRT-RTX, which needs no GPU for it, from a layer of attention over a KV cache."""

import importlib.util
import os
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.trt.library import Library, load_library
from vocabtrim_export.trt import build as build_module
from vocabtrim_export.trt.build import BuildOptions, build_plan, member_name, target_capabilities
from vocabtrim_export.trt.messages import model_layer, raise_ended
from vocabtrim_export.trt.network import Kernel, Network, parse_kernels
from vocabtrim_export.trt.worker import fixed_shape, load_timing_cache, save_timing_cache

HEADS, KV_HEADS, SIZE, HIDDEN, KEPT, SLOTS = 4, 2, 64, 64, 96, 128
LAYER = "model.layers.0.self_attn"
SIZES = {"sequence_length": 1, "keep": 1}
CHUNK = {"sequence_length": 16, "keep": 1}
AMPERE = BuildOptions(("8.6",))


def write_graph(path, element_type=TensorProto.FLOAT16, **attention):
    """One attention layer over a KV cache and a trimmed head, in the form of an exported graph."""
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    random = np.random.default_rng(0)
    weights = {
        name: (random.standard_normal(shape) * 0.02).astype(dtype)
        for name, shape in {
            "embedding": (200, HIDDEN),
            "q": (HIDDEN, HEADS * SIZE),
            "k": (HIDDEN, KV_HEADS * SIZE),
            "v": (HIDDEN, KV_HEADS * SIZE),
            "o": (HEADS * SIZE, HIDDEN),
            "head": (HIDDEN, KEPT),
        }.items()
    }
    numbers = {
        "kept_token_ids": np.arange(0, 2 * KEPT, 2),
        "q_shape": np.array([1, -1, HEADS, SIZE]),
        "k_shape": np.array([1, -1, KV_HEADS, SIZE]),
        "o_shape": np.array([1, -1, HEADS * SIZE]),
        "flat": np.array([-1]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "column": np.array([1, 1, -1, 1]),
        "slots": np.arange(SLOTS).reshape(1, 1, 1, SLOTS),
    }
    nodes = [
        ("Gather", "embedding input_ids", "x", "model.embed", {}),
        ("Reshape", "position_ids flat", "positions", "positions", {}),
        ("Slice", "positions zero one", "start", "start", {}),
        ("Reshape", "position_ids column", "queries", "queries", {}),
        ("LessOrEqual", "slots queries", "mask", "mask", {}),
    ]
    for name, shape in (("q", "q_shape"), ("k", "k_shape"), ("v", "k_shape")):
        nodes += [
            ("MatMul", f"x {name}", f"{name}0", f"{LAYER}.{name}_proj", {}),
            ("Reshape", f"{name}0 {shape}", f"{name}1", f"{LAYER}.{name}_heads", {}),
            ("Transpose", f"{name}1", f"{name}2", f"{LAYER}.{name}_swap", {"perm": [0, 2, 1, 3]}),
        ]
    for name, part in (("k2", "key"), ("v2", "value")):
        cache = f"past_key_values.0.{part} {name} start"
        nodes.append(("TensorScatter", cache, f"present.0.{part}", f"{LAYER}.{part}_update", {"axis": 2}))
    nodes += [
        ("Attention", "q2 present.0.key present.0.value mask", "a", f"{LAYER}.attention", {"scale": 0.125} | attention),
        ("Transpose", "a", "a1", f"{LAYER}.swap", {"perm": [0, 2, 1, 3]}),
        ("Reshape", "a1 o_shape", "a2", f"{LAYER}.flat", {}),
        ("MatMul", "a2 o", "a3", f"{LAYER}.o_proj", {}),
        ("Add", "x a3", "y", f"{LAYER}.add", {}),
        ("Gather", "y logits_positions", "yk", "predicted", {"axis": 1}),
        ("MatMul", "yk head", "logits", "lm_head", {}),
        ("ArgMax", "logits", "best", "argmax", {"axis": -1, "keepdims": 0}),
        ("Gather", "kept_token_ids best", "token_ids", "to_full_vocabulary", {}),
    ]
    step, cache = [1, "sequence_length"], [1, KV_HEADS, SLOTS, SIZE]
    value, int64 = helper.make_tensor_value_info, TensorProto.INT64
    inputs = [value("input_ids", int64, step), value("position_ids", int64, step)]
    inputs.append(value("logits_positions", int64, ["keep"]))
    outputs = [value("logits", element_type, [1, "keep", KEPT]), value("token_ids", int64, [1, "keep"])]
    for part in ("key", "value"):
        inputs.append(value(f"past_key_values.0.{part}", element_type, cache))
        outputs.append(value(f"present.0.{part}", element_type, cache))
    graph = helper.make_graph(
        [helper.make_node(op, i.split(), o.split(), name=name, **a) for op, i, o, name, a in nodes],
        "step",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in (weights | numbers).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def rtx():
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    return load_library("rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture(scope="module")
def built(rtx, graph):
    """The plan's size in its file, what `build_plan` returned, and the progress that it reported."""
    reports, plan = [], graph.with_suffix(".engine")
    result = build_plan(rtx, graph, plan, [SIZES, CHUNK], AMPERE, progress=lambda *report: reports.append(report))
    return plan.stat().st_size, result, reports


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_plan_is_written_and_described(built):
    size, result, _ = built
    assert result.size == size > 100_000
    assert result.seconds > 0
    assert result.compute_capabilities == ("8.6",)


def test_progress_counts_the_profiles(built):
    _, _, reports = built
    assert reports[0] == (0, 2)
    assert (1, 2) in reports
    assert reports[-1] == (2, 2)


def test_network_updates_the_cache_and_attends(built):
    counts = built[1].network.counts()
    assert counts["KV_CACHE_UPDATE"] == 2
    assert counts["ATTENTION_INPUT"] == counts["ATTENTION_OUTPUT"] == 1


def test_network_ends_in_a_head_of_the_kept_tokens_and_their_ids(built):
    product, best, ids, lookup = built[1].network.layers[-4:]
    assert [layer.type for layer in (product, best, ids, lookup)] == ["MATRIX_MULTIPLY", "TOPK", "CONSTANT", "GATHER"]
    assert product.outputs[0].shape == (1, -1, KEPT)
    assert product.inputs[1].shape == (1, HIDDEN, KEPT)
    assert best.inputs[0].name == product.outputs[0].name == "logits"
    assert ids.outputs[0].shape == (KEPT,)
    assert [tensor.name for tensor in lookup.inputs] == [ids.outputs[0].name, best.outputs[1].name]
    assert lookup.outputs[0].name == "token_ids"


def test_builder_tells_its_kernels_for_every_profile(built):
    attention = [kernel for kernel in built[1].network.kernels if f"{LAYER}.attention" in kernel.nodes]
    assert len([kernel for kernel in attention if "mha" in kernel.name]) == 2  # one a profile
    assert {kernel.type for kernel in built[1].network.kernels} <= {"kgen", "gemm", "runtime_fusion"}


def test_network_survives_its_file_which_is_compact(built):
    text = built[1].network.to_json()
    assert Network.from_json(text, "network.json") == built[1].network
    assert len(text) < 10_000
    with pytest.raises(VocabtrimError, match=r"network\.json does not describe a network"):
        Network.from_json(text[:-9], "network.json")


def test_all_gpus_since_ampere_by_default(rtx, graph, tmp_path):
    plan = build_plan(rtx, graph, tmp_path / "p", [SIZES], BuildOptions())
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(plan.compute_capabilities)
    assert "7.5" not in plan.compute_capabilities


def test_every_line_of_the_log_is_passed_on(rtx, graph, tmp_path):
    lines = []
    build_plan(rtx, graph, tmp_path / "p", [SIZES], AMPERE, log_write=lines.append)
    assert any(f"{LAYER}.attention" in line for line in lines)
    assert any(line.startswith("[verbose]") for line in lines)


def test_refused_node_is_named_with_its_operator_and_layer(rtx, tmp_path):
    softcapped = write_graph(tmp_path / "model.onnx", softcap=30.0)
    with pytest.raises(VocabtrimError) as error:
        build_plan(rtx, softcapped, tmp_path / "p", [SIZES], AMPERE)
    text = one_line(error)
    assert "Attention of layer model.layers.0 " in text
    assert f"node {LAYER}.attention of model.onnx" in text
    assert "softcap" in text
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_graph_that_cannot_be_read(rtx, tmp_path):
    with pytest.raises(VocabtrimError, match=r"cannot read .*missing\.onnx"):
        build_plan(rtx, tmp_path / "missing.onnx", tmp_path / "p", [SIZES], AMPERE)


def test_failed_build_gives_the_librarys_reason(rtx, tmp_path):
    float32 = write_graph(tmp_path / "model.onnx", TensorProto.FLOAT)
    with pytest.raises(VocabtrimError) as error:
        build_plan(rtx, float32, tmp_path / "p", [CHUNK], AMPERE)  # of one token it would build
    text = one_line(error)
    assert "--dtype fp16 and bf16" in text
    assert "dedicated kernel" in text
    assert not (tmp_path / "p").exists()


def test_dynamic_dimension_without_a_size(rtx, graph, tmp_path):
    with pytest.raises(VocabtrimError, match=r"dynamic dimension sequence_length in input_ids.* only keep can be"):
        build_plan(rtx, graph, tmp_path / "p", [{"keep": 1}], AMPERE)


def test_sizes_are_looked_up_by_the_dimensions_name():
    names = ["batch", "sequence_length", None]
    tensor = SimpleNamespace(name="x", shape=(1, -1, 64), get_dimension_name=names.__getitem__)
    assert fixed_shape(tensor, {"keep": 3, "sequence_length": 5}, "model.onnx") == (1, 5, 64)


@pytest.mark.parametrize("moment", ["log", "progress"])
def test_interrupted_build_leaves_nothing(rtx, graph, tmp_path, monkeypatch, moment):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            started.append(self)

    def interrupt(*report):
        if report != (0, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(build_module.subprocess, "Popen", Recorded)
    hooks = {"log_write": interrupt} if moment == "log" else {"progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        build_plan(rtx, graph, tmp_path / "p", [SIZES, CHUNK], AMPERE, **hooks)
    (process,) = started
    assert process.returncode == -signal.SIGKILL  # and waited for
    assert list(tmp_path.iterdir()) == []


def test_graph_without_dynamic_dimensions(rtx, graph, tmp_path):
    model = onnx.load(graph)
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = dim.dim_value or 1
    onnx.save(model, tmp_path / "static.onnx")
    assert build_plan(rtx, tmp_path / "static.onnx", tmp_path / "p", [{}], AMPERE).size > 0


def test_full_disk_is_the_disks_error(rtx, graph, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    (tmp_path / "p").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        build_plan(rtx, graph, tmp_path / "p", [SIZES], AMPERE)
    assert list(tmp_path.iterdir()) == []
    assert os.path.exists("/dev/full")


@pytest.mark.skipif(not cuda.has_device(), reason="TensorRT-RTX strips weights only where there is a GPU")
def test_stripped_plan_is_smaller_by_the_weights(rtx, graph, tmp_path):
    here = BuildOptions((cuda.current_gpu().compute_capability,))
    whole = build_plan(rtx, graph, tmp_path / "whole", [SIZES], here)
    options = BuildOptions(here.compute_capabilities, strip_weights=True)
    stripped = build_plan(rtx, graph, tmp_path / "stripped", [SIZES], options)
    head, projections = HIDDEN * KEPT, HIDDEN * SIZE * (2 * HEADS + 2 * KV_HEADS)
    assert whole.size - stripped.size > 2 * (head + projections)


class Enum:
    __members__ = dict.fromkeys(["NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])


RTX = Library("rtx", "1.7.1", SimpleNamespace(ComputeCapability=Enum))
FULL = Library("tensorrt", "11.0", SimpleNamespace())


def test_capabilities_come_in_order_and_once():
    assert target_capabilities(RTX, BuildOptions(("12.0", "7.5", "12.0"))) == ("7.5", "12.0")
    assert [member_name(capability) for capability in ("7.5", "12.0")] == ["SM75", "SM120"]


def test_unknown_capability_lists_the_known_ones():
    with pytest.raises(VocabtrimError) as error:
        target_capabilities(RTX, BuildOptions(("8.6", "8.7")))
    assert "compute capability 8.7: it knows 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in one_line(error)


def test_hopper_is_sent_to_tensorrt():
    with pytest.raises(VocabtrimError, match="Hopper needs --trt-flavor tensorrt"):
        target_capabilities(RTX, BuildOptions(("9.0",)))


def test_rtx_has_no_timing_cache(tmp_path):
    with pytest.raises(VocabtrimError, match="no timing cache"):
        target_capabilities(RTX, BuildOptions(timing_cache=tmp_path / "cache"))


def test_version_compatible_plans_are_tensorrts_and_keep_their_weights():
    with pytest.raises(VocabtrimError, match="TensorRT-RTX has no lean runtime: leave --version-compatible out"):
        target_capabilities(RTX, BuildOptions(version_compatible=True))
    with pytest.raises(VocabtrimError, match="give only one of"):
        target_capabilities(FULL, BuildOptions(strip_weights=True, version_compatible=True))


def test_rtx_strips_on_a_gpu_and_for_one_capability(monkeypatch):
    monkeypatch.setattr(cuda, "has_device", lambda: False)
    with pytest.raises(VocabtrimError, match="needs an NVIDIA GPU to strip weights"):
        target_capabilities(RTX, BuildOptions(("8.6",), strip_weights=True))
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    assert target_capabilities(RTX, BuildOptions(("8.6",), strip_weights=True)) == ("8.6",)
    with pytest.raises(VocabtrimError, match="one --compute-capability"):
        target_capabilities(RTX, BuildOptions(("8.6", "8.9"), strip_weights=True))


def test_tensorrt_needs_the_gpu_it_builds_for(monkeypatch):
    monkeypatch.setattr(cuda, "has_device", lambda: False)
    with pytest.raises(VocabtrimError) as error:
        target_capabilities(FULL, BuildOptions())
    assert "there is none here" in one_line(error)
    monkeypatch.setattr(cuda, "has_device", lambda: True)
    monkeypatch.setattr(cuda, "current_gpu", lambda: cuda.Gpu("H100", "9.0"))
    assert target_capabilities(FULL, BuildOptions()) == target_capabilities(FULL, BuildOptions(("9.0",))) == ("9.0",)
    with pytest.raises(VocabtrimError, match=r"H100 of compute capability 9\.0, not for 8\.6"):
        target_capabilities(FULL, BuildOptions(("9.0", "8.6")))


def test_timing_cache_is_written_whole_and_read_again(rtx, tmp_path):
    """TensorRT-RTX's API has these calls though they keep nothing."""
    builder = rtx.api.Builder(rtx.api.Logger())
    config, path = builder.create_builder_config(), tmp_path / "timings"
    load_timing_cache(config, path)
    save_timing_cache(config, path)
    assert path.stat().st_size > 0
    load_timing_cache(config, path)
    save_timing_cache(config, path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.o_proj", "model.layers.12"),
        ("model.language_model.layers.3", "model.language_model.layers.3"),
        ("step_2/model.layers.0.mlp.act", "step_2/model.layers.0"),
        ("lm_head", None),
        ("node_MatMul_5", None),
        ("model.players.3", None),
    ],
)
def test_layer_of_a_node(name, layer):
    assert model_layer(name) == layer


def test_how_a_builder_ended():
    with pytest.raises(VocabtrimError, match="memory ran out"):
        raise_ended("TensorRT-RTX", "model.onnx", -signal.SIGKILL, "")
    with pytest.raises(VocabtrimError, match=r"TensorRT-RTX crashed on model\.onnx \(SIGABRT\): CHECK failed"):
        raise_ended("TensorRT-RTX", "model.onnx", -signal.SIGABRT, "first\nCHECK failed\n")
    with pytest.raises(RuntimeError, match="Traceback"):
        raise_ended("TensorRT-RTX", "model.onnx", 1, "Traceback …")


def test_kernels_are_read_from_the_log():
    lines = [
        "[verbose] Layers:",
        "Name: gemm [profile 1], LayerType: gemm, Inputs: [ { Name: a, Dimensions: [1] }], Metadata: [ONNX Layer: a.b]"
        "\x1f[ONNX Layer: c]",
        "Name: moved, LayerType: kgen, Outputs: [ { Name: b }], StreamId: 0, Metadata: ",
        "Layer(Reformat): something, LayerType: none",
    ]
    assert parse_kernels(lines) == (Kernel("gemm [profile 1]", "gemm", ("a.b", "c")), Kernel("moved", "kgen", ()))
