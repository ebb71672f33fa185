"""SmolLM2-135M-Instruct as its users have it, through the commands. `make test` fetches the weights."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from engines import load_engine
from engines.bundle.tokenizer import Tokenizer
from runtime import SpeculativeDecoder
from vocabtrim_export.cli.main import export_main, main
from vocabtrim_export.trt.network import Network

from .eagle_heads import check_rules

MODEL = os.environ.get("VOCABTRIM_TEST_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="needs VOCABTRIM_TEST_MODEL, the path of SmolLM2-135M-Instruct as .gguf"),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = [
    "A farmer has 17 sheep and buys 3 pens for 8 sheep each. How many more sheep fit in?",
    "Name three rivers in Europe and say where they end.",
]
MORE_QUESTIONS = [
    "Write a short letter to a friend about your new job.",
    "Explain to a child why the sky is blue.",
]


@pytest.fixture(scope="module")
def bundles(store):
    """The demo's pair, on a calibration that is short and needs no generation; nobody changes it."""

    def make(output: Path) -> None:
        arguments = ["--drafter", MODEL, "--target", MODEL, "--quantize-drafter", "int4", "--k", "8192"]
        arguments += ["--calibration-source", "text", "--calibration-tokens", "50000"]
        arguments += ["--max-length", "512", "--output", str(output)]
        assert export_main(arguments) == 0

    files, _ = store.once(("real weights", MODEL), make)
    return files


def test_greedy_output_is_that_of_transformers(bundles):
    """Both generate from the same GGUF; a difference would have to be a near-tie, and these prompts have none."""
    path = Path(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with SpeculativeDecoder.load(bundles / "target", bundles / "drafter", draft_length=4) as decoder:
        for question in QUESTIONS:
            prompt = decoder.encode(question)
            with torch.no_grad():
                ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)[0, len(prompt) :]
            result = decoder.generate(question, max_new_tokens=32)
            assert list(result.token_ids) == ids.tolist()
            assert result.stats.block_efficiency > 1.5
        check_rules(decoder, model, decoder.encode(MORE_QUESTIONS[0]))


def test_an_answer_under_a_schema_is_the_masked_targets_and_valid(bundles):
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    texts = {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 3}
    numbers = {"type": "integer", "minimum": 1, "maximum": 9999}
    properties = {"name": {"type": "string", "maxLength": 30}, "length_km": numbers, "countries": texts}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    with (
        SpeculativeDecoder.load(bundles / "target", bundles / "drafter") as pair,
        SpeculativeDecoder.load(bundles / "target") as alone,
    ):
        question = "Describe the river Rhine as JSON with name, length_km and countries."
        answer, expected = (
            decoder.generate(question, max_new_tokens=100, json_schema=schema) for decoder in (pair, alone)
        )
        assert answer.token_ids == expected.token_ids
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.stats.block_efficiency > 1.5


def test_the_target_as_its_own_drafter_accepts_everything(bundles):
    with SpeculativeDecoder(
        load_engine(bundles / "target"), load_engine(bundles / "target"), draft_length=4
    ) as decoder:
        prompt = Tokenizer.load(bundles / "target").encode_chat([{"role": "user", "content": QUESTIONS[0]}])
        stats = decoder.generate(prompt, max_new_tokens=40).stats
        assert stats.accepted == stats.drafted > 25


def test_the_eagle_head_of_the_examples_drafts_well(bundles, tmp_path, capsys):
    """Trained on the original weights, not on this GGUF, whose 4-bit rounding costs it some acceptance."""
    head = EXAMPLES / "eagle3" / "smollm2-135m-instruct"
    arguments = ["--drafter", str(head), "--target", MODEL, "--k", "49152", "--max-length", "512"]
    arguments += ["--calibration", str(bundles / "token_counts.safetensors"), "--output", str(tmp_path / "out")]
    assert export_main(arguments) == 0
    assert "trained with another file of its target" in capsys.readouterr().err
    with (
        SpeculativeDecoder.load(tmp_path / "out" / "target", tmp_path / "out" / "drafter", draft_length=4) as decoder,
        SpeculativeDecoder.load(bundles / "target") as alone,
    ):
        results = [decoder.generate(question, max_new_tokens=96) for question in [*QUESTIONS, *MORE_QUESTIONS]]
        gained = sum(result.stats.block_efficiency * result.stats.rounds for result in results)
        assert gained / sum(result.stats.rounds for result in results) > 1.9
        assert results[1].token_ids == alone.generate(QUESTIONS[1], max_new_tokens=96).token_ids


def test_bench_reports_every_mode(bundles, capsys):
    arguments = ["bench", "--target", bundles / "target", "--drafter", bundles / "drafter", "--num-prompts", 1]
    arguments += ["--prompts", EXAMPLES / "prompts.jsonl", "--max-new-tokens", 24, "--repeats", 1, "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["modes"]) == {"target_only", "trimmed_drafter"}
    assert report["lossless"]
    trimmed, target = report["modes"]["trimmed_drafter"], report["modes"]["target_only"]
    for mode in (trimmed, target):
        assert mode["tokens_per_second"] > 0
        assert mode["verify_ms"] > 0
    assert trimmed["bytes_per_step"] < target["bytes_per_step"] / 5
    assert trimmed["overhead"] < 0.1  # typically 0.003


def test_generate_prints_the_text(bundles, capsys):
    arguments = ["generate", "--target", bundles / "target", "--drafter", bundles / "drafter", "--max-new-tokens", "8"]
    assert main([*map(str, arguments), "--prompt", "What is 2 + 2?", "--temperature", "0.8", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "block efficiency" in captured.err


def test_tensorrt_plans(bundles, tmp_path):
    """Both plans, as the README says; the drafter's last layers have K columns. What they compute runs on the CPU."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT-RTX: pip install '.[trt-rtx]'")
    output = tmp_path / "out"
    arguments = ["--drafter", MODEL, "--target", MODEL, "--k", "8192", "--max-length", "512", "--output", str(output)]
    arguments += ["--calibration", str(bundles / "token_counts.safetensors"), "--format", "trt", "--trt-flavor", "rtx"]
    assert export_main([*arguments, "--compute-capability", "8.9"]) == 0
    for role, profiles in (("drafter", 2), ("target", 2)):
        network = Network.from_json((output / role / "network.json").read_text("utf-8"), role)
        counts = network.counts()
        assert (counts["KV_CACHE_UPDATE"], counts["ATTENTION_INPUT"], counts["TOPK"]) == (60, 30, 1)
        assert sum("mha" in kernel.name for kernel in network.kernels) == 30 * profiles
    network = Network.from_json((output / "drafter" / "network.json").read_text("utf-8"), "drafter")
    head, top, table, gather = network.layers[-4:]
    assert [layer.type for layer in (head, top, table, gather)] == ["MATRIX_MULTIPLY", "TOPK", "CONSTANT", "GATHER"]
    assert head.outputs[0].shape[-1] == table.outputs[0].shape[0] == 8192
    with (
        SpeculativeDecoder.load(output / "target", output / "drafter", draft_length=4) as half,
        SpeculativeDecoder.load(bundles / "target") as plain,
    ):
        result, expected = (each.generate(QUESTIONS[1], max_new_tokens=16) for each in (half, plain))
        assert result.token_ids == expected.token_ids  # fp16 against fp32: no near-tie in this text
        assert result.stats.block_efficiency > 2
