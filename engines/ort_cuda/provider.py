"""ONNX Runtime's CUDA provider: opening sessions on it, and one-line errors where it is missing or out of memory."""

import ctypes
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import onnxruntime as ort

from engines.bundle.read import MODEL_NAME, WEIGHTS_NAME, Bundle
from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.ort.session import new_session, reason

PROVIDER = "CUDAExecutionProvider"
_OUT_OF_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|Failed to allocate memory|bad allocation|ALLOC_FAILED")
_NO_CAPTURE = "graph capture feature"  # in the error of a session that has nodes elsewhere than on CUDA


def require_provider() -> tuple[str, ...]:
    """Load CUDA's libraries.

    Returns:
        The names of the libraries that do not load.

    Raises:
        VocabtrimError: ONNX Runtime has no CUDA provider here.
    """
    missing = preload_libraries()
    if PROVIDER not in ort.get_available_providers():
        raise VocabtrimError(why_no_provider(missing))
    return missing


def open_cuda_session(
    bundle: Bundle, stream: cuda.CudaStream, missing: tuple[str, ...] = (), name: str = MODEL_NAME
) -> ort.InferenceSession:
    """Open a session on `stream`, for CUDA graphs if every node of the model can be in one.

    Args:
        bundle: The bundle.
        stream: The session's stream.
        missing: The libraries that `require_provider` could not load, for the message.
        name: The bundle's file to open.

    Raises:
        VocabtrimError: The model cannot run on CUDA here.
    """
    path = bundle.path / name
    try:
        try:
            session = _open(path, stream, cuda_graphs=True)
        except Exception as error:
            if _NO_CAPTURE not in str(error):
                raise
            if bundle.manifest.dtype == "fp32":  # attention on the host, a copy of the cache for every layer
                raise VocabtrimError(
                    f"{bundle.path} is an fp32 bundle, for which ONNX Runtime has no attention on CUDA: "
                    "export it with --dtype fp16 or bf16"
                ) from error
            session = _open(path, stream, cuda_graphs=False)
    except VocabtrimError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base
        explain_out_of_memory(error, bundle)
        raise VocabtrimError(f"ONNX Runtime cannot open {path} on CUDA: {reason(error)}") from error
    if PROVIDER not in session.get_providers():  # ONNX Runtime falls back to the CPU without an error
        raise VocabtrimError(why_no_provider(missing))
    return session


def open_cuda_graph(model: bytes, stream: cuda.CudaStream) -> ort.InferenceSession:
    """Open a small model on `stream`; all of its nodes can be in a CUDA graph."""
    return _open(model, stream, cuda_graphs=True)


def can_be_captured(session: ort.InferenceSession) -> bool:
    """Returns whether runs of `session` can be captured in a CUDA graph."""
    options: dict[str, str] = session.get_provider_options().get(PROVIDER, {})
    return options.get("enable_cuda_graph") == "1"


def _open(model: Path | bytes, stream: cuda.CudaStream, cuda_graphs: bool) -> ort.InferenceSession:
    options = {
        "device_id": "0",
        "user_compute_stream": str(stream.address),
        "enable_cuda_graph": str(int(cuda_graphs)),
        "arena_extend_strategy": "kSameAsRequested",  # else the weights take up to the next power of two
    }
    providers = [(PROVIDER, options), "CPUExecutionProvider"]
    return new_session(model, providers)


def preload_libraries() -> tuple[str, ...]:
    """Load CUDA's and cuDNN's libraries from NVIDIA's wheels or the system.

    Returns:
        The names of those that do not load.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        ort.preload_dlls()
    # Each library is tried in two places, so one that loads from neither is named twice.
    return tuple(dict.fromkeys(re.findall(r"Failed to load (?:\S*/)?([^\s/:]+):", printed.getvalue())))


def why_no_provider(missing: tuple[str, ...] = ()) -> str:
    """Returns why there is no CUDAExecutionProvider, and what to do about it.

    Args:
        missing: The names of the libraries that do not load.
    """
    home = Path(ort.__file__).parent / "capi"
    libraries = list(home.glob("*onnxruntime_providers_cuda.*"))
    if not libraries:
        return (
            f"the installed onnxruntime {ort.__version__} is the CPU wheel, which has no CUDA: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    problem = f"missing: {', '.join(missing)}" if missing else "no reason known"
    try:
        for library in (*home.glob("*onnxruntime_providers_shared.*"), *libraries):  # has the others' symbols
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        problem = reason(error)
    return (
        f"the CUDA of onnxruntime {ort.__version__} does not load ({problem}): "
        "pip install 'onnxruntime-gpu[cuda,cudnn]', or install the CUDA and cuDNN that it was built for"
    )


def explain_out_of_memory(error: Exception, bundle: Bundle) -> None:
    """Replace an error by one that says what to lower, if it says that the GPU's memory is full.

    Args:
        error: The error of a library. Nothing happens where it has another cause.
        bundle: The bundle that was loaded, or that ran.

    Raises:
        VocabtrimError: The GPU's memory is full; the message has the sizes of the weights and the KV cache.
    """
    if isinstance(error, VocabtrimError) or not _OUT_OF_MEMORY.search(str(error)):
        return
    manifest = bundle.manifest
    files = [bundle.path / name for name in (MODEL_NAME, WEIGHTS_NAME) if name in manifest.files]
    weights = sum(path.stat().st_size for path in files)
    cache = manifest.kv_bytes_per_token * manifest.context_length
    raise VocabtrimError(
        f"out of GPU memory with {bundle.path}: its weights take {weights / 1e6:,.0f} MB and its KV cache of "
        f"{manifest.context_length:,} tokens {cache / 1e6:,.0f} MB: export it with a shorter --max-length, a smaller "
        "--dtype or --quantize"
    ) from error
