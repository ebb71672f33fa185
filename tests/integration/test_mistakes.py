"""A user's mistakes: one line on standard error that says what to do, exit code 2, nothing lost."""

import errno
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from engines import VocabtrimError, load_engine
from vocabtrim_export import CalibrationSettings, ExportSettings, export
from vocabtrim_export.cli.main import export_main, main


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("llama")


@pytest.fixture(scope="module")
def bundles(model, export_pair):
    return export_pair(model)


@pytest.fixture
def attempt(model, count_file, tmp_path, capsys):
    """attempt(k="0", …) runs vocabtrim-export with these options changed → (exit code, standard error)."""
    counts = count_file(model)

    def run(**changes):
        capsys.readouterr()  # transformers' bar of a model that was saved just now
        options = {
            "drafter": model,
            "target": model,
            "k": 192,
            "output": tmp_path / "out",
            "calibration": counts,
            "max_length": 64,
        }
        arguments = []
        for name, value in (options | changes).items():
            if value is not None:
                arguments += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
        try:
            code = export_main(arguments)
        except SystemExit as stop:  # argparse's way
            code = stop.code
        return code, capsys.readouterr().err

    return run


def assert_one_line(result, pattern):
    code, message = result
    lines = [line for line in message.splitlines() if not re.match(r"[\w ]+: \d+/\d+", line)]  # progress
    assert code == 2, message
    assert len(lines) == 1, message
    assert lines[0].startswith("error: ")
    assert re.search(pattern, lines[0]), message


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_missing_or_wrong_models(attempt, model, tmp_path):
    assert_one_line(attempt(drafter="./no/such/model"), "no model at ./no/such/model")
    (tmp_path / "empty").mkdir()
    assert_one_line(attempt(drafter=tmp_path / "empty"), "no config.json")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(model / "config.json", pickled)
    write(pickled / "pytorch_model.bin", "not opened")
    assert_one_line(attempt(drafter=pickled), "pytorch_model.bin is a pickle checkpoint.*save_pretrained")
    assert_one_line(attempt(drafter=pickled / "pytorch_model.bin"), "is a pickle checkpoint")
    unknown = shutil.copytree(model, tmp_path / "unknown")
    config = json.loads((model / "config.json").read_text())
    write(unknown / "config.json", json.dumps(config | {"model_type": "frobnicator", "architectures": ["F"]}))
    assert_one_line(attempt(drafter=unknown), "frobnicator")
    broken = shutil.copytree(model, tmp_path / "broken")
    write(broken / "model.safetensors", "no weights")
    assert_one_line(attempt(drafter=broken), "cannot load")
    assert_one_line(attempt(drafter=write(tmp_path / "notes.txt", "x")), "no .gguf")
    assert_one_line(attempt(drafter="~nobody-of-this-name/m/n"), "no model at ~nobody-of-this-name/m/n")
    url = "https://huggingface.co/Qwen/Qwen3-0.6B/tree/main"
    assert_one_line(attempt(drafter=url), "is a URL, which is not fetched: give its hub id, Qwen/Qwen3-0.6B, or")
    for spec in (None, 3):
        with pytest.raises(VocabtrimError, match=r"the drafter is .*: give a hub id"):
            export(spec, None, tmp_path / "out", ExportSettings(k=64))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_their_config(attempt, model, tmp_path):
    deeper = shutil.copytree(model, tmp_path / "deeper")
    config = json.loads((model / "config.json").read_text())
    write(deeper / "config.json", json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    assert_one_line(attempt(drafter=deeper), "do not fit")
    write(deeper / "config.json", json.dumps(config | {"vocab_size": 512}))
    assert_one_line(attempt(drafter=deeper), r"embed_tokens.weight has the shape \[448, 64\], .* asks for \[512, 64\]")
    write(deeper / "config.json", json.dumps(config | {"tie_word_embeddings": False}))
    assert_one_line(attempt(drafter=deeper), 'no usable lm_head.weight .* set "tie_word_embeddings" to true')


def test_weights_that_overflow(attempt, model, tmp_path):
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(model, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert_one_line(attempt(drafter=damaged), "computes NaN or infinite logits")
    tensors = load_file(model / "model.safetensors")
    for part in ("up_proj", "down_proj"):  # what float32 holds and float16 does not
        tensors[f"model.layers.0.mlp.{part}.weight"] *= 1000
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    wide = {"drafter": damaged, "target": None}
    assert_one_line(attempt(**wide, dtype="fp16"), "in fp16 it computes NaN or infinite logits.*use --dtype fp32")
    assert attempt(**wide)[0] == 0


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("generation_config.json", "{bad", "generation_config.json"),  # with its rules and its ends of a generation
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id names '</s>', which is no token id"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "cannot read the tokenizer of .*fetch"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "'hidden_size': .*x"),
    ],
)
def test_files_beside_the_weights_that_cannot_be_read(file, content, pattern, attempt, model, tmp_path):
    write(shutil.copytree(model, tmp_path / "damaged") / file, content)
    assert_one_line(attempt(drafter=tmp_path / "damaged"), pattern)


