"""The bundles of `vocabtrim bench --random-weights`."""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import VocabtrimError
from vocabtrim_export.cli.bench_options import Bundles

if TYPE_CHECKING:
    from vocabtrim_export.progress import Progress


def random_bundles(options: argparse.Namespace, stack: ExitStack, progress: "Progress") -> Bundles:
    """Create them in --bundles, or in a temporary directory that `stack` removes.

    Raises:
        VocabtrimError: The options contradict each other, or the disk cannot hold the bundles.
    """
    from vocabtrim_export.random_weights.bundles import RandomSettings, random_bundles

    if "cuda" in (options.device, options.drafter_device):
        _check_cuda(options.dtype or "fp32")
    settings = RandomSettings(
        options.random_weights,
        options.random_drafter,
        tuple(options.k) or (None,),
        options.dtype or "fp32",
        options.quantize or "none",
        options.quantize_drafter,
        options.max_length or 1024,
    )
    directory = options.bundles or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vocabtrim-")))
    written = random_bundles(settings, directory, progress)
    return Bundles(written.target, written.drafters)


def _check_cuda(dtype: str) -> None:
    """Refuse, before gigabytes are written, what the engines would refuse to load."""
    from engines.ort_cuda.provider import require_provider

    if dtype == "fp32":
        raise VocabtrimError("ONNX Runtime has no fp32 attention on CUDA: give --dtype fp16 or bf16")
    require_provider()
