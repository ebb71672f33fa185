"""`--format trt` with the real parser and builder of TensorRT-RTX, which needs no GPU."""

import importlib.util

import pytest

from engines import read_bundle
from vocabtrim_export.trt.network import NETWORK_NAME, Network
from vocabtrim_export.trt.settings import TensorRTSettings

from .conftest import ARCHITECTURES

if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("needs TensorRT-RTX: pip install '.[trt-rtx]'", allow_module_level=True)
RTX = TensorRTSettings(flavor="rtx", compute_capabilities=("8.9",), draft_length=3, prefill_chunk=16, unroll=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_builds(architecture, random_model, export_pair):
    result = export_pair(random_model(architecture), trt=RTX)
    for path in (result.target, result.drafter):
        bundle = read_bundle(path)
        assert bundle.manifest.tensorrt.compute_capabilities == ("8.9",)
        network = Network.from_json((path / NETWORK_NAME).read_text(), "it")
        assert network.counts()["KV_CACHE_UPDATE"] == 4
