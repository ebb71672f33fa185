"""`build_plan`: an ONNX graph in, a TensorRT plan out, built by a separate process.

One kernel compilation can take a minute and cannot be interrupted. A process can be ended at any time, frees its memory
before the next plan is built, and keeps this process alive if the library aborts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from engines.cuda import runtime as cuda
from engines.errors import VocabtrimError
from engines.trt.library import NAMES, Library
from vocabtrim_export.trt.messages import raise_ended
from vocabtrim_export.trt.network import Network

_WORKER = "vocabtrim_export.trt.worker"
_TURING = "7.5"  # RTX builds for it only when asked: it has no bfloat16


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options for building a plan.

    Attributes:
        compute_capabilities: The GPUs that are to run it, such as "8.6". Empty: for TensorRT-RTX all that it knows from
            Ampere on, for TensorRT the GPU of this machine.
        strip_weights: Leave the weights out of the plan; they are read from its graph when the plan is opened.
        timing_cache: A file of kernel timings that TensorRT reads first and adds to; created if missing.
        version_compatible: TensorRT's lean runtime of the same version can open the plan, too. No runtime is packed
            into it, because opening a plan must run no code from it.
    """

    compute_capabilities: tuple[str, ...] = ()
    strip_weights: bool = False
    timing_cache: Path | None = None
    version_compatible: bool = False


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan file that was written.

    Attributes:
        size: Bytes of the file.
        seconds: The time that building it took.
        compute_capabilities: The GPUs that it is for.
        network: The parsed layers, and the kernels that were built for them.
    """

    size: int
    seconds: float
    compute_capabilities: tuple[str, ...]
    network: Network


def build_plan(
    library: Library,
    onnx_path: Path,
    plan_path: Path,
    profiles: Sequence[Mapping[str, int]],
    options: BuildOptions,
    log_write: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> BuiltPlan:
    """Parse `onnx_path`, build it strongly typed and write the plan to `plan_path`.

    Whatever happens, Ctrl-C included, the builder process is ended and no plan is left half-written.

    Args:
        library: TensorRT or TensorRT-RTX.
        onnx_path: The graph.
        plan_path: The file to write.
        profiles: One fixed shape each: the size of every dynamic dimension by its name.
        options: The options of the build.
        log_write: Called with each line that the library logs.
        progress: Called with (profiles built, profiles).

    Raises:
        VocabtrimError: Names the node and layer that cannot be parsed, or gives the library's reason.
    """
    capabilities = target_capabilities(library, options)
    request = {
        "flavor": library.flavor,
        "onnx": str(onnx_path),
        "plan": str(plan_path),
        "profiles": [dict(profile) for profile in profiles],
        "capabilities": capabilities if library.flavor == "rtx" else (),
        "strip_weights": options.strip_weights,
        "version_compatible": options.version_compatible,
        "timing_cache": str(options.timing_cache) if options.timing_cache else None,
        "verbose": log_write is not None,
    }
    progress(0, len(profiles))
    try:
        done = _run(request, log_write or (lambda _line: None), progress)
    except BaseException:
        plan_path.unlink(missing_ok=True)
        raise
    progress(len(profiles), len(profiles))
    network = Network.from_json(done["network"], str(onnx_path))
    return BuiltPlan(plan_path.stat().st_size, done["seconds"], capabilities, network)


def target_capabilities(library: Library, options: BuildOptions) -> tuple[str, ...]:
    """Returns the compute capabilities that a plan of `options` is for, ascending.

    Raises:
        VocabtrimError: `library` cannot build for them, or does not offer one of the options.
    """
    if options.version_compatible and options.strip_weights:
        raise VocabtrimError(
            "the lean runtime cannot refit a plan: give only one of --strip-weights and --version-compatible"
        )
    if library.flavor == "tensorrt":
        return _this_gpu(library, options.compute_capabilities)
    if options.timing_cache is not None:
        raise VocabtrimError("TensorRT-RTX has no timing cache: leave --timing-cache out")
    if options.version_compatible:
        raise VocabtrimError("TensorRT-RTX has no lean runtime: leave --version-compatible out")
    known = _known(library.api.ComputeCapability.__members__)
    if unknown := [asked for asked in options.compute_capabilities if asked not in known]:
        hopper = " (Hopper needs --trt-flavor tensorrt)" if "9.0" in unknown else ""
        raise VocabtrimError(
            f"{library.name} {library.version} does not build for compute capability {', '.join(unknown)}{hopper}: "
            f"it knows {', '.join(known)}"
        )
    wanted = options.compute_capabilities or [capability for capability in known if capability != _TURING]
    if options.strip_weights and not cuda.has_device():
        raise VocabtrimError(f"{library.name} needs an NVIDIA GPU to strip weights: leave --strip-weights out here")
    if options.strip_weights and len(wanted) > 1:
        raise VocabtrimError(
            f"{library.name} strips the weights of plans for one compute capability, not {len(wanted)}: "
            "give one --compute-capability"
        )
    return tuple(capability for capability in known if capability in wanted)


def member_name(capability: str) -> str:
    """Returns the name of a compute capability in TensorRT-RTX's enum: "SM86" for "8.6"."""
    return "SM" + capability.replace(".", "")


def _known(members: Mapping[str, Any]) -> list[str]:
    """Returns the compute capabilities of the enum's members, ascending, without its members NONE and CURRENT."""
    numbers = sorted(int(name[2:]) for name in members if name[:2] == "SM" and name[2:].isdecimal())
    return [f"{number // 10}.{number % 10}" for number in numbers]


def _this_gpu(library: Library, asked: Sequence[str]) -> tuple[str, ...]:
    if not cuda.has_device():
        raise VocabtrimError(
            f"{library.name} builds on the GPU that it builds for, and there is none here: "
            "take --trt-flavor rtx, or a machine with an NVIDIA GPU"
        )
    device = cuda.current_gpu()
    if others := [capability for capability in asked if capability != device.compute_capability]:
        raise VocabtrimError(
            f"{library.name} builds for this machine's {device.name} of compute capability "
            f"{device.compute_capability}, not for {', '.join(others)}: build on such a GPU, or take --trt-flavor rtx"
        )
    return (device.compute_capability,)


def _run(
    request: Mapping[str, Any], log_write: Callable[[str], None], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Let the worker do `request`. Returns its description of the finished plan."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # The pipe stays open as long as this process lives: the worker ends when it closes.
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            done = _relay(process.stdout, log_write, progress)
            process.wait()
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                stream.close()
        if done is None:
            stderr.seek(0)
            text = stderr.read().decode("utf-8", "replace")
            raise_ended(NAMES[request["flavor"]], Path(request["onnx"]).name, process.returncode, text)
        return done


def _relay(
    messages: IO[str], log_write: Callable[[str], None], progress: Callable[[int, int], None]
) -> dict[str, Any] | None:
    """Pass on the worker's reports. Returns its last one; None if it ends without one."""
    for line in messages:
        message = json.loads(line)
        match message["kind"]:
            case "log":
                log_write(message["line"])
            case "progress":
                progress(message["done"], message["total"])
            case "error":
                raise VocabtrimError(message["error"])
            case "oserror":
                raise OSError(*message["arguments"])
            case "done":
                return dict(message)
    return None