def test_tokenizers_that_do_not_belong(attempt, random_model, model, tmp_path):
    small = random_model("llama", vocab_size=192)
    assert_one_line(attempt(drafter=small), "does not match its weights")
    other = shutil.copytree(model, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    write(other / "tokenizer.json", json.dumps(data))
    assert_one_line(attempt(target=other), "different vocabularies")


@pytest.mark.parametrize(
    ("k", "pattern"),
    [("0", "must be positive"), ("-5", "must be positive"), ("many", "not understood"), ("coverage:2", "coverage")],
)
def test_impossible_k(attempt, k, pattern):
    assert_one_line(attempt(k=k), pattern)


def test_unusable_calibration(attempt, tmp_path):
    assert_one_line(attempt(calibration=tmp_path / "gone.txt"), "gone.txt")
    assert_one_line(attempt(calibration=write(tmp_path / "empty.txt", "")), "empty.txt")
    assert_one_line(attempt(calibration=write(tmp_path / "a.jsonl", '{"no": 1}\n')), "a.jsonl")
    (tmp_path / "nothing").mkdir()
    assert_one_line(attempt(calibration=tmp_path / "nothing"), "nothing")
    assert_one_line(attempt(calibration=write(tmp_path / "c.safetensors", "x")), "token counts")
    assert_one_line(attempt(calibration="https://a.b/c.jsonl"), "is a URL, which is not fetched: download it")
    with pytest.raises(VocabtrimError, match="give a list of paths"):
        CalibrationSettings(calibration="/data")


def test_wrong_options(attempt, tmp_path, monkeypatch):
    assert_one_line(attempt(max_length=100_000), "--max-length 100000")
    assert_one_line(attempt(max_length=1), "--max-length 1 is not in the 2 to")
    assert_one_line(attempt(calibration_tokens=0), "the number of calibration tokens must be positive, not 0")
    assert_one_line(attempt(temperature=-1), "the calibration temperature must be 0 or more")
    assert_one_line(attempt(draft_length=0), "--draft-length is for TensorRT: give --format trt")
    assert_one_line(attempt(quantize="fp8"), "no fp8 products on the CPU")
    assert_one_line(attempt(dtype="fp64"), "fp64")
    assert_one_line(attempt(quantise="int4"), "unrecognized arguments: --quantise int4; did you mean --quantize?")
    assert_one_line(attempt(k="-x"), "expected one argument; a value that begins with a dash is given as --k=-VALUE")
    assert_one_line(attempt(calibration_tok=5), "did you mean --calibration-tokens N?")  # no abbreviations
    assert_one_line(attempt(calibration=""), "--calibration: the path is empty")  # it would be the current directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_one_line(attempt(calibration="~/none.jsonl"), f"calibration data not found: {tmp_path}/none.jsonl")
    assert_one_line(attempt(k=None), "--k")
    assert_one_line(attempt(target=None, calibration=None, calibration_source="target"), "--target")


def test_an_output_that_holds_something(attempt, tmp_path):
    kept = write(tmp_path / "out" / "thesis.txt", "precious")
    assert_one_line(attempt(), "not empty.*--force")
    assert attempt(force=True)[0] == 0
    assert kept.read_text() == "precious"
    assert attempt(force=True)[0] == 0  # replaces its own bundles
    mine = write(tmp_path / "other" / "drafter" / "notes.txt", "precious")
    assert_one_line(attempt(output=tmp_path / "other", force=True), "not a bundle")
    assert mine.read_text() == "precious"
    file = write(tmp_path / "file", "x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    for output, pattern in [
        (file, "is a file"),
        (file / "sub", "file is a file"),
        (tmp_path / "link", "link to nothing"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "is no path"),
        (tmp_path / "out" / "target" / "inner", "is inside the bundle"),
        ("/proc/nothing", "/proc/nothing: No such file"),
    ]:
        assert_one_line(attempt(output=output), pattern)


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), signal.SIGTERM]
)
def test_a_fault_while_writing_loses_nothing(fault, attempt, tmp_path, monkeypatch):
    """The second bundle's manifest cannot be written: the pair that was there stays as it was."""
    assert attempt()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    real_write, manifests = Path.write_text, []

    def failing_write(self, *arguments, **options):
        if self.name == "vocabtrim.json":
            manifests.append(self)
            if len(manifests) == 2 and fault is signal.SIGTERM:
                signal.raise_signal(fault)
            elif len(manifests) == 2:
                raise fault
        return real_write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing_write)
    code, message = attempt(force=True, k=256)
    if not isinstance(fault, OSError):
        assert code == 130
        assert "interrupted" in message
    else:
        assert_one_line((code, message), "disk is full")
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before


