"""The forms that quantised weights are packed in, and the dense weights, [out, in], that they stand for."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engines.errors import VocabtrimError
from vocabtrim_export.sources import bitsandbytes_weights
from vocabtrim_export.sources.float4_weights import exponents, scaled

Parts: TypeAlias = Mapping[str, Tensor]  # the tensors of one matrix, by the last part of their names
_FP8_BLOCK = (128, 128)  # rows and columns where the configuration states none
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns that the nibbles of a number hold, from the lowest on
# What AutoRound calls GPTQ's layouts: its own zero points are stored as they are.
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2", "auto_round": "gptq_v2"}


def unpack(packed: Tensor, bits: int, axis: int) -> Tensor:
    """Unpack int32 numbers to 32 / bits numbers each along `axis`, from the lowest bits on. Returns int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    parts = (packed.unsqueeze(axis + 1) >> shifts.view(-1, *[1] * (packed.ndim - axis - 1))) & ((1 << bits) - 1)
    return parts.flatten(axis, axis + 1)


def _gptq(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise GPTQ's qweight: [in / n, out].

    There are zero points (stored less one) and scales for each group of inputs.
    """
    layout = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or parts["qweight"].dtype != torch.int32:
        kind = str(parts["qweight"].dtype).removeprefix("torch.")
        raise VocabtrimError(
            f"of GPTQ checkpoints the layouts gptq and gptq_v2 in int32 are read, this is {layout} in {kind}: give the "
            "unquantised weights"
        )
    bits = _bits(quantization.get("bits"))
    values, scales = unpack(parts["qweight"], bits, 0), parts["scales"].float()
    zeros = unpack(parts["qzeros"], bits, 1)[:, : scales.shape[1]]
    if layout == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    size = quantization.get("group_size")
    groups = parts["g_idx"].long() if "g_idx" in parts else _groups(len(values), len(scales), size)
    weight: Tensor = ((values - zeros[groups]).float() * scales[groups]).T
    return weight.contiguous()


def _awq(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise AWQ's qweight in one of its layouts."""
    version = str(quantization.get("version", "gemm")).lower()
    if quantization.get("bits", quantization.get("w_bit")) != 4 or version not in ("gemm", "gemv"):
        raise VocabtrimError("only the 4-bit GEMM and GEMV layouts of AWQ are read: give the unquantised weights")
    size = quantization.get("group_size", quantization.get("q_group_size"))
    values, zeros, scales = (_awq_rows if version == "gemv" else _awq_columns)(parts, size)
    groups = _groups(values.shape[1], scales.shape[1], size)
    return (values - zeros[:, groups]).float() * scales[:, groups]


def _awq_columns(parts: Parts, _size: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values, zero points and scales, [out, …], of GEMM: qweight is [in, out / 8], shuffled within each 8."""
    place = torch.tensor(_AWQ_ORDER).argsort()
    values, zeros = (
        unpack(parts[name], 4, 1).unflatten(1, (-1, 8))[..., place].flatten(1) for name in ("qweight", "qzeros")
    )
    return values.T.contiguous(), zeros.T, parts["scales"].float().T


def _awq_rows(parts: Parts, size: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `_awq_columns` does, of GEMV: qweight is [out, in / 8], and unused groups fill up the others."""
    values = unpack(parts["qweight"], 4, 1)
    if not isinstance(size, int):
        raise IndexError("config.json states no size of its groups")
    count = -(-values.shape[1] // size) if size > 0 else 1
    return values, unpack(parts["qzeros"], 4, 1)[:, :count], parts["scales"].float()[:, :count]


def _auto_round(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise what AutoRound writes in the layout of GPTQ, of AWQ, or of compressed-tensors' 4-bit floats."""
    packing = quantization.get("packing_format")
    if "weight_packed" in parts:
        return _compressed_float4(parts, quantization)
    if packing == "auto_round:auto_awq":
        return _awq(parts, dict(quantization) | {"version": "gemm"})
    if packing not in _AUTO_ROUND:
        raise VocabtrimError(
            f"of AutoRound's checkpoints those packed as GPTQ or AWQ are read, not {packing}: give the unquantised "
            "weights"
        )
    return _gptq(parts, dict(quantization) | {"checkpoint_format": _AUTO_ROUND[packing]})


def _modelopt(parts: Parts, _quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise ModelOpt's weight.

    It is float8 [out, in] with a scale for the tensor or for each row, or nvfp4: uint8[out, in / 2] with a scale for
    each 16 numbers, weight_scale, and one for all of them, weight_scale_2.
    """
    if parts["weight"].dtype == torch.uint8:
        return scaled(parts["weight"], parts["weight_scale"].float() * parts["weight_scale_2"].float())
    return _float8(parts, {})


def _float8(parts: Parts, _quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise weight: float8 [out, in] by weight_scale, one number or one for each row (fbgemm_fp8, Quark)."""
    return _fp8(parts, {"weight_block_size": None})


def _compressed(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise the weight of compressed-tensors.

    It is weight_packed: [out, in / n], unsigned, or weight: int8 or float8 [out, in]; the scales are [out, groups], or
    one for each block of rows and columns.
    """
    if quantization.get("transform_config"):
        raise VocabtrimError("weights that are rotated (transform_config) are not read: give the unquantised ones")
    if "weight_packed" in parts and parts["weight_packed"].dtype != torch.int32:
        return _compressed_float4(parts, quantization)
    scales = parts["weight_scale"].float()
    if "weight_packed" in parts:
        bits = _bits(_of_weights(quantization, "num_bits"))
        offset, columns = 1 << (bits - 1), int(parts["weight_shape"][1])
        values = (unpack(parts["weight_packed"], bits, 1)[:, :columns] - offset).float()
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpack(zeros, bits, 0)[: len(values)] - offset
    else:
        values, zeros = parts["weight"].float(), parts.get("weight_zero_point")
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    block = _of_weights(quantization, "block_structure")
    height, width = block if isinstance(block, list) else (None, _of_weights(quantization, "group_size"))
    rows = _groups(len(values), len(scales), height)[:, None]
    groups = _groups(values.shape[1], scales.shape[1], width)
    if "weight_g_idx" in parts and int(parts["weight_g_idx"].min()) >= 0:
        groups = parts["weight_g_idx"].long()
    shift = 0.0 if zeros is None else zeros.float().reshape(len(zeros), -1).expand_as(scales)[rows, groups]
    weight: Tensor = (values - shift) * scales[rows, groups]
    return weight


def _compressed_float4(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise weight_packed: uint8[out, in / 2] of compressed-tensors, nvfp4 or mxfp4."""
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    if packed.dtype == torch.uint8 and "weight_global_scale" in parts:
        return scaled(packed, scales.float() / parts["weight_global_scale"].float())
    if packed.dtype == torch.uint8 and scales.dtype == torch.uint8:
        return scaled(packed, exponents(scales))
    raise VocabtrimError(
        "of compressed-tensors' packed weights integers, nvfp4 and mxfp4 are read, not "
        f"{quantization.get('format', 'other numbers')}: give the unquantised weights"
    )


def _fp8(parts: Parts, quantization: Mapping[str, Any]) -> Tensor:
    """Dequantise weight: float8 [out, in] by its scale: one number, or one for each block of rows and columns.

    The scale is weight_scale_inv, or weight_scale as AutoFP8 names it; both are factors of the stored numbers.
    """
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    values, scales = parts["weight"].float(), parts[name].float()
    height, width = quantization.get("weight_block_size", _FP8_BLOCK) or (None, None)
    scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    if scales.ndim > 2 or parts["weight"].dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        kind = str(parts["weight"].dtype).removeprefix("torch.")
        raise IndexError(f"numbers of {kind} with scales {list(scales.shape)}")
    rows, columns = _groups(len(values), len(scales), height), _groups(values.shape[1], scales.shape[1], width)
    weight: Tensor = values * scales[rows[:, None], columns]
    return weight


READERS: dict[str, Callable[[Parts, Mapping[str, Any]], Tensor]] = {
    "auto-round": _auto_round,
    "awq": _awq,
    "bitsandbytes": bitsandbytes_weights.dequantize,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _float8,
    "fp8": _fp8,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "quark": _float8,
}
QUANTISED = frozenset(
    {"qweight", "weight_packed", "weight_scale", "weight_scale_inv"}
    | {bitsandbytes_weights.ABSMAX, bitsandbytes_weights.ROW_SCALES}
)
PARTS = frozenset(
    {"qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_shape", "weight_scale"}
    | {"weight_scale_2", "weight_scale_inv", "weight_global_scale", "weight_zero_point", "weight_g_idx"}
    | {"input_scale", "input_global_scale", "input_zero_point", "activation_scale"}
    | bitsandbytes_weights.PARTS
)


def _bits(bits: Any) -> int:
    if isinstance(bits, list) and bits:
        raise VocabtrimError(
            f"a checkpoint of mixed quantisation, of {bits} bits, is not read: give its unquantised weights"
        )
    if bits not in (4, 8):
        raise VocabtrimError(f"weights of {bits!r} bits are not read, only those of 4 and 8: give the unquantised ones")
    return int(bits)


def _of_weights(quantization: Mapping[str, Any], name: str) -> Any:
    """Returns the setting of compressed-tensors' groups of layers for their weights; a list where the groups differ."""
    groups = [group.get("weights") for group in quantization.get("config_groups", {}).values()]
    values = [weights.get(name) for weights in groups if weights is not None]
    return values[0] if values and all(value == values[0] for value in values) else values


def _groups(columns: int, count: int, size: Any = None) -> Tensor:
    """Returns int64[columns], the group of each input: `count` groups of `size`.

    Without a size all groups have the same, which is a power of 2: a smaller last group would leave the size open.
    """
    if not (isinstance(size, int) and size > 0 and count > 1):
        size = -(-columns // count)
        if count > 1 and (columns % count or size & (size - 1)):
            raise IndexError(f"config.json states no size for its {count} groups of {columns} numbers")
    if -(-columns // size) != count:
        raise IndexError(f"{count} groups of {size} do not make {columns}")
    groups: Tensor = torch.arange(columns) // size
    return groups
