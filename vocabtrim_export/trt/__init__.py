"""Build a TensorRT plan from an ONNX graph: the shapes, the build, and the description of the result."""
