"""`--format trt` with the real parser and builder of TensorRT-RTX, which needs no GPU."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines import VocabtrimError, load_engine, read_bundle
from engines.bundle.graph_io import SLOT_WEIGHT
from engines.bundle.read import PLAN_NAME
from engines.ort.session import share
from engines.outputs import StepOutput
from engines.trt.engine import StaticEngine
from engines.trt.plan_proof import PROOF_NAME, prove_plan
from engines.trt.reference import ReferenceExecutor
from tests.bundles import ARCHITECTURES
from vocabtrim_export.cli.main import export_main, main
from vocabtrim_export.trt.network import DRAFT_NETWORK_NAME, NETWORK_NAME, Network
from vocabtrim_export.trt.settings import TensorRTSettings

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("needs TensorRT-RTX: pip install '.[trt-rtx]'", allow_module_level=True)
RTX = TensorRTSettings(flavor="rtx", compute_capabilities=("8.9",), draft_length=3, prefill_chunk=16)
UNROLLED = replace(RTX, unroll=True)
LAYERS = 2  # of the random models


def network_of(bundle, name=NETWORK_NAME):
    return Network.from_json((bundle / name).read_text("utf-8"), name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_builds(architecture, random_model, export_pair):
    result = export_pair(random_model(architecture), trt=RTX)
    for path in (result.target, result.drafter):
        plans = read_bundle(path).manifest.tensorrt
        assert (plans.flavor, plans.compute_capabilities) == ("rtx", ("8.9",))
        assert (path / PLAN_NAME).stat().st_size > 0
        network = network_of(path)
        counts = network.counts()
        assert counts["KV_CACHE_UPDATE"] == 2 * LAYERS
        if architecture == "gemma2":  # the parser refuses attention with a softcap: it is written out
            assert "ATTENTION_INPUT" not in counts
        else:
            assert counts["ATTENTION_INPUT"] == counts["ATTENTION_OUTPUT"] == LAYERS
            fused = [kernel for kernel in network.kernels if "mha" in kernel.name]
            assert len(fused) == LAYERS * len(plans.profiles)


def test_the_drafter_ends_with_k_columns_a_top_1_and_the_table(random_model, export_pair):
    result = export_pair(random_model("llama"), trt=RTX)
    head, top, table, gather = network_of(result.drafter).layers[-4:]
    assert [layer.type for layer in (head, top, table, gather)] == ["MATRIX_MULTIPLY", "TOPK", "CONSTANT", "GATHER"]
    assert head.outputs[0].shape[-1] == 192
    assert top.inputs[0].name == head.outputs[0].name == "logits"
    assert (table.outputs[0].shape, table.outputs[0].dtype) == ((192,), "INT64")
    assert gather.inputs[0].name == table.outputs[0].name
    assert gather.inputs[1].name == top.outputs[1].name  # the index, not the value
    assert gather.outputs[0].name == "token_ids"
    assert [layer.type for layer in network_of(result.target).layers[-2:]] == ["TOPK", "CAST"]


def test_the_trim_shrinks_the_plan_by_the_rows_it_cuts(random_model, export_pair):
    directory = random_model("llama", vocab_size=32768, tie_word_embeddings=False, hidden_size=128)
    trimmed, full = (export_pair(directory, k=k, trt=RTX) for k in (1024, 32768))
    sizes = [(result.drafter / PLAN_NAME).stat().st_size for result in (trimmed, full)]
    cut = (32768 - 1024) * 128 * 2
    assert sizes[1] - sizes[0] == pytest.approx(cut, rel=0.05)


def test_one_plan_has_all_spans_and_capabilities(random_model, export_pair):
    settings = TensorRTSettings(flavor="rtx", compute_capabilities=("12.0", "8.6"), draft_length=3, spans=(40,))
    result = export_pair(random_model("llama"), trt=settings)
    plans = read_bundle(result.target).manifest.tensorrt
    assert plans.compute_capabilities == ("8.6", "12.0")
    assert [(p.phase, p.tokens, p.span) for p in plans.profiles] == [
        ("verify", 4, 64),
        ("prefill", 64, 64),
        ("verify", 4, 192),
        ("prefill", 192, 192),
    ]


def test_unrolled_drafts_write_the_cache_once(random_model, export_pair):
    result = export_pair(random_model("llama"), trt=UNROLLED, slots=16)
    counts = network_of(result.drafter, DRAFT_NETWORK_NAME).counts()
    assert counts["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert counts["ATTENTION_INPUT"] == 3 * LAYERS
    assert counts["TOPK"] == 3
    assert "draft.onnx" in read_bundle(result.drafter).manifest.files
    assert (result.drafter / "draft.onnx").stat().st_size < 1e6  # its weights are model.onnx's
    assert not (result.target / "draft.onnx").exists()


def test_slots_are_inputs_of_fixed_shapes(random_model, export_pair):
    result = export_pair(random_model("llama"), trt=UNROLLED, slots=16)
    manifest = read_bundle(result.drafter).manifest
    assert (manifest.slots, manifest.tensorrt.flavor) == (16, "rtx")
    for name, steps in ((NETWORK_NAME, 1), (DRAFT_NETWORK_NAME, 3)):
        layers = network_of(result.drafter, name).layers
        read = [tensor for layer in layers for tensor in layer.inputs if tensor.name.startswith("slot_")]
        weights = [tensor for tensor in read if tensor.name == "slot_weight"]
        assert {(tensor.dtype, tensor.shape[-2:]) for tensor in weights} == {("HALF", (64, 16))}
        assert len(weights) == steps
        tokens = {tensor for tensor in read if tensor.name == "slot_token_ids"}
        assert {(tensor.dtype, tensor.shape) for tensor in tokens} == {("INT64", (16,))}
        tops = [layer for layer in layers if layer.type == "TOPK"]
        assert [layer.inputs[0].shape[-1] for layer in tops] == [192 + 16] * steps
    target = network_of(result.target)
    assert not [tensor for layer in target.layers for tensor in layer.inputs if tensor.name.startswith("slot_")]


@pytest.fixture
def unrolled_drafter(random_model, export_pair, tmp_path):
    """A bundle of plans, whose graphs stand in for them where there is no GPU."""
    path = tmp_path / "drafter"
    shutil.copytree(export_pair(random_model("llama"), trt=UNROLLED, slots=16).drafter, path)
    return read_bundle(path)


def test_a_plan_proves_itself_once(unrolled_drafter):
    with StaticEngine(unrolled_drafter, ReferenceExecutor(unrolled_drafter)) as engine:
        proof = prove_plan(unrolled_drafter, engine)
        assert 0 < proof.largest_difference < 0.05  # fp16 against the float32 view of the same graph
        assert engine.length == 0
        engine.feed = None  # the second time nothing runs
        assert prove_plan(unrolled_drafter, engine) == proof
        engine.environment = lambda: {"another": "driver"}
        with pytest.raises(TypeError):
            prove_plan(unrolled_drafter, engine)


def logits_rolled(executor):
    step = executor.step
    executor.step = lambda *given: (
        (output := step(*given)) and StepOutput(output.token_ids, lambda: np.roll(output.logits, 1, -1))
    )


def positions_shifted(executor):
    step = executor.step
    executor.step = lambda profile, ids, at, rows: step(profile, ids, np.maximum(at - 1, 0), rows)


def nan_logits(executor):
    step = executor.step
    executor.step = lambda *given: (
        (output := step(*given)) and StepOutput(output.token_ids, lambda: np.full_like(output.logits, np.nan))
    )


def nan_after_a_draft(executor):
    """The steps that a draft in one call is compared with have no logits."""
    draft = executor.draft

    def broken(*given):
        nan_logits(executor)
        return draft(*given)

    executor.draft = broken


def drafts_shifted(executor):
    draft = executor.draft
    executor.draft = lambda *given: draft(*given)[::-1].copy()


def slots_never_copied(executor):
    """The plan reads a copy of the slots' rows from before a token entered."""
    weight = executor.slots.inputs[SLOT_WEIGHT]
    executor._slot_inputs[SLOT_WEIGHT] = share(weight.copy())


