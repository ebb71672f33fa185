"""`Lowered`: a finished graph, and the bytes that one decode step of it reads."""

import math
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from engines.bundle.experts import Experts
from engines.bundle.graph_io import PAST, SLOT_WEIGHT
from engines.errors import VocabtrimError
from vocabtrim_export.lowering.embedding import GATHER_BLOCKS
from vocabtrim_export.lowering.experts import MOE, QMOE
from vocabtrim_export.lowering.graph import DecoderGraph

# inputs of which a step reads only a few rows: an embedding or remap table, rotary tables
_TABLES = {"Gather": (0,), GATHER_BLOCKS: (0, 2, 3), "GroupQueryAttention": (7, 8), "RotaryEmbedding": (1, 2)}


@dataclass(frozen=True, slots=True)
class Lowered:
    """A finished model, and the bytes of weights that one decode step reads.

    Attributes:
        model: The graph.
        weight_bytes_per_step: Bytes of all weights that one step reads.
        head_bytes: The head's share of these, its slots included.
        kv_bytes_per_token: Bytes of the KV cache for one token, in all layers.
        num_layers: Layers with a KV cache.
        num_kv_heads: Key/value heads of each.
        head_dim: Numbers in a key or value of one head.
        head_tensors: The initializers that the head reads.
        experts: The routed experts. Of their bytes a step reads only those of the experts that one token picks.
    """

    model: ir.Model
    weight_bytes_per_step: int
    head_bytes: int
    kv_bytes_per_token: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_tensors: tuple[str, ...]
    experts: tuple[Experts, ...] = ()

    @classmethod
    def of(cls, decoder: DecoderGraph, head_weights: list[str]) -> "Lowered":
        """Measure a finished graph.

        Args:
            decoder: The graph.
            head_weights: The initializers that the head reads.
        """
        caches = [value for value in decoder.graph.inputs if str(value.name).startswith(PAST)]
        heads, head_dim = _cache_form(caches)
        slots = sum(math.prod(_dims(value)) for value in decoder.graph.inputs if value.name == SLOT_WEIGHT)
        slot_bytes = slots * decoder.dtype.itemsize
        experts = _experts(decoder.graph)
        idle_bytes = sum(each.bytes - round(each.expected_bytes(1)) for each in experts)
        return cls(
            decoder.model,
            weight_bytes_per_step=_bytes_per_step(decoder.graph) - idle_bytes + slot_bytes,
            head_bytes=sum(_size(decoder.graph.initializers[name]) for name in head_weights) + slot_bytes,
            kv_bytes_per_token=len(caches) * heads * head_dim * decoder.dtype.itemsize,
            num_layers=len(caches) // 2,
            num_kv_heads=heads,
            head_dim=head_dim,
            head_tensors=tuple(head_weights),
            experts=experts,
        )


def _bytes_per_step(graph: ir.Graph) -> int:
    total = 0
    for value in graph.initializers.values():
        whole = any(use.idx not in _TABLES.get(use.node.op_type, ()) for use in value.uses())
        total += _size(value) // (1 if whole else _dims(value)[0])
    return total


def _experts(graph: ir.Graph) -> tuple[Experts, ...]:
    """Returns the weights that MoE and QMoE read, by the number of experts and how many of them a token picks."""
    sizes: Counter[tuple[int, int]] = Counter()
    for node in graph:
        if node.op_type in (MOE, QMOE):
            weights = [value for value in node.inputs[2:] if value is not None and value.is_initializer()]
            form = _dims(weights[0])[0], node.attributes["k"].as_int()
            sizes[form] += sum(map(_size, weights))
    return tuple(Experts(*form, size) for form, size in sizes.items())


def _cache_form(caches: list[ir.Value]) -> tuple[int, int]:
    """Returns the heads and the head size of the KV caches; 0 and 0 where there are none.

    They are alike in all layers of a bundle.
    """
    forms = {(shape[1], shape[3]) for shape in map(_dims, caches)} or {(0, 0)}
    if len(forms) != 1:
        raise VocabtrimError(f"the layers' KV caches differ in form ({sorted(forms)}), which bundles cannot hold")
    return forms.pop()


def _dims(value: ir.Value) -> list[int]:
    """Returns the dimensions of a value; 0 for one that is not known."""
    assert value.shape is not None
    return [dim if isinstance(dim, int) else 0 for dim in value.shape]


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes
