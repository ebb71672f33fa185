"""Small ONNX graphs that run beside the models on the device: sampling and acceptance."""
