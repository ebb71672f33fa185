"""A KV cache in buffers of a known capacity, whose content can be written to a file and read back."""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """A layer's keys and values in buffers of a known capacity.

    `DynamicLayer` concatenates, copying the whole cache at every step (44% of the time at batch 64); `StaticLayer`
    attends over its full capacity from the first step on. Attention sees `keys[:, :, :length]`, a view.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer, self.value_buffer = (
            state.new_empty((*state.shape[:2], self.capacity, state.shape[3])) for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, heads, new, head_dim] each. Returns views of everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        return self.show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self.show()

    def show(self) -> tuple[Tensor, Tensor]:
        """Make `keys` and `values`, which attention reads, the views of everything so far, and return them."""
        keys, values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]
        self.keys, self.values = keys, values
        return keys, values


class BufferedCache(Cache):
    """A cache of buffered layers, one for each layer that the model turns out to have."""

    def __init__(self, capacity: int) -> None:
        new_layer = cast(type[DynamicLayer], partial(BufferedLayer, capacity))  # Cache only calls it
        super().__init__(layer_class_to_replicate=new_layer)

    @property
    def buffers(self) -> tuple[BufferedLayer, ...] | None:
        """The layers; None for a model with layers of another kind, whose state this module does not know."""
        layers = tuple(layer for layer in self.layers if isinstance(layer, BufferedLayer) and layer.is_initialized)
        return layers if layers and len(layers) == len(self.layers) else None

    def written(self, start: int) -> dict[str, Tensor]:
        """Returns all layers' keys and values from position `start` on, as separate tensors on the CPU."""
        parts: dict[str, Tensor] = {}
        for number, layer in enumerate(self.buffers or ()):
            for name, buffer in (("key", layer.key_buffer), ("value", layer.value_buffer)):
                parts[f"{name}.{number}"] = buffer[:, :, start : layer.length].cpu().contiguous().clone()
        return parts

    def append(self, parts: Mapping[str, Tensor], rows: Tensor, device: torch.device) -> None:
        """Keep some rows of the batch, and append keys and values to them.

        Args:
            parts: The result of `written`.
            rows: int64[n], the rows of the batch to keep; those in `parts` are these.
            device: The device of the model.
        """
        if self.layers:
            self.batch_select_indices(rows.to(device))
        for number in range(sum(name.startswith("key.") for name in parts)):
            self.update(parts[f"key.{number}"].to(device), parts[f"value.{number}"].to(device), number)
