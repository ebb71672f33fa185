"""The process that builds one plan: a request on standard input, reports as lines of JSON on standard output.

`vocabtrim_export.trt.build` starts it and says why it is a process of its own.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from engines.errors import VocabtrimError
from engines.trt.library import Library, Log, create_network, load_library, make_log
from vocabtrim_export.trt.build import member_name
from vocabtrim_export.trt.messages import build_error, parse_error
from vocabtrim_export.trt.network import Network, describe_network, parse_kernels

SendReport = Callable[..., None]
_PROFILES_PHASE = "Computing profile costs"  # the builder's name for compiling the kernels, one profile after the other


def main() -> None:
    """Do the one request and report "done" or, for a mistake of the user, "error"."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as reports:
        os.dup2(2, 1)  # the library prints some of its errors, which must not mix with the reports

        def report(kind: str, **fields: object) -> None:
            reports.write(json.dumps({"kind": kind} | fields) + "\n")
            reports.flush()

        request = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            report("done", **build(request, report))
        except VocabtrimError as error:
            report("error", error=str(error))
        except OSError as error:
            report("oserror", arguments=[error.errno, error.strerror, error.filename])


def build(request: Mapping[str, Any], report: SendReport) -> dict[str, Any]:
    """Parse, configure and build one plan; see `build_plan` for the content of `request`."""
    lines: list[str] = []

    def write(text: str) -> None:
        if ", LayerType: " in text:
            lines.extend(text.splitlines())
        if request["verbose"]:
            report("log", line=text)

    library = load_library(request["flavor"])
    log = make_log(library, write)
    builder = library.api.Builder(log)
    network = create_network(library, builder)
    onnx_path = Path(request["onnx"])
    _parse(library, network, onnx_path, log)
    config = _configure(library, builder, network, request)
    config.progress_monitor = _make_monitor(library, len(request["profiles"]), report)
    cache = Path(request["timing_cache"]) if request["timing_cache"] else None
    if cache is not None:
        load_timing_cache(config, cache)
    log.clear()
    start = time.perf_counter()
    with open(request["plan"], "wb") as file:
        writer = _make_writer(library, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise build_error(library, onnx_path, log.reason())
    seconds = time.perf_counter() - start
    if cache is not None:
        save_timing_cache(config, cache)
    described = Network(describe_network(network), parse_kernels(lines))
    return {"seconds": seconds, "network": described.to_json()}


def load_timing_cache(config: Any, path: Path) -> None:
    """Let the builder start from the timings in `path`, if the file exists.

    Raises:
        VocabtrimError: The file cannot be used.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        raise VocabtrimError(f"{path} holds no timings of this GPU and TensorRT: name another --timing-cache")


def save_timing_cache(config: Any, path: Path) -> None:
    """Write the builder's timings to `path`, together with those that another build has added meanwhile."""
    cache = config.get_timing_cache()
    if path.is_file():
        cache.combine(config.create_timing_cache(path.read_bytes()), False)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(memoryview(cache.serialize()))
    os.replace(file.name, path)


def fixed_shape(tensor: Any, sizes: Mapping[str, int], where: str) -> tuple[int, ...]:
    """Returns the shape of a network input, its dynamic dimensions looked up in `sizes` by name.

    Args:
        tensor: The input.
        sizes: The size of each dynamic dimension.
        where: The graph's name, for errors.

    Raises:
        VocabtrimError: A dimension has no size.
    """
    shape = []
    for axis, size in enumerate(tensor.shape):
        name = tensor.get_dimension_name(axis)
        if size == -1 and name not in sizes:
            raise VocabtrimError(
                f"{where} has the dynamic dimension {name or axis} in {tensor.name}, whose sizes are not given: "
                f"only {', '.join(sizes) or 'none'} can be dynamic"
            )
        shape.append(sizes[name] if size == -1 else size)
    return tuple(shape)


def _parse(library: Library, network: Any, onnx_path: Path, log: Log) -> None:
    parser = library.api.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise parse_error(library, onnx_path, parser, log.reason())


def _configure(library: Library, builder: Any, network: Any, request: Mapping[str, Any]) -> Any:
    api = library.api
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if library.flavor == "rtx":  # a plan that allocates while it runs cannot become a CUDA graph
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if request["strip_weights"]:
        config.set_flag(api.BuilderFlag.STRIP_PLAN)
    if request["version_compatible"]:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(api.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # a plan must not contain code
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for sizes in request["profiles"]:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape = fixed_shape(tensor, sizes, request["onnx"])
            if shape != tuple(tensor.shape):
                profile.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise VocabtrimError(f"{library.name} does not take the sizes {sizes} for {request['onnx']}: change them")
    if request["capabilities"]:
        config.num_compute_capabilities = len(request["capabilities"])
    for index, capability in enumerate(request["capabilities"]):
        config.set_compute_capability(api.ComputeCapability.__members__[member_name(capability)], index)
    return config


def _make_monitor(library: Library, profiles: int, report: SendReport) -> Any:
    """Returns a monitor that counts the profiles built.

    The builder has thousands of other phases, most of them short.
    """
    base: Any = library.api.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.per_profile = 1

        def phase_start(self, phase: str, _parent: str | None, steps: int) -> None:
            if phase == _PROFILES_PHASE:
                self.per_profile = max(1, steps // profiles)

        def phase_finish(self, _phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == _PROFILES_PHASE and (step + 1) % self.per_profile == 0:
                report("progress", done=min(profiles, (step + 1) // self.per_profile), total=profiles)
            return True

    return Monitor()


def _make_writer(library: Library, file: IO[bytes]) -> Any:
    """Returns a writer that takes the plan piece by piece, which saves a copy of all of it in memory."""
    base: Any = library.api.IStreamWriter

    class Writer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # such as a full disk; the library would not pass it on
                self.error = OSError(error.errno, error.strerror, file.name)
                return 0

    return Writer()


def _end_with_parent() -> None:
    """Exit when standard input ends: that is when the parent has ended, killed or not."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
