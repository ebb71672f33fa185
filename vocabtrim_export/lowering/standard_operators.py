"""Lowers composites to the standard operators of opset 24, for TensorRT; ONNX Runtime's CPU runs them as well."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.bundle.graph_io import ATTENDED_SLOTS, PAST, PRESENT, cache_names
from vocabtrim_export.lowering.graph import DecoderGraph, attributes, name_of
from vocabtrim_export.lowering.nodes import Nodes

STANDARD_OPSET = 24
_NOWHERE = 1 << 40  # a position after all others


def standard_norms(decoder: DecoderGraph) -> None:
    """Lower RMSNorm to RMSNormalization."""
    for node in decoder.composites("RMSNorm"):
        x, scale = node.inputs
        numbers = attributes(node)
        if numbers["zero_centered"]:
            name = name_of(scale)
            scale = decoder.add_weight(f"{name}.plus_one", decoder.weights[name].plus(1))
        norm = Nodes(decoder, node)("RMSNormalization", x, scale, epsilon=float(numbers["epsilon"]), axis=-1)
        decoder.replace(node, [], [norm])


@dataclass(frozen=True, slots=True)
class _Form:
    """The numbers of one Attention composite."""

    layer: int
    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int
    softcap: float

    @classmethod
    def of(cls, node: ir.Node) -> "_Form":
        numbers = attributes(node)
        layer, heads, kv_heads, size, window = (
            int(numbers[name]) for name in ("layer", "num_heads", "num_kv_heads", "head_dim", "window")
        )
        return cls(layer, heads, kv_heads, size, float(numbers["scale"]), window, float(numbers["softcap"]))


@dataclass(frozen=True, slots=True)
class CacheForm:
    """The form of a graph's KV cache.

    With one span attention reads the whole cache. With more the graph has the input attended_slots: int64[span], the
    numbers from 0 on: TensorRT refuses a cache whose size is not constant, but takes a part of it.

    Attributes:
        slots: The slots of the cache.
        spans: The numbers of slots that attention is to read; `slots` is the last.
    """

    slots: int
    spans: tuple[int, ...]


def standard_attention(decoder: DecoderGraph, form: CacheForm, positions: Sequence[ir.Value]) -> None:
    """Lower Attention to TensorScatter into a linear cache and Attention over all of it under an explicit mask.

    Adds the inputs past_key_values.N.key|value: [1, kv_heads, slots, head_dim] and the outputs present.N.key|value.
    Unrolled steps attend to the cache and to the keys of the steps before them, and the cache is written once at the
    end: TensorRT refuses updates of updates.

    Args:
        decoder: The graph.
        form: The form of the cache.
        positions: int64[1, S] of the one step of the graph, or of each step of an unrolled graph. The tokens are
            written from slot `positions[0][0, 0]` on.
    """
    layers: dict[int, list[ir.Node]] = {}
    for node in decoder.composites("Attention"):
        layers.setdefault(_Form.of(node).layer, []).append(node)
    cache = _Cache(decoder, form, positions)
    for layer, steps in sorted(layers.items()):
        numbers = _Form.of(steps[0])
        shape = [1, numbers.kv_heads, form.slots, numbers.size]
        past = [decoder.input(name, decoder.ir_dtype, shape) for name in cache_names(PAST, layer)]
        present = _lower_layer(decoder, steps, past, cache)
        for name, value in zip(cache_names(PRESENT, layer), present, strict=True):
            decoder.output(value, name, decoder.ir_dtype, shape)


class _Cache:
    """The slots that tokens are written to, and one mask of the slots they see for each step and window.

    Attributes:
        start: int64[1], the slot of the first new token.
    """

    def __init__(self, decoder: DecoderGraph, form: CacheForm, positions: Sequence[ir.Value]) -> None:
        self.decoder, self.positions = decoder, positions
        nodes = Nodes(decoder, decoder.graph[0])
        self.start = nodes("Slice", nodes("Reshape", positions[0], nodes.ints(-1)), nodes.ints(0), nodes.ints(1))
        self.span: ir.Value | None = None
        if len(form.spans) > 1:
            self.slots = decoder.input(ATTENDED_SLOTS, ir.DataType.INT64, ["span"])
            self.span = nodes("Shape", self.slots)
        else:
            self.slots = decoder.initializer("slots", ir.Tensor(np.arange(form.slots), name="slots"))
        if len(positions) > 1:  # slots after the first new token hold another sequence's keys
            self.slots = nodes("Where", nodes("Less", self.slots, self.start), self.slots, nodes.ints(_NOWHERE))
        self.masks: dict[tuple[int, int], ir.Value] = {}

    def read(self, nodes: Nodes, cache: ir.Value) -> ir.Value:
        """Returns the part of a layer's keys or values that attention reads."""
        if self.span is None:
            return cache
        return nodes("Slice", cache, nodes.ints(0), self.span, nodes.ints(2))

    def mask(self, step: int, window: int, anchor: ir.Node) -> ir.Value:
        """Returns the attention mask of a step, which layers with the same window share.

        Args:
            step: The step of an unrolled graph; 0 for any other.
            window: The tokens that attention reaches back; 0 for all.
            anchor: The node before which the mask's nodes are put when it is first asked for.
        """
        if (step, window) not in self.masks:
            self.masks[step, window] = self._mask(step, window, Nodes(self.decoder, anchor))
        return self.masks[step, window]

    def _mask(self, step: int, window: int, nodes: Nodes) -> ir.Value:
        slots = self.slots
        if len(self.positions) > 1:
            new = [nodes("Reshape", position, nodes.ints(-1)) for position in self.positions[: step + 1]]
            slots = nodes("Concat", slots, *new, axis=0)
        at = nodes("Reshape", self.positions[step], nodes.ints(1, 1, -1, 1))
        mask = nodes("LessOrEqual", slots, at)
        if window:
            mask = nodes("And", mask, nodes("Greater", slots, nodes("Sub", at, nodes.ints(window))))
        return mask


