"""`--format`: each form as its own consumer reads it."""

import importlib.metadata
import importlib.util
import json

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from engines import VocabtrimError, load_engine
from engines.bundle.vocab_map import VocabMap
from runtime import SpeculativeDecoder
from vocabtrim_export.bundles.output import FORMAT_MARK, check_output
from vocabtrim_export.cli.main import export_main
from vocabtrim_export.formats import FORMATS, check_formats
from vocabtrim_export.formats.masked import write_masked

PROMPT = [5, 17, 260, 33, 120, 7]
OF_MODELS = tuple(name for name, needs in FORMATS.items() if "language-model" in needs.drafters and not needs.packages)


@pytest.fixture(scope="module")
def pair(random_model, export_pair):
    """A random Llama as target and drafter, K = 192, in every form."""
    model = random_model("llama")
    return model, export_pair(model, formats=OF_MODELS)


@pytest.mark.parametrize("architecture", ["gemma2", "phi"])  # logits are capped after the head; the head has a bias
def test_hf_is_the_model_with_fewer_logits_and_drafts_for_it(
    architecture, random_model, export_pair, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = random_model(architecture)
    result = export_pair(path, formats=("hf",))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, drafter = load(path).eval(), load(result.drafter.parent / "hf", trust_remote_code=True).eval()
    kept = torch.from_numpy(result.selection.vocab_map.kept_token_ids.copy())
    assert drafter.get_output_embeddings().weight.shape[0] == len(kept) == 192
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        full, cut = model(ids).logits, drafter(ids).logits
        torch.testing.assert_close(cut[..., kept], full[..., kept])
        assert torch.isinf(cut).sum() == cut.numel() - cut.shape[1] * len(kept)
        options = {"do_sample": False, "max_new_tokens": 24}
        plain = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, assistant_model=drafter, **options), plain)


