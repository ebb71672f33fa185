"""Checks a checkpoint that stores each expert's matrices separately, before any weight is read."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engines.errors import VocabtrimError
from vocabtrim_export.sources.mapped import check_room
from vocabtrim_export.sources.weight_files import tensor_shapes, tensor_sizes

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")


def check_experts(spec: str, files: Sequence[Path]) -> None:
    """Refuse a checkpoint whose experts cannot be stacked.

    Args:
        spec: MODEL as the user gave it, for errors.
        files: Its .safetensors files, whose headers alone are read.

    Raises:
        VocabtrimError: A tensor of some expert is missing, or has another shape than the other experts'.
    """
    shapes: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    for file in files:
        for name, shape in tensor_shapes(file).items():
            if match := _EXPERT.fullmatch(name):
                shapes.setdefault((match[1], match[3]), {})[int(match[2])] = shape
    counts: Counter[str] = Counter()
    for (layer, _), by_expert in shapes.items():
        counts[layer] = max(counts[layer], *(index + 1 for index in by_expert))
    for (layer, part), by_expert in sorted(shapes.items()):
        usual = Counter(by_expert.values()).most_common(1)[0][0]
        for index in range(counts[layer]):
            name = f"{layer}.{index}.{part}"
            if index not in by_expert:
                raise VocabtrimError(f"{spec} is not whole: {name} is missing; download its weights again")
            if by_expert[index] != usual:
                raise VocabtrimError(
                    f"{spec} is damaged: {name} has the shape {list(by_expert[index])}, the other experts have "
                    f"{list(usual)}; download its weights again"
                )


def check_room_for_experts(spec: str, files: Sequence[Path], scratch: Path | None) -> None:
    """Refuse a checkpoint whose experts, stacked into files of `scratch`, would not fit on its disk.

    Args:
        spec: MODEL as the user gave it, for errors.
        files: Its .safetensors files, whose headers alone are read.
        scratch: The directory of the stacked experts; without one they are in memory.

    Raises:
        VocabtrimError: Less is free than they need.
    """
    sizes = (item for file in files for item in tensor_sizes(file).items())
    needed = sum(size for name, size in sizes if _EXPERT.fullmatch(name))
    if scratch is not None and needed:
        check_room(scratch, needed, f"{spec}, its experts stacked,")
