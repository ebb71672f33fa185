"""Every ONNX file that an export writes opens in onnx, its checker, Polygraphy and ONNX Runtime."""

import pytest

from tests.graphs import assert_opens
from vocabtrim_export.trt.settings import TensorRTSettings

from . import eagle_heads, layer_heads, test_medusa
from .test_formats import OF_MODELS
from .test_layer_heads import deepseek_like  # noqa: F401

MODEL, DRAFT, FEATURES = "model.onnx", "draft.onnx", "features.onnx"
UNROLLED = TensorRTSettings(flavor="none", draft_length=2, prefill_chunk=16, unroll=True)
# How a random Llama drafts for itself → the names of the files of the export.
LLAMAS = {
    "formats": ({"formats": OF_MODELS}, [MODEL] * 6),  # the bundles, genai's and triton's
    "unrolled": ({"trt": UNROLLED, "dtype": "fp32"}, [DRAFT, MODEL, MODEL]),
    "unrolled int4": ({"trt": UNROLLED, "dtype": "fp32", "quantize": "int4"}, [DRAFT, MODEL, MODEL]),
    "slots int4": ({"k": 128, "quantize_drafter": "int4", "slots": 16}, [MODEL, MODEL]),
    "int8": ({"quantize": "int8", "formats": ("genai", "triton")}, [MODEL] * 6),
    "fp16": ({"dtype": "fp16", "formats": ("genai", "triton")}, [MODEL] * 6),
}


def check(result, names):
    paths = sorted(result.drafter.parent.rglob("*.onnx"))
    assert sorted(path.name for path in paths) == names
    for path in paths:
        assert_opens(path)


@pytest.mark.parametrize("kind", LLAMAS)
def test_graphs_of_models(kind, random_model, export_pair):
    changes, names = LLAMAS[kind]
    check(export_pair(random_model("llama"), **changes), names)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_graphs_of_mixtures(quantize, random_model, export_pair):
    check(export_pair(random_model("qwen2_moe"), quantize=quantize), [MODEL, MODEL])


def test_graphs_of_heads(random_model, export_pair, write_head, deepseek_like):  # noqa: F811
    medusa = write_head(test_medusa.make_tensors("medusa_head."), test_medusa.CONFIG)
    eagle = write_head(layer_heads.safeailab(layer_heads.make_tensors()), layer_heads.CONFIG)
    eagle3 = write_head(eagle_heads.make_tensors(), eagle_aux_hidden_state_layer_ids=list(eagle_heads.LAYERS))
    check(export_pair(medusa, random_model("llama")), [MODEL, MODEL])
    check(export_pair(eagle, random_model("llama", num_hidden_layers=3)), [MODEL, MODEL])
    check(export_pair("mtp", deepseek_like[0]), [MODEL, MODEL])
    check(export_pair(eagle3, random_model("llama", num_hidden_layers=6), k=100000), [FEATURES, MODEL, MODEL])