WRONG = [logits_rolled, positions_shifted, nan_logits, nan_after_a_draft, drafts_shifted, slots_never_copied]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_plan_that_computes_something_else_is_refused(wrong, unrolled_drafter):
    executor = ReferenceExecutor(unrolled_drafter)
    wrong(executor)
    with (
        StaticEngine(unrolled_drafter, executor) as engine,
        pytest.raises(VocabtrimError, match="on this GPU its plan does not compute what its graph does") as raised,
    ):
        prove_plan(unrolled_drafter, engine)
    assert "\n" not in str(raised.value)
    assert not (unrolled_drafter.path / PROOF_NAME).exists()


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4), ("fp8", 8)])
def test_quantised_weights_stay_small_in_the_plan(quantize, bits, random_model, export_pair):
    directory = random_model("llama", hidden_size=256, intermediate_size=2048, vocab_size=512)
    dense, small = (export_pair(directory, trt=RTX, quantize=name).drafter for name in ("none", quantize))
    saved = (dense / PLAN_NAME).stat().st_size - (small / PLAN_NAME).stat().st_size
    weights = LAYERS * (3 * 256 * 2048 + 2 * 256 * 256 + 2 * 256 * 128) + 192 * 256
    assert saved > weights * (16 - bits) / 8 * 0.85  # scales, and padding, take some


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_cannot_run_here_is_said_in_one_line(dtype, random_model, export_pair):
    result = export_pair(random_model("llama"), trt=RTX, dtype=dtype, slots=16)
    with pytest.raises(VocabtrimError, match=r"^\S.*(no NVIDIA driver|no GPU|CUDA)") as raised:
        load_engine(result.target, device="cuda").close()
    assert "\n" not in str(raised.value)


