"""Lowers composites to ONNX Runtime's operators: GroupQueryAttention and simplified layer norms."""

import onnx_ir as ir

from engines.bundle.graph_io import INPUT_IDS, PAST, PRESENT, SEQLENS_K, TOTAL_LENGTH, cache_names
from engines.errors import VocabtrimError
from vocabtrim_export.lowering.attention_padding import AttentionPadding
from vocabtrim_export.lowering.graph import DecoderGraph, attributes, name_of
from vocabtrim_export.lowering.nodes import CONTRIB, Nodes

_HEAD_SIZES = 8


def lower_norms(decoder: DecoderGraph) -> None:
    """Lower RMSNorm to SimplifiedLayerNormalization, or to its Skip form where a residual sum comes before it."""
    for node in decoder.composites("RMSNorm"):
        x, weight = node.inputs
        assert x is not None
        numbers = attributes(node)
        scale = weight
        if numbers["zero_centered"]:
            name = name_of(weight)
            scale = decoder.add_weight(f"{name}.plus_one", decoder.weights[name].plus(1))
        add = x.producer()
        if add is not None and add.op_type == "Add" and _same_shape(add) and x.shape is not None and len(x.shape) == 3:
            _skip_norm(decoder, node, add, scale, float(numbers["epsilon"]))
        else:
            norm = ir.node(
                "SimplifiedLayerNormalization",
                [x, scale],
                {"epsilon": float(numbers["epsilon"]), "axis": -1, "stash_type": 1},
            )
            decoder.replace(node, [norm], norm.outputs)


def _same_shape(add: ir.Node) -> bool:
    a, b = add.inputs
    return a is not None and b is not None and a.shape is not None and a.shape == b.shape


def _skip_norm(decoder: DecoderGraph, node: ir.Node, add: ir.Node, scale: ir.Value | None, epsilon: float) -> None:
    fused = ir.node(
        "SkipSimplifiedLayerNormalization", [*add.inputs, scale], {"epsilon": epsilon}, domain=CONTRIB, num_outputs=4
    )
    decoder.graph.insert_before(add, fused)
    normed, _, _, total = fused.outputs
    for unused in fused.outputs[1:3]:
        unused.name = ""
    decoder.replace(node, [], [normed])
    decoder.replace(add, [], [total])


def lower_attention(decoder: DecoderGraph, padded: bool) -> None:
    """Lower Attention to GroupQueryAttention over a cache whose past and present may be one buffer.

    Adds the inputs seqlens_k: int32[1] (tokens in the cache after this step, less one), total_sequence_length:
    int32[1], past_key_values.N.key|value: [1, kv_heads, capacity, head_dim], and the outputs present.N.key|value.

    Args:
        decoder: The graph.
        padded: Adds the input attention_padding: int64[1] as well, the rows of zeros behind those fed, which attention
            computes and nothing else; `seqlens_k` and `total_sequence_length` count them. A program that does not feed
            it gets none.

    Raises:
        VocabtrimError: ONNX Runtime has no kernel for heads of this size.
    """
    seqlens = decoder.input(SEQLENS_K, ir.DataType.INT32, [1])
    total = decoder.input(TOTAL_LENGTH, ir.DataType.INT32, [1])
    biases: dict[str, ir.Value] = {}  # for the keys so far, which all layers share
    composites = list(decoder.composites("Attention"))
    padding = AttentionPadding.before(composites[0], decoder) if padded and composites else None
    for node in composites:
        numbers = attributes(node)
        nodes = Nodes(decoder, node)
        layer, (cos, sin, sink, table) = int(numbers["layer"]), (*node.inputs[3:], None, None, None, None)[:4]
        if table is not None and name_of(table) not in biases:
            biases[name_of(table)] = _key_bias(nodes, table, total)
        if int(numbers["head_dim"]) % _HEAD_SIZES:
            raise VocabtrimError(
                f"its attention heads have {numbers['head_dim']} numbers, and ONNX Runtime's attention takes multiples "
                f"of {_HEAD_SIZES}: use --format trt, or give another model"
            )
        cache_shape: list[int | str] = [1, int(numbers["num_kv_heads"]), "capacity", int(numbers["head_dim"])]
        past = [decoder.input(name, decoder.ir_dtype, cache_shape) for name in cache_names(PAST, layer)]
        bias = None if table is None else biases[name_of(table)]
        options: dict[str, int | float] = {
            "num_heads": int(numbers["num_heads"]),
            "kv_num_heads": int(numbers["num_kv_heads"]),
            "scale": float(numbers["scale"]),
            "do_rotary": int(cos is not None),
        }
        if numbers["window"]:
            options["local_window_size"] = int(numbers["window"])
        if numbers["softcap"]:
            options["softcap"] = float(numbers["softcap"])
        inputs = [*node.inputs[:3], *past, seqlens, total, cos, sin, None, bias, sink]
        while inputs[-1] is None:
            inputs.pop()
        if padding:
            inputs[:3] = [padding.padded(nodes, value) for value in inputs[:3]]
        gqa = ir.node("GroupQueryAttention", inputs, options, domain=CONTRIB, num_outputs=3)
        last = padding.cut(nodes, gqa.outputs[0]) if padding else gqa
        decoder.replace(node, [gqa, last] if padding else [gqa], last.outputs[:1])
        for name, present in zip(cache_names(PRESENT, layer), gqa.outputs[1:], strict=True):
            decoder.output(present, name, decoder.ir_dtype, cache_shape)


def _key_bias(nodes: Nodes, table: ir.Value, total: ir.Value) -> ir.Value:
    """Returns the attention bias [1, heads, S, total] that adds to each key's logits the table's entry for its place.

    Args:
        nodes: Makes nodes.
        table: [heads, context].
        total: int32[1], the keys so far.
    """
    ids = next(value for value in nodes.decoder.graph.inputs if value.name == INPUT_IDS)
    keys = nodes("Slice", table, nodes.ints(0), nodes("Cast", total, to=int(ir.DataType.INT64)), nodes.ints(1))
    one = nodes.ints(1)
    rows = nodes("Concat", one, one, nodes("Shape", ids, start=1, end=2), one, axis=0)
    return nodes("Expand", nodes("Unsqueeze", keys, nodes.ints(0, 2)), rows)
