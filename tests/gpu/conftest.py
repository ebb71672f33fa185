"""A GPU, and bundles built for it. Where there is none, every test here skips and says what it needs."""

import pytest

from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.trt.library import load_library
from vocabtrim_export.trt.settings import TensorRTSettings

NEEDS = "needs an NVIDIA GPU and TensorRT or TensorRT-RTX"
# Head sizes and group that the libraries have attention kernels for; two layers, so that a cache can be mixed up.
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="session")
def gpu() -> cuda.Gpu:
    try:
        device = cuda.current_gpu()
        library = load_library("auto")
    except VocabtrimError as error:
        pytest.skip(f"{NEEDS}: {error}")
    known = "SM" + device.compute_capability.replace(".", "")
    if library.flavor == "rtx" and known not in library.api.ComputeCapability.__members__:
        pytest.skip(f"{NEEDS}: TensorRT-RTX, which is installed, does not run on a {device.name}, TensorRT may")
    return device


@pytest.fixture(scope="session")
def build(gpu, random_model, export_pair):
    """build(**changes of the model) → ExportResult: both bundles, with plans for this GPU."""

    def run(dtype="fp16", strip_weights=False, spans=(), **changes):
        settings = TensorRTSettings(
            compute_capabilities=(gpu.compute_capability,),
            prefill_chunk=16,
            spans=spans,
            unroll=True,
            strip_weights=strip_weights,
        )
        return export_pair(random_model("llama", **(LLAMA | changes)), trt=settings, dtype=dtype)

    return run


@pytest.fixture(scope="session")
def pair(build):
    return build()
