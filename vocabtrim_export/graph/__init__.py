"""The ONNX graph: passes from composites to what ONNX Runtime and TensorRT run."""
