"""From an ONNX graph to a TensorRT plan: the shapes, the build, and the description of the result."""
