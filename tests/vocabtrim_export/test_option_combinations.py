"""Options that would change nothing beside others are refused before anything is loaded."""

import pytest

from vocabtrim_export.cli.main import main

PAIR = ["--target", "t", "--drafter", "d"]
EXPORT = ["export", "--drafter", "onnx", "--k", "64", "--output", "o"]
REFUSED = {
    "--draft-length as a number is for a drafter": ["generate", "--target", "t", "--draft-length", "4"],
    "--drafter-device is for a drafter": ["generate", "--target", "t", "--drafter-device", "cpu"],
    "--top-k changes nothing": ["generate", "--target", "t", "--top-k", "5"],
    "--top-p changes nothing": ["generate", "--target", "t", "--top-p", "0.9"],
    "--min-p changes nothing": ["generate", "--target", "t", "--min-p", "0.1"],
    "--seed changes nothing": ["generate", "--target", "t", "--temperature", "0", "--seed", "0"],
    "--draws is for a test of sampling": ["verify", *PAIR, "--draws", "90"],
    "--seed is for a test of sampling": ["verify", *PAIR, "--seed", "0"],
    "--template-arg is for prompts of text": ["bench", "--random-weights", "tiny", "--template-arg", "a=1"],
    "--layers is not shown by --check": ["inspect", "d", "--check", "--layers"],
    "--output is for the page": ["report", "d", "--json", "--output", "x.html"],
    "--verbose shows what TensorRT logs": [*EXPORT, "--verbose"],
    "--prefill-chunk is for TensorRT": [*EXPORT, "--prefill-chunk", "0"],  # the drafter is an ONNX model
    "--compute-capability is for plans": [
        *["export", "--drafter", "m", "--k", "64", "--output", "o", "--format", "trt"],
        *["--trt-flavor", "none", "--compute-capability", "8.9"],
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_option_that_would_change_nothing_is_refused(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    arguments = REFUSED[message]
    assert main([*arguments, *(["--prompt", "a"] if arguments[0] == "generate" else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_auto_without_a_drafter_is_prompt_lookup_and_accepted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--target", "t", "--draft-length", "auto", "--prompt", "a"]) == 2
    assert "--draft-length" not in capsys.readouterr().err  # the missing bundle is what is wrong
