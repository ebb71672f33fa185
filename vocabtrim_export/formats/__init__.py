"""The formats that an export writes in addition to its bundles, for programs that do not read bundles.

A format is a module in this folder with `write(exported, directory)`, which fills an empty directory, and an entry in
`FORMATS`. This module imports little: the command line reads the names of the formats to answer `--help`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import VocabtrimError

if TYPE_CHECKING:
    from vocabtrim_export.formats.exported import Exported


@dataclass(frozen=True, slots=True)
class Format:
    """A format: the module that writes it, and its requirements.

    Attributes:
        module: The module in this folder that writes it.
        needs_target: It holds both models.
        needs_graph: It is derived from the graphs of `--format onnx`.
        has_bf16: Its program also runs graphs in bf16.
        drafters: The kinds of drafters that it can hold.
        packages: Packages that must be installed to write it; the extra of the same name installs them.
    """

    module: str
    needs_target: bool = False
    needs_graph: bool = False
    has_bf16: bool = True
    drafters: tuple[str, ...] = ("language-model",)
    packages: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "eagle3": Format("eagle3", needs_target=True, drafters=("eagle3",)),
    "genai": Format("genai", needs_target=True, needs_graph=True, has_bf16=False),
    "hf": Format("hf"),
    "openvino": Format(
        "openvino", needs_target=True, needs_graph=True, has_bf16=False, packages=("openvino", "openvino_tokenizers")
    ),
    "sglang-token-map": Format("sglang", drafters=("language-model", "eagle")),
    "triton": Format("triton", needs_graph=True),
}


def check_formats(names: Sequence[str], has_target: bool, is_tensorrt: bool, drafter: str, dtype: str) -> None:
    """Check, before the long work, that the formats can be written.

    Args:
        names: The formats.
        has_target: A target is exported, too.
        is_tensorrt: The bundles are of `--format trt`.
        drafter: The drafter's kind.
        dtype: The bundles' dtype.

    Raises:
        VocabtrimError: A format is unknown, cannot hold this export, or needs a package that is not installed.
    """
    for name in names:
        if name not in FORMATS:
            raise VocabtrimError(f"--format {name} is unknown: choose from onnx, trt, {', '.join(FORMATS)}")
        needs = FORMATS[name]
        if drafter not in needs.drafters:
            kinds = " or ".join(needs.drafters)
            raise VocabtrimError(f"--format {name} is for drafters of the kind {kinds}, and this one is of {drafter}")
        if needs.needs_target and not has_target:
            raise VocabtrimError(f"--format {name} holds drafter and target: give --target as well")
        if needs.needs_graph and is_tensorrt:
            raise VocabtrimError(f"--format {name} is made of the graphs of --format onnx: export it without trt")
        if dtype == "bf16" and not needs.has_bf16:
            raise VocabtrimError(
                f"--format {name} runs on the CPU, which has no bf16 products: give --dtype fp32 or fp16"
            )
        if absent := [package for package in needs.packages if importlib.util.find_spec(package) is None]:
            raise VocabtrimError(f"--format {name} needs {absent[0]}: pip install 'vocabtrim-export[{name}]'")


def write_formats(
    directories: Mapping[str, Path], exported: "Exported", progress: Callable[[str, int, int], None]
) -> None:
    """Write each format into its empty directory.

    Args:
        directories: The directories by the formats' names.
        exported: The bundles and models.
        progress: Called with (task, done, total).

    Raises:
        VocabtrimError: A format cannot hold this export.
    """
    from vocabtrim_export.formats.exported import write_mark

    for name, directory in directories.items():
        module = importlib.import_module(f"{__name__}.{FORMATS[name].module}")
        progress(f"convert to {name}", 0, 1)
        module.write(exported, directory)
        write_mark(exported, directory, name)
        progress(f"convert to {name}", 1, 1)
