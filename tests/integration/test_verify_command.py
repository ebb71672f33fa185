"""`vocabtrim verify` on tiny real bundles: exit codes, what it prints, and a user's mistakes."""

import json
import shutil

import pytest

import runtime.rules
from runtime.accept import Accepted, accept_greedy
from vocabtrim_export.cli.main import main


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def pair(model, export_pair):
    """A drafter with 192 of 448 rows and noise of its own: it is often wrong."""
    return export_pair(model, quantize_drafter="int4")


@pytest.fixture
def verify(pair, capsys):
    """verify(*options, target=…) → exit code, what it printed, and its errors."""

    def run(*options, target=None):
        given = ["--target", target or pair.target, "--drafter", pair.drafter, "--max-new-tokens", "24", *options]
        try:
            code = main(["verify", *map(str, given)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("judge", ["the engine", "transformers"])
def test_a_right_pair_is_lossless(verify, model, judge, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the quick brown fox"}\n{"text": "the lazy dog"}\n')
    options = ["--prompts", prompts, *(["--reference", model] if judge == "transformers" else [])]
    code, out, _ = verify(*options)
    assert (code, out.splitlines()[-1]) == (0, "lossless")
    assert "prompt 1: equal" in out
    assert ("compared only with the target's own engine" in out) == (judge == "the engine")
    code, out, _ = verify(*options, "--json", "--num-prompts", "1")
    data = json.loads(out)
    assert (code, data["passed"], data["sampling"]) == (0, True, None)
    assert [prompt["verdict"] for prompt in data["greedy"]["prompts"]] == ["equal"]


def test_sampling(verify):
    code, out, _ = verify("--sampling", "--draws", "90")
    assert code == 0
    assert out.count("follows the target, p-value") == 4
    assert "90 draws find a total variation of 0.42" in out
    code, out, _ = verify("--sampling", "--temperature", "0.8", "--draws", "90", "--json")
    (setting,) = json.loads(out)["sampling"]["settings"]
    assert (code, setting["temperature"], setting["top_k"], setting["draws"]) == (0, 0.8, 0, 90)
    assert setting["limit"] == 1e-3


def test_a_difference_is_exit_code_1(verify, monkeypatch):
    def drafted_instead(draft, verified):
        right = accept_greedy(draft, verified)
        return Accepted(right.count, draft[right.count]) if right.count < len(draft) else right

    monkeypatch.setattr(runtime.rules, "accept_greedy", drafted_instead)
    code, out, _ = verify()
    assert (code, out.splitlines()[-1]) == (1, "NOT LOSSLESS")
    assert "different at token" in out
    data = json.loads(verify("--json")[1])
    first = data["greedy"]["prompts"][0]["differences"][0]
    assert first["gap"] > first["tolerance"]
    assert first["found_text"] != first["expected_text"]


def test_a_target_that_is_not_the_reference_is_different(verify, random_model):
    code, out, _ = verify("--reference", random_model("llama", seed=3), "--num-prompts", "1")
    assert code == 1
    assert "different at token 0" in out


def test_a_reference_may_name_a_reserved_token_otherwise(verify, model, tmp_path):
    renamed = shutil.copytree(model, tmp_path / "renamed")
    text = (renamed / "tokenizer.json").read_text()
    (renamed / "tokenizer.json").write_text(text.replace("<|unused_0|>", "<|unused_9|>"))
    code, _, _ = verify("--reference", renamed, "--num-prompts", "1")
    assert code == 0


def test_mistakes_are_one_line(verify, model, random_model, export_pair, tmp_path):
    renamed = shutil.copytree(model, tmp_path / "renamed")
    said = json.loads((renamed / "tokenizer.json").read_text())
    table = said["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(said))
    quantized = export_pair(model, quantize="int8").target
    for options, target, message in [
        (["--reference", renamed], None, "another tokenizer than the target"),
        (["--reference", model], quantized, "leave --reference out"),
        (["--reference", "./nowhere"], None, "no model at ./nowhere"),
        (["--top-k", "5"], None, "--top-k is for a test of sampling"),
        (["--sampling", "--draws", "9"], None, "at least 85 draws"),
        (["--sampling", "--temperature", "0"], None, "temperatures above 0"),
        (["--num-prompts", "0"], None, "--num-prompts is 0"),
    ]:
        code, _, error = verify(*options, target=target)
        assert code == 2, message
        assert "verify: 1" not in error  # before any prompt runs
        assert [message in line for line in error.splitlines() if line.startswith("error: ")] == [True], error
