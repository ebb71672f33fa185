"""Loads bundles on ONNX Runtime's CUDA, and makes the streams that they run on."""

import weakref

from engines.base import Engine
from engines.bundle.read import FEATURES_NAME, Bundle
from engines.cuda import runtime as cuda
from engines.ort_cuda.eagle import CudaEagleEngine, CudaFeatureEngine
from engines.ort_cuda.engine import OnnxRuntimeCudaEngine
from engines.ort_cuda.provider import open_cuda_session, require_provider


def load_cuda_engine(bundle: Bundle, neighbour: Engine | None, share_cache: bool) -> OnnxRuntimeCudaEngine:
    """Load a bundle on CUDA.

    Args:
        bundle: The bundle.
        neighbour: An engine whose stream is used, if it has one.
        share_cache: Use the neighbour's KV cache as well.

    Raises:
        VocabtrimError: ONNX Runtime has no CUDA, a library is missing, or the GPU has too little memory.
    """
    missing = require_provider()
    beside = neighbour if isinstance(neighbour, OnnxRuntimeCudaEngine) else None
    stream = beside.stream if beside else make_stream()
    session = open_cuda_session(bundle, stream, missing)
    shared = beside if share_cache else None
    if bundle.manifest.feature_layers:
        if bundle.manifest.kind != "language-model":
            fuses = FEATURES_NAME in bundle.manifest.files
            fuse = open_cuda_session(bundle, stream, missing, FEATURES_NAME) if fuses else None
            return CudaEagleEngine(bundle, session, fuse, stream)
        return CudaFeatureEngine(bundle, session, stream, shared)
    return OnnxRuntimeCudaEngine(bundle, session, stream, shared)


def make_stream() -> cuda.Stream:
    """Make a stream that is destroyed after its last user: engines share it and close in any order."""
    stream = cuda.Stream()
    # Not at exit: sessions that nobody closed are still there then.
    weakref.finalize(stream, cuda.runtime().cudaStreamDestroy, stream.address).atexit = False
    return stream
