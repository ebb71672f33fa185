"""TensorRT and TensorRT-RTX behind one door: how they load, where they differ, and what they log."""

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError

Flavor = Literal["tensorrt", "rtx"]
NAMES: dict[str, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_EXTRAS: dict[str, str] = {"tensorrt": "[trt]", "rtx": "[trt-rtx]"}

# The wheel that has TensorRT-RTX's shared libraries, and these, in the order that they need each other.
_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_RTX_FILES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")

_NOISE = re.compile(
    r"Make sure (input|output) \S+ has Int64 binding"  # every graph of token ids gets it
    r"|The logger passed into \w+ differs from one already registered"  # two engines in one process
)
_KEPT_LINES = 100  # of errors and of warnings


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded TensorRT. version: of the Python bindings, such as "1.7.1.116". api: the Python module."""

    flavor: Flavor
    version: str
    api: Any

    @property
    def name(self) -> str:
        return NAMES[self.flavor]


def load_library(flavor: Literal["auto", "tensorrt", "rtx"]) -> Library:
    """Import a TensorRT library. "auto": TensorRT where there is a GPU to build with, else TensorRT-RTX, if installed.

    Raises `VocabtrimError` if it is not installed or does not load.
    """
    order: tuple[Flavor, ...] = ("rtx", "tensorrt") if flavor == "auto" else (flavor,)
    if flavor == "auto" and cuda.has_device():
        order = ("tensorrt", "rtx")
    for name in order:
        library = _load_tensorrt() if name == "tensorrt" else _load_rtx()
        if library is not None:
            return library
    missing = " and ".join(NAMES[name] for name in sorted(order, reverse=True))
    extras = " or ".join(f"'vocabtrim-export{_EXTRAS[name]}'" for name in sorted(order, reverse=True))
    verb = "is" if len(order) == 1 else "are"
    raise VocabtrimError(f"{missing} {verb} not installed: pip install {extras}")


def _load_tensorrt() -> Library | None:
    api = _import("tensorrt", "tensorrt")
    if api is None:
        return None
    if not hasattr(api.ICudaEngine, "get_aliased_input_tensor"):
        raise VocabtrimError(f"TensorRT {api.__version__} has no KV cache update: install 10.15 or newer")
    return Library("tensorrt", api.__version__, api)


def _load_rtx() -> Library | None:
    """NVIDIA's own package where it is installed, else the bindings and the libraries that PyPI has apart."""
    api = _import("tensorrt_rtx", "rtx")
    if api is not None:
        return Library("rtx", api.__version__, api)
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return None
    loaded = _preload_rtx()
    api = _import("tensorrt_rtx_bindings", "rtx")
    if api is None:
        return None
    if loaded is not None:
        check_versions(api.__version__, loaded)
    return Library("rtx", api.__version__, api)


def _preload_rtx() -> str | None:
    """Load TensorRT-RTX's libraries for the bindings to find; the version, None where PyPI's wheel is not installed.

    Asking for the wheel's place runs none of its code, which would load more and write into its directory.
    """
    spec = importlib.util.find_spec(_RTX_LIBRARIES)
    if spec is None or not spec.submodule_search_locations:
        return None
    home = Path(spec.submodule_search_locations[0])
    handles = []
    for stem in _RTX_FILES:
        files = sorted(home.glob(f"{stem}.*.*.*"))
        if not files:
            raise VocabtrimError(f"{home} lacks {stem}: pip install --force-reinstall 'vocabtrim-export[trt-rtx]'")
        try:
            handles.append(ctypes.CDLL(str(files[-1]), ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise VocabtrimError(f"{files[-1]} does not load: {one_line(str(error))}") from error
    parts = ("Major", "Minor", "Patch")
    return ".".join(str(getattr(handles[0], f"getInferLib{part}Version")()) for part in parts)


def check_versions(bindings: str, libraries: str) -> None:
    """Raise `VocabtrimError` unless bindings such as "1.7.1.116" belong to libraries such as "1.7.1"."""
    if bindings.split(".")[:3] != libraries.split(".")[:3]:
        raise VocabtrimError(
            f"TensorRT-RTX's bindings are {bindings} and its libraries {libraries}, these must be equal: "
            f"pip install 'tensorrt-rtx-cu13-bindings=={'.'.join(libraries.split('.')[:3])}.*'"
        )


def _import(module: str, flavor: Flavor) -> Any | None:
    """The module, None if there is none. Raises `VocabtrimError` if there is one that does not load."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return None
        raise VocabtrimError(
            f"{NAMES[flavor]} is installed but does not load ({one_line(str(error))}): "
            f"pip install --force-reinstall 'vocabtrim-export{_EXTRAS[flavor]}'"
        ) from error


def create_network(library: Library, builder: Any) -> Any:
    """An empty network whose types are as the ONNX graph says, which TensorRT before 11 must be told."""
    strongly_typed = 0
    if library.flavor == "tensorrt" and int(library.version.split(".")[0]) < 11:
        strongly_typed = 1 << int(library.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(strongly_typed)


def create_context(library: Library, engine: Any) -> Any | None:
    """An execution context that is given its activation memory; None if the library could not make it."""
    strategy = library.api.ExecutionContextAllocationStrategy.USER_MANAGED
    if library.flavor == "tensorrt":
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # A shape's own kernels are else compiled in the background, and a CUDA graph would keep the slow general ones.
    eager = library.api.DynamicShapesKernelSpecializationStrategy.EAGER
    config.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(config)


class Log:
    """What a TensorRT library says; `make_log` makes one that it takes for its logger. Known noise is dropped."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._write = write

    def log(self, severity: Any, message: str) -> None:
        """Called by the library. severity: ILogger.Severity."""
        if _NOISE.search(message):
            return
        if int(severity) <= 2:  # 0 and 1 are errors, 2 is a warning
            lines = self.warnings if int(severity) == 2 else self.errors
            if len(lines) < _KEPT_LINES:
                lines.append(message)
        if self._write is not None:
            self._write(f"[{severity.name.lower()}] {message}")

    def reason(self) -> str:
        """The first error since the last `clear` in one line: those after it follow from it."""
        return one_line(self.errors[0]) if self.errors else "it gave no reason"

    def clear(self) -> None:
        self.errors.clear()
        self.warnings.clear()


def make_log(library: Library, write: Callable[[str], None] | None = None) -> Log:
    """A logger for everything of `library`; it must live as long. write: gets every line, as `--verbose` shows them."""
    base = library.api.ILogger

    def initialize(self: Log) -> None:
        base.__init__(self)
        Log.__init__(self, write)

    return cast(Log, type("Logger", (Log, base), {"__init__": initialize})())


def one_line(text: str) -> str:
    """At most 300 characters of `text`, without line breaks."""
    return " ".join(text.split())[:300]
