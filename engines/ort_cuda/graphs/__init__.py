"""Small ONNX graphs that run on the device between the models' calls: sampling and acceptance."""