def test_the_graph_for_genai_has_a_full_row_for_every_token_and_no_logit_for_what_was_cut(pair):
    _, result = pair
    with load_engine(result.drafter) as engine:
        wanted = engine.feed(PROMPT, keep=len(PROMPT)).logits
    session = onnxruntime.InferenceSession(result.drafter.parent / "genai" / "drafter" / "model.onnx")
    empty = np.zeros((1, 2, len(PROMPT), 16), np.float32)
    feed = {value.name: empty for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    feed |= {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    full = session.run(["logits"], feed)[0][0]
    kept = result.selection.vocab_map.kept_token_ids
    assert full.shape == (len(PROMPT), 448)
    np.testing.assert_allclose(full[:, kept], wanted, rtol=1e-5, atol=1e-5)
    assert np.isneginf(np.delete(full, kept, axis=1)).all()


def test_genai_drafts_with_it_and_writes_what_we_write(pair):
    check_genai(pair[1])


@pytest.mark.parametrize(("k", "dtype"), [(448, "fp32"), (192, "fp16")])
def test_genai_takes_a_drafter_of_fewer_tokens_than_the_target(k, dtype, random_model, export_pair):
    """The head is narrower than the target's 512 rows even where nothing is trimmed (448 of 448)."""
    drafter, target = random_model("llama"), random_model("llama", vocab_size=512)
    check_genai(export_pair(drafter, target, k=k, dtype=dtype, formats=("genai",)), accepted=0)


def check_genai(result, accepted=1):
    """GenAI's greedy text is ours, with at least so many drafted tokens in it."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(result.drafter.parent / "genai"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    with SpeculativeDecoder.load(result.target, result.drafter, draft_length=4) as decoder:
        ours = decoder.generate(PROMPT, max_new_tokens=24).token_ids
    theirs = generator.get_sequence(0)[len(PROMPT) :]
    assert theirs.tolist() == list(ours)[: len(theirs)]
    stats = generator.get_speculative_stats()
    assert len(theirs) > 4
    assert stats["draft_tokens_proposed"] > 0
    assert stats["draft_tokens_accepted"] >= accepted


def test_genai_refuses_narrow_logits(pair):
    """The reason for scattering them; should it ever pass, the scatter can go."""
    genai = pytest.importorskip("onnxruntime_genai")
    _, result = pair
    place = result.drafter.parent / "genai" / "drafter"
    for file in place.iterdir():
        file.unlink()
    write_masked(result.drafter, place, 448, 192)
    with pytest.raises(RuntimeError, match="must share the same vocabulary"):
        genai.Model(str(place.parent))


def test_sglang_reads_absolute_ids(pair):
    _, result = pair
    ids = torch.load(result.drafter.parent / "sglang-token-map" / "hot_token_ids.pt", weights_only=True)
    assert torch.tensor(ids, dtype=torch.int64).tolist() == result.selection.vocab_map.kept_token_ids.tolist()


def test_triton_keeps_the_cache_and_forgets_by_a_length(pair):
    """The server's part played by hand: state outputs become state inputs, the first are zeros as the config says."""
    _, result = pair
    repository = result.drafter.parent / "triton"
    config = _triton_config(repository / "drafter" / "config.pbtxt")
    session = onnxruntime.InferenceSession(repository / "drafter" / "1" / config.default_model_filename)
    state = {x.input_name: np.zeros(list(x.initial_state[0].dims), np.float32) for x in config.sequence_batching.state}
    after = {x.output_name: x.input_name for x in config.sequence_batching.state}
    assert {x.name for x in config.input} | set(state) == {x.name for x in session.get_inputs()}
    assert {x.name for x in config.output} | set(after) == {x.name for x in session.get_outputs()}

    def infer(ids, total):
        nonlocal state
        feed = {
            "input_ids": np.array([ids]),
            "num_logits_to_keep": np.array([1]),
            "seqlens_k": np.array([total - 1], np.int32),
            "total_sequence_length": np.array([total], np.int32),
        }
        names = ["token_ids", *after]
        token, *present = session.run(names, feed | state)
        state = dict(zip(after.values(), present, strict=True))
        return token[0, 0]

    with load_engine(result.drafter) as engine:
        assert infer(PROMPT, 6) == engine.feed(PROMPT).token_ids[-1]
        wrong = infer([9], 7)
        engine.rewind(6)
        right = engine.feed([11]).token_ids[-1]
        assert infer([11], 7) == right != wrong


def test_a_format_that_fails_changes_nothing_and_one_that_is_there_may_be_replaced(pair, count_file, tmp_path, capsys):
    model, _ = pair
    output = tmp_path / "out"
    arguments = ["--drafter", str(model), "--calibration", str(count_file(model)), "--output", str(output)]
    assert export_main([*arguments, "--k", "192", "--format", "sglang-token-map", "sglang-token-map"]) == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert export_main([*arguments, "--k", "448", "--format", "hf", "sglang-token-map", "--force"]) == 2
    assert "there is no map" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    check_output(output, ["drafter", "sglang-token-map"], force=True)
    (output / "sglang-token-map" / FORMAT_MARK).unlink()
    with pytest.raises(VocabtrimError, match="move it away first"):
        check_output(output, ["drafter", "sglang-token-map"], force=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "genai"], "give --target"),
        (["--format", "genai", "--target", "nowhere", "--dtype", "bf16"], "give --dtype fp32 or fp16"),
        (["--format", "onnx", "trt"], "make the same bundles"),
        (["--format", "trt", "triton", "--trt-flavor", "none"], "made of the graphs of --format onnx"),
        (["--format", "eagle3"], "is for drafters of the kind eagle3, and this one is of language-model"),
    ],
)
def test_formats_that_cannot_be_are_refused_in_one_line(arguments, message, pair, tmp_path, capsys):
    model, _ = pair
    code = export_main(["--drafter", str(model), "--k", "192", "--output", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err.strip()
    assert (code, error.count("\n")) == (2, 0)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_format_whose_packages_are_absent_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(VocabtrimError, match=r"needs openvino: pip install 'vocabtrim-export\[openvino\]'"):
        check_formats(["openvino"], has_target=True, is_tensorrt=False, drafter="language-model", dtype="fp16")


def _triton_config(path):
    """Parsed by Triton's own schema. The client's package imports gRPC, which the schema does not need."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    try:
        files = importlib.metadata.files("tritonclient")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs tritonclient")
    (schema,) = [file.locate() for file in files if str(file).endswith("grpc/model_config_pb2.py")]
    spec = importlib.util.spec_from_file_location("model_config_pb2", schema)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(), module.ModelConfig())


def test_the_map_that_a_mark_names_is_the_bundles(pair):
    _, result = pair
    digest = VocabMap.load(result.drafter / "vocab_map.safetensors").digest
    marks = [json.loads((result.drafter.parent / name / FORMAT_MARK).read_text()) for name in OF_MODELS]
    assert [(mark["format"], mark["vocab_map"]) for mark in marks] == [(name, digest) for name in OF_MODELS]
