"""Drafters that are ONNX models already: their LM head is cut in the graph, without the original weights."""
