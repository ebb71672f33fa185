"""Loads bundles on ONNX Runtime's CUDA, and makes the streams that they run on."""

import weakref
from pathlib import Path

from engines.base import Neighbour
from engines.bundle.read import FEATURES_NAME, Bundle
from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.ort.load import cache_owner
from engines.ort_cuda.eagle import CudaEagleEngine, CudaFeatureEngine
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.gpu import Gpu
from engines.ort_cuda.provider import open_cuda_session, require_provider
from engines.refusals import refuse_profile


def load(bundle: Bundle, neighbour: Neighbour, profile: Path | None) -> OnnxRuntimeCudaEngine:
    """Load a bundle of `--format onnx` on CUDA; see `engines.load.load_engine`.

    Args:
        bundle: The bundle.
        neighbour: Gives an engine whose stream is used, if it has one, and whose KV cache, if that can serve both.
        profile: None: operators are not profiled on CUDA.

    Raises:
        VocabtrimError: The bundle cannot run on CUDA, ONNX Runtime has no CUDA, a library is missing, or the GPU has
            too little memory.
    """
    _check(bundle, profile)
    missing = require_provider()
    beside = neighbour()
    other = beside if isinstance(beside, OnnxRuntimeCudaEngine) else None
    gpu = other.gpu if other else Gpu(make_stream())
    session = open_cuda_session(bundle, gpu.stream, missing)
    if bundle.manifest.interface == "feature-head":
        fuses = FEATURES_NAME in bundle.manifest.files
        fuse = open_cuda_session(bundle, gpu.stream, missing, FEATURES_NAME) if fuses else None
        return CudaEagleEngine(bundle, session, fuse, gpu)
    shared = other if cache_owner(bundle, other, "cuda") else None
    engine = CudaFeatureEngine if bundle.manifest.feature_layers else OnnxRuntimeCudaEngine
    return engine(bundle, session, gpu, shared)


def _check(bundle: Bundle, profile: Path | None) -> None:
    refuse_profile(profile)
    if bundle.manifest.interface == "parallel-heads":
        raise VocabtrimError(f"{bundle.path} holds Medusa heads, which run on the CPU only so far: use device 'cpu'")


def make_stream() -> cuda.CudaStream:
    """Make a stream that is destroyed after its last user: engines share it and close in any order."""
    stream = cuda.CudaStream()
    # Not at exit: sessions that nobody closed are still there then.
    weakref.finalize(stream, cuda.runtime().cudaStreamDestroy, stream.address).atexit = False
    return stream
