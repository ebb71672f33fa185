"""Weight-only quantised checkpoints, read as the dense weights that their numbers and scales stand for, exactly.

These forms are read from safetensors: `packed_weights.READERS`, and mxfp4 as gpt-oss has it. Each row of a dense
matrix equals the quantised model's row, so rows can be cut from it.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engines.errors import VocabtrimError
from vocabtrim_export.progress import BytesDone
from vocabtrim_export.sources.float4_weights import mxfp4
from vocabtrim_export.sources.mapped import Hold
from vocabtrim_export.sources.packed_weights import PARTS, QUANTISED, READERS, Parts
from vocabtrim_export.sources.weight_files import tensor_dtypes

_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_FLOATS = ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
_MXFP4 = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_INSIDE = ".weight."  # where a name goes on behind a module's weight
_PACKED_DTYPES = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)


def is_quantized(spec: str, files: Iterable[Path], quantization: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint with such a `quantization_config` holds quantised tensors.

    Args:
        spec: MODEL as the user gave it, for errors.
        files: Its .safetensors files.
        quantization: The `quantization_config` of config.json.

    Raises:
        VocabtrimError: The tensors are quantised in a form that is not read.
    """
    if not any(dtype in _PACKED for file in files for dtype in tensor_dtypes(file).values()):
        return False
    method = quantization.get("quant_method")
    if method not in (known := sorted((*READERS, _MXFP4))):
        raise VocabtrimError(
            f"{spec} is quantised by {method or 'an unnamed method'}, which is not read ({', '.join(known)} are): give "
            "its unquantised weights or a .gguf file"
        )
    return True


def check_plain(spec: str, files: Iterable[Path]) -> None:
    """Refuse integers as weights: nothing in a checkpoint without a `quantization_config` says what they stand for.

    Args:
        spec: MODEL as the user gave it, for errors.
        files: Its .safetensors files.

    Raises:
        VocabtrimError: A weight is stored as integers.
    """
    for file in files:
        for name, dtype in tensor_dtypes(file).items():
            if name.endswith(".weight") and dtype not in _FLOATS:
                raise VocabtrimError(
                    f"{spec} stores {name} as {dtype}, and its config.json has no quantization_config that says what "
                    "these numbers stand for: give its unquantised weights or a .gguf file"
                )


def dense_weights(
    files: list[Path],
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
    hold: Hold,
    progress: BytesDone,
) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, the quantised ones as dense weights, [out, in].

    Args:
        files: The .safetensors files.
        quantization: The `quantization_config` of config.json.
        dtype: The dtype of the dense weights.
        hold: The function that keeps a dense weight.
        progress: Called with (bytes of tensors read, bytes of all).

    Returns:
        The tensors by name; those that were quantised end in `weight`.

    Raises:
        VocabtrimError: The form of quantisation is not read.
    """
    method = str(quantization["quant_method"])
    dense: dict[str, Tensor] = {}
    modules = _by_module(files)
    sizes = [sum(part.nbytes for part in parts.values()) for parts in modules.values()]
    done, total = accumulate(sizes), sum(sizes)
    for module, parts in modules.items():
        packed = _packed_names(parts, method)
        for name in packed:
            dense[f"{module}.{name}"] = hold(_dense_weight(module, name, parts, quantization, dtype).to(dtype))
        used = {name + end for name in packed for end in (_BLOCKS, _SCALES)} | (PARTS if packed else frozenset())
        others = {f"{module}.{part}": parts[part] for part in parts.keys() - used}
        _check_unpacked(others, method)
        dense |= others
        progress(next(done), total)
    return dense


def _by_module(files: list[Path]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of a checkpoint, which stay in its files, by module and the end of their names.

    The end is the last part of a name, or everything from `weight` on, as in `weight.absmax`.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no dictionary)
                module, _, part = name.rpartition(".")
                if _INSIDE in name:
                    module, _, rest = name.partition(_INSIDE)
                    part = f"weight.{rest}"
                modules.setdefault(module, {})[part] = opened.get_tensor(name)
    return modules


def _packed_names(parts: Parts, method: str) -> list[str]:
    """Returns the names of the dense weights that the parts of one module stand for."""
    if method == _MXFP4:
        return [part.removesuffix(_BLOCKS) for part in parts if part.endswith(_BLOCKS)]
    return ["weight"] if QUANTISED & parts.keys() else []


def _dense_weight(module: str, name: str, parts: Parts, quantization: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Returns the dense weight `name` of a module, in `dtype` or in float32."""
    method = str(quantization["quant_method"])
    try:
        if method == _MXFP4:
            return mxfp4(parts[name + _BLOCKS], parts[name + _SCALES], dtype)
        return READERS[method](parts, quantization)
    except (KeyError, RuntimeError, IndexError) as error:
        cause = f"there is no {error.args[0]}" if isinstance(error, KeyError) else error
        raise VocabtrimError(
            f"the quantised weights of {module} are not understood: {cause}; give unquantised weights or a .gguf file"
        ) from error


def _check_unpacked(tensors: Mapping[str, Tensor], method: str) -> None:
    """Check that the tensors, which are no part of a quantised weight, are not quantised in another form.

    Raises:
        VocabtrimError: One is.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in _PACKED_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise VocabtrimError(
                f"a checkpoint of mixed quantisation is not read: {name} is {kind}, which is no part of a "
                f"weight that is quantised by {method}; give its unquantised weights or a .gguf file"
            )
