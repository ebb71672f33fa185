"""A masked graph (see `masked`) as an OpenVINO model in the form that OpenVINO GenAI's pipelines rewrite and run.

They want standard attention over a KV cache that is the graph's state, any batch size, and positions as an input.
OpenVINO reads and runs `GroupQueryAttention`, which does this inside, but cannot read it back from its own files.
"""

from typing import Any

import numpy as np
from openvino import Model, PartialShape, opset6, opset14

from engines.bundle.graph_io import INPUT_IDS, LOGITS, PAST, POSITION_IDS

_ATTENTION = "GroupQueryAttention"


def stateful(model: Any) -> Any:
    """Returns the model with attention written out and its KV cache as state.

    Its inputs are input_ids, attention_mask: int64[batch, length]; position_ids: int64[batch, S]; beam_idx:
    int32[batch], the rows of the state that are continued. Its output is logits: float32[batch, S, width].

    Args:
        model: The model that OpenVINO read; it is changed in place.
    """
    inputs = {port.get_any_name(): port.get_node() for port in model.inputs}
    caches = [node for name, node in inputs.items() if name.startswith(PAST)]
    for name in (INPUT_IDS, "attention_mask", POSITION_IDS):
        if name not in inputs:
            inputs[name] = _input(name, np.int64, [-1, -1])
        inputs[name].set_partial_shape(PartialShape([-1, -1]))
    state = _State(inputs[INPUT_IDS], inputs["attention_mask"], inputs[POSITION_IDS])
    for node in model.get_ordered_ops():
        if node.get_type_name() == _ATTENTION:
            node.output(0).replace(state.attention(node).output(0))
    logits = next(port.get_node() for port in model.outputs if LOGITS in port.get_names())
    _as_float(logits)
    kept = [node for node in inputs.values() if node not in caches]
    return Model([logits], state.written, [*kept, state.beam], "decoder")


class _State:
    """Attention over a KV cache that is state.

    Attributes:
        written: The nodes that write each layer's keys and values.
    """

    def __init__(self, ids: Any, mask: Any, positions: Any) -> None:
        self.positions = positions
        self.beam = _input("beam_idx", np.int32, [-1])
        self.batch = _sizes(ids, 0)
        self.mask = _seen(ids, mask)
        self.written: list[Any] = []

    def attention(self, node: Any) -> Any:
        """Returns the output of one GroupQueryAttention, [batch, S, heads·size]."""
        numbers = node.get_attributes()
        q, k, v, *past = node.input_values()[:5]
        size = q.get_partial_shape()[3].get_length()
        if numbers["do_rotary"]:
            q, k = (self._rotated(x, node.input_values()[7:9], size) for x in (q, k))
        heads, kv_heads = numbers["num_heads"], numbers["kv_num_heads"]
        keys, values = (
            _repeated(self._extended(cache, new, kv_heads, size), heads, kv_heads, size)
            for cache, new in zip(past, (k, v), strict=True)
        )
        scale = opset14.constant(np.array(numbers["scale"], q.get_element_type().to_dtype()))
        out = opset14.scaled_dot_product_attention(q, keys, values, self.mask, scale)
        return opset14.reshape(opset14.transpose(out, _ints(0, 2, 1, 3)), _ints(0, 0, heads * size), True)

    def _extended(self, cache: Any, new: Any, kv_heads: int, size: int) -> Any:
        """Returns the layer's keys or values with the new ones appended, [batch, kv_heads, total, size].

        The state starts empty.
        """
        name, dtype = cache.get_any_name(), cache.get_element_type()
        shape = opset14.concat([self.batch, _ints(kv_heads, 0, size)], 0)
        empty = opset14.broadcast(opset14.constant(np.zeros((), dtype.to_dtype())), shape)
        read = opset6.read_value(empty, name, dtype, PartialShape([-1, kv_heads, -1, size]))
        extended = opset14.concat([opset14.gather(read, self.beam, _int(0)), new], 2)
        self.written.append(opset6.assign(extended, name))
        return extended

    def _rotated(self, x: Any, tables: Any, size: int) -> Any:
        """Rotate the first dimensions of each head by the cos and sin of their positions; the other dimensions stay."""
        cos, sin = (opset14.unsqueeze(opset14.gather(t, self.positions, _int(0)), _int(1)) for t in tables)
        half = cos.output(0).get_partial_shape()[3].get_length()
        sizes = [half, half] + ([size - 2 * half] if size > 2 * half else [])
        first, second, *rest = opset14.variadic_split(x, _int(3), _ints(*sizes)).outputs()
        turned = [
            opset14.subtract(opset14.multiply(first, cos), opset14.multiply(second, sin)),
            opset14.add(opset14.multiply(second, cos), opset14.multiply(first, sin)),
        ]
        return opset14.concat([*turned, *rest], 3)


def _as_float(logits: Any) -> None:
    """Convert the logits to float32, which GenAI reads, whatever the products are computed in."""
    wide = opset14.convert(logits.input_value(0), "f32")
    logits.input(0).replace_source_output(wide.output(0))
    wide.output(0).get_tensor().set_names({LOGITS})


def _seen(ids: Any, mask: Any) -> Any:
    """Returns bool[batch, 1, S, total]: a token sees the keys up to its own that the mask keeps, and its own.

    Padding must see at least itself: attention over no keys would be NaN, and NaN stays NaN in sums with a weight of 0.
    """
    total, fed = (opset14.squeeze(_sizes(x, 1), _int(0)) for x in (mask, ids))
    keys = opset14.range(_int(0), total, _int(1), "i64")
    tokens = opset14.range(opset14.subtract(total, fed), total, _int(1), "i64")
    tokens = opset14.unsqueeze(tokens, _int(1))
    there = opset14.not_equal(opset14.unsqueeze(mask, _ints(1, 2)), _int(0))
    return opset14.logical_or(opset14.logical_and(there, opset14.less(keys, tokens)), opset14.equal(keys, tokens))


def _repeated(x: Any, heads: int, kv_heads: int, size: int) -> Any:
    """Repeat each key/value head for every head of its group.

    [batch, kv_heads, total, size] → [batch, heads, total, size].
    """
    if heads == kv_heads:
        return x
    shape = opset14.concat([_sizes(x, 0, 1), _ints(heads // kv_heads), _sizes(x, 2, 3)], 0)
    spread = opset14.broadcast(opset14.unsqueeze(x, _int(2)), shape)
    return opset14.reshape(spread, _ints(0, heads, -1, size), True)


def _input(name: str, dtype: Any, shape: list[int]) -> Any:
    parameter = opset14.parameter(shape, dtype, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _sizes(x: Any, *axes: int) -> Any:
    """Returns int64[len(axes)]: the sizes of `x` along `axes`."""
    return opset14.gather(opset14.shape_of(x), _ints(*axes), _int(0))


def _ints(*values: int) -> Any:
    return opset14.constant(np.array(values, np.int64))


def _int(value: int) -> Any:
    return opset14.constant(np.array(value, np.int64))
