"""Drafters that are ONNX models already: their LM head is cut in the graph, without the weights that it was made of."""
