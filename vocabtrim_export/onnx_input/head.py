"""Finds the LM head of a decoder that another tool exported."""

from dataclasses import dataclass

import onnx_ir as ir

from engines.bundle.graph_io import LOGITS
from engines.errors import VocabtrimError

# What may stand between the head's product and the logits; all of it works column by column.
ELEMENTWISE = frozenset(
    {"Add", "Cast", "Clip", "DequantizeLinear", "Div", "Identity", "Mul", "QuantizeLinear", "Sub", "Tanh"}
)
PRODUCTS = frozenset({"Gemm", "MatMul", "MatMulInteger", "MatMulNBits"})


@dataclass(frozen=True, slots=True)
class OnnxHead:
    """The LM head of a graph.

    Attributes:
        logits: The graph's output, [batch, sequence, vocab].
        product: The node that computes its columns.
        vocab: The number of columns.
    """

    logits: ir.Value
    product: ir.Node
    vocab: int


def find_head(model: ir.Model) -> OnnxHead:
    """Find the head of a decoder.

    Raises:
        VocabtrimError: There is no head of a known form; the message says what is there instead.
    """
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if logits is None:
        names = ", ".join(str(value.name) for value in model.graph.outputs[:4])
        raise VocabtrimError(f"no LM head: looked for an output named logits, found {names}")
    product = _product(logits)
    vocab = _columns(product)
    stated = logits.shape[-1] if logits.shape is not None and len(logits.shape) else None
    if isinstance(stated, int) and stated != vocab:
        raise VocabtrimError(f"no LM head: the last product before logits has {vocab} columns, logits have {stated}")
    return OnnxHead(logits, product, vocab)


def _product(logits: ir.Value) -> ir.Node:
    """Returns the one product with a constant before the logits, with only column-by-column operators between them."""
    products: list[ir.Node] = []
    met: list[str] = []
    pending, seen = [logits], set[ir.Node]()
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in PRODUCTS:
            products.append(node)
        elif node.op_type in ELEMENTWISE:
            pending += [value for value in node.inputs if value is not None]
        else:
            met.append(node.op_type)
    if len(products) != 1:
        what = ", ".join(sorted({node.op_type for node in products} or set(met))) or "an input of the graph"
        raise VocabtrimError(
            f"no LM head: looked for one {', '.join(sorted(PRODUCTS))} before logits, found {len(products)} ({what})"
        )
    return products[0]


def _columns(product: ir.Node) -> int:
    """Returns the number of columns that a product gives."""
    if product.op_type == "MatMulNBits":
        return int(product.attributes["N"].as_int())
    size = _size(product.inputs[1], matrix_axis(product))
    if size is None:
        raise VocabtrimError(f"no LM head: the {product.op_type} before logits multiplies with no constant matrix")
    return size


def matrix_axis(product: ir.Node) -> int:
    """Returns the axis of its second input, a matrix, that becomes the product's columns."""
    return 0 if product.op_type == "Gemm" and _int(product, "transB") else 1


def _size(value: ir.Value | None, axis: int) -> int | None:
    """Returns the size of an axis of a matrix that is constant, or unpacked from a constant; None for any other."""
    if value is None:
        return None
    stored, node = constant(value), value.producer()
    if stored is not None:
        return int(stored.shape[axis]) if len(stored.shape) == 2 else None  # type: ignore[arg-type]
    if node is not None and node.op_type == "Transpose":
        return _size(node.inputs[0], transposed(node, axis))
    if node is not None and node.op_type in ("Cast", "DequantizeLinear", "Identity"):
        return _size(node.inputs[0], axis)
    return None


def transposed(node: ir.Node, axis: int) -> int:
    """Returns the axis of a matrix that Transpose turns into `axis`."""
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else (1, 0)
    return int(order[axis])


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Returns the value of an initializer or a Constant node; None for any other."""
    node = value.producer()
    if node is None:
        return value.const_value
    return node.attributes["value"].as_tensor() if node.op_type == "Constant" and "value" in node.attributes else None


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0
