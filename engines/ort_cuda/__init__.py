"""Bundles on ONNX Runtime's CUDA, and whole rounds as one CUDA graph."""
