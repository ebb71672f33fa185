"""A tied embedding is stored once, and that of a quantised graph in blocks, which the proof reads as well."""

import onnx
import pytest

from engines.bundle.read import MODEL_NAME
from vocabtrim_export.bundles.writer import BundlePlan, write_bundle
from vocabtrim_export.proof.prove import find_difference
from vocabtrim_export.proof.proven import trace_source
from vocabtrim_export.sources.source import DTYPES, load_source

ROWS, HIDDEN = 448, 64  # of the random models
BYTES = {"none": ROWS * HIDDEN * 4, "int8": ROWS * (HIDDEN + 4 + 1)}  # one block a row
BYTES["int4"] = BYTES["int8"] + ROWS * (HIDDEN // 2 + 2 * 4 + 1)  # the head has two blocks of its own


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_tied_embedding_is_stored_once_and_proven(quantization, random_model, tmp_path):
    source = load_source(str(random_model("llama")), DTYPES["fp32"])
    plan = BundlePlan("target", source, "fp32", quantization, context_length=128)
    write_bundle(tmp_path, trace_source(plan), plan, lambda *_: None)
    assert find_difference(tmp_path, plan) is None
    model = onnx.load(tmp_path / MODEL_NAME, load_external_data=False)
    stored = {}
    for tensor in model.graph.initializer:
        if ROWS in tensor.dims:
            entries = {entry.key: entry for entry in tensor.external_data}
            stored[entries["offset"].value] = int(entries["length"].value)
            if tensor.name.endswith(".rows.quantized"):  # each token gets the next one's row
                entries["offset"].value = str(int(entries["offset"].value) + HIDDEN)
    assert sum(stored.values()) == BYTES[quantization]
    if quantization != "none":
        onnx.save(model, tmp_path / MODEL_NAME)
        assert find_difference(tmp_path, plan) is not None
