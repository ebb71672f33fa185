"""In-context slots: columns of the LM head that are inputs of the graph, for tokens that the trimmed head lacks."""

import numpy as np
import onnx_ir as ir
from torch import Tensor

from engines.bundle.graph_io import SLOT_BIAS, SLOT_TOKEN_IDS, SLOT_WEIGHT
from engines.errors import VocabtrimError
from vocabtrim_export.lowering.graph import DecoderGraph, name_of
from vocabtrim_export.lowering.nodes import Nodes
from vocabtrim_export.lowering.ort_products import quantized_parts
from vocabtrim_export.lowering.quantize import BITS, Quantization, block_size
from vocabtrim_export.lowering.standard_products import dequantized_rows
from vocabtrim_export.lowering.weights import Weight

_BEHIND_A_HEAD = {"Add", "Cast", "Div", "Mul", "Sub", "Tanh"}  # operators that work element by element


def add_slots(decoder: DecoderGraph, slots: int) -> ir.Value:
    """Give the logits `slots` more columns after those of the head.

    Adds the inputs slot_weight: [hidden, slots] in the compute dtype, slot_token_ids: int64[slots], -1 where a slot is
    empty, and slot_bias: [slots] where the head has a bias. The logits of slots are computed like the head's; those of
    empty slots are -inf.

    Returns:
        slot_token_ids.

    Raises:
        VocabtrimError: The model computes something after its head that is not element by element.
    """
    (head,) = decoder.composites("Head")
    x, weight, *bias = head.inputs
    hidden = decoder.weights[name_of(weight)].shape[1]
    nodes = Nodes(decoder, head)
    values = nodes("MatMul", x, decoder.input(SLOT_WEIGHT, decoder.ir_dtype, [hidden, slots]))
    if bias and bias[0] is not None:
        values = nodes("Add", values, decoder.input(SLOT_BIAS, decoder.ir_dtype, [slots]))
    token_ids = decoder.input(SLOT_TOKEN_IDS, ir.DataType.INT64, [slots])
    logits = decoder.graph.outputs[0]
    for node in _behind(head, logits):
        inputs = [values if value is not None and not _is_number(value) else value for value in node.inputs]
        copy = ir.node(node.op_type, inputs, node.attributes)
        decoder.graph.append(copy)
        values = copy.outputs[0]
    decoder.graph.outputs[0] = _join(decoder, logits, values, token_ids)
    return token_ids


def slot_weights(
    decoder: DecoderGraph, quantization: Quantization, rows: Tensor, is_standard: bool
) -> dict[str, Weight]:
    """Returns rows of the head in the form in which the trimmed head stores its own rows.

    Args:
        decoder: The graph before the head is trimmed.
        quantization: The quantisation of the head.
        rows: The rows, int64[n].
        is_standard: The graph is one of standard operators; its quantised rows are returned dequantised.

    Returns:
        weight: [n, hidden], or quantised the parts of `quantized_parts`; and bias: [n] where the head has one.
    """
    (head,) = decoder.composites("Head")
    _, weight, *bias = head.inputs
    dense = decoder.weights[name_of(weight)].rows(rows)
    bits = BITS.get(quantization)
    if is_standard:
        parts = {"weight": dequantized_rows(dense, quantization)}
    else:
        parts = {"weight": dense} if bits is None else quantized_parts(dense, bits, block_size(bits, dense.shape[1]))
    if bias and bias[0] is not None:
        parts["bias"] = decoder.weights[name_of(bias[0])].rows(rows)
    return parts


def _join(decoder: DecoderGraph, logits: ir.Value, values: ir.Value, token_ids: ir.Value) -> ir.Value:
    """Returns the logits followed by those of the slots; the logits of empty slots are masked."""
    dtype = logits.dtype
    assert dtype is not None
    # ONNX Runtime's CUDA has no Where for bfloat16; the casts are exact
    masked_in = ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype
    zero = decoder.initializer("slot_zero", ir.Tensor(np.array(0, np.int64), name="slot_zero"))
    lowest = decoder.initializer("slot_lowest", ir.Tensor(np.array(-np.inf, masked_in.numpy()), name="slot_lowest"))

    def append(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        decoder.graph.append(node)
        return node.outputs[0]

    values = values if masked_in == dtype else append("Cast", values, to=masked_in)
    masked = append("Where", append("Less", token_ids, zero), lowest, values)
    masked = masked if masked_in == dtype else append("Cast", masked, to=dtype)
    output = append("Concat", logits, masked, axis=-1)
    output.name, logits.name = logits.name, "kept_logits"
    output.type = ir.TensorType(dtype)
    return output


def _behind(head: ir.Node, logits: ir.Value) -> list[ir.Node]:
    """Returns the nodes between the head's product and the logits, in order."""
    chain: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not head:
        computed = [each for each in node.inputs if each is not None and not _is_number(each)] if node else []
        if node is None or node.op_type not in _BEHIND_A_HEAD or len(computed) != 1:
            what = node.op_type if node else "an input"
            raise VocabtrimError(f"slots cannot follow this model's head ({what} stands behind it): leave --slots out")
        chain.append(node)
        value = computed[0]
    return chain[::-1]


def _is_number(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1
