"""Sets llama.cpp up: its server and its quantiser, built once from the source that llama-cpp-python's sdist carries.

    python benchmarks/peers/llama_cpp.py --output DIR [--jobs N]

The sdist, CMake and Ninja come from PyPI; a C++ compiler must be there. Flags are those of this machine's CPU. Writes
DIR/bin/llama-server, DIR/bin/llama-quantize and DIR/version.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

SDIST = "llama-cpp-python==0.3.36"
_PROGRAMS = ("llama-server", "llama-quantize")
# GCC 12 tells its optimiser that AMX reads 8 of the 64 bytes of a tile configuration, and then drops the stores of the
# others as dead: quantised models end in an illegal instruction.
_KEEP_STORES = "-fno-tree-dse -fno-dse"
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_CXX_FLAGS": _KEEP_STORES,
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers that run at the same time")
    options = parser.parse_args()
    build_programs(options.output, options.jobs)


def build_programs(output: Path, jobs: int) -> None:
    """Download, build and install the programs, unless they are there."""
    if all((output / "bin" / name).exists() for name in _PROGRAMS):
        return
    output.mkdir(parents=True, exist_ok=True)
    tools = output / "tools"
    _run(sys.executable, "-m", "venv", str(tools))
    _run(str(tools / "bin" / "pip"), "install", "--quiet", "cmake", "ninja")
    source, build = _source(output), output / "build"
    environment = os.environ | {"PATH": f"{(tools / 'bin').absolute()}{os.pathsep}{os.environ['PATH']}"}
    settings = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    _run("cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *settings, environment=environment)
    targets = [argument for name in _PROGRAMS for argument in ("--target", name)]
    _run("cmake", "--build", str(build), *targets, f"-j{jobs}", environment=environment)
    (output / "bin").mkdir(exist_ok=True)
    for name in _PROGRAMS:
        shutil.copy2(build / "bin" / name, output / "bin" / name)
    (output / "version.json").write_text(json.dumps(_version(output, source), indent=1) + "\n", "utf-8")


def version(directory: Path) -> dict[str, str]:
    """Returns what `build_programs` recorded in a directory: the sdist, the commit of llama.cpp and its own words."""
    recorded: dict[str, str] = json.loads((directory / "version.json").read_text("utf-8"))
    return recorded


def _source(output: Path) -> Path:
    """Returns the directory of llama.cpp's source, downloaded unless it is there."""
    if not list(output.glob("llama_cpp_python-*/vendor/llama.cpp")):
        command = ("download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python")
        if not list(output.glob("llama_cpp_python-*.tar.gz")):
            _run(str(output / "tools" / "bin" / "pip"), *command, "--dest", str(output), SDIST)
        with tarfile.open(next(output.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(output, filter="data")
    return next(output.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _version(output: Path, source: Path) -> dict[str, str]:
    line = (source.parents[1] / "CHANGELOG.md").read_text("utf-8").split("ggml-org/llama.cpp@", 1)
    own = subprocess.run([output / "bin" / _PROGRAMS[0], "--version"], capture_output=True, text=True, check=True)
    return {
        "sdist": SDIST,
        "llama.cpp": line[1].split()[0] if len(line) == 2 else "unknown",
        "compiler": (own.stdout + own.stderr).strip().splitlines()[-1],
    }


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    """Run a command that may take minutes. Its output is shown, and a failure ends this program with its status."""
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise SystemExit(f"{_shown(command)} ended with {status}")


def _shown(command: Sequence[str]) -> str:
    return " ".join(command[:4])


if __name__ == "__main__":
    main()
