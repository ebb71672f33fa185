"""Promises about graphs: what is placed computes what the model does."""

from tests.mutations.mutation import Mutation

TESTS, PROVEN = "tests/integration/test_proof.py", "vocabtrim_export/proof/proven.py"

PROOF = (
    Mutation(
        "A plan that computes something else than its graph is refused at its first load",
        "the limit of a plan is a thousand times the logits' spread",
        "engines/trt/plan_proof.py",
        '"fp16": 0.1',
        '"fp16": 1e3',
        "tests/integration/test_tensorrt_export.py -k something_else",
    ),
    Mutation(
        "A graph that is not its model is never placed",
        "a difference is not refused",
        PROVEN,
        "    if difference:\n",
        "    if False:\n",
        f"{TESTS} -k places_nothing",
    ),
    Mutation(
        "A model whose norm follows its rotation is exported as it is",
        "the rotation stays in attention after a difference",
        PROVEN,
        "fuse_rotation=False)",
        "fuse_rotation=True)",
        f"{TESTS} -k norm_behind",
    ),
    Mutation(
        "Each wrong graph is caught by the export itself",
        "the limit is a thousand times the logits' spread",
        "engines/deviation.py",
        '"fp32": 1e-3',
        '"fp32": 1e3',
        f"{TESTS} -k noticed",
    ),
    Mutation(
        "A quantised weight of another layer is caught by the export itself",
        "a written weight may be anything",
        "vocabtrim_export/proof/dequantized.py",
        '_MOST_ERROR = {"int4": 0.6, "int8": 0.1',
        '_MOST_ERROR = {"int4": 1e9, "int8": 1e9',
        f"{TESTS} -k quantized_graph",
    ),
    Mutation(
        "A sliding window is proven however long it is",
        "a long window is not narrowed",
        "vocabtrim_export/proof/tokens.py",
        "_REACHED = 64",
        "_REACHED = 1 << 20",
        f"{TESTS} -k long_window",
    ),
    Mutation(
        "A head that the checkpoint stores is the head",
        "config.json says whether it is tied",
        "vocabtrim_export/tracing/trace.py",
        "each.tie_word_embeddings = is_tied",
        "pass",
        f"{TESTS} -k stored_head",
    ),
    Mutation(
        "An ONNX drafter gives the kept columns of what it gave",
        "the trimmed model is not compared",
        "vocabtrim_export/onnx_input/prove.py",
        "    if not off <=",
        "    if False and not off <=",
        "tests/vocabtrim_export/test_onnx_input.py -k computes_something_else",
    ),
)