def _lower_layer(
    decoder: DecoderGraph, steps: list[ir.Node], past: Sequence[ir.Value], cache: _Cache
) -> list[ir.Value]:
    """Lower one layer's attention in all steps. Returns its updated cache, keys and values."""
    form = _Form.of(steps[0])
    unrolled = len(steps) > 1
    new: tuple[list[ir.Value], list[ir.Value]] = ([], [])
    for step, node in enumerate(steps):
        nodes = Nodes(decoder, node)
        mask = cache.mask(step, form.window, node)
        q, k, v = (
            _split_heads(nodes, x, heads, form.size)
            for x, heads in zip(node.inputs[:3], (form.heads, form.kv_heads, form.kv_heads), strict=True)
        )
        if len(node.inputs) > 3:
            q, k = (_rotate(nodes, x, node.inputs[3:5], cache.positions[step], form.size) for x in (q, k))
        new[0].append(k)
        new[1].append(v)
        if unrolled:
            seen = [nodes("Concat", cache.read(nodes, x), *parts, axis=2) for x, parts in zip(past, new, strict=True)]
        else:
            present = _write(nodes, past, (k, v), cache.start)
            seen = [cache.read(nodes, x) for x in present]
        out = _attend(nodes, form, q, seen[0], seen[1], mask)
        flat = nodes("Reshape", nodes("Transpose", out, perm=(0, 2, 1, 3)), nodes.ints(1, -1, form.heads * form.size))
        if unrolled and node is steps[-1]:
            present = _write(nodes, past, [nodes("Concat", *parts, axis=2) for parts in new], cache.start)
        decoder.replace(node, [], [flat])
    return present


def _split_heads(nodes: Nodes, x: ir.Value | None, heads: int, size: int) -> ir.Value:
    """Reshape and transpose `x` from [1, S, heads·size] to [1, heads, S, size]."""
    return nodes("Transpose", nodes("Reshape", x, nodes.ints(1, -1, heads, size)), perm=(0, 2, 1, 3))


def _rotate(nodes: Nodes, x: ir.Value, tables: Sequence[ir.Value | None], positions: ir.Value, size: int) -> ir.Value:
    cos = tables[0]
    assert cos is not None
    assert cos.shape is not None
    rotated = 2 * int(cos.shape[1])  # type: ignore[arg-type]
    partial = {} if rotated == size else {"rotary_embedding_dim": rotated}
    return nodes("RotaryEmbedding", x, *tables, positions, **partial)


def _write(nodes: Nodes, past: Sequence[ir.Value], new: Sequence[ir.Value], start: ir.Value) -> list[ir.Value]:
    return [nodes("TensorScatter", cache, x, start, axis=2, mode="linear") for cache, x in zip(past, new, strict=True)]


def _attend(nodes: Nodes, form: _Form, q: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> ir.Value:
    """Attend with `q`, [1, heads, S, size], over `keys` and `values`, [1, kv_heads, slots, size].

    Returns:
        [1, heads, S, size].
    """
    if not form.softcap:
        return nodes("Attention", q, keys, values, mask, scale=form.scale)
    # TensorRT's parser refuses Attention's softcap. Written out, the heads of a group are rows of one product.
    dtype = nodes.decoder.ir_dtype
    group = nodes.ints(1, form.kv_heads, form.heads // form.kv_heads, -1, form.size)
    keys, values = (nodes("Unsqueeze", x, nodes.ints(2)) for x in (keys, values))
    scores = nodes("MatMul", nodes("Reshape", q, group), nodes("Transpose", keys, perm=(0, 1, 2, 4, 3)))
    scores = nodes("Cast", scores, to=int(ir.DataType.FLOAT))
    scores = nodes("Mul", scores, nodes.number(form.scale / form.softcap))
    scores = nodes("Mul", nodes("Tanh", scores), nodes.number(form.softcap))
    weights = nodes("Softmax", nodes("Where", mask, scores, nodes.number(float("-inf"))), axis=-1)
    out = nodes("MatMul", nodes("Cast", weights, to=int(dtype)), values)
    return nodes("Reshape", out, nodes.ints(1, form.heads, -1, form.size))