def test_polygraphy_runs_the_graph_on_the_bundles_inputs(random_model, export_pair):
    result = export_pair(random_model("llama"), trt=UNROLLED, slots=16)

    def polygraphy(*arguments):
        command = [str(Path(sys.executable).with_name("polygraphy")), *arguments]
        return subprocess.run(command, cwd=result.drafter, capture_output=True, text=True)

    shown = polygraphy("inspect", "model", "model.onnx")
    assert "logits_positions [dtype=int64, shape=('keep',)]" in shown.stdout
    done = polygraphy("run", "model.onnx", "--onnxrt", "--data-loader-script", "polygraphy_inputs.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def test_inspect_shows_the_plans(random_model, export_pair, capsys):
    result = export_pair(random_model("llama"), trt=RTX)
    assert main(["inspect", str(result.drafter), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["manifest"]["tensorrt"]["compute_capabilities"] == ["8.9"]
    assert main(["inspect", str(result.drafter), "--layers"]) == 0
    assert "KV_CACHE_UPDATE" in capsys.readouterr().out


MISTAKES = {
    "an unknown GPU": (["--compute-capability", "6.1"], r"does not build for compute capability 6\.1.*8\.6"),
    "Hopper": (["--compute-capability", "9.0"], "Hopper needs --trt-flavor tensorrt"),
    "fp32": (["--dtype", "fp32"], "give --dtype fp16 or bf16"),
    "fp8 on older GPUs": (["--quantize", "fp8"], r"fp8 needs .* 8\.9 or newer, which 8\.0, 8\.6 is not: give"),
    "int4 on Turing": (["--quantize-drafter", "int4", "--compute-capability", "7.5"], "int4 needs .* 8.0 or newer"),
    "a span that is none": (["--span", "128"], "--span is 128: give lengths below --max-length"),
    "no draft to unroll": (["--draft-length", "0", "--unroll-draft"], "--unroll-draft needs a --draft-length"),
    "a long draft": (["--draft-length", "65"], "--draft-length is 65: give 0 to 64"),
    "full TensorRT": (["--trt-flavor", "tensorrt"], "TensorRT"),
    "another format": (["--format", "onnx", "--compute-capability", "8.6"], "is for TensorRT: give --format trt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(mistake, random_model, count_file, tmp_path, capsys):
    model = random_model("llama")
    extra, message = MISTAKES[mistake]
    arguments = ["--drafter", str(model), "--k", "192", "--max-length", "128", "--calibration", str(count_file(model))]
    output = tmp_path / "out"
    arguments += ["--format", "trt", "--trt-flavor", "rtx", "--output", str(output), *extra]
    assert export_main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not list(output.glob("[!t]*"))  # the token counts may stay
