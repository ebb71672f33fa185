"""From an ONNX graph to a TensorRT plan: the shapes it is built for, the build itself, and what was built."""
