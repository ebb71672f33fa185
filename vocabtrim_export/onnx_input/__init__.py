"""Drafters that arrive as ONNX: their head is cut in the graph itself, without the weights that they were made of."""
