"""Removes shape arithmetic from a graph: a decode step must not compute constants."""

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.weights import concatenate


def tidy(decoder: DecoderGraph) -> None:
    """Make the targets of reshapes constant, then drop views and transposes that undo each other."""
    _constant_reshapes(decoder)
    for node in list(decoder.graph):
        if node.op_type == "SplitToSequence" and not node.domain:
            _plain_split(decoder, node)
    IdentityEliminationPass()(decoder.model)
    for node in list(decoder.graph):
        if node.graph is not None and node.op_type in ("Reshape", "Transpose") and not node.domain:
            _cancel(node)
    RemoveUnusedNodesPass()(decoder.model)


def _constant_reshapes(decoder: DecoderGraph) -> None:
    """Make reshapes constant: -1 stands for the one unknown dimension of a shape, so no arithmetic is needed.

    A reshape of a constant list of integers, which is how the exporter writes axes, becomes a constant itself.
    """
    for node in decoder.graph:
        shape = node.outputs[0].shape
        if node.op_type != "Reshape" or node.domain:
            continue
        numbers, target = (_constant(value) for value in node.inputs)
        is_list = target is not None and target.size == 1
        if is_list and numbers is not None and numbers.dtype == ir.DataType.INT64:
            values = numbers.numpy().flatten().tolist()
            constant = decoder.constant("ints_" + "_".join(map(str, values)), values)
            node.outputs[0].replace_all_uses_with(constant)
        elif shape is not None:
            dims = [dim if isinstance(dim, int) else -1 for dim in shape]
            if dims.count(-1) <= 1:
                node.replace_input_with(1, decoder.constant("shape_" + "_".join(map(str, dims)), dims))


def _plain_split(decoder: DecoderGraph, node: ir.Node) -> None:
    """Replace SplitToSequence and the SequenceAt nodes after it by Split: TensorRT has no sequences."""
    x, split = node.inputs
    readers = [use.node for use in node.outputs[0].uses()]
    parts = [_constant(reader.inputs[1]) for reader in readers]
    sizes = _constant(split)
    axis = node.attributes["axis"].as_int()
    total = x.shape[axis] if x is not None and x.shape is not None else None
    if sizes is None or None in parts or not isinstance(total, int):
        return
    numbers = sizes.numpy()
    lengths = (
        numbers.tolist() if numbers.ndim else [min(int(numbers), total - at) for at in range(0, total, int(numbers))]
    )
    name = "split_" + "_".join(map(str, lengths))
    plain = ir.node("Split", [x, decoder.constant(name, lengths)], {"axis": axis}, num_outputs=len(lengths))
    plain.metadata_props.update(node.metadata_props)
    decoder.graph.insert_before(node, plain)
    for reader, part in zip(readers, parts, strict=True):
        assert part is not None
        decoder.replace(reader, [], [plain.outputs[int(part.numpy())]])


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


def _cancel(node: ir.Node) -> None:
    """Bypass as many of the views before `node` as leave its input unchanged."""
    value = node.outputs[0]
    source, best = value, None
    order: list[int] | None = None  # the permutation since the last plain view; None: none
    while (producer := source.producer()) is not None and producer.op_type in ("Reshape", "Transpose"):
        if producer.op_type == "Transpose":
            perm = list(producer.attributes["perm"].as_ints())
            order = perm if order is None else [perm[i] for i in order]
            order = None if order == sorted(order) else order
        elif order is not None:  # a reshape of a transposed tensor mixes its elements
            break
        source = producer.inputs[0] or source
        if order is None and source.shape == value.shape and source.shape is not None:
            best = source
    if best is not None:
        value.replace_all_uses_with(best, replace_graph_outputs=True)


def behind(value: ir.Value | None, op: str) -> ir.Node | None:
    """Returns the node `op` that computes `value`, if nothing else reads it."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    producer = value.producer()
    return producer if producer is not None and producer.op_type == op else None


def packed_name(first: str) -> str:
    """Returns the name of the joined weights of q, k and v, made from the name of q's."""
    return first.replace("q_proj", "qkv_proj") if "q_proj" in first else f"{first}.qkv"


def pack_projections(decoder: DecoderGraph) -> None:
    """Compute q, k and v by one product where all three are plain linear layers of one input.

    The composite is then Attention(qkv, -, -, …).
    """
    for node in decoder.composites("Attention"):
        linears = [behind(value, "Linear") for value in node.inputs[:3]]
        if any(linear is None or "transposed" in linear.attributes for linear in linears):
            continue
        q, k, v = (linear for linear in linears if linear is not None)
        if not (q.inputs[0] is k.inputs[0] is v.inputs[0]) or len({len(x.inputs) for x in (q, k, v)}) > 1:
            continue
        inputs: list[ir.Value | None] = [q.inputs[0]]
        for parts in zip(q.inputs[1:], k.inputs[1:], v.inputs[1:], strict=True):
            names = [name_of(part) for part in parts]
            packed = packed_name(names[0])
            inputs.append(decoder.add_weight(packed, concatenate([decoder.weights[name] for name in names])))
        linear = ir.node("Linear", inputs, domain=q.domain)
        decoder.graph.insert_before(node, linear)
        node.replace_input_with(0, linear.outputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
