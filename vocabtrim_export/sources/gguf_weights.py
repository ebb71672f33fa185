"""The tensors of a `.gguf` file, dequantised by the `gguf` package: many blocks at a time, on all cores."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocabtrim_export.progress import BytesDone
from vocabtrim_export.sources.gguf_header import GgufHeader
from vocabtrim_export.sources.mapped import Hold

# Numbers that are dequantised at once: the intermediate arrays stay in the cache. The package's own groups of 16 rows
# are too small for numpy to release the interpreter's lock.
_AT_ONCE = 1 << 17


def dequantize(header: GgufHeader, name: str, executor: ThreadPoolExecutor | None = None) -> NDArray[np.float32]:
    """Returns a tensor of the file in float32, of its own shape.

    Args:
        header: The file's header.
        name: The tensor's name in the file.
        executor: Threads that share the work; None: the calling thread alone.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf import dequantize as dequantize_blocks

    tensor = header.tensors[name]
    kind = GGMLQuantizationType(tensor.kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    data = np.memmap(header.path, np.uint8, "r", tensor.start, (tensor.length,)) if tensor.length else np.empty(0, "u1")
    weights = np.empty(tensor.weights, np.float32)
    step = max(1, _AT_ONCE // block)

    def part(begin: int) -> None:
        # One row is enough: blocks follow each other across the tensor's rows.
        blocks = np.asarray(data[begin * block_bytes : (begin + step) * block_bytes]).reshape(1, -1)
        weights[begin * block : (begin + step) * block] = dequantize_blocks(blocks, kind).reshape(-1)

    run = map if executor is None else executor.map
    for _ in run(part, range(0, tensor.weights // block, step)):
        pass
    return weights.reshape(tensor.shape)


def load_weights(
    header: GgufHeader, config: Any, model: Any, dtype: torch.dtype, progress: BytesDone, hold: Hold
) -> dict[str, Tensor]:
    """Dequantise the file's tensors for a model of transformers, through transformers' own names and rearrangements.

    Args:
        header: The file's header.
        config: The configuration that transformers reads of the file, before any correction, as its tensor processors
            expect it.
        model: The model that the weights are for; its parameters may be on the meta device.
        dtype: The dtype of the result.
        progress: Called with (bytes of the file read, bytes of the file).
        hold: The function that keeps a weight.

    Returns:
        All of the file's tensors, by the model's own names.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    kind: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    processor = kind(config=config)
    names = _model_names(model, processor)
    read: dict[str, Any] = {"tensors": {}}  # some processors put what they split or join here themselves
    weights: dict[str, Tensor] = read["tensors"]
    total = header.path.stat().st_size
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        for name, tensor in header.tensors.items():
            array = dequantize(header, name, executor)
            result = processor.process(array, name, tensor_key_mapping=names, parsed_parameters=read)
            if result.name in names:
                weights[names[result.name]] = hold(torch.from_numpy(np.ascontiguousarray(result.weights)).to(dtype))
            progress(tensor.start + tensor.length, total)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def _model_names(model: Any, processor: Any) -> dict[str, str]:
    """Returns the names of the model's parameters by the names in the file."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names: dict[str, str] = get_gguf_hf_weights_map(_Level(model, 1), processor)
    return names


class _Level:
    """A model as `get_gguf_hf_weights_map` looks at it: itself and its direct children.

    The function descends into every module and builds the table of all names again for each, which takes seconds.
    Names below the base model (`model.layers…` or, where a converter wrote the base model, `layers…`) are never used.
    """

    def __init__(self, module: Any, levels: int) -> None:
        self._module, self._levels = module, levels
        self.config = getattr(module, "config", None)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self._module.state_dict()  # type: ignore[no-any-return]

    def named_children(self) -> list[tuple[str, "_Level"]]:
        if not self._levels:
            return []
        return [(name, _Level(child, self._levels - 1)) for name, child in self._module.named_children()]