def run_vocabtrim(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def test_wrong_bundles(bundles, tmp_path, capsys):
    def generate(target, drafter, *more):
        return run_vocabtrim(capsys, "generate", "--target", target, "--drafter", drafter, "--prompt", "hi", *more)

    assert_one_line(generate(tmp_path / "none", bundles.drafter), "no bundle")
    assert_one_line(generate(bundles.target.parent, bundles.drafter), "did you mean")
    (tmp_path / "config.json").touch()
    assert_one_line(generate(tmp_path / "config.json", bundles.drafter), "is a file, a bundle is a directory")
    assert_one_line(generate(tmp_path, bundles.drafter), "it is a model: export it")
    assert_one_line(generate(bundles.drafter, bundles.target), "holds a drafter")
    assert_one_line(generate(bundles.target, bundles.drafter, "--max-new-tokens", "0"), "max_new_tokens")
    assert_one_line(generate(bundles.target, bundles.drafter, "--device", "abacus"), "abacus")
    damaged = shutil.copytree(bundles.drafter, tmp_path / "damaged")
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "model.onnx.data").write_bytes(data)
    assert_one_line(generate(bundles.target, damaged), "model.onnx.data does not match")
    swapped = shutil.copytree(bundles.drafter, tmp_path / "swapped")
    (swapped / "vocab_map.safetensors").unlink()
    assert_one_line(generate(bundles.target, swapped), "lacks vocab_map.safetensors")


def test_a_chat_template_that_does_not_exist(attempt, bundles, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", '{"prompt": "the fox"}\n' * 9)
    message = "^error: no chat template is named other: choose one of default$"
    assert_one_line(attempt(calibration=prompts, chat_template="other"), message)
    for command in ("verify", "bench"):
        pair = ("--target", bundles.target, "--drafter", bundles.drafter)
        assert_one_line(
            run_vocabtrim(capsys, command, *pair, "--prompts", prompts, "--chat-template", "other"), message
        )


def test_a_k_that_covers_the_vocabulary_is_said_to_trim_nothing(attempt, tmp_path):
    code, message = attempt(k=10_000)
    assert code == 0
    assert "nothing is trimmed" in message
    assert "the drafter reads 100% of what its target reads" in message
    assert not (tmp_path / "out" / "drafter" / "vocab_map.safetensors").exists()


@pytest.mark.parametrize("bundle", [None, 3, b"bytes"])
def test_a_bundle_that_is_no_path_is_one_line(bundle):
    with pytest.raises(VocabtrimError, match="a bundle is a directory, given as text or as a path; got"):
        load_engine(bundle)


def test_heads_of_a_size_that_onnx_runtime_lacks_are_named(random_model, attempt):
    assert_one_line(attempt(drafter=random_model("qwen3", head_dim=20), target=None), "heads have 20 numbers")


def test_an_unknown_command_is_one_line(capsys):
    assert_one_line(run_vocabtrim(capsys, "exprot"), "exprot")
