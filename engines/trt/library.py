"""TensorRT and TensorRT-RTX under one interface: loading, differences, and logs."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError

LibraryName = Literal["tensorrt", "rtx"]
NAMES: dict[str, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_EXTRAS: dict[str, str] = {"tensorrt": "[trt]", "rtx": "[trt-rtx]"}
_MODULES: dict[str, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_LEAN_MODULE = "tensorrt_lean"

_NOISE = re.compile(
    r"Make sure (input|output) \S+ has Int64 binding"  # every graph of token ids gets it
    r"|The logger passed into \w+ differs from one already registered"  # two engines in one process
)
_KEPT_LINES = 100  # of errors and of warnings


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded TensorRT.

    Attributes:
        version: The version of the Python bindings, such as "1.7.1.116".
        api: The Python module.
        lean: It is TensorRT's lean runtime, which builds and refits nothing and opens version-compatible plans of its
            own version only.
    """

    flavor: LibraryName
    version: str
    api: Any
    lean: bool = False

    @property
    def name(self) -> str:
        return f"{NAMES[self.flavor]}'s lean runtime" if self.lean else NAMES[self.flavor]


def load_library(flavor: Literal["auto", "tensorrt", "rtx"], *, to_run: bool = False) -> Library:
    """Import a TensorRT library. "auto": TensorRT where there is a GPU to build with, else TensorRT-RTX, if installed.

    Args:
        flavor: The library to import.
        to_run: Nothing will be built. TensorRT's lean runtime then does where TensorRT itself is not installed.

    Returns:
        The library.

    Raises:
        VocabtrimError: It is not installed, or it is and does not load.
    """
    order: tuple[LibraryName, ...] = ("rtx", "tensorrt") if flavor == "auto" else (flavor,)
    if flavor == "auto" and cuda.has_device():
        order = ("tensorrt", "rtx")
    for name in order:
        library = _load(name)
        if library is None and name == "tensorrt" and to_run:
            library = _load(name, lean=True)
        if library is not None:
            return library
    missing = " and ".join(NAMES[name] for name in sorted(order, reverse=True))
    extras = " or ".join(f"'vocabtrim-export{_EXTRAS[name]}'" for name in sorted(order, reverse=True))
    verb = "is" if len(order) == 1 else "are"
    raise VocabtrimError(f"{missing} {verb} not installed: pip install {extras}")


def _load(flavor: LibraryName, lean: bool = False) -> Library | None:
    module = _LEAN_MODULE if lean else _MODULES[flavor]
    try:
        api = importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return None
        extra = "[trt-lean]" if lean else _EXTRAS[flavor]
        raise VocabtrimError(
            f"{NAMES[flavor]} is installed but does not load ({one_line(str(error))}): "
            f"pip install --force-reinstall 'vocabtrim-export{extra}'"
        ) from error
    if not hasattr(api.ICudaEngine, "get_aliased_input_tensor"):
        raise VocabtrimError(f"TensorRT {api.__version__} has no KV cache update: install 10.15 or newer")
    return Library(flavor, api.__version__, api, lean)


def create_network(library: Library, builder: Any) -> Any:
    """Create an empty, strongly typed network; TensorRT before 11 must be told to keep the ONNX graph's types."""
    strongly_typed = 0
    if library.flavor == "tensorrt" and int(library.version.split(".")[0]) < 11:
        strongly_typed = 1 << int(library.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder.create_network(strongly_typed)


def create_context(library: Library, engine: Any) -> Any | None:
    """Create an execution context that is given its activation memory; None if the library could not make it."""
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
    """Collects what a TensorRT library logs, without known noise.

    `make_log` makes one that the library takes as its logger.
    """

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._write = write

    def log(self, severity: Any, message: str) -> None:
        """Take a message; the library calls this.

        Args:
            severity: ILogger.Severity.
            message: The text.
        """
        if _NOISE.search(message):
            return
        if int(severity) <= 2:  # 0 and 1 are errors, 2 is a warning
            lines = self.warnings if int(severity) == 2 else self.errors
            if len(lines) < _KEPT_LINES:
                lines.append(message)
        if self._write is not None:
            self._write(f"[{severity.name.lower()}] {message}")

    def reason(self) -> str:
        """Returns the first error since the last `clear`, in one line; later errors follow from it."""
        return one_line(self.errors[0]) if self.errors else "it gave no reason"

    def clear(self) -> None:
        self.errors.clear()
        self.warnings.clear()


def make_log(library: Library, write: Callable[[str], None] | None = None) -> Log:
    """Returns a logger for `library`, which must outlive every object that is made with it.

    Args:
        library: The library.
        write: Called with every line, which `--verbose` shows.
    """
    base = library.api.ILogger

    def initialize(self: Log) -> None:
        base.__init__(self)
        Log.__init__(self, write)

    return cast(Log, type("Logger", (Log, base), {"__init__": initialize})())


def one_line(text: str) -> str:
    """Returns `text` without line breaks, cut to 300 characters."""
    return " ".join(text.split())[:300]
