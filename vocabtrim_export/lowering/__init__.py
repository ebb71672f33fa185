"""Lowers traced graphs of composite operators to the ONNX graphs that ONNX Runtime and TensorRT run."""
