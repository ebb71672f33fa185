"""A head cut within a graph gives what the whole one gives at the kept columns, bit for bit, however it is stored."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from engines.bundle.vocab_map import VocabMap
from engines.errors import VocabtrimError
from engines.ort.session import new_session, open_session
from vocabtrim_export.cli.main import main
from vocabtrim_export.onnx_input import trim
from vocabtrim_export.onnx_input.cut import cut_head
from vocabtrim_export.onnx_input.head import find_head

VOCAB, HIDDEN = 96, 64
KEPT = VocabMap.from_ids([0, 3, 4, 17, 31, 32, 60, 95], VOCAB)
RNG = np.random.default_rng(0)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def build(nodes, constants, outputs=("logits",), opset=21):
    """input_ids → embedding → `nodes`, which read "hidden" and give "logits"."""
    embedding = {"embedding": weights(VOCAB, HIDDEN)} | constants
    gather = helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"])
    shape = ["batch", "sequence", VOCAB]
    graph = helper.make_graph(
        [gather, *nodes],
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [
            value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
            for name, value in embedding.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node(op, inputs, output="logits", domain="", **attributes):
    return helper.make_node(op, inputs, [output], domain=domain, **attributes)


def blocks(flat, bias=False, zeros=True):
    lines = HIDDEN // 32
    constants = {
        "b": RNG.integers(0, 256, (VOCAB, lines, 16), np.uint8),
        "s": weights(VOCAB, lines),
        "z": RNG.integers(0, 256, (VOCAB, 1), np.uint8),
        "c": weights(VOCAB),
    }
    if flat:
        constants |= {"s": constants["s"].ravel(), "z": constants["z"].ravel()}
    inputs = ["hidden", "b", "s", "z" if zeros else "", "", "c" if bias else ""]
    options = {"K": HIDDEN, "N": VOCAB, "bits": 4, "block_size": 32}
    return build([node("MatMulNBits", inputs, domain="com.microsoft", **options)], constants)


def dequantised(shape, scales, zeros, transposed=False, **attributes):
    constants = {"q": RNG.integers(-128, 127, shape, np.int8), "s": np.abs(weights(*scales))}
    constants["z"] = RNG.integers(-9, 9, zeros, np.int8)
    nodes = [node("DequantizeLinear", ["q", "s", "z"], "w", **attributes)]
    if transposed:
        nodes.append(node("Transpose", ["w"], "wt", perm=[1, 0]))
    return build([*nodes, node("MatMul", ["hidden", "wt" if transposed else "w"])], constants)


def integers():
    """Build a dynamically quantised head: scales for each column, rounded activations."""
    constants = {"q": RNG.integers(-128, 127, (HIDDEN, VOCAB), np.int8), "z": np.zeros(VOCAB, np.int8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["hidden"], ["x", "xs", "xz"]),
        node("MatMulInteger", ["x", "q", "xz", "z"], "sums"),
        node("Cast", ["sums"], "whole", to=TensorProto.FLOAT),
        node("Mul", ["xs", "s"], "scale"),
        node("Mul", ["whole", "scale"]),
    ]
    return build(nodes, constants | {"s": np.abs(weights(VOCAB))})


def capped():
    nodes = [
        node("MatMul", ["hidden", "w"], "a"),
        node("Add", ["a", "bias"], "b"),
        node("Div", ["b", "cap"], "c"),
        node("Tanh", ["c"], "d"),
        node("Mul", ["d", "cap"]),
    ]
    return build(nodes, {"w": weights(HIDDEN, VOCAB), "bias": weights(VOCAB), "cap": np.array(10, np.float32)})


def gemm():
    """Gemm takes matrices only."""
    nodes = [
        node("Reshape", ["hidden", "flat"], "rows"),
        node("Gemm", ["rows", "w", "bias"], "columns", transB=1),
        node("Identity", ["columns"]),
    ]
    constants = {"w": weights(VOCAB, HIDDEN), "bias": weights(VOCAB), "flat": np.array([-1, HIDDEN])}
    model = build(nodes, constants)
    del model.graph.output[0].type.tensor_type.shape.dim[0]
    return model


HEADS = {
    "MatMul": lambda: build([node("MatMul", ["hidden", "w"])], {"w": weights(HIDDEN, VOCAB)}),
    "tied": lambda: build([node("Transpose", ["embedding"], "w", perm=[1, 0]), node("MatMul", ["hidden", "w"])], {}),
    "bias and cap": capped,
    "Gemm": gemm,
    "blocks": lambda: blocks(flat=False),
    "flat blocks, bias": lambda: blocks(flat=True, bias=True),
    "symmetric blocks": lambda: blocks(flat=True, zeros=False),
    "one scale": lambda: dequantised((HIDDEN, VOCAB), (), ()),
    "a scale a column": lambda: dequantised((HIDDEN, VOCAB), (VOCAB,), (VOCAB,), axis=1),
    "a scale a row of the input": lambda: dequantised((HIDDEN, VOCAB), (HIDDEN,), (HIDDEN,), axis=0),
    "transposed": lambda: dequantised((VOCAB, HIDDEN), (VOCAB,), (VOCAB,), transposed=True, axis=0),
    "blocks within a row": lambda: dequantised(
        (VOCAB, HIDDEN), (VOCAB, 2), (VOCAB, 2), transposed=True, axis=1, block_size=32
    ),
    "MatMulInteger": integers,
}


def run(model, names, ids):
    session = new_session(model.SerializeToString())
    return session.run(names, {"input_ids": ids})


@pytest.mark.parametrize("name", HEADS)
def test_the_cut_head_gives_the_kept_columns(name):
    whole = HEADS[name]()
    model = ir.from_proto(whole)
    cut_head(model, find_head(model), KEPT)
    RemoveUnusedNodesPass()(model)
    cut = ir.to_proto(model)
    onnx.checker.check_model(cut, full_check=name not in ("blocks", "flat blocks, bias", "symmetric blocks"))
    ids = RNG.integers(0, VOCAB, (1, 7))
    (wanted,) = run(whole, ["logits"], ids)
    logits, token_ids = run(cut, ["logits", "token_ids"], ids)
    np.testing.assert_array_equal(logits, wanted[..., KEPT.kept_token_ids])
    np.testing.assert_array_equal(token_ids, KEPT.kept_token_ids[logits.argmax(-1)])
    assert cut.graph.output[0].type.tensor_type.shape.dim[-1].dim_value == len(KEPT)
    stored = {tensor.name: tuple(tensor.dims) for tensor in cut.graph.initializer}
    assert not {"w", "q", "b"} & set(stored), "the whole head is still there"
    assert stored["embedding"] == (VOCAB, HIDDEN)


def test_a_head_that_is_none_is_said():
    refusals = {
        "looked for an output named logits, found scores": build(
            [node("MatMul", ["hidden", "w"], "scores")], {"w": weights(HIDDEN, VOCAB)}, outputs=("scores",)
        ),
        "found 0 (Softmax)": build([node("Softmax", ["hidden"])], {}),
        "multiplies with no constant matrix": build(
            [node("Transpose", ["hidden"], "t", perm=[0, 2, 1]), node("MatMul", ["hidden", "t"])], {}
        ),
        "found 2 (MatMul)": build(
            [node("MatMul", ["hidden", "w"], "a"), node("MatMul", ["hidden", "w"], "b"), node("Add", ["a", "b"])],
            {"w": weights(HIDDEN, VOCAB)},
        ),
        "blocks of several rows": dequantised((HIDDEN, VOCAB), (HIDDEN, 3), (HIDDEN, 3), axis=1, block_size=32),
    }
    for message, proto in refusals.items():
        model = ir.from_proto(proto)
        with pytest.raises(VocabtrimError) as caught:
            cut_head(model, find_head(model), KEPT)
        assert message in str(caught.value)
    model = ir.from_proto(HEADS["MatMul"]())
    cut_head(model, find_head(model), KEPT)
    with pytest.raises(VocabtrimError, match="token_ids already"):
        cut_head(model, find_head(model), VocabMap.from_ids([1, 2], len(KEPT)))


@pytest.fixture
def directory(random_model, tmp_path):
    """A decoder in ONNX as others leave it: with its tokenizer, and GenAI's word on how a text ends."""
    source = random_model("llama")
    place = tmp_path / "onnx"
    place.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, place / name)
    (place / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [1, 447]}}))
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    head = helper.make_node("MatMul", ["hidden", "w"], ["logits"])
    gather = helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"])
    constants = {"embedding": weights(rows, HIDDEN), "w": weights(HIDDEN, rows)}
    graph = helper.make_graph(
        [gather, head],
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", rows])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, place / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return place


def test_the_command_trims_a_directory(directory, count_file, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["export", "--drafter", str(directory), "--k", "192", "--calibration", str(count_file(directory))]
    assert main([*given, "--output", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["k"], said["product"], said["full_head_bytes"] // 4 % HIDDEN) == (192, "MatMul", 0)
    kept = VocabMap.load(out / "drafter" / "vocab_map.safetensors")
    assert {1, 447} <= set(kept.kept_token_ids.tolist())
    ids = np.arange(9)[None]
    (wanted,) = open_session(directory / "model.onnx").run(["logits"], {"input_ids": ids})
    (found,) = open_session(out / "drafter" / "model.onnx").run(["token_ids"], {"input_ids": ids})
    np.testing.assert_array_equal(found, kept.kept_token_ids[wanted[..., kept.kept_token_ids].argmax(-1)])
    assert (out / "drafter" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_a_cut_that_computes_something_else_is_refused(directory, count_file, tmp_path, capsys, monkeypatch):
    """The columns of the first K tokens under the table of others."""
    cut = trim.cut_head
    monkeypatch.setattr(
        trim, "cut_head", lambda model, head, kept: cut(model, head, VocabMap(np.arange(len(kept)), kept.full_vocab))
    )
    given = ["export", "--drafter", str(directory), "--k", "192", "--calibration", str(count_file(directory))]
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    assert "its logits are not those of the kept tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "drafter").exists()


def test_a_model_that_this_cpu_cannot_run_is_trimmed_with_a_note(directory, count_file, tmp_path, capsys):
    graph = onnx.load(directory / "model.onnx", load_external_data=False)
    node = graph.graph.node[0]
    node.op_type, node.domain = "Elsewhere", "of.another.runtime"
    graph.opset_import.append(helper.make_opsetid("of.another.runtime", 1))
    onnx.save(graph, directory / "model.onnx")
    given = ["export", "--drafter", str(directory), "--k", "192", "--calibration", str(count_file(directory))]
    assert main([*given, "--output", str(tmp_path / "out")]) == 0
    assert "was not run against the whole one" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "code"), [("added_tokens", 0), ("vocab", 2)])
def test_an_added_token_alone_may_lack_a_column(kind, code, directory, tmp_path, capsys):
    """The image token of Gemma 3's text models has none."""
    path = directory / "tokenizer.json"
    said = json.loads(path.read_text())
    if kind == "vocab":
        said["model"]["vocab"]["image"] = 448
    else:
        said["added_tokens"].append(said["added_tokens"][-1] | {"id": 448, "content": "<image>"})
    path.write_text(json.dumps(said))
    text = tmp_path / "text.txt"
    text.write_text("a <image> b\n" * 20)
    given = ["--calibration", str(text), "--calibration-source", "text", "--output", str(tmp_path / "out")]
    assert main(["export", "--drafter", str(directory), "--k", "192", *given]) == code
    assert ("has ids up to 448 and its head 448 columns" in capsys.readouterr().err) == (code == 2)


def test_mistakes_are_one_line(directory, count_file, tmp_path, capsys):
    given = ["export", "--drafter", str(directory), "--k", "192", "--output", str(tmp_path / "out")]
    for options, message in [
        (["--target", "x"], "--target does not apply to a drafter that is an ONNX model"),
        (["--quantize", "int4"], "--quantize does not apply to a drafter that is an ONNX model"),
        (["--format", "trt"], "--format does not apply to a drafter that is an ONNX model"),
        (["--calibration", str(count_file(directory)), "--k", "few"], "K = 'few' is not understood"),
        (["--calibration-source", "drafter"], "an ONNX model is not run to calibrate"),
    ]:
        assert main([*given, *options]) == 2
        assert message in capsys.readouterr().err
    counts = str(count_file(directory))
    tokenizer = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_text("{}")
    assert main([*given, "--calibration", counts]) == 2
    assert "cannot read the tokenizer of" in capsys.readouterr().err
    (directory / "tokenizer.json").write_bytes(tokenizer)
    proto = onnx.load(directory / "model.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../secret"
    (directory / "model.onnx").write_bytes(proto.SerializeToString())
    assert main([*given, "--calibration", counts]) == 2
    assert "../secret" in capsys.readouterr().err
    assert not (tmp_path / "out" / "drafter").exists()
