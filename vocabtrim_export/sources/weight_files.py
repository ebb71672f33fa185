"""Checks of weight files before they are opened: pickles are refused, and sizes are read from the headers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.typed_json import decode, parse, read
from engines.errors import VocabtrimError
from vocabtrim_export.sources.gguf_header import check_gguf

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers' names, the first one wins
_MOST_DIMENSIONS = 16
_MOST_HEADER = 100 << 20  # bytes; what the safetensors library itself allows


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor, as the header of a .safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


def pickled(path: Path) -> VocabtrimError:
    """Returns the error for a pickle checkpoint; it says how to convert it."""
    directory = path.parent
    return VocabtrimError(
        f"{path} is a pickle checkpoint, which can run code when opened: take a release with .safetensors, or convert "
        'it on a machine that has nothing to lose: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}', weights_only=True).save_pretrained('{directory}-safetensors')\", "
        "and copy the tokenizer's files"
    )


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the .safetensors files of the model in a directory, those that transformers takes.

    Other files next to them, such as a backup or the same weights in another layout, are no part of the model. Where
    transformers would find none, all but adapters are returned.

    Raises:
        VocabtrimError: The model's index is not valid, names a file elsewhere, or one that is missing.
    """
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("adapter_"))
    index = read(directory / _INDEX)
    shards = decode(Mapping[str, str], index.get("weight_map") if isinstance(index, dict) else None, _INDEX)
    if odd := next((name for name in shards.values() if Path(name).name != name), None):
        raise VocabtrimError(
            f"{directory / _INDEX} names {odd!r}, which is no file of that directory: download it again"
        )
    files = sorted({directory / name for name in shards.values()})
    if missing := next((file for file in files if not file.is_file()), None):
        raise VocabtrimError(
            f"{directory} is not whole: {missing.name}, which {_INDEX} names, is missing; download its weights again"
        )
    return files


def count_weights(path: Path) -> int:
    """Returns how many numbers a weight file holds, by its header alone.

    Raises:
        VocabtrimError: The header is not valid.
    """
    if path.suffix == ".gguf":
        return check_gguf(path)
    return sum(map(math.prod, tensor_shapes(path).values()))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of a .safetensors file, by its header alone.

    Raises:
        VocabtrimError: The header is not valid.
    """
    return {name: entry.shape for name, entry in _entries(path).items()}


def tensor_sizes(path: Path) -> dict[str, int]:
    """Returns the bytes of the tensors of a .safetensors file, by its header alone.

    Raises:
        VocabtrimError: The header is not valid.
    """
    return {name: entry.data_offsets[1] - entry.data_offsets[0] for name, entry in _entries(path).items()}


def tensor_dtypes(path: Path) -> dict[str, str]:
    """Returns the dtypes of the tensors of a .safetensors file, as the file spells them, by its header alone.

    Raises:
        VocabtrimError: The header is not valid.
    """
    return {name: entry.dtype for name, entry in _entries(path).items()}


def _entries(path: Path) -> Mapping[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise VocabtrimError(f"cannot load {path}: it is cut short or no .safetensors file; fetch it again")
        data = file.read(length)
    try:
        header = parse(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise VocabtrimError(f"cannot load {path}: its header is no .safetensors header; fetch it again") from error
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    entries: Mapping[str, _Entry] = decode(Mapping[str, _Entry], header, f"cannot load {path}: its header")
    if any(len(entry.shape) > _MOST_DIMENSIONS or len(entry.data_offsets) != 2 for entry in entries.values()):
        raise VocabtrimError(f"cannot load {path}: its header is no .safetensors header; fetch it again")
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise VocabtrimError(
            f"cannot load {path}: it has {size} bytes, its header says {8 + length + end}; fetch it again"
        )
    return entries
